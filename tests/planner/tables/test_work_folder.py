"""The tables of a work folder: the newest one is planned from, and a plan finds the one that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategies import make_table

from reallm.planner.results.allocate import solve
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import RecordError, write_record
from reallm.planner.tables.units import PlanError
from reallm.planner.tables.work_folder import (
    EARLIER_FOLDER,
    described,
    find_table,
    folder_of,
    keep_earlier,
    read_table,
    recorded_places,
    table_of,
    tables_in,
)


def table_with(seed: int, cost: float = 0.1) -> MeasuredTable:
    table = make_table(("up", 64, 64, "linear", {"int4-g64": cost, "int8-g64": cost / 100}))
    return table.model_copy(update={"settings": {"seed": seed, "nsamples": 4, "seqlen": 8, "identity": str(seed)}})


def put(work: Path, table: MeasuredTable) -> None:
    """Write `table` as the newest one, as `measure` does."""
    keep_earlier(work, table)
    write_record(work / TABLE_FILE, table)


def plan_from(table: MeasuredTable, work: str) -> Plan:
    return solve(table, "5bpw", work=work)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with three tables, the last one of seed 3."""
    for seed in (1, 2, 3):
        put(tmp_path / "work", table_with(seed, cost=0.1 * seed))
    return tmp_path / "work"


def test_every_replaced_table_stays_and_its_plan_finds_it(work: Path) -> None:
    assert read_table(work) == table_with(3, cost=0.1 * 3)
    assert len(list((work / EARLIER_FOLDER).iterdir())) == 2
    for seed in (1, 2, 3):
        table = table_with(seed, cost=0.1 * seed)
        plan = plan_from(table, str(work))
        assert table_of(plan) == table
        assert read_table(find_table(plan)) == table and folder_of(find_table(plan)) == work


def test_a_table_that_is_measured_again_is_listed_once(work: Path) -> None:
    put(work, table_with(1, cost=0.1))
    assert [table.settings["seed"] for _, table in tables_in(work)] == [1, 3, 2]
    before = sorted(work.rglob("*.json"))
    put(work, table_with(1, cost=0.1))  # nothing new: nothing to keep
    assert sorted(work.rglob("*.json")) == before


def test_tables_that_cannot_be_read_are_left_out(work: Path) -> None:
    next((work / EARLIER_FOLDER).iterdir()).write_text("{}")
    assert len(list(tables_in(work))) == 2
    (work / TABLE_FILE).write_text("{}")
    assert len(list(tables_in(work))) == 1
    with pytest.raises(RecordError, match="not what `reallm measure` writes"):
        read_table(work)
    kept = keep_earlier(work, table_with(9))
    assert kept is not None and kept[1] is None and kept[0].read_text() == "{}" and not (work / TABLE_FILE).exists()
    assert keep_earlier(work, table_with(9)) is None


def test_a_table_is_described_by_its_settings() -> None:
    table = table_with(7)
    assert described(table) == "4 windows of 8 tokens of text, seed 7"
    more = table.model_copy(update={"settings": {**table.settings, "prefix": "out", "chat_template": True}})
    assert described(more) == "4 windows of 8 tokens of text, seed 7, chat template, inputs of out"


def test_a_relative_work_folder_is_found_from_anywhere(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan lies beside the work folder, in a folder below, or inside an artifact; the command runs elsewhere."""
    plan, elsewhere = plan_from(table_with(1, cost=0.1), "work"), tmp_path / "elsewhere"
    put(elsewhere / "work", table_with(8))  # a work folder of the same name that is not the plan's
    monkeypatch.chdir(elsewhere)
    for place in (tmp_path / "plan.json", tmp_path / "plans" / "a.json", tmp_path / "out"):
        assert table_of(plan, place) == table_with(1, cost=0.1), place
    with pytest.raises(PlanError, match="from another measured table than those in work"):
        table_of(plan)


def test_what_is_missing_is_said_with_the_option_that_names_it(work: Path, tmp_path: Path) -> None:
    plan = plan_from(table_with(1, cost=0.1), str(tmp_path / "gone"))
    with pytest.raises(
        RecordError, match=r"gone, which does not exist here or .*; if it has moved, name it with --work"
    ):
        table_of(plan)
    (tmp_path / "gone").mkdir()
    with pytest.raises(RecordError, match=r"gone, which holds no table\.json; .* --work"):
        table_of(plan)
    assert table_of(plan, work=work) == table_with(1, cost=0.1)
    assert table_of(plan, work=work / TABLE_FILE) == table_with(1, cost=0.1)  # the folder of a file is searched
    with pytest.raises(PlanError, match=f"than those in {work}; .* --work"):
        table_of(plan_from(table_with(5), str(work)))
    with pytest.raises(RecordError, match="`reallm measure` makes it"):
        table_of(plan, work=tmp_path / "gone")


def test_an_absolute_path_means_itself_alone() -> None:
    assert recorded_places("/a/work", "/b/plan.json") == [Path("/a/work")]
    assert recorded_places("work", None) == [Path("work")]
