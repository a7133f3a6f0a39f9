"""Stored tensors that a model does not use: whole parts may be left out, but not a tensor that a used part needs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from reallm.errors import UserError

_RECOMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|token_type_ids|causal_mask|masked_bias|attn\.bias|attention\.bias"
    r"|num_batches_tracked|relative_position_index)$"
)
"""Buffers that older releases of transformers stored and newer ones compute."""
_FURTHER_TOKENS = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|mtp\w*|nextn\w*)(\.|$)")
"""Names inside the blocks that predict tokens after the next one, which transformers leaves out (DeepSeek-V3)."""
_SHOWN = 4


def leftover_notes(model: PreTrainedModel, names: Iterable[str], label: str) -> tuple[str, ...]:
    """A note that lists the stored tensors `names`, which `model` does not use; empty if there are none.

    Layers beyond the model's last one (which predict further tokens), heads and towers that the class lacks, and
    buffers that are computed may be left out. Raises UserError for a tensor inside a part that the model does use, such
    as a bias, a scale or a norm: the model would compute something else without it.
    """
    left_out = sorted(names)
    modules = dict(model.named_modules())
    _refuse_more_blocks(modules, left_out, label)
    for name in left_out:
        owner = _owner(modules, name)
        of_block = any(part.isdecimal() for part in owner.split("."))
        of_layer = owner and next(modules[owner].parameters(recurse=False), None) is not None
        if (of_block or of_layer) and not _RECOMPUTED.search(name):
            raise UserError(
                f"{label}: the stored tensor {name} belongs to {owner}, but {type(model).__name__} has no place for it "
                "there and would compute something else without it; get the model as transformers saves it"
            )
    if not left_out:
        return ()
    return (f"{len(left_out)} stored tensors do not belong to the model and are left out: {_summary(left_out)}",)


def _owner(modules: Mapping[str, nn.Module], name: str) -> str:
    """The innermost part of the model that the name of a stored tensor lies in."""
    owner = name.rpartition(".")[0]
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner


def _refuse_more_blocks(modules: Mapping[str, nn.Module], names: Iterable[str], label: str) -> None:
    """Raise UserError if `names` contain a block beyond those of the model that does not predict further tokens."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        owner = _owner(modules, name)
        number, _, inner = name.removeprefix(f"{owner}.").partition(".")
        if isinstance(modules[owner], nn.ModuleList) and number.isdecimal():
            blocks[f"{owner}.{number}"].append(inner)
    for block, rest in blocks.items():
        if not any(_FURTHER_TOKENS.search(name) for name in rest):
            count = len(cast(nn.ModuleList, modules[block.rpartition(".")[0]]))
            raise UserError(
                f"{label}: the weights files hold {block}, but by config.json there are only {count} such parts; get "
                "config.json and weights from the same model"
            )


def _summary(names: list[str]) -> str:
    """The names, with those of one part (the first three levels) counted together."""
    parts = Counter(".".join(name.split(".")[:3]) for name in names)
    shown = [part if count == 1 else f"{part} ({count})" for part, count in parts.items()]
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} parts more" if rest > 0 else "")
