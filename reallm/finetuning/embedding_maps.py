"""A trained square map on an embedding that is stored as plain floats: W (I + M) replaces W, at the same size.

    x_t = w_t + M^T w_t          logits = W (h + M h)          M [features, features], zero at first

At low budgets most of the uncompressed weights belong to the embedding, and its map can make up for directions that the
compressed blocks lose or rotate. A tied head shares M with the embedding; an untied head has a separate M.
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
    """Name -> weight of the embedding and the head, if stored as plain floats; a tied weight appears once."""
    weights = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = None if isinstance(module, Packed) else getattr(module, "_parameters", {}).get("weight")
        if isinstance(module, nn.Embedding | nn.Linear) and weight is not None:
            weights[next(name for name, known in model.named_parameters() if known is weight)] = weight
    return weights


@dataclass
class EmbeddingMaps:
    """The maps of one model during training, by the name of the weight that each map acts on."""

    model: PreTrainedModel
    maps: dict[str, nn.Parameter] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def start(self) -> None:
        """Add a trainable map to every plain embedding and head."""
        for name, weight in plain_weights(self.model).items():
            width = weight.shape[1]
            self.maps[name] = M = nn.Parameter(torch.zeros(width, width, device=weight.device))
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            if getattr(embedding, "weight", None) is weight:
                self._handles.append(embedding.register_forward_hook(_map_output(M)))
            if getattr(head, "weight", None) is weight:
                self._handles.append(head.register_forward_pre_hook(_map_input(M)))

    def head_input(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., features] with the head's map applied: the input of the head's stored weight."""
        head = self.model.get_output_embeddings()
        M = next((self.maps.get(n) for n, w in plain_weights(self.model).items() if w is head.weight), None)
        return hidden if M is None else _mapped(hidden, M)

    @torch.no_grad()
    def write_back(self, stored_dtype: torch.dtype) -> None:
        """Multiply the maps into the weights, round the weights to `stored_dtype`, and remove the maps.

        Raises ValueError if a value is not finite.
        """
        for name, weight in plain_weights(self.model).items():
            if name in self.maps:
                value = (weight.float() + weight.float() @ self.maps[name]).to(stored_dtype)
                if not bool(value.isfinite().all()):
                    raise ValueError("an embedding is not finite; train with a smaller learning rate")
                weight.copy_(value)
        self.remove()

    def remove(self) -> None:
        """Remove the maps; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.maps = [], {}


def _mapped(hidden: Tensor, M: Tensor) -> Tensor:
    return hidden + linear(hidden, M.to(hidden.dtype))


def _map_output(M: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda module, arguments, output: output + output @ M.to(output.dtype)


def _map_input(M: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, arguments: (_mapped(arguments[0], M), *arguments[1:])
