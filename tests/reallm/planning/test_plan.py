"""`plan`: a preset allows the formats of one method, of those that were measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategies import make_table

from reallm.errors import UserError
from reallm.measurement.search_space import PRESETS
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.records import write_record
from reallm.planning.plan import plan

COSTS = {"uint4-g64+ldl": 0.1, "uint2-g64+ldl": 0.9, "tq4-l12+ldl2+rot": 0.01, "int8-g64": 0.001}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_record(tmp_path / TABLE_FILE, make_table(("blocks.0.q", 64, 128, "linear", COSTS)))
    return tmp_path


def test_a_preset_allows_its_own_formats_only(work: Path) -> None:
    assert plan(work, budget="5bpw").choices[0].format == "tq4-l12+ldl2+rot"
    assert plan(work, budget="5bpw", preset="gptq").choices[0].format == "uint4-g64+ldl"


def test_an_unknown_or_unmeasured_preset_names_the_way_out(work: Path) -> None:
    with pytest.raises(UserError, match=r"--preset gtpq: no such preset; there are .*gptq"):
        plan(work, budget="5bpw", preset="gtpq")
    with pytest.raises(UserError, match=r"none of its formats was measured .*reallm measure tiny -o .* --space qtip"):
        plan(work, budget="5bpw", preset="qtip")  # although int8-g64, its embedding's, was


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reaches_from_few_bits_to_many(preset: str) -> None:
    assert len(set(PRESETS[preset][0])) == len(PRESETS[preset][0]) >= 1
    assert PRESETS[preset][1]
