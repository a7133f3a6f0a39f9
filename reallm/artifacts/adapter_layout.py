"""Names, shapes and values of PEFT's LoRA and DoRA adapters, read without torch; `peft_files` describes the files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from reallm.errors import LayoutError, UserError
from reallm.kernels.storage.dtypes import SAFETENSORS_FLOATS
from reallm.kernels.storage.safetensors_reader import read_header

from .stored_values import read_floats

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
RIGHT, LEFT, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
ARTIFACT_KEY = "reallm_artifact_sha256"
"""Key in the metadata of the weights file: sha256 of the manifest of the artifact that the adapter was trained on."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""The values of PEFT's `init_lora_weights` that leave the base weights unchanged."""

Terms = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]
"""L [rows, rank], into which the scaling s is multiplied, R [rank, cols], and m [rows] of DoRA or None."""


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


def read_layout(folder: Path | str) -> Layout:
    """Read names and shapes of the adapter in `folder`, reallm's or PEFT's, but no values.

    Raises UserError for a damaged adapter, and for one that is neither plain LoRA nor DoRA.
    """
    folder = Path(folder)
    config, path = _read_config(folder), folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="np") as file:
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


def read_terms(folder: Path | str, layout: Layout) -> dict[str, Terms]:
    """Module name -> the values of its terms. Raises UserError for a damaged file and a value that is not finite."""
    path = Path(folder) / WEIGHTS_FILE
    try:
        stored = read_header(path)
    except LayoutError as error:
        raise UserError(f"{error}; save the adapter again") from None
    values = {name: read_floats(tensor).astype(np.float32).reshape(tensor.shape) for name, tensor in stored.items()}
    terms: dict[str, Terms] = {}
    for name, stem in layout.prefixed.items():
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite product is refused below
            left = np.float32(layout.scalings[name]) * values[f"{stem}{LEFT}"]
        terms[name] = (left, values[f"{stem}{RIGHT}"], values.get(f"{stem}{MAGNITUDE}"))
        if not all(np.isfinite(term).all() for term in terms[name] if term is not None):
            raise UserError(f"{path}: {name} holds NaN or infinity; train the adapter again")
    return terms


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
