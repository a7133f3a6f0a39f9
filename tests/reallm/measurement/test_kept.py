"""What calibration cannot measure keeps its dtype, and a plan says so; a pin overrides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from torch import nn

from reallm.calibration.unmeasured import NOT_REACHED
from reallm.compilation.compile import compile_plan
from reallm.measurement import measure as measure_module
from reallm.measurement.measure import measure
from reallm.models.loaded import LoadedModel, discover, load_model
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import write_record
from reallm.planner.tables.units import PlanError
from reallm.planning.plan import plan

SPACE = "linear: [int4-g16, int8-g16]\nembedding: [int8-g16]\n"
UNUSED = "model.layers.1.mlp.unused"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A tiny llama, one block of which has a linear layer that the model never runs."""
    folder = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (folder / "space.yaml").write_text(SPACE)
    loaded = load_model(folder)
    loaded.model.model.layers[1].mlp.unused = nn.Linear(48, 80, bias=False, dtype=torch.bfloat16)
    loaded.blocks, loaded.matrices = discover(loaded.model)
    monkeypatch.setattr(measure_module, "load_model", lambda _source, scratch: loaded)
    return loaded


def work_of(loaded: LoadedModel, tmp_path: Path, pins: tuple[str, ...] = ()) -> Path:
    model = tmp_path / "model"
    settings = {"nsamples": 2, "seqlen": 32, "jobs": 1, "pins": pins}
    measure(model, text=model / "text.txt", space=model / "space.yaml", output=tmp_path / "work", **settings)
    return tmp_path / "work"


def artifact_of(made: Plan, loaded: LoadedModel, tmp_path: Path) -> dict[str, torch.Tensor]:
    write_record(tmp_path / "plan.json", made)
    return load_file(compile_plan(tmp_path / "plan.json", tmp_path / "out", model=loaded) / "model.safetensors")


@pytest.mark.parametrize("budget", ["7bpw", "120KiB"])
def test_a_matrix_that_never_ran_keeps_its_dtype(budget: str, loaded: LoadedModel, tmp_path: Path) -> None:
    made = plan(work_of(loaded, tmp_path), budget=budget)
    assert made.kept == {NOT_REACHED: (UNUSED,)} and UNUSED in made.dense
    assert all(choice.cost > 0 or choice.format == "bf16" for choice in made.choices)
    assert any(UNUSED in note and NOT_REACHED in note and "1 matrices" in note for note in made.notes)
    tensors = artifact_of(made, loaded, tmp_path)
    assert torch.equal(tensors[f"{UNUSED}.weight"], loaded.model.get_submodule(UNUSED).weight)


def test_a_pin_needs_a_measured_format_and_then_overrides(loaded: LoadedModel, tmp_path: Path) -> None:
    pin = f"{UNUSED}=int8-g16"
    with pytest.raises(PlanError, match=r"was not measured in int8-g16.*reallm measure --pin"):
        plan(work_of(loaded, tmp_path), budget="7bpw", pins=[pin])
    made = plan(work_of(loaded, tmp_path, (pin,)), budget="7bpw", pins=[pin])
    assert next(choice.format for choice in made.choices if choice.matrix == UNUSED) == "int8-g16"
    assert any("1 pinned matrices" in note and UNUSED in note and "unknown" in note for note in made.notes)
    tensors = artifact_of(made, loaded, tmp_path)
    assert f"{UNUSED}.weight" not in tensors and any(name.startswith(UNUSED) for name in tensors)
