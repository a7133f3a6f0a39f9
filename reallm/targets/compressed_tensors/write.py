"""Write an artifact as a model folder in the compressed-tensors format, "pack-quantized".

Of every matrix, `weight_packed` int32 [out, ceil(in b / 32)] is a little-endian stream of the codes of a row (code =
q + 2^(b-1)), `weight_scale` fp16 [out, groups], `weight_zero_point` (asymmetric only) the zero points as a stream along
the rows, int32 [ceil(out b / 32), groups], and `weight_shape` int64 [2]. A weight is (q - zero point) * scale.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reallm.artifacts.directory import new_artifact
from reallm.artifacts.stored_values import read_bytes, read_tensors
from reallm.errors import UserError
from reallm.kernels.formats.codecs import ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.kernels.storage.safetensors_reader import read_folder
from reallm.kernels.storage.safetensors_writer import write_weights
from reallm.planner.tables.plan import PLAN_FILE
from reallm.targets.exported import Exported
from reallm.targets.folder import DenseTensors, check_modules, copy_files, model_config
from reallm.targets.packed_integers import PackedArtifact, bit_stream, read_packed, unpacked_stream

from .types import compressed_tensors_type

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices that the engines load as one, by the last part of their names."""
Spec = tuple[str, tuple[int, ...], Callable[[], NDArray[Any]]]


def write_compressed_tensors(artifact: Path, output: Path, *, force: bool = False, engine: str = "vllm") -> Exported:
    """Write the artifact to the folder `output`.

    Raises UserError for formats that `engine` does not hold, for matrices that it loads as one but that have different
    formats, for a packed embedding or head, and for an output that exists.
    """
    type_of = partial(compressed_tensors_type, engine=engine)
    packed = read_packed(artifact, read_tensors(artifact), type_of, engine)
    _check_structure(packed, engine)
    check_modules(packed, engine)
    dense = DenseTensors(packed)
    tensors: dict[str, Any] = dict(dense.specs())
    for name in packed.types:
        tensors |= _specs(packed, name)
    with new_artifact(output, force, PLAN_FILE) as folder:
        files = write_weights(folder, tensors, {"format": "pt"})
        config = model_config(packed) | {"quantization_config": _quantization(packed)}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_files(packed, folder)
        _verify(folder, packed)
        nbytes = sum(file.stat().st_size for file in files)
    return Exported(output, nbytes, packed.types, dense.notes)


def _check_structure(packed: PackedArtifact, engine: str) -> None:
    kinds = {choice.matrix: choice.kind for choice in packed.plan.choices}
    if vocabulary := [name for name in packed.types if kinds[name] != "linear"]:
        raise UserError(
            f"{vocabulary[0]} is packed, and {engine} loads embedding and head as they are: plan with a budget in bits "
            "per weight, which leaves them out"
        )
    known = {*kinds, *packed.plan.dense}
    for name in packed.types:
        parent, _, last = name.rpartition(".")
        for group in FUSED:
            others = [f"{parent}.{other}" for other in group] if last in group else []
            formats = {other: packed.formats.get(other) for other in others if other in known}
            if differing := [o for o, fmt in formats.items() if fmt is None or fmt.codec != packed.formats[name].codec]:
                raise UserError(
                    f"{engine} loads {name} and {differing[0]} as one, but their formats differ: plan with "
                    f"--target {engine}"
                )


def _specs(packed: PackedArtifact, name: str) -> dict[str, Spec]:
    codec = packed.formats[name].codec
    assert isinstance(codec, ScalarCodec)
    rows, cols = next((c.rows, c.cols) for c in packed.plan.choices if c.matrix == name)
    groups, bits = codec.group_count(cols), codec.bits
    specs: dict[str, Spec] = {
        f"{name}.weight_packed": (
            "I32",
            (rows, -(-cols * bits // 32)),
            lambda: bit_stream(packed.matrix(name).codes, bits),
        ),
        f"{name}.weight_scale": ("F16", (rows, groups), lambda: np.ascontiguousarray(packed.matrix(name).steps)),
        f"{name}.weight_shape": ("I64", (2,), lambda: np.array([rows, cols], dtype="<i8")),
    }
    if codec.table == "uint":
        shape = (-(-rows * bits // 32), groups)
        specs[f"{name}.weight_zero_point"] = ("I32", shape, lambda: _packed_zeros(packed, name))
    return specs


def _packed_zeros(packed: PackedArtifact, name: str) -> NDArray[np.uint32]:
    matrix = packed.matrix(name)
    assert matrix.zeros is not None
    return np.ascontiguousarray(bit_stream(np.ascontiguousarray(matrix.zeros.T), matrix.bits).T)


def _quantization(packed: PackedArtifact) -> dict[str, Any]:
    """The quantization_config: a group for every codec, with exact and disjoint names, keys in alphabetical order."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in packed.types:
        members[packed.formats[name].codec.name].append(name)
    groups = {}
    for number, codec_name in enumerate(sorted(members)):
        codec = Format.parse(codec_name).codec
        assert isinstance(codec, ScalarCodec)
        weights: dict[str, Any] = {"num_bits": codec.bits, "type": "int", "symmetric": codec.table == "int"}
        weights |= (
            {"strategy": "group", "group_size": codec.group_size} if codec.group_size else {"strategy": "channel"}
        )
        groups[f"group_{number:03d}"] = {"targets": sorted(members[codec_name]), "weights": weights}
    linear = {choice.matrix for choice in packed.plan.choices if choice.kind == "linear"}
    ignored = sorted({"lm_head", *packed.plan.dense, *linear} - set(packed.types))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


def _verify(folder: Path, packed: PackedArtifact) -> None:
    """Read the written files back, decode every matrix by the formula above, and compare. Raises UserError."""
    tensors = read_folder(folder)
    for name in packed.types:
        matrix = packed.matrix(name)
        rows, cols = matrix.codes.shape
        words = read_bytes(tensors[f"{name}.weight_packed"]).view("<u4").reshape(rows, -1)
        scale = read_bytes(tensors[f"{name}.weight_scale"]).view("<f2").reshape(rows, -1).astype(np.float32)
        half = 1 << (matrix.bits - 1)
        values = unpacked_stream(words, matrix.bits, cols).astype(np.float32) - half
        if (stored := tensors.get(f"{name}.weight_zero_point")) is not None:
            zeros = read_bytes(stored).view("<u4").reshape(stored.shape)
            zero = unpacked_stream(np.ascontiguousarray(zeros.T), matrix.bits, rows).T.astype(np.float32) - half
            values -= zero.repeat(matrix.group, axis=1)
        if not np.array_equal(values * scale.repeat(matrix.group, axis=1), matrix.decoded()):
            raise UserError(f"{folder}: {name} was not written correctly; nothing was kept")
