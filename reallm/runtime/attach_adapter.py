"""LoRA and DoRA adapters attached to a loaded artifact: a low-rank term, and for DoRA a gain for every row.

    y = g o (x W_hat^T + (x R^T) L^T)        L = s B, R = A; g = m / ||W_hat + L R||_row with DoRA, else 1

The factors are appended in fp16 to those that the module has, and the gain is kept in float32, both in memory only.
Products are therefore computed as for any artifact with low-rank factors. `artifacts.peft_files` reads the files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.artifacts.manifest import artifact_digest
from reallm.artifacts.peft_files import Adapter
from reallm.errors import UserError

from .field_bytes import add_low_rank
from .modules import CompressedLinear, TiedHead
from .row_magnitudes import MIN_NORM, set_magnitudes


@torch.no_grad()
def attach_adapter(model: PreTrainedModel, adapter: Adapter, where: str, artifact: Path) -> None:
    """Add the terms of `adapter` (called `where` in messages) to the modules of the loaded `artifact`.

    Raises UserError for an adapter that was trained on another model or artifact, before anything is changed.
    """
    if adapter.artifact_sha256 not in (None, digest := artifact_digest(artifact)):
        if digest is None:
            raise UserError(
                f"{where} belongs to an artifact with a manifest.json, and {artifact} has none, so whether they belong "
                "together cannot be checked; load the artifact that it was trained on"
            )
        raise UserError(f"{where} was trained on another artifact than {artifact}; load that one, or train it again")
    modules, embedding = dict(model.named_modules()), model.get_input_embeddings()
    for name, (left, right) in adapter.factors.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise UserError(f"{where} is an adapter for another model: {artifact} has no linear module {name}")
        if isinstance(module, TiedHead) or getattr(embedding, "weight", None) is module.weight:
            raise UserError(f"{where}: {name} shares the embedding's weight, which the adapter would change too")
        shape, expected = (left.shape[0], right.shape[1]), (module.out_features, module.in_features)
        if shape != expected:
            raise UserError(f"{where} is an adapter for another model: {name} is {list(expected)}, not {list(shape)}")
    for name, (left, right) in adapter.factors.items():
        _add(modules[name], left, right, adapter.magnitudes.get(name), f"{where}: {name}")


def _add(module: nn.Module, left: Tensor, right: Tensor, magnitudes: Tensor | None, where: str) -> None:
    if not isinstance(module, CompressedLinear):
        assert isinstance(module, nn.Linear)
        weight = module.weight.float() + left @ right
        if magnitudes is not None:
            weight *= (magnitudes / weight.norm(dim=1).clamp(min=MIN_NORM))[:, None]
        module.weight.copy_(weight.to(module.weight.dtype))
        return
    try:
        add_low_rank(module, left, right)
        if magnitudes is not None:
            set_magnitudes(module, magnitudes)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
