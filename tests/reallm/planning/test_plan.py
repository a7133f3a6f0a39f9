"""`plan`: a preset allows the measured formats of one method; options and keywords say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategies import make_table

from reallm.errors import UserError
from reallm.measurement.search_space import PRESETS
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.records import write_record
from reallm.planning.plan import best_plans, diff, explain, next_mib, plan, sweep

COSTS = {"uint4-g64+ldl": 0.1, "uint2-g64+ldl": 0.9, "tq4-l12+ldl2+rot": 0.01, "int8-g64": 0.001}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_record(tmp_path / TABLE_FILE, make_table(("blocks.0.q", 64, 128, "linear", COSTS)))
    return tmp_path


def test_a_preset_allows_its_own_formats_only(work: Path) -> None:
    assert plan(work, budget="5bpw").choices[0].format == "tq4-l12+ldl2+rot"
    assert plan(work, budget="5bpw", preset="gptq").choices[0].format == "uint4-g64+ldl"


def test_an_unknown_or_unmeasured_preset_names_the_way_out(work: Path) -> None:
    with pytest.raises(UserError, match=r"--preset gtpq: unknown preset; expected one of .*gptq"):
        plan(work, budget="5bpw", preset="gtpq")
    with pytest.raises(UserError, match=r"none of its formats was measured .*reallm measure tiny -o .* --space qtip"):
        plan(work, budget="5bpw", preset="qtip")  # although int8-g64, the format of its embedding, was measured


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reaches_from_few_bits_to_many(preset: str) -> None:
    assert len(set(PRESETS[preset][0])) == len(PRESETS[preset][0]) >= 1
    assert PRESETS[preset][1] or preset in ("vllm", "sglang")  # these engines keep embedding and head as they are


def test_options_and_keywords_give_the_same_plan_file(work: Path) -> None:
    plan(work, budget="9bpw", output=work / "keywords.json", pins=[".q=int8-g64"], ties="family", cost="guided")
    options = PlanOptions(pins=(".q=int8-g64",), ties="family", cost="guided")
    plan(work, budget="9bpw", output=work / "options.json", options=options)
    assert (work / "keywords.json").read_bytes() == (work / "options.json").read_bytes()


def test_a_keyword_takes_the_place_of_the_option(work: Path) -> None:
    options = PlanOptions(formats=("uint2*",), preset="gptq", exclude=("nothing",))
    result = plan(work, budget="9bpw", options=options, preset=None, exclude=(), formats=["int8-g64"])
    assert result.choices[0].format == "int8-g64" and (result.formats, result.exclude) == (("int8-g64",), ())
    with pytest.raises(TypeError, match="no_such_option"):
        plan(work, budget="9bpw", no_such_option=1)  # type: ignore[call-arg]  # that is the point


def test_every_function_resolves_presets_and_targets(work: Path) -> None:
    options = PlanOptions(preset="gptq", target="cpu")
    chosen = plan(work, budget="5bpw", options=options)
    assert set(chosen.formats or ()) <= {"uint4-g64+ldl", "uint2-g64+ldl", "int8-g64"}
    assert best_plans(work, budget="5bpw", count=2, options=options)[0] == chosen
    (point, _) = sweep(work, first="5bpw", last="6bpw", points=2, options=options)
    assert point.predicted_loss == chosen.predicted_loss


def test_plans_are_explained_and_compared_from_their_files(work: Path) -> None:
    small, large = work / "small.json", work / "large.json"
    plan(work, budget="3.5bpw", output=small)
    plan(work, budget="9bpw", output=large)
    (change,) = diff(small, large)
    assert (change.matrix, change.before, change.after) == ("blocks.0.q", "uint2-g64+ldl", "int8-g64")
    assert {a.format for a in explain(small, "q$")} == {*COSTS, "bf16"}
    current, richer = next_mib(small, work)
    assert current.choices[0].format == change.before and richer.predicted_loss == 0
