"""The files of PEFT's LoRA and DoRA adapters: `adapter_config.json` and `adapter_model.safetensors` in one folder.

W = W_hat + s B A                    LoRA (arXiv 2106.09685): `<prefix><module>.lora_A.weight` A [r, in] and
                                     `.lora_B.weight` B [out, r]; s = lora_alpha / r, or lora_alpha / sqrt(r) with
                                     use_rslora (arXiv 2312.03732)
W = m o (W_hat + s B A) / ||.||_row  DoRA (arXiv 2402.09353), with use_dora: also `.lora_magnitude_vector` m [out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.kernels.storage.safetensors_writer import write_weights

from .adapter_layout import (
    ARTIFACT_KEY,
    CONFIG_FILE,
    LEFT,
    MAGNITUDE,
    PREFIX,
    RIGHT,
    WEIGHTS_FILE,
    read_layout,
    read_terms,
)
from .directory import new_artifact
from .manifest import MANIFEST_FILE, sha256_file

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


def read_adapter(folder: Path | str) -> Adapter:
    """Read the adapter in `folder`, reallm's or PEFT's.

    Raises UserError in the same cases as `read_layout`, and for a value that is not finite.
    """
    layout = read_layout(folder)
    terms = read_terms(folder, layout)
    factors = {name: (torch.from_numpy(left), torch.from_numpy(right)) for name, (left, right, _) in terms.items()}
    magnitudes = {name: torch.from_numpy(m) for name, (_, _, m) in terms.items() if m is not None}
    return Adapter(factors, layout.artifact_sha256, magnitudes)
