"""Measuring again in one work folder: other settings start another table, and plans of the earlier one stay usable."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from measuring import start_measure
from tiny import save_tiny

from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.measurement import tasks
from reallm.measurement.measure import measure
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import load_model
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import read_plan
from reallm.planner.tables.work_folder import EARLIER_FOLDER, find_table, read_table, tables_in
from reallm.planning.plan import explain, plan
from reallm.reporting.report_data import collect_report_data

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"nsamples": 2, "seqlen": 32, "seed": 1, "jobs": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in bfloat16, with a text and two spaces beside it."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)))
    (folder / "space.yaml").write_text("linear: [int4-g16, int3-g16]\n")
    (folder / "more.yaml").write_text("linear: [int8-g16]\n")
    return folder


def run(model: Path, output: Path, space: str = "space.yaml", **changes: int) -> MeasuredTable:
    return measure(model, text=model / "text.txt", space=model / space, output=output, **{**SETTINGS, **changes})


def test_other_settings_leave_the_earlier_table_and_its_plans_usable(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work, first = tmp_path / "work", tmp_path / "first.json"
    earlier = run(model, work)
    plan(work, budget="4.5bpw", output=first)
    for changes in ({"nsamples": 3}, {"seed": 2}, {"seqlen": 16}):
        run(model, work, **changes)
    assert len(list(tables_in(work))) == 4 and read_table(work).settings["seqlen"] == 16
    assert read_table(find_table(read_plan(first))) == earlier
    with caplog.at_level("INFO"):
        plan(work, budget="4.5bpw", output=tmp_path / "last.json")
    kept = str(work / EARLIER_FOLDER / f"{earlier.digest()[:16]}.json")
    assert any("2 windows of 32 tokens" in line and kept in line for line in caplog.messages)
    again = plan(kept, budget="4.5bpw", output=tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first.read_bytes() and again.work == str(work)
    for path in (first, tmp_path / "last.json"):
        assert explain(path, "q_proj") and collect_report_data(read_plan(path)).richer is not None
        compile_plan(path, tmp_path / f"{path.stem}-out", kernels=False)


def test_what_is_kept_is_said_when_it_is_replaced(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(model, tmp_path / "work")
        run(model, tmp_path / "work", "more.yaml")  # the same settings: the table grows
        assert not [line for line in caplog.messages if "they are kept" in line]
        run(model, tmp_path / "work", nsamples=3)
    (line,) = [line for line in caplog.messages if "they are kept" in line]
    assert "2 windows of 32 tokens" in line and f"{EARLIER_FOLDER}/" in line and "can still be compiled" in line


def test_going_back_to_settings_adds_to_their_table(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    small = run(model, work)
    plan(work, budget="4.5bpw", output=tmp_path / "small.json")
    run(model, work, nsamples=3)
    grown = run(model, work, "more.yaml")
    assert {r.format for r in grown.measurements} == {"int4-g16", "int3-g16", "int8-g16"}
    assert {(r.matrix, r.format, r.two_sided) for r in small.measurements} < {
        (r.matrix, r.format, r.two_sided) for r in grown.measurements
    }
    assert {a.format for a in explain(tmp_path / "small.json", "q_proj")} == {"int4-g16", "int3-g16", "bf16"}
    monkeypatch.setattr(tasks, "encode", None)  # everything is in the cache
    assert run(model, work, nsamples=3).settings["nsamples"] == 3


def test_a_plan_whose_table_is_gone_is_refused_with_the_reason(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(model, work)
    plan(work, budget="4.5bpw", output=tmp_path / "plan.json")
    run(model, work, nsamples=3)
    for path in (work / EARLIER_FOLDER).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"not made from the measurements in .*\(3 windows of 32 tokens.*--work"):
        compile_plan(tmp_path / "plan.json", tmp_path / "out", kernels=False)
    made = read_plan(tmp_path / "plan.json")
    changed = made.choices[0].model_copy(update={"codes_sha256": "0" * 64})
    codes = MeasuredCodes(work, load_model(model))
    trained = made.model_copy(update={"choices": (changed,), "table_sha256": codes.table.digest()})
    with pytest.raises(UserError, match="plan of a fine-tuned artifact"):
        codes.check_measured(trained)


def test_two_processes_with_other_settings_leave_both_tables(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    processes = [start_measure(model, work, tmp_path / f"stderr{n}", **SETTINGS | {"nsamples": n}) for n in (2, 3)]
    for n, process in zip((2, 3), processes, strict=True):
        process.join(timeout=180)
        assert process.exitcode == 0, (tmp_path / f"stderr{n}").read_text()[-2000:]
    assert {table.settings["nsamples"] for _, table in tables_in(work)} == {2, 3}
    assert not list(work.rglob("*.partial")) and not list(work.glob("weights-*"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_the_earlier_table_is_kept_loses_nothing(
    when: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes just before or just after the earlier table is put aside; the same command then finishes."""
    from reallm.measurement import table as module

    work, keep = tmp_path / "work", module.keep_earlier
    earlier = run(model, work)

    def interrupted(folder: Path, newer: MeasuredTable) -> None:
        if when == "after":
            keep(folder, newer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "keep_earlier", interrupted)
        run(model, work, nsamples=3)
    assert [table for _, table in tables_in(work)] == [earlier]
    run(model, work, nsamples=3)
    assert [table.settings["nsamples"] for _, table in tables_in(work)] == [3, 2]
