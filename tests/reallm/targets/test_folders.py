"""Exports are judged by the engines' own libraries where they are installed, else by readers that share no code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import Made, make
from numpy.typing import NDArray
from packing import Codes, PackedModel
from tiny import tiny_model, tiny_tokenizer

from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.kernels.codes.packing import pad
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.safetensors_reader import StoredTensor, read_folder
from reallm.models.loaded import LoadedModel, Matrix, load_model
from reallm.targets.engines import ENGINES
from reallm.targets.export import export

SETTINGS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
FUSED = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 1, "up": 1, "down": 2}


def build(folder: Path, choose: Callable[[Matrix], str | None], least_scale: float = 0.02) -> Made:
    """A compiled artifact of a tiny llama with random codes, whose scales are at least `least_scale`."""
    source = folder / "model"
    tiny_model("llama", settings=SETTINGS).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    loaded = load_model(source)
    packed = PackedModel(loaded, choose)
    for name, fields in packed.fields.items():
        if "scales" in fields:
            scales = fields["scales"].view("<f2").astype(np.float32)
            scales = np.where(np.abs(scales) < least_scale, least_scale, scales)
            count = next(
                f.count for f in Format.parse(packed.names[name]).fields(*shape(loaded, name)) if f.name == "scales"
            )
            packed.fields[name] = {**fields, "scales": pad(scales[:count].astype("<f2").tobytes())}
    plan = packed.write_plan(folder / "plan.json")
    output = compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)
    return Made(output, source, plan, loaded, packed)


def shape(loaded: LoadedModel, name: str) -> tuple[int, int]:
    return next((m.rows, m.cols) for m in loaded.matrices if m.name == name)


def by_family(*formats: str) -> Callable[[Matrix], str | None]:
    """Formats of linear layers; matrices that vLLM loads as one get the same."""

    def choose(matrix: Matrix) -> str | None:
        family = matrix.name.rpartition(".")[2].removesuffix("_proj")
        return formats[(FUSED[family] + (matrix.block or 0)) % len(formats)] if matrix.kind == "linear" else None

    return choose


CT_FORMATS = ("int4-g32", "uint3-g32+ldl", "int5-g0", "uint4-g32", "int2-g32", "int8-g32", "uint8-g0", "int6-g32")


@pytest.mark.parametrize("start", range(0, 8, 3))
def test_compressed_tensors_hold_the_artifacts_values(tmp_path: Path, start: int) -> None:
    formats = [CT_FORMATS[(start + i) % 8] for i in range(4)]
    made = build(tmp_path, by_family(*formats))
    result = export(made.folder, tmp_path / "vllm", target="vllm")
    tensors = read_folder(result.path)
    for matrix in made.loaded.matrices:
        if matrix.name in made.packed.fields:
            values = compressed_tensors_values(tensors, matrix, Format.parse(made.packed.names[matrix.name]))
            assert np.array_equal(values, made.reference(matrix).numpy()), matrix.name
    config = json.loads((result.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert len(targets) == len(set(targets)) == 14
    assert list(config["config_groups"]) == sorted(config["config_groups"])


def compressed_tensors_values(tensors: dict[str, StoredTensor], matrix: Matrix, fmt: Format) -> NDArray[np.float32]:
    """Dequantise by the definition of pack-quantized, one whole number for each row."""
    bits, half = fmt.codec.bits, 1 << (fmt.codec.bits - 1)
    codes = codes_of(stored(tensors[f"{matrix.name}.weight_packed"]), matrix.rows, matrix.cols, bits) - half
    scales = np.frombuffer(stored(tensors[f"{matrix.name}.weight_scale"]), "<f2").reshape(matrix.rows, -1)
    group = matrix.cols // scales.shape[1]
    assert np.frombuffer(stored(tensors[f"{matrix.name}.weight_shape"]), "<i8").tolist() == [matrix.rows, matrix.cols]
    if fmt.codec.table == "uint":
        tensor = tensors[f"{matrix.name}.weight_zero_point"]
        words = np.frombuffer(stored(tensor), "<u4").reshape(tensor.shape)
        zeros = codes_of(np.ascontiguousarray(words.T).tobytes(), words.shape[1], matrix.rows, bits).T - half
        codes = codes - zeros.repeat(group, axis=1)
    return codes * scales.astype(np.float32).repeat(group, axis=1)


def codes_of(raw: bytes, rows: int, cols: int, bits: int) -> NDArray[np.float32]:
    """Codes [rows, cols] from rows of words, each read as one whole number."""
    size, codes = len(raw) // rows, np.empty((rows, cols), dtype=np.float32)
    for row in range(rows):
        number = int.from_bytes(raw[row * size : (row + 1) * size], "little")
        codes[row] = [(number >> (bits * col)) & ((1 << bits) - 1) for col in range(cols)]
    return codes


def test_our_reader_of_other_checkpoints_reads_them_too(tmp_path: Path) -> None:
    made = build(tmp_path, by_family("int4-g32", "uint4-g32", "int8-g0"))
    result = export(made.folder, tmp_path / "vllm", target="vllm")
    compare(made, load_model(result.path, dtype=torch.float32).model.state_dict())


def test_transformers_runs_mixed_symmetric_groups(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    made = build(tmp_path, by_family("int4-g32", "int3-g32", "int8-g0"))
    result = export(made.folder, tmp_path / "vllm", target="vllm")
    model = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    expected = made.replaced()
    packed = {f"{name}.weight" for name in made.packed.fields}
    for name, parameter in expected.named_parameters():
        if name not in packed:
            parameter.data = parameter.data.half().float()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", CT_FORMATS)
def test_compressed_tensors_own_library_decompresses_them(tmp_path: Path, fmt: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    made = build(tmp_path, by_family(fmt))
    result = export(made.folder, tmp_path / "vllm", target="vllm")
    settings = json.loads((result.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(settings).config_groups.values()
    tensors = load_file(result.path / "model.safetensors")
    for matrix in made.loaded.matrices:
        if matrix.name in made.packed.fields:
            prefix = f"{matrix.name}."
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            weight = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
            expected = made.reference(matrix)
            # the library multiplies in the dtype of the scales
            torch.testing.assert_close(weight.float(), expected.half().float(), rtol=0, atol=0)


def compare(made: Made, state: dict[str, torch.Tensor]) -> None:
    """All weights are the artifact's: packed ones exactly, others to the rounding of fp16."""
    expected = made.replaced().state_dict()
    packed = {f"{name}.weight" for name in made.packed.fields}
    assert packed < set(expected)
    for name, value in expected.items():
        if name in packed:
            assert torch.equal(state[name].float(), value), name
        else:
            assert torch.equal(state[name].float(), value.half().float()), name


@pytest.mark.parametrize("formats", [("int4-g64", "int3-g32", "int8-g32"), ("int2-g32", "int5-g32", "int6-g32")])
def test_mlx_holds_the_artifacts_values(tmp_path: Path, formats: tuple[str, ...]) -> None:
    choose = by_family(*formats)
    made = build(tmp_path, lambda m: "int8-g32" if "down" in m.name or m.kind != "linear" else choose(m))
    result = export(made.folder, tmp_path / "mlx", target="mlx")
    config = json.loads((result.path / "config.json").read_text(encoding="utf-8"))
    tensors = read_folder(result.path)
    for matrix in made.loaded.matrices:
        entry = config["quantization"][matrix.name]
        raw = {part: stored(tensors[f"{matrix.name}.{part}"]) for part in ("weight", "scales", "biases")}
        values = mlx_values(raw, matrix.rows, matrix.cols, entry["bits"], entry["group_size"])
        assert np.array_equal(values, made.reference(matrix).numpy()), matrix.name
    assert config["quantization"] == config["quantization_config"]
    assert config["rope_theta"] == made.loaded.model.config.rope_parameters["rope_theta"]  # MLX reads only this name


def stored(tensor: StoredTensor) -> bytes:
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.nbytes)


def mlx_values(raw: dict[str, bytes], rows: int, cols: int, bits: int, group: int) -> NDArray[np.float32]:
    """Dequantise by MLX's definition."""
    parts = (np.frombuffer(raw[part], "<f2").reshape(rows, -1).astype(np.float32) for part in ("scales", "biases"))
    scales, biases = parts
    codes = codes_of(raw["weight"], rows, cols, bits)
    return codes * scales.repeat(group, axis=1) + biases.repeat(group, axis=1)


@dataclass(frozen=True)
class Refusal:
    target: str
    formats: tuple[str, ...]
    message: str


REFUSALS = [
    Refusal("mlx", ("int4-g32", "lm4-g32"), r"mlx cannot hold 7 of the 14 packed matrices, such as \S+ in lm4-g32"),
    Refusal("mlx", ("uint4-g32",), "mlx cannot hold 14"),
    Refusal("sglang", ("int5-g32",), "sglang cannot hold 14"),
    Refusal("vllm", ("int4-g32+rot",), "vllm cannot hold 14"),
    Refusal("other", ("int4-g32",), "unknown target; expected one of gguf, vllm, sglang, mlx"),
    Refusal("gguf", ("int4-g32",), "--target gguf needs --base FILE.gguf"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case.target}-{case.formats[0]}")
def test_what_an_engine_cannot_hold_is_refused(tmp_path: Path, case: Refusal) -> None:
    formats = iter(case.formats * 14)
    made = build(tmp_path, lambda m: next(formats) if m.kind == "linear" else None)
    with pytest.raises(UserError, match=case.message):
        export(made.folder, tmp_path / "engine", target=case.target)
    assert not (tmp_path / "engine").exists()


def test_matrices_loaded_as_one_must_agree(tmp_path: Path) -> None:
    made = build(tmp_path, lambda m: ("int4-g32" if "q_proj" in m.name else "int8-g32") if m.kind == "linear" else None)
    with pytest.raises(UserError, match=r"vllm loads \S+q_proj and \S+k_proj as one, but their formats differ"):
        export(made.folder, tmp_path / "engine", target="vllm")


def test_a_dense_matrix_is_not_loaded_as_one_with_packed_ones(tmp_path: Path) -> None:
    made = build(tmp_path, lambda m: "int4-g32" if m.kind == "linear" and "k_proj" not in m.name else None)
    with pytest.raises(UserError, match=r"vllm loads \S+q_proj and \S+k_proj as one, but their formats differ"):
        export(made.folder, tmp_path / "engine", target="vllm")


@pytest.mark.parametrize("target", ["vllm", "mlx"])
def test_a_group_larger_than_the_row_is_refused(tmp_path: Path, target: str) -> None:
    made = build(tmp_path, by_family("int4-g128"))
    with pytest.raises(UserError, match=rf"{target} cannot hold 14 of the 14 packed matrices"):
        export(made.folder, tmp_path / "engine", target=target)


def test_an_artifact_is_never_replaced_by_an_export(tmp_path: Path) -> None:
    made = build(tmp_path, by_family("int4-g32"))
    before = (made.folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="is a reallm artifact, which an export does not replace"):
        export(made.folder, made.folder, target="vllm", force=True)
    assert (made.folder / "config.json").read_bytes() == before


def test_modules_that_compressed_tensors_does_not_pack_are_refused(tmp_path: Path) -> None:
    made = make("gpt2", tmp_path, lambda m: "uint4-g0" if m.kind == "linear" else None)
    with pytest.raises(UserError, match="c_attn is a Conv1D, whose packed weights vllm does not load"):
        export(made.folder, tmp_path / "engine", target="vllm")
    assert not (tmp_path / "engine").exists()


def test_a_scale_that_the_engine_cannot_hold_is_refused(tmp_path: Path) -> None:
    made = build(tmp_path, by_family("int8-g32"), least_scale=0.0)
    with pytest.raises(UserError, match="a scale is too small for the engine's fp16 scale, which is 128 times smaller"):
        export(made.folder, tmp_path / "engine", target="mlx")
    assert not (tmp_path / "engine").exists()


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    made = build(tmp_path, by_family("int4-g32"))
    export(made.folder, tmp_path / "engine", target="mlx")
    with pytest.raises(UserError, match="exists; give another name, or --force"):
        export(made.folder, tmp_path / "engine", target="mlx")
    export(made.folder, tmp_path / "engine", target="mlx", force=True)
    with pytest.raises(UserError, match="exists and is not a reallm artifact"):
        export(made.folder, made.source, target="mlx", force=True)
    assert (made.source / "model.safetensors").exists()


def test_every_target_has_a_search_space_that_it_holds() -> None:
    from reallm.measurement.search_space import load_space
    from reallm.planning.allowed_formats import supported_formats

    for target in ENGINES:
        for formats in load_space(target).formats.values():
            assert supported_formats(formats, target) == tuple(formats)
            plain = [replace(fmt, rotated=True) for fmt in formats]
            assert not supported_formats(plain, target)
