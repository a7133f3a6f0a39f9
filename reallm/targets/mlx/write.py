"""Write an artifact as a model folder for MLX (mlx_lm).

Of every matrix, `weight` uint32 [out, in b / 32] is a little-endian stream of the codes of a row, `scales` and `biases`
are fp16 [out, groups]. A weight is scale * code + bias; a symmetric code has the bias -2^(b-1) scale, which is exact.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reallm.artifacts.directory import new_artifact
from reallm.artifacts.stored_values import read_bytes, read_tensors
from reallm.errors import UserError
from reallm.kernels.formats.codecs import ScalarCodec
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.kernels.storage.safetensors_reader import read_folder
from reallm.kernels.storage.safetensors_writer import write_weights
from reallm.planner.tables.plan import PLAN_FILE
from reallm.targets.exported import Exported
from reallm.targets.folder import DenseTensors, check_modules, copy_files, model_config
from reallm.targets.packed_integers import PackedArtifact, bit_stream, read_packed, unpacked_stream

from .model_settings import mlx_settings, window_note
from .types import mlx_type

Spec = tuple[str, tuple[int, ...], Callable[[], NDArray[Any]]]


def write_mlx(artifact: Path, output: Path, *, force: bool = False) -> Exported:
    """Write the artifact to the folder `output`. Raises UserError for formats that MLX does not hold.

    Also for an output that exists, and a value beyond fp16.
    """
    packed = read_packed(artifact, read_tensors(artifact), mlx_type, "mlx")
    check_modules(packed, "mlx")
    dense = DenseTensors(packed)
    tensors: dict[str, Any] = dict(dense.specs())
    for name in packed.types:
        if name not in packed.tied:
            tensors |= _specs(packed, name)
    with new_artifact(output, force, PLAN_FILE) as folder:
        files = write_weights(folder, tensors, {"format": "mlx"})
        (folder / CONFIG_FILE).write_text(
            json.dumps(_config(packed), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        copy_files(packed, folder)
        _verify(folder, packed)
        nbytes = sum(file.stat().st_size for file in files)
    return Exported(output, nbytes, packed.types, dense.notes + window_note(model_config(packed)))


def _specs(packed: PackedArtifact, name: str) -> dict[str, Spec]:
    codec = packed.formats[name].codec
    assert isinstance(codec, ScalarCodec)
    rows, cols = next((c.rows, c.cols) for c in packed.plan.choices if c.matrix == name)
    groups, bits = (rows, codec.group_count(cols)), codec.bits
    return {
        f"{name}.weight": ("U32", (rows, cols * bits // 32), lambda: bit_stream(packed.matrix(name).codes, bits)),
        f"{name}.scales": ("F16", groups, lambda: np.ascontiguousarray(packed.matrix(name).steps)),
        f"{name}.biases": ("F16", groups, lambda: _biases(packed, name)),
    }


def _biases(packed: PackedArtifact, name: str) -> NDArray[np.float16]:
    matrix = packed.matrix(name)
    return (matrix.steps.astype(np.float32) * -(1 << (matrix.bits - 1))).astype(np.float16)


def _config(packed: PackedArtifact) -> dict[str, Any]:
    """config.json with MLX's quantisation: the most frequent setting as the default, and an entry for every matrix."""
    entries = {}
    for name in packed.types:
        codec = packed.formats[name].codec
        assert isinstance(codec, ScalarCodec)
        entries[name] = {"group_size": codec.group_size, "bits": codec.bits, "mode": "affine"}
    common = Counter((entry["group_size"], entry["bits"]) for entry in entries.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = {"group_size": common[0], "bits": common[1], "mode": "affine", **entries}
    config = model_config(packed)
    config |= mlx_settings(config)
    if packed.tied:  # reallm's artifacts keep the packed embedding as a module of its own
        config["tie_word_embeddings"] = True
    return config | {"quantization": quantization, "quantization_config": quantization}


def _verify(folder: Path, packed: PackedArtifact) -> None:
    """Read the written files back, decode every matrix by the formula above, and compare. Raises UserError."""
    tensors = read_folder(folder)
    for name in (name for name in packed.types if name not in packed.tied):
        matrix = packed.matrix(name)
        rows, cols = matrix.codes.shape
        words = read_bytes(tensors[f"{name}.weight"]).view("<u4").reshape(rows, -1)
        codes = unpacked_stream(words, matrix.bits, cols).astype(np.float32)
        scale, bias = (
            read_bytes(tensors[f"{name}.{part}"]).view("<f2").reshape(rows, -1).astype(np.float32)
            for part in ("scales", "biases")
        )
        values = codes * scale.repeat(matrix.group, axis=1) + bias.repeat(matrix.group, axis=1)
        if not np.array_equal(values, matrix.decoded()):
            raise UserError(f"{folder}: {name} was not written correctly; nothing was kept")
