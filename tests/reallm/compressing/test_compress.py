"""The whole job in one call: what it makes, what it does not do twice, and what it refuses at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny

from reallm.artifacts.verify import verify
from reallm.compressing import compress as module
from reallm.compressing.compress import compress
from reallm.compressing.result import Compressed
from reallm.errors import ReallmError

SETTINGS = {"nsamples": 4, "seqlen": 32, "windows": 2, "jobs": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("compress") / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (folder / "space.yaml").write_text("linear: [int3-g16, int4-g16, int6-g16, int8-g16]\n")
    return folder


def run(model: Path, budget: str, output: Path, **settings: object) -> Compressed:
    text = model / "text.txt"
    merged = {**SETTINGS, "text": text, "test": str(text), "space": model / "space.yaml", **settings}
    return compress(model, budget, output, **merged)  # type: ignore[arg-type]


def test_an_artifact_its_plan_and_its_loss(model: Path, tmp_path: Path) -> None:
    made = run(model, "6bpw", tmp_path / "out")
    assert made.plan.bits_per_weight <= 6
    assert verify(made.output).hashed
    assert made.evaluation is not None and made.evaluation.comparison.divergence is not None
    assert made.work == tmp_path / "out-work" and (made.work / "table.json").exists()
    assert list(made.seconds) == ["measure", "plan", "compile", "evaluate"]
    full = run(model, "6bpw", tmp_path / "full", work=made.work, full=True, windows=0)
    assert full.plan.unmeasured is None and full.evaluation is None
    assert full.plan.predicted_loss <= made.plan.predicted_loss <= 1.02 * full.plan.predicted_loss


def test_a_second_run_encodes_and_compiles_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, "6bpw", tmp_path / "out")
    monkeypatch.setattr(module, "compile_plan", lambda *_args, **_settings: pytest.fail("compiled again"))
    assert run(model, "6bpw", tmp_path / "out").table.measurements == first.table.measurements
    with pytest.raises(ReallmError, match="out"):
        monkeypatch.undo()
        run(model, "5bpw", tmp_path / "out")  # another plan needs --force


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "2bpw"}, "the smallest plan takes"),
        ({"budget": "three"}, "expected a number with a unit"),
        ({"target": "tpu"}, "unknown target"),
        ({"preset": "gptq"}, "give one of them"),
        ({"formats": ["int4-*"]}, "option of `plan`"),
        ({"test": "missing.txt"}, "missing.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    budget = str(settings.pop("budget", "6bpw"))
    with pytest.raises(ReallmError, match=words):
        run(model, budget, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-work" / "statistics").exists()
