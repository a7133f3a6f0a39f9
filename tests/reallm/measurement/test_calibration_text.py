"""Calibration windows: what the model writes is kept and used again, and the plan and the card say what was used."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import POSITIONS, save_tiny, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from reallm.cli.plan_tables import print_plan
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.measurement import written_windows as module
from reallm.measurement.calibration_text import WindowSettings, calibration_windows, given_text
from reallm.measurement.measure import measure
from reallm.measurement.written_windows import batch_size, written_windows
from reallm.models.loaded import LoadedModel, load_model
from reallm.planner.tables.work_folder import read_table
from reallm.planning.plan import plan
from reallm.system.scratch import Scratch
from reallm.text.corpus import Text, load_text
from reallm.text.model_written import text_start, write_windows

pytestmark = pytest.mark.usefixtures("one_thread")
WRITTEN = "text written by the model itself at temperature 1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("written") / "model")
    (folder / "space.yaml").write_text("linear: [int4-g16, int8-g16]\n")
    return folder


def no_writing(*_: object, **__: object) -> None:
    pytest.fail("windows were written again")


def error_message(loaded: LoadedModel, work: Path, nsamples: int = 2, seqlen: int = 16, template: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        calibration_windows(loaded, "self", None, work, WindowSettings(nsamples, seqlen, 0, template))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_windows_are_the_sampled_ids(model: Path, tmp_path: Path) -> None:
    loaded = load_model(model)
    windows = written_windows(loaded, tmp_path, 5, 24, 7)
    start = text_start(loaded.model, loaded.tokenizer)
    assert start is not None and torch.equal(windows, write_windows(loaded.model, start, range(5), 24, seed=7))
    (kept,) = tmp_path.rglob("*.safetensors")
    assert torch.equal(load_file(kept)["ids"], windows)


def test_a_second_run_uses_the_same_windows(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "text": "self",
        "output": tmp_path,
        "space": model / "space.yaml",
        "seqlen": 16,
        "jobs": 1,
    }
    first = measure(model, nsamples=6, **settings)
    monkeypatch.setattr(module, "write_windows", no_writing)
    assert measure(model, nsamples=6, **settings).digest() == first.digest()
    fewer = measure(model, nsamples=4, **settings)
    assert fewer.settings["nsamples"] == 4 and fewer.text_sha256 != first.text_sha256
    monkeypatch.undo()
    with pytest.raises(pytest.fail.Exception):  # another seed needs other windows
        monkeypatch.setattr(module, "write_windows", no_writing)
        measure(model, nsamples=4, seed=1, **settings)


def test_an_interrupted_run_continues_behind_its_last_batch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, written = load_model(model), []
    whole = written_windows(loaded, tmp_path / "whole", 5, 16, 0)

    def interrupted(
        model: PreTrainedModel, start: object, indices: Sequence[int], *rest: int, **named: object
    ) -> Tensor:
        written.extend(indices)
        if 2 in indices and len(written) == 4:
            raise KeyboardInterrupt
        return write_windows(model, start, indices, *rest, **named)

    monkeypatch.setattr(module, "write_windows", interrupted)
    monkeypatch.setattr(module, "batch_size", lambda *_: 2)
    with pytest.raises(KeyboardInterrupt):
        written_windows(loaded, tmp_path / "cut", 5, 16, 0)
    assert torch.equal(written_windows(loaded, tmp_path / "cut", 5, 16, 0), whole)
    assert written == [0, 1, 2, 3, 2, 3, 4]


def test_a_damaged_file_is_written_again(model: Path, tmp_path: Path) -> None:
    loaded = load_model(model)
    windows = written_windows(loaded, tmp_path, 2, 16, 0)
    (kept,) = tmp_path.rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:40])
    assert torch.equal(written_windows(loaded, tmp_path, 2, 16, 0), windows)


def test_windows_are_written_in_float32_and_the_weights_are_left_as_they_were(tmp_path: Path) -> None:
    loaded = load_model(save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16))
    seen = []
    loaded.model.register_forward_pre_hook(lambda module, _: seen.append(module.lm_head.weight.dtype))
    written_windows(loaded, tmp_path / "work", 2, 8, 0)
    assert set(seen) <= {torch.float32, torch.bfloat16} and torch.float32 in seen
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_a_batch_fits_in_a_tenth_of_the_free_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(model)
    assert batch_size(loaded, 64) == module.MAX_BATCH
    row = 2 * 2 * 16 * 64 * 4  # blocks, keys and values, head size, tokens, bytes of float32
    monkeypatch.setattr(module, "available_memory", lambda: 10 * 7 * row)
    assert batch_size(loaded, 64) == 7


def test_the_plan_and_the_card_say_which_text_was_used(model: Path, tmp_path: Path) -> None:
    settings = {
        "output": tmp_path / "work",
        "space": model / "space.yaml",
        "nsamples": 4,
        "seqlen": 16,
        "jobs": 1,
    }
    table = measure(model, text="self", **settings)
    assert table.text == WRITTEN
    made = plan(tmp_path / "work", budget="7bpw", output=tmp_path / "plan.json")
    assert made.calibration == f"4 windows of 16 tokens of {WRITTEN}, seed 0"
    compile_plan(tmp_path / "plan.json", tmp_path / "out", kernels=False)
    assert f"| calibrated on | {made.calibration} |" in (tmp_path / "out" / "README.md").read_text()
    console = Console(record=True, width=200, file=io.StringIO())
    print_plan(made, console)
    assert made.calibration in console.export_text()
    text = tmp_path / "some text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    measure(model, text=text, **settings)
    assert read_table(tmp_path / "work").text == str(text)
    calibration = plan(tmp_path / "work", budget="7bpw").calibration
    assert calibration == "4 windows of 16 tokens of some text.txt, seed 0"  # without the folder


def test_models_that_cannot_write_are_refused_with_a_way_out(tmp_path: Path) -> None:
    encoder = load_model(save_tiny("roberta", tmp_path / "encoder"))
    message = error_message(encoder, tmp_path)
    assert "RobertaForMaskedLM, which does not generate text; give a text file or a data set with --text" in message
    loaded = load_model(save_tiny("llama", tmp_path / "model"))
    assert f"this model takes 1 to {POSITIONS} tokens" in error_message(loaded, tmp_path, seqlen=POSITIONS + 1)
    assert "--nsamples 0" in error_message(loaded, tmp_path, nsamples=0)
    assert "--chat-template wraps the documents of a text" in error_message(loaded, tmp_path, template=True)
    tokenizer, loaded.tokenizer = loaded.tokenizer, None
    assert "has no tokenizer" in error_message(loaded, tmp_path)
    loaded.tokenizer = tokenizer
    loaded.scratch = Scratch(tmp_path)
    assert "does not fit into memory" in error_message(loaded, tmp_path)


def test_a_model_without_any_start_is_refused(tmp_path: Path) -> None:
    loaded = load_model(save_tiny("llama", tmp_path / "model"))
    assert loaded.tokenizer is not None
    loaded.tokenizer.bos_token = loaded.tokenizer.eos_token = None
    loaded.model = tiny_model("llama", settings={"bos_token_id": None, "eos_token_id": None})
    assert "no BOS and no EOS token" in error_message(loaded, tmp_path)


def default_text(loaded: LoadedModel, work: Path, template: bool = False) -> Text:
    windows, text = calibration_windows(loaded, None, given_text(None), work, WindowSettings(2, 16, 0, template))
    assert windows.shape == (2, 16)
    return text


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def fake_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Iterator[dict[str, str]]]) -> None:
    """A hub that has C4, whose rows `load_dataset` gives."""
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda _self, _name, timeout: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def test_without_a_text_a_general_one_is_streamed_from_the_hub_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], []

    def load_dataset(*arguments: object, **named: object) -> Iterator[dict[str, str]]:
        asked.append((arguments, named))
        for number in range(1000):
            read.append(number)
            yield {"text": f"The page with the number {number} of a corpus."}

    fake_hub(monkeypatch, load_dataset)
    settings = {
        "output": tmp_path,
        "space": model / "space.yaml",
        "nsamples": 2,
        "seqlen": 16,
        "jobs": 1,
    }
    table = measure(model, **settings)
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert len(read) < 20  # not the whole corpus
    assert table.text == f"data set allenai/c4 (en), split train, its first {len(read)} rows"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("streamed again"))
    assert measure(model, **settings).digest() == table.digest()


def test_without_the_hub_the_model_writes_its_text(
    model: Path, tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = default_text(load_model(model), tmp_path)
    assert (text.description, text.is_fallback) == (WRITTEN, False)
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert record.message.startswith(f"no --text: calibrating on {WRITTEN} (the hub does not give allenai/c4: ")
    fake_hub(monkeypatch, lambda *_, **__: pytest.fail("another text in a resumed run"))
    with caplog.at_level("INFO"):
        again = default_text(load_model(model), tmp_path)
    assert f"no --text: calibrating on {WRITTEN}, as {tmp_path} was before" in caplog.text
    assert (again.description, again.sha256) == (WRITTEN, text.sha256)


def test_a_hub_that_fails_while_it_streams_is_no_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load_dataset(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "The first page."}
        raise ConnectionError("the line is dead\nafter one page")

    fake_hub(monkeypatch, load_dataset)
    assert default_text(load_model(model), tmp_path).description == WRITTEN
    assert "the line is dead)" in caplog.text and WRITTEN in caplog.text


def test_pythons_documentation_where_the_model_cannot_write(
    model: Path, tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, encoder = load_model(model), load_model(save_tiny("roberta", tmp_path / "encoder"))
    assert default_text(encoder, tmp_path).is_fallback
    assert default_text(loaded, tmp_path, template=True).is_fallback
    monkeypatch.setattr(loaded.model, "generate", lambda **_: 1 / 0)
    text = default_text(loaded, tmp_path)
    assert text.is_fallback
    reasons = ("does not generate text", "--chat-template wraps", "division by zero")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for warning, reason in zip(warnings, reasons, strict=True):
        assert reason in warning and text.description in warning and "the hub does not give allenai/c4" in warning
    with pytest.raises(UserError, match=r"--seqlen 999: this model takes"):
        calibration_windows(loaded, None, None, tmp_path, WindowSettings(2, 999, 0))


def test_only_measuring_takes_the_models_own_text() -> None:
    with pytest.raises(UserError, match=r"--text self is the text that a model writes.*\./self\)"):
        load_text("self")
