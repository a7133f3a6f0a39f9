"""PEFT's LoRA adapters over an artifact: read, written, and attached at load as one more low-rank term.

    y = x W_hat^T + s (x A^T) B^T        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732)

An adapter is a folder of `adapter_config.json` and `adapter_model.safetensors` with `<prefix><module>.lora_A.weight`
[r, in] and `.lora_B.weight` [out, r] (LoRA, arXiv 2106.09685). Attached, s B and A stand beside the module's own
factors, in fp16 and in memory only, so that products run as those of any artifact with factors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UserError
from .folder import new_artifact
from .manifest import MANIFEST_FILE, sha256_file
from .planner.records import canonical_json, write_text_atomic
from .runtime.low_rank import LowRankTraining
from .runtime.modules import TiedHead

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ARTIFACT_KEY = "reallm_artifact_sha256"
"""In the metadata of the weights file: sha256 of the manifest of the artifact an adapter was trained on."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""PEFT's `init_lora_weights` that leave the base weights alone."""

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Adapter:
    """The low-rank terms of an adapter: module name -> L [rows, rank], R [rank, cols], float32, s in L."""

    factors: Factors
    artifact_sha256: str | None
    """None for one that was not made by reallm."""


def write_adapter(output: Path, factors: Factors, artifact: Path, force: bool = False) -> Path:
    """Write `factors` (module -> L, R) as an adapter trained on `artifact`. Raises UserError; nothing half-written."""
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
        tensors[f"{PREFIX}{name}.lora_A.weight"] = right.detach().float().contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = left.detach().float().contiguous().cpu()
    with new_artifact(output, force, CONFIG_FILE) as folder:
        write_text_atomic(folder / CONFIG_FILE, canonical_json(config))
        metadata = {"format": "pt", ARTIFACT_KEY: sha256_file(artifact / MANIFEST_FILE)}
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    return output


def read_adapter(folder: Path | str) -> Adapter:
    """The adapter in `folder`, ours or PEFT's. Raises UserError for one that is damaged or no plain LoRA."""
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            artifact = (file.metadata() or {}).get(ARTIFACT_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the adapter again") from None
    factors = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        right, left = tensors.pop(name), tensors.pop(f"{stem}.lora_B.weight", None)
        if left is None or left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise UserError(f"{path}: {stem} has no lora_A [r, in] beside lora_B [out, r]; save the adapter again")
        module = stem.removeprefix(PREFIX)
        factors[module] = (_scaling(config, module, len(right)) * left.float(), right.float())
    if tensors or not factors:
        found = next(iter(tensors), "no tensor")
        raise UserError(f"{path} holds {found!r}; expected lora_A and lora_B of linear modules and nothing else")
    return Adapter(factors, artifact)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is no adapter: it has no readable {CONFIG_FILE}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{folder} is a PEFT adapter of type {found}; expected LORA")
    for option in ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias"):
        if config.get(option):
            raise UserError(f"{folder} uses {option}, which is no low-rank term; load it with peft instead")
    if isinstance(start := config.get("init_lora_weights"), str) and start not in PLAIN_STARTS:
        raise UserError(
            f"{folder} was begun by {start}, which changes the base weights; convert it to a plain LoRA first"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder} trains biases, which is no low-rank term; load it with peft instead")
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


@torch.no_grad()
def attach_adapter(model: PreTrainedModel, adapter: Adapter, where: str, artifact: Path) -> None:
    """Add the terms of `adapter` (called `where` in messages) to the modules of the loaded `artifact`.

    Raises UserError for an adapter of another model or artifact.
    """
    if adapter.artifact_sha256 not in (None, sha256_file(artifact / MANIFEST_FILE)):
        raise UserError(f"{where} was trained on another artifact than {artifact}; load that one, or train it again")
    modules, embedding = dict(model.named_modules()), model.get_input_embeddings()
    for name, (left, right) in adapter.factors.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise UserError(f"{where} is an adapter for another model: {artifact} has no linear module {name}")
        if isinstance(module, TiedHead) or getattr(embedding, "weight", None) is module.weight:
            raise UserError(f"{where}: {name} shares the embedding's weight, which the adapter would change too")
        shape, found = (left.shape[0], right.shape[1]), (module.out_features, module.in_features)
        if shape != found:
            raise UserError(f"{where} is an adapter for another model: {name} is {list(found)}, not {list(shape)}")
    for name, (left, right) in adapter.factors.items():
        _add(modules[name], left, right, f"{where}: {name}")


def _add(module: nn.Module, left: Tensor, right: Tensor, where: str) -> None:
    if not isinstance(module, LowRankTraining):
        assert isinstance(module, nn.Linear)
        module.weight.copy_((module.weight.float() + left @ right).to(module.weight.dtype))
        return
    try:
        module.add_low_rank(left, right)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
