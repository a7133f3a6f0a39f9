"""A trained square map on an embedding that is stored as plain floats: W (I + M) in its place, not one byte more.

    x_t = w_t + M^T w_t          logits = W (h + M h)          M [features, features], zero at first

An embedding is most of what a low budget leaves uncompressed, and takes up directions that the blocks lose or turn. A
tied head shares M with the embedding; another head has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from reallm.runtime.packed import Packed


def plain_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name -> weight of the embedding and of the head, each where it is stored as plain floats; a tied one once."""
    found = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = None if isinstance(module, Packed) else getattr(module, "_parameters", {}).get("weight")
        if isinstance(module, nn.Embedding | nn.Linear) and weight is not None:
            found[next(name for name, known in model.named_parameters() if known is weight)] = weight
    return found


@dataclass
class EmbeddingMaps:
    """The maps of one model while they are trained, by the name of the weight they act on."""

    model: PreTrainedModel
    maps: dict[str, nn.Parameter] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def start(self) -> None:
        """Make a map of every plain embedding and head trainable."""
        for name, weight in plain_weights(self.model).items():
            width = weight.shape[1]
            self.maps[name] = own = nn.Parameter(torch.zeros(width, width, device=weight.device))
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            if getattr(embedding, "weight", None) is weight:
                self._handles.append(embedding.register_forward_hook(_after(own)))
            if getattr(head, "weight", None) is weight:
                self._handles.append(head.register_forward_pre_hook(_before(own)))

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head's own weight multiplies in place of `hidden`."""
        head = self.model.get_output_embeddings()
        own = next((self.maps.get(n) for n, w in plain_weights(self.model).items() if w is head.weight), None)
        return hidden if own is None else _mapped(hidden, own)

    @torch.no_grad()
    def fold(self, stored: torch.dtype) -> None:
        """Put the maps into the weights, rounded to `stored`. Raises ValueError if one is not finite."""
        for name, weight in plain_weights(self.model).items():
            if name in self.maps:
                value = (weight.float() + weight.float() @ self.maps[name]).to(stored)
                if not bool(value.isfinite().all()):
                    raise ValueError("an embedding is not finite; train with a smaller learning rate")
                weight.copy_(value)
        self.drop()

    def drop(self) -> None:
        """Give the maps up."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.maps = [], {}


def _mapped(hidden: Tensor, own: Tensor) -> Tensor:
    return hidden + linear(hidden, own.to(hidden.dtype))


def _after(own: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda module, arguments, output: output + output @ own.to(output.dtype)


def _before(own: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, arguments: (_mapped(arguments[0], own), *arguments[1:])
