"""FinetuneSettings: one set of values for the function, the command line and the checkpoints."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reallm.cli.main import app
from reallm.cli.settings_options import field_docs, options_from
from reallm.errors import UserError
from reallm.finetuning.settings import FinetuneSettings, with_overrides

OTHER_VALUES: dict[str, Any] = {
    "train": ("scales", "codebooks"),
    "rank": 3,
    "factor_dtype": "i4",
    "init": "loftq",
    "stages": ("blocks", "end-to-end"),
    "loss": "kl",
    "adapter": True,
    "dora": True,
    "steps": 7,
    "batch_size": 2,
    "seqlen": 64,
    "learning_rate": 2e-3,
    "gain_learning_rate": 3e-3,
    "patience": 0,
    "seed": 5,
    "block_windows": 6,
    "block_epochs": 3,
    "code_steps": 0,
    "code_learning_rate": 2e-4,
    "teacher": "elsewhere/model",
    "work": "elsewhere/work",
    "device": "cuda",
    "gradient_checkpointing": True,
    "resume": False,
    "kernels": False,
    "force": True,
}


def options(values: dict[str, Any]) -> list[str]:
    """`values` as the command line spells them."""
    words: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return words


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneSettings]:
    """The settings with which the command calls `finetune`, which trains nothing here."""
    calls: list[FinetuneSettings] = []
    monkeypatch.setattr("reallm.finetuning.run.finetune", lambda *_, settings, **__: calls.append(settings))
    return calls


def test_every_setting_has_a_docstring_and_an_option_that_shows_it() -> None:
    docs = field_docs(FinetuneSettings)
    assert docs.keys() == {field.name for field in fields(FinetuneSettings)} == OTHER_VALUES.keys()
    text = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "400"}).output
    shown = " ".join(re.sub(r"[│|]", " ", text).split())
    for name, doc in docs.items():
        assert f"--{name.replace('_', '-')} " in shown and doc.replace("  ", " ") in shown, name


def test_the_command_passes_every_option_on(received: list[FinetuneSettings]) -> None:
    done = CliRunner().invoke(app, ["finetune", "out", "-o", "tuned", *options(OTHER_VALUES)])
    assert done.exit_code == 0, done.output
    assert asdict(received[0]) == OTHER_VALUES


def test_the_command_without_options_has_the_defaults_of_the_function(received: list[FinetuneSettings]) -> None:
    assert CliRunner().invoke(app, ["finetune", "out", "-o", "tuned"]).exit_code == 0
    assert received == [FinetuneSettings()]


def test_the_former_spelling_of_stages_still_works(received: list[FinetuneSettings]) -> None:
    assert CliRunner().invoke(app, ["finetune", "out", "-o", "t", "--order", "codes, end-to-end"]).exit_code == 0
    assert received[0].stages == ("codes", "end-to-end")
    assert with_overrides(None, {"order": ["blocks"]}).stages == ("blocks",)
    assert "--order" not in CliRunner().invoke(app, ["finetune", "--help"]).output


def test_keywords_take_precedence_over_settings() -> None:
    settings = FinetuneSettings(steps=5, rank=2)
    assert with_overrides(settings, {"steps": 9}) == replace(settings, steps=9)
    assert with_overrides(settings, {}) == settings and with_overrides(None, {}) == FinetuneSettings()
    with pytest.raises(TypeError, match="finetune\\(\\) has no setting 'step'; expected one of train, rank"):
        with_overrides(None, {"step": 9})


def test_parts_have_one_order_and_stages_keep_theirs() -> None:
    settings: Any = FinetuneSettings(train=["norms", "factors"], stages=["end-to-end", "blocks"])
    assert settings.train == ("factors", "norms") and settings.stages == ("end-to-end", "blocks")


def test_a_checkpoint_of_an_earlier_version_has_the_same_keys() -> None:
    values = FinetuneSettings().deciding_values()
    assert values.keys() == {
        *("train", "rank", "factor_dtype", "init", "steps", "batch_size", "seqlen", "learning_rate"),
        *("gain_learning_rate", "loss", "patience", "seed", "order", "block_windows", "block_epochs"),
        *("code_steps", "code_learning_rate", "dora"),
    }
    assert (values["train"], values["order"]) == ("factors,scales,norms", "end-to-end")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 1025}, "--rank 1025: expected 0 to 1024"),
        ({"seqlen": 7}, "--seqlen 7: expected at least 8 tokens"),
        ({"batch_size": 0}, "--batch-size 0: expected at least 1 window"),
        ({"init": "svd"}, "--init svd: expected zero, loftq, lq-lora or plan"),
        ({"code_learning_rate": 1.0}, "--code-learning-rate 1.0: expected a number between 0 and 1, such as 1e-4"),
        ({"dora": True}, "--dora: row magnitudes can be stored in adapters only; add --adapter"),
        (
            {"stages": ("blocks",), "loss": "text"},
            "--stages blocks trains the model to match the dense model: it needs --loss kl",
        ),
    ],
)
def test_unusable_values_are_refused_with_the_option_and_what_is_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        FinetuneSettings(**values)
    assert str(error.value) == message


def test_options_are_added_beside_the_parameters_of_a_command() -> None:
    def command(artifact: Path, settings: FinetuneSettings, text: str | None = None) -> None:
        assert settings.steps == 4 and str(artifact) == text

    with_options = options_from(FinetuneSettings)(command)
    names = list(inspect.signature(with_options).parameters)
    assert names == ["artifact", "text", *(field.name for field in fields(FinetuneSettings))]
    values = {"train": "scales", "stages": "blocks", "steps": 4}
    defaults = {field.name: field.default for field in fields(FinetuneSettings)}
    with_options(artifact=Path("a"), text="a", **defaults | values)
