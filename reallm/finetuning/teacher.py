"""The dense model as the teacher: its output head, and its hidden states on the windows that training will use.

The hidden states are computed before the compressed model is loaded. Then the dense model except its head is freed, so
that the two models need not fit into memory together. When `accelerate launch --use_fsdp` starts several processes,
each process holds one shard of the dense model's blocks and gathers the other shards of a block while it runs the block
(FSDP, arXiv 2304.11277).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from reallm.models.loaded import LoadedModel, load_model
from reallm.runtime.packed import Packed
from reallm.system.progress import progress_bar

from .processes import SINGLE_PROCESS, TrainingProcesses, max_over_processes, true_in_all_processes

LOG = logging.getLogger(__name__)
CACHE_BYTES = 1 << 30
"""Maximum size of the cached hidden states."""


def hidden_state(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The input of the head of `model`, [batch, seqlen, features], for token ids [batch, seqlen]."""
    result: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return result


@torch.no_grad()
def plain_head(model: PreTrainedModel, input_ids: Tensor) -> nn.Linear | None:
    """The head of `model` if the logits are exactly the head's weight times the hidden state, checked on `input_ids`.

    Returns None for any other head, and for a compressed head, which during training multiplies by a different matrix
    than its `weight`.
    """
    head = model.get_output_embeddings()
    if (
        not isinstance(head, nn.Linear)
        or isinstance(head, Packed)
        or head.bias is not None
        or model.base_model is model
    ):
        return None
    try:
        hidden = hidden_state(model, input_ids)
    except (AttributeError, TypeError):  # an encoder, or several outputs
        return None
    logits = model(input_ids=input_ids).logits
    product = head(hidden)
    same = product.shape == logits.shape and torch.allclose(product.float(), logits.float(), rtol=1e-3, atol=1e-3)
    return head if same else None


class Teacher:
    """The dense model `loaded`, on `device` in `dtype`, and a cache of its hidden states by window id."""

    def __init__(
        self,
        loaded: LoadedModel,
        sample: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        processes: TrainingProcesses = SINGLE_PROCESS,
    ) -> None:
        """`sample`: a few token ids [1, seqlen], used to check whether the head is a plain matrix."""
        self.loaded, self.device, self.dtype = loaded, device, dtype
        self.runner: PreTrainedModel = loaded.model
        """The model that computes; if processes shard the weights, it holds one shard of everything except the head."""
        self.sharded = processes.shards_teacher
        if self.sharded:
            _shard(loaded, device, dtype, processes)
        else:
            loaded.model.to(device=device, dtype=dtype)
        self.head = plain_head(self.runner, sample.to(device))
        self.cached: dict[int, Tensor] = {}
        """Window id -> hidden states [seqlen, features]."""
        self.cached_bytes = 0

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, window_ids: Sequence[int]) -> Tensor:
        """Hidden states [batch, seqlen, features] of the windows `input_ids`, from the cache if it holds them all.

        Otherwise they are computed, and cached as long as they fit into CACHE_BYTES.
        """
        if all(window in self.cached for window in window_ids):
            return torch.stack([self.cached[window] for window in window_ids])
        result = hidden_state(self.runner, input_ids)
        for window, state in zip(window_ids, result, strict=True):
            if window not in self.cached and self.cached_bytes < CACHE_BYTES and not self.sharded:
                self._cache(window, state)
        return result

    def _cache(self, window: int, state: Tensor) -> None:
        self.cached[window] = state.clone()
        self.cached_bytes += state.nbytes

    @torch.no_grad()
    def cache_all(self, input_ids: Tensor, window_ids: Sequence[int]) -> bool:
        """Cache the hidden states of all the windows `input_ids`, int64 [windows, seqlen], and return True.

        Returns False, having done nothing, if they do not fit into CACHE_BYTES or the head is not a plain matrix.
        Processes that shard the weights must call this together.
        """
        if self.head is None:
            return False
        missing = {window: row for row, window in enumerate(window_ids) if window not in self.cached}
        nbytes = input_ids.shape[1] * self.head.in_features * self.dtype.itemsize * len(missing)
        if not true_in_all_processes(self.cached_bytes + nbytes <= CACHE_BYTES):
            return False
        todo = list(missing.items())
        # a sharded forward pass needs all processes, so those with fewer windows repeat their first one
        passes = max_over_processes(len(todo)) if self.sharded else len(todo)
        quiet = not LOG.isEnabledFor(logging.INFO)
        for turn in progress_bar(range(passes), desc="dense model", unit="window", leave=False, disable=quiet):
            window, row = todo[turn] if turn < len(todo) else (window_ids[0], 0)
            state = hidden_state(self.runner, input_ids[row : row + 1].to(self.device))[0]
            if window not in self.cached:
                self._cache(window, state)
        return True

    def free_weights(self) -> None:
        """Free the weights, except the head and this process's shard, until `reload_weights` is called."""
        if self.sharded:
            self.loaded.model = self.runner
            return
        for parameter in self.runner.parameters():
            if self.head is None or parameter is not self.head.weight:
                parameter.data = parameter.data.new_empty(0)

    def reload_weights(self) -> None:
        """Read the weights of `loaded` from its source again, if they were freed."""
        if self.sharded and self.loaded.model is self.runner:
            self.loaded.model = load_model(self.loaded.source).model
            return
        freed = {name: p for name, p in self.loaded.model.named_parameters() if not p.numel()}
        if freed:
            reloaded = load_model(self.loaded.source).model
            for name, parameter in freed.items():
                parameter.data = reloaded.get_parameter(name).data.to(self.device, self.dtype)


def _shard(loaded: LoadedModel, device: torch.device, dtype: torch.dtype, processes: TrainingProcesses) -> None:
    """Shard all weights except the head's among the processes, block by block, and move this process's to `device`."""
    model, mesh = loaded.model.to(dtype), init_device_mesh(device.type, (processes.count,))
    for name in loaded.blocks:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True)
    for part in model.children():
        if part is not model.base_model:
            part.to(device)
