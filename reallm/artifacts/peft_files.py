"""The files of PEFT's LoRA and DoRA adapters: `adapter_config.json` and `adapter_model.safetensors` in one folder.

W = W_hat + s B A                    LoRA (arXiv 2106.09685): `<prefix><module>.lora_A.weight` A [r, in] and
                                     `.lora_B.weight` B [out, r]; s = lora_alpha / r, or lora_alpha / sqrt(r) with
                                     use_rslora (arXiv 2312.03732)
W = m o (W_hat + s B A) / ||.||_row  DoRA (arXiv 2402.09353), with use_dora: also `.lora_magnitude_vector` m [out]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.kernels.storage.dtypes import SAFETENSORS_FLOATS
from reallm.kernels.storage.safetensors_writer import write_weights

from .directory import new_artifact
from .manifest import MANIFEST_FILE, sha256_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
RIGHT, LEFT, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
ARTIFACT_KEY = "reallm_artifact_sha256"
"""Key in the metadata of the weights file: sha256 of the manifest of the artifact that the adapter was trained on."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""The values of PEFT's `init_lora_weights` that leave the base weights unchanged."""
MAX_FILE_BYTES = 1 << 62
"""PEFT reads a single file, so the weights are never split."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
Magnitudes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """The low-rank terms of an adapter."""

    factors: Factors
    """Module name -> L [rows, rank], R [rank, cols], float32; the scaling s is multiplied into L."""
    artifact_sha256: str | None
    """The value stored under ARTIFACT_KEY; None for an adapter that reallm did not write."""
    magnitudes: Magnitudes = field(default_factory=dict)
    """Module name -> m [rows], float32, for every module in `factors` of a DoRA adapter; empty for LoRA."""


@dataclass(frozen=True)
class Layout:
    """Names, shapes and settings of an adapter, without its values."""

    shapes: Mapping[str, tuple[int, int, int]]
    """Module name -> rows, rank, cols."""
    scalings: Mapping[str, float]
    """Module name -> s."""
    prefixed: Mapping[str, str]
    """Module name -> the prefix of the names of its tensors."""
    dora: bool
    artifact_sha256: str | None
    nbytes: int
    """Size of the weights file."""


def write_adapter(
    output: Path, factors: Factors, artifact: Path, force: bool = False, magnitudes: Magnitudes | None = None
) -> Path:
    """Write `factors` (module -> L, R) as an adapter trained on `artifact`; with `magnitudes` as a DoRA adapter.

    Raises UserError if `output` exists and `force` is not given, or for an error of the file system; then no
    partial output is left behind.
    """
    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(artifact),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"{PREFIX}{name}{RIGHT}"], tensors[f"{PREFIX}{name}{LEFT}"] = right, left
    if magnitudes is not None:
        config["use_dora"] = True
        tensors |= {f"{PREFIX}{name}{MAGNITUDE}": magnitudes[name] for name in factors}
    arrays = {name: tensor.detach().float().contiguous().cpu().numpy() for name, tensor in tensors.items()}
    with new_artifact(output, force, CONFIG_FILE) as folder:
        write_text_atomic(folder / CONFIG_FILE, canonical_json(config))
        stored = {name: ("F32", array.shape, array) for name, array in arrays.items()}
        metadata = {"format": "pt", ARTIFACT_KEY: sha256_file(artifact / MANIFEST_FILE)}
        (file,) = write_weights(folder, stored, metadata, max_shard_bytes=MAX_FILE_BYTES)
        file.rename(folder / WEIGHTS_FILE)
    return output


def read_layout(folder: Path | str) -> Layout:
    """Read names and shapes of the adapter in `folder`, reallm's or PEFT's, but no values.

    Raises UserError for a damaged adapter, and for one that is neither plain LoRA nor DoRA.
    """
    folder = Path(folder)
    config, path = _read_config(folder), folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            strange = [name for name, part in slices.items() if part.get_dtype() not in SAFETENSORS_FLOATS]
            artifact = (file.metadata() or {}).get(ARTIFACT_KEY)
        nbytes = path.stat().st_size
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the adapter again") from None
    if strange:
        raise UserError(f"{path}: {strange[0]} does not hold floats of 16 or 32 bits; save the adapter again")
    dora = bool(config.get("use_dora"))
    modules, scalings, prefixed = {}, {}, {}
    for name in [name for name in shapes if name.endswith(RIGHT)]:
        stem = name.removesuffix(RIGHT)
        right, left = shapes.pop(name), shapes.pop(f"{stem}{LEFT}", ())
        if len(right) != 2 or len(left) != 2 or left[1] != right[0] or not right[0]:
            raise UserError(f"{path}: {stem} has no lora_A [r, in] beside lora_B [out, r]; save the adapter again")
        if dora and shapes.pop(f"{stem}{MAGNITUDE}", ()) != left[:1]:
            raise UserError(f"{path}: {stem} has no lora_magnitude_vector [{left[0]}]; save the adapter again")
        module = stem.removeprefix(PREFIX)
        modules[module], prefixed[module] = (left[0], right[0], right[1]), stem
        try:
            scalings[module] = _scaling(config, module, right[0])
        except (TypeError, ValueError, AttributeError, OverflowError, re.error):
            raise UserError(
                f"{folder / CONFIG_FILE}: its lora_alpha gives no finite scaling of {module}; save the adapter again"
            ) from None
    if shapes or not modules:
        unexpected = next(iter(shapes), "no tensor")
        raise UserError(f"{path} holds {unexpected!r}; expected lora_A and lora_B of linear modules and nothing else")
    return Layout(modules, scalings, prefixed, dora, artifact, nbytes)


def read_adapter(folder: Path | str) -> Adapter:
    """Read the adapter in `folder`, reallm's or PEFT's.

    Raises UserError in the same cases as `read_layout`, and for a value that is not finite.
    """
    layout, path = read_layout(folder), Path(folder) / WEIGHTS_FILE
    factors, magnitudes = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, stem in layout.prefixed.items():
                left, right = file.get_tensor(f"{stem}{LEFT}"), file.get_tensor(f"{stem}{RIGHT}")
                factors[name] = (layout.scalings[name] * left.float(), right.float())
                if layout.dora:
                    magnitudes[name] = file.get_tensor(f"{stem}{MAGNITUDE}").float()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the adapter again") from None
    for name, (left, right) in factors.items():
        if not all(bool(torch.isfinite(t).all()) for t in (left, right, magnitudes.get(name, left))):
            raise UserError(f"{path}: {name} holds NaN or infinity; train the adapter again")
    return Adapter(factors, layout.artifact_sha256, magnitudes)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is not an adapter: it has no readable {CONFIG_FILE}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{folder} is a PEFT adapter of type {kind}; expected LORA")
    for option in ("fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias"):
        if config.get(option):
            raise UserError(f"{folder} uses {option}, which is not a low-rank term; load it with peft instead")
    if isinstance(start := config.get("init_lora_weights"), str) and start not in PLAIN_STARTS:
        raise UserError(
            f"{folder} was initialised by {start}, which changes the base weights; convert it to a plain LoRA first"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder} trains biases, which are not a low-rank term; load it with peft instead")
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    scaling = float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if not math.isfinite(scaling):
        raise ValueError(f"a scaling of {scaling}")
    return scaling
