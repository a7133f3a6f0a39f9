"""The dtypes of tensors that are not packed: those of the file, unless another dtype is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from artifacts import make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import reallm  # noqa: F401 - registers with transformers
from reallm.errors import UserError

NORM, OTHER = "model.layers.1.input_layernorm.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama-tied", tmp_path_factory.mktemp("made"), dtype=torch.bfloat16).folder


@pytest.fixture
def mixed_dtypes(compiled: Path, tmp_path: Path) -> Iterator[Path]:
    """An artifact in bfloat16 with one norm in float32, whose values bfloat16 cannot hold."""
    folder = tmp_path / "mixed"
    shutil.copytree(compiled, folder)
    change(folder, NORM, 1 + torch.rand(48) / 3)
    yield folder


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: value}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["auto", None, torch.bfloat16])
def test_tensors_keep_the_dtypes_of_the_file(mixed_dtypes: Path, dtype: object) -> None:
    stored = load_file(mixed_dtypes / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(mixed_dtypes, dtype=dtype)
    assert not torch.equal(stored[NORM], stored[NORM].bfloat16().float())
    for name in (NORM, OTHER):
        parameter = model.get_parameter(name)
        assert parameter.dtype == stored[name].dtype and torch.equal(parameter, stored[name])
    assert model.dtype == torch.bfloat16


def test_a_saved_model_keeps_them_too(mixed_dtypes: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(mixed_dtypes).save_pretrained(tmp_path / "saved")
    first, second = (load_file(path / "model.safetensors") for path in (mixed_dtypes, tmp_path / "saved"))
    assert second[NORM].dtype == torch.float32 and second[OTHER].dtype == torch.bfloat16
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_converts_all(mixed_dtypes: Path, auto: type[PreTrainedModel], dtype: torch.dtype) -> None:
    model = auto.from_pretrained(mixed_dtypes, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_what_the_class_keeps_in_float32_stays(mixed_dtypes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["layers.1.input_layernorm"])
    model = AutoModelForCausalLM.from_pretrained(mixed_dtypes, dtype=torch.float16)
    assert model.get_parameter(NORM).dtype == torch.float32 and model.get_parameter(OTHER).dtype == torch.float16
    assert torch.equal(model.get_parameter(NORM), load_file(mixed_dtypes / "model.safetensors")[NORM])


def test_integers_in_place_of_floats_are_refused(mixed_dtypes: Path) -> None:
    change(mixed_dtypes, NORM, torch.ones(48, dtype=torch.int64))
    with pytest.raises(
        UserError, match=r"'model.layers.1.input_layernorm.weight' is I64 \[48\], expected floats \[48\]"
    ):
        AutoModelForCausalLM.from_pretrained(mixed_dtypes)
