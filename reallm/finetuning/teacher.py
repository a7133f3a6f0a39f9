"""The dense model while something is trained towards it: its head, and its hidden states on the windows that come up.

They are computed before the compressed model is loaded, and the rest of the dense model is freed then: the two need not
fit into memory side by side. Where several processes train and `accelerate launch --use_fsdp` asks for it, each holds
a share of the dense model's blocks until then, and gets the others' while it runs them (FSDP, arXiv 2304.11277).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import trange
from transformers import PreTrainedModel

from reallm.models.loaded import LoadedModel, load_model
from reallm.runtime.packed import Packed

from .processes import ALONE, TrainingProcesses, everywhere, most

LOG = logging.getLogger(__name__)
KEPT_BYTES = 1 << 30
"""Of hidden states, at most."""


def hidden_state(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What the head of `model` is given, [batch, seqlen, features]."""
    result: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return result


@torch.no_grad()
def plain_head(model: PreTrainedModel, input_ids: Tensor) -> nn.Linear | None:
    """The head of `model`, if its logits are no more than W h, which is tried on `input_ids`; else None.

    A compressed head is none: while it is trained its weight is not what it multiplies with.
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
    found = head(hidden)
    same = found.shape == logits.shape and torch.allclose(found.float(), logits.float(), rtol=1e-3, atol=1e-3)
    return head if same else None


class Teacher:
    """The dense model `loaded`, on `device` in `dtype`; what it made of windows is kept by their names."""

    def __init__(
        self,
        loaded: LoadedModel,
        sample: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        ranks: TrainingProcesses = ALONE,
    ) -> None:
        """`sample`: a few token ids [1, seqlen], on which the head is tried."""
        self.loaded, self.device, self.dtype = loaded, device, dtype
        self.weights = sum(tensor.numel() for tensor in loaded.model.parameters())
        """How many it has, those that were freed among them."""
        self.runner: PreTrainedModel = loaded.model
        """What is run; where processes share the weights, all in it but the head is a share."""
        self.shared = ranks.shares_original
        if self.shared:
            _share(loaded, device, dtype, ranks)
        else:
            loaded.model.to(device=device, dtype=dtype)
        self.head = plain_head(self.runner, sample.to(device))
        self.kept, self.nbytes = dict[int, Tensor](), 0

    @torch.no_grad()
    def states(self, input_ids: Tensor, names: Sequence[int]) -> Tensor:
        """Hidden states [batch, seqlen, features] of windows that are called `names`; those that fit are kept."""
        if all(name in self.kept for name in names):
            return torch.stack([self.kept[name] for name in names])
        result = hidden_state(self.runner, input_ids)
        for name, state in zip(names, result, strict=True):
            if name not in self.kept and self.nbytes < KEPT_BYTES and not self.shared:
                self._keep(name, state)
        return result

    def _keep(self, name: int, state: Tensor) -> None:
        self.kept[name] = state.clone()
        self.nbytes += state.nbytes

    @torch.no_grad()
    def keep_all(self, input_ids: Tensor, names: Sequence[int]) -> bool:
        """Keep the states of all these windows, int64 [windows, seqlen].

        False, and nothing done, where they do not fit or the logits are not the head's product. Processes that share
        the weights come here together.
        """
        if self.head is None:
            return False
        missing = {name: row for row, name in enumerate(names) if name not in self.kept}
        nbytes = input_ids.shape[1] * self.head.in_features * self.dtype.itemsize * len(missing)
        if not everywhere(self.nbytes + nbytes <= KEPT_BYTES):
            return False
        todo = list(missing.items())
        turns = most(len(todo)) if self.shared else len(todo)  # each turn takes the others' shares
        show = LOG.isEnabledFor(logging.INFO)
        for turn in trange(turns, desc="dense model", unit="window", leave=False, disable=not show):
            name, row = todo[turn] if turn < len(todo) else (names[0], 0)
            state = hidden_state(self.runner, input_ids[row : row + 1].to(self.device))[0]
            if name not in self.kept:
                self._keep(name, state)
        return True

    def release(self) -> None:
        """Free the weights, all but the head's and a process's share of them. Until `restore` they are not there."""
        if self.shared:
            self.loaded.model = self.runner
            return
        for parameter in self.runner.parameters():
            if self.head is None or parameter is not self.head.weight:
                parameter.data = parameter.data.new_empty(0)

    def restore(self) -> None:
        """Make `loaded` whole again, if it is not: read its weights."""
        if self.shared and self.loaded.model is self.runner:
            self.loaded.model = load_model(self.loaded.source).model
            return
        freed = {name: p for name, p in self.loaded.model.named_parameters() if not p.numel()}
        if freed:
            again = load_model(self.loaded.source).model
            for name, parameter in freed.items():
                parameter.data = again.get_parameter(name).data.to(self.device, self.dtype)


def _share(loaded: LoadedModel, device: torch.device, dtype: torch.dtype, ranks: TrainingProcesses) -> None:
    """Leave a share of every block's weights, and of the rest but the head, in each process; they go to `device`."""
    model, mesh = loaded.model.to(dtype), init_device_mesh(device.type, (ranks.count,))
    for name in loaded.blocks:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True)
    for part in model.children():
        if part is not model.base_model:
            part.to(device)
