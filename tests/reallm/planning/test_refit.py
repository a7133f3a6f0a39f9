"""Refit: the loss in memory is that of the artifact, the best measured plan is returned, corrections are recorded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.evaluation.compare import compare_models
from reallm.measurement.measure import measure
from reallm.models.loaded import load_model
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record, write_record
from reallm.planning.plan import explain, plan
from reallm.planning.plan_evaluator import PlanEvaluator
from reallm.planning.refit import refit, uncorrected
from reallm.runtime.load import load

SPACE = "linear: [int2-g16, int4-g16, tq2-l8+ldl2+rot, aq1x4-d4-shared]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("refit")
    save_tiny("llama", base / "model", dtype=torch.bfloat16)
    for seed, name in enumerate(("text.txt", "held.txt")):
        (base / name).write_text("".join(random.Random(seed).choices("abcdefgh ", k=1500)), encoding="utf-8")
    (base / "space.yaml").write_text(SPACE)
    measure(
        base / "model",
        text=str(base / "text.txt"),
        output=base / "work",
        space=base / "space.yaml",
        nsamples=4,
        seqlen=64,
        jobs=1,
    )
    return base


def test_losses_in_memory_are_those_of_artifacts(folder: Path) -> None:
    chosen = plan(folder / "work", budget="6bpw", output=folder / "plan.json")
    windows = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    evaluator = PlanEvaluator(load_model(folder / "model"), folder / "work", windows, progress=False)
    other = plan(folder / "work", budget="4.6bpw")
    first, between, again = evaluator.loss(chosen), evaluator.loss(other), evaluator.loss(chosen)
    assert first == again != between
    compile_plan(folder / "plan.json", folder / "out", kernels=False)
    model, _ = load(folder / "out", dtype=torch.float32)
    dense = load_model(folder / "model", dtype=torch.float32).model
    divergence = compare_models(dense, model, windows, progress=False).divergence
    assert divergence is not None and first == pytest.approx(divergence.mean, rel=1e-4)
    everything = {choice.family for choice in chosen.choices}
    assert evaluator.loss(chosen, everything) == pytest.approx(0, abs=1e-9)


def test_the_best_measured_plan_comes_back_with_the_record(folder: Path) -> None:
    start = plan(folder / "work", budget="5bpw")
    best = refit(start, text=str(folder / "held.txt"), rounds=2, windows=3, seqlen=64, progress=False)
    record = best.measured
    assert record is not None and record.windows == 3
    assert record.kl == min(kl for _, _, kl in record.tried)
    names = [name for name, _, _ in record.tried]
    assert names[:2] == [f"uniform {start.uniform.format}", "plan"] and record.uniform_kl == record.tried[0][2]
    assert best.counted_bytes <= best.budget_bytes == start.budget_bytes
    assert uncorrected(start) == pytest.approx(record.tried[1][1]) == pytest.approx(start.predicted_loss)
    write_record(folder / "refit.json", best)
    assert read_record(folder / "refit.json", Plan, "plan") == best
    assert next(a for a in explain(folder / "refit.json", best.choices[0].matrix) if a.chosen).cost == pytest.approx(
        best.choices[0].cost
    )


def test_rivals_keep_the_options(folder: Path) -> None:
    first = plan(folder / "work", budget="6bpw").choices[0].matrix
    start = plan(folder / "work", budget="6bpw", pins=[f"{first}$=int2-g16"], formats=["int*"])
    best = refit(start, text=str(folder / "held.txt"), rounds=1, windows=2, seqlen=64, progress=False)
    assert best.measured is not None and best.measured.uniform_kl is not None
    assert (best.pins, best.formats, best.ties, best.budget) == (start.pins, start.formats, start.ties, start.budget)
    assert next(c for c in best.choices if c.matrix == first).format == "int2-g16"
    assert all(c.format.startswith("int") for c in best.choices)


def test_the_calibration_text_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="calibrated on; name one that it has not seen"):
        refit(plan(folder / "work", budget="5bpw"), text=str(folder / "text.txt"), progress=False)
