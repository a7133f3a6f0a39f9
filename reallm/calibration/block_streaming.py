"""Running a model in parts, one at a time: a front (embeddings), a chain of blocks, and a tail (norm and head).

Each part can be run by itself, with gradients, on the hidden states and gradients that the neighbouring parts stored in
`HiddenStates`. The model must call its blocks in order, each on the output of the block before it; this is checked by
replaying every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reallm.errors import UserError
from reallm.models.loaded import LoadedModel
from reallm.system.progress import progress_bar
from reallm.text.masking import mask_windows

from .hidden_states import HiddenStates
from .hooks import StatisticsHooks

MAX_NATS = 700.0
"""Upper bound of a reported loss in nats per token, so that the perplexity exp(loss) does not overflow."""
WAY_OUT = "check the weights, or convert a float16 model to bfloat16 or float32"


class _ReachedBlocksError(Exception):
    """Raised to end a forward pass when it reaches the first block."""


@dataclass(frozen=True)
class _BlockCall:
    """The arguments with which the model calls one block, except the hidden state."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class BlockStreamer:
    """Runs the parts of `loaded` on token `windows` [n, seqlen].

    The hidden states and gradients that pass between the parts are stored in `folder`.
    """

    def __init__(self, loaded: LoadedModel, folder: Path, windows: Tensor, seed: int, *, masked: bool = False) -> None:
        """Prepare the parts; `masked` says that the windows are already masked (for an encoder)."""
        self.loaded, self.windows, self.seed = loaded, windows, seed
        self.device = loaded.model.device
        self.blocks = [loaded.model.get_submodule(name) for name in loaded.blocks]
        self.hidden_states = HiddenStates(folder, len(self.blocks) + 1)
        self.notes: list[str] = []
        """Notes for the user, one line each."""
        self.inputs: Tensor = windows
        """The token ids that the model reads: the windows, masked for an encoder, int64 [n, seqlen]."""
        self.scored: Tensor | None = None
        """The tokens on which a masked language model's loss is computed, bool [n, seqlen]; None for all tokens."""
        self._calls: list[_BlockCall | None] = [None] * len(self.blocks)
        self._returns_tuple = [False] * len(self.blocks)
        if loaded.is_encoder and not masked:
            self._mask_inputs()

    def _mask_inputs(self) -> None:
        token = getattr(self.loaded.tokenizer, "mask_token_id", None)
        if token is None:
            self.notes.append("the tokenizer has no mask token: all tokens are scored unmasked")
            self.scored = torch.ones_like(self.windows, dtype=torch.bool)
        else:
            self.inputs, self.scored = mask_windows(self.windows, int(token), self.seed)

    def _forward(self, window: int) -> Any:
        keywords = {} if self.loaded.is_encoder else {"use_cache": False}
        return self.loaded.model(input_ids=self.inputs[window : window + 1].to(self.device), **keywords)

    # -- forward ----------------------------------------------------------------------------------------------------

    def store_inputs(self) -> None:
        """Run all windows and store the input of every block and the output of the last, unless an earlier pass did.

        Raises UserError for activations that are not finite, and for blocks that do not form a chain.
        """
        if self.hidden_states.is_complete():
            with torch.no_grad(), self._watched(store=False):
                self._forward(0)
            self._check_chain()
            return
        with torch.no_grad(), self.hidden_states.writing(), self._watched(store=True):
            for window in progress_bar(range(len(self.windows)), desc="calibrate: forward", unit="window"):
                self._forward(window)
        self._check_chain()
        self.hidden_states.mark_complete()

    @contextmanager
    def _watched(self, store: bool) -> Iterator[None]:
        """Record the arguments and the type of result of each block; with `store`, also store the hidden states."""

        def before(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}
                self._calls[number] = _BlockCall(args[1:], rest)
                if store:
                    self._store(number, _hidden(args, kwargs))

            return hook

        def after(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                self._returns_tuple[number] = isinstance(output, tuple)
                if store and number == len(self.blocks) - 1:
                    self._store(number + 1, _first(output))

            return hook

        handles = []
        for number, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
            handles.append(block.register_forward_hook(after(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _store(self, boundary: int, hidden: Tensor) -> None:
        if not bool(torch.isfinite(hidden).all()):
            last = boundary == len(self.blocks)
            where = "the last block's output" if last else f"the input of {self.loaded.blocks[boundary]}"
            what = f"activations at {where} are NaN or infinite in {hidden.dtype}; expected finite ones"
            raise UserError(f"{self.loaded.source}: {what}; {WAY_OUT}")
        self.hidden_states.append(boundary, hidden)

    def _check_chain(self) -> None:
        """Raise UserError unless replaying each block on the first window gives exactly the input of the next block."""
        counts = self.hidden_states.windows
        if None in self._calls or set(counts) != {len(self.windows)}:
            what = f"its blocks ran {min(counts)} to {max(counts)} times on {len(self.windows)} windows"
            raise UserError(f"{self.loaded.source}: {what}, expected once each; this architecture cannot be streamed")
        hidden = self._read(0, 1)
        for number, name in enumerate(self.loaded.blocks):
            with torch.no_grad():
                replayed = self.replay(number, hidden)
            hidden = self._read(number + 1, 1)
            if not torch.equal(replayed, hidden):
                gap = float((replayed.float() - hidden.float()).abs().max()) if replayed.shape == hidden.shape else None
                what = f"{name} run alone differs from {name} in the model (by {gap}); expected a chain of blocks"
                raise UserError(f"{self.loaded.source}: {what}: this architecture cannot be streamed")

    def _read(self, boundary: int, count: int | None = None) -> Tensor:
        return self.hidden_states.read(boundary, count).to(self.device)

    def replay(self, number: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """The output [1, seqlen, hidden] of block `number` for hidden states [1, seqlen, hidden].

        If `block` is given, it is run in place of that block.
        """
        call = self._calls[number]
        assert call is not None
        return _first((block or self.blocks[number])(hidden, *call.arguments, **call.keywords))

    # -- backward ---------------------------------------------------------------------------------------------------

    def run_tail(self, hooks: StatisticsHooks) -> float:
        """Run the tail on all windows and store the loss gradient at the last block's output.

        Gradients are those of the loss on sampled labels; the perplexity returned is that of the text. Raises UserError
        for logits or gradients that are not finite.
        """
        last = len(self.blocks)
        hidden, generator = self._read(last), torch.Generator().manual_seed(self.seed)
        gradients, total, scored = torch.empty_like(hidden), 0.0, 0
        for window in progress_bar(range(len(self.windows)), desc="calibrate: head", unit="window"):
            leaf = hidden[window : window + 1].clone().requires_grad_()
            with hooks.recording(), self._bypassed(leaf):
                loss, text_loss, count = self._losses(self._forward(window).logits[0], window, generator)
                torch.autograd.backward(loss)
            if not math.isfinite(text_loss):
                raise UserError(f"{self.loaded.source}: its logits are NaN or infinite; {WAY_OUT}")
            gradients[window] = self._gradient_of(leaf, "the last block's output")
            total, scored = total + text_loss, scored + count
        self.hidden_states.store_gradient(last, gradients)
        return math.exp(min(total / max(scored, 1), MAX_NATS))

    def _losses(self, logits: Tensor, window: int, generator: torch.Generator) -> tuple[Tensor, float, int]:
        """(summed loss on sampled labels, summed loss on the text, number of tokens in the latter sum)."""
        scores, text = logits.float(), self.windows[window].to(self.device)
        with torch.no_grad():
            sampled = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(self.device)
        if self.scored is not None:
            mask = self.scored[window]
            sampled_loss = nn.functional.cross_entropy(scores[mask], sampled[mask], reduction="sum")
            text_loss = nn.functional.cross_entropy(scores[mask].detach(), text[mask], reduction="sum")
            return sampled_loss, float(text_loss), int(mask.sum())
        sampled_loss = nn.functional.cross_entropy(scores, sampled, reduction="sum")
        text_loss = nn.functional.cross_entropy(scores[:-1].detach(), text[1:], reduction="sum")
        return sampled_loss, float(text_loss), len(text) - 1

    def run_block(self, number: int, hooks: StatisticsHooks) -> Tensor:
        """Replay one block on all windows with gradients; returns the gradient at its input, which is not stored."""
        hidden, gradient = self._read(number), self.hidden_states.read_gradient(number + 1).to(self.device)
        result = torch.empty_like(hidden)
        for window in range(len(self.windows)):
            part = slice(window, window + 1)
            leaf = hidden[part].clone().requires_grad_()
            with hooks.recording():
                torch.autograd.backward(self.replay(number, leaf), gradient[part])
            result[part] = self._gradient_of(leaf, f"the input of {self.loaded.blocks[number]}")
        return result

    def run_front(self, hooks: StatisticsHooks) -> None:
        """Propagate the gradient from the first block's input back to the embeddings."""
        gradient = self.hidden_states.read_gradient(0).to(self.device)
        for window in range(len(self.windows)):
            with hooks.recording(), self._bypassed(None):
                try:
                    self._forward(window)
                except _ReachedBlocksError as stopped:
                    (hidden,) = stopped.args
                if hidden.requires_grad:
                    torch.autograd.backward(hidden, gradient[window : window + 1])

    def _gradient_of(self, leaf: Tensor, where: str) -> Tensor:
        if leaf.grad is None or not bool(torch.isfinite(leaf.grad).all()):
            what = f"the gradient at {where} is missing, NaN or infinite in {leaf.dtype}; expected a finite one"
            raise UserError(f"{self.loaded.source}: {what}; {WAY_OUT}")
        return leaf.grad

    @contextmanager
    def _bypassed(self, last_output: Tensor | None) -> Iterator[None]:
        """Within the context, blocks compute nothing: each returns its input, and the last one returns `last_output`.

        If `last_output` is None, the forward pass ends when it reaches the first block.
        """

        def pass_through(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = _hidden(args, kwargs)
                if last_output is None:
                    raise _ReachedBlocksError(hidden)
                result = last_output if number == len(self.blocks) - 1 else hidden
                return (result,) if self._returns_tuple[number] else result

            return forward

        overrides = [vars(block).get("forward") for block in self.blocks]
        try:
            for number, block in enumerate(self.blocks):
                block.forward = pass_through(number)
            yield
        finally:
            for block, override in zip(self.blocks, overrides, strict=True):
                if override is None:
                    del block.forward
                else:
                    block.forward = override


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state from a block's arguments."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _first(output: Any) -> Tensor:
    """The hidden state from a block's output."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
