"""One forward pass of a few tokens that shows how a model uses its weights, since their names do not tell.

It shows two things:

- Which matrices have the same input: those whose input has the same bytes (q, k and v; gate and up).
- The orientation of a 3-D stack of experts: if the model computes y = x W^T, the last axis is summed over, so the stack
  is [E, out, in]; if it computes y = x W, the middle axis is summed over, so the stack is [E, in, out].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from reallm.errors import UserError

from .limits import vocabulary_size

PROBE_TOKENS = 8
_PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__})


@dataclass(frozen=True)
class Uses:
    """What one forward pass showed about each module and stack; those that the pass did not use have no entry."""

    inputs: dict[str, str] = field(default_factory=dict)
    """Module path, or parameter path of a 3-D stack -> fingerprint of its input."""
    transposed: dict[str, bool] = field(default_factory=dict)
    """Parameter path of a 3-D stack -> whether it is stored [E, in, out]."""
    token_lookups: set[int] = field(default_factory=set)
    """Addresses of the tables in which the token ids are looked up."""


def probe(model: PreTrainedModel, modules: Mapping[str, nn.Module], stacks: Mapping[str, Tensor]) -> Uses:
    """Run PROBE_TOKENS tokens through `model` and watch `modules` and the 3-D parameters `stacks`, both given by path.

    The model is left unchanged. Raises UserError if it needs more inputs than token ids.
    """
    uses = Uses()
    watchers = {name: _watcher(name, uses) for name in modules}
    handles = [modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name, hook in watchers.items()]
    training = model.training
    model.eval()
    try:
        ids = probe_ids(model)
        with torch.no_grad(), eager_experts(model), _StackWatch(stacks, uses, ids):
            model(input_ids=ids)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{type(model).__name__} cannot be run on token ids alone: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return uses


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Distinct token ids spread over the vocabulary, without the padding token, int64 [1, PROBE_TOKENS]."""
    rows = vocabulary_size(model)
    if rows is None:
        raise UserError(f"{type(model).__name__} has no embedding of token ids, so text cannot be run through it")
    special = {getattr(model.config.get_text_config(), "pad_token_id", None)}
    ids = [token for token in range(rows) if token not in special]
    step = max(1, len(ids) // PROBE_TOKENS)
    return torch.tensor([ids[step // 2 :: step][:PROBE_TOKENS]], device=model.device)


def _watcher(name: str, uses: Uses) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        uses.inputs[name] = uses.inputs.get(name, "") + fingerprint(x, name)

    return hook


def fingerprint(x: Tensor, owner: str) -> str:
    """Digest of the rows of `x` [..., K], the same for equal inputs.

    If all entries of `x` are equal, the digest depends on `owner` instead, because such inputs are equal by chance.
    """
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous().cpu()
    if flat.numel() == 0 or bool((flat == flat[0, 0]).all()):
        return f"constant:{owner};"
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes())
    digest.update(f"{flat.dtype} {tuple(flat.shape)}".encode())
    return digest.hexdigest() + ";"


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Make the model loop over its experts within the context: grouped versions hide all products in one call."""
    if not (hasattr(model, "set_experts_implementation") and hasattr(model, "get_experts_implementation")):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _StackWatch(TorchFunctionMode):
    """Records every matrix product whose weight lies inside one of the 3-D parameters `stacks`, and look-ups of `ids`.

    A table may have fewer rows than there are ids; then a model looks up another row for the larger ones.
    """

    def __init__(self, stacks: Mapping[str, Tensor], uses: Uses, ids: Tensor) -> None:
        super().__init__()
        self.stacks, self.uses, self.ids = stacks, uses, ids

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.embedding and self._are_token_ids(args[0]):
            self.uses.token_lookups.add(args[1].data_ptr())
        if self.stacks and len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            if func is nn.functional.linear:
                self._note(args[1], -1, args[0])
            elif func in _PRODUCTS:
                self._note(args[1], -2, args[0])
                self._note(args[0], -1, args[1])
        return func(*args, **(kwargs or {}))

    def _are_token_ids(self, ids: Tensor) -> bool:
        return ids.shape == self.ids.shape and 2 * int((ids == self.ids).sum()) > ids.numel()

    def _note(self, weight: Tensor, contracted: int, x: Tensor) -> None:
        """Record a product that contracts axis `contracted` of `weight` with `x`."""
        for name, stack in self.stacks.items():
            start = stack.data_ptr()
            inside = start <= weight.data_ptr() < start + stack.numel() * stack.element_size()
            if weight.ndim < 2 or not inside or name in self.uses.transposed:
                continue
            self.uses.transposed[name] = weight.stride(contracted) == stack.stride(1)
            self.uses.inputs[name] = fingerprint(x, name)
