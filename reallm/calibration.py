"""Calibration: one streaming pass over the blocks that gives every matrix its metric.

Forward once, keeping each block's input on disk; then from the last block to the first replay one block at a time with
gradients. Only one block's statistics are ever in memory. With labels sampled from the model, g_t the gradient of the
summed loss at a matrix's output and x_t its input at token t, over n tokens:

    H         = 1/n sum x_t x_t^T                        per distinct input
    H_guided  = 1/n sum mean_i(g_ti^2) x_t x_t^T         per matrix (GuidedQuant, arXiv 2505.07004)
    F_ij      = 1/n sum g_ti^2 x_tj^2                    per matrix, the diagonal Fisher (LQ-LoRA, arXiv 2311.12023)

An output head also gets a weight per row, mean_t(g_ti^2) over its mean; an embedding gets the diagonal Fisher of its
look-ups. One file a block; a pass that is interrupted goes on at the block it had reached.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from reallm.planner.records import canonical_json, write_text_atomic

from .errors import UserError
from .model import LoadedModel, Matrix
from .taps import Tap, Taps

LOG = logging.getLogger(__name__)
OUTER = "outer"
MASK_SHARE = 0.15  # of the tokens of a masked language model (BERT, arXiv 1810.04805)
DONE_FILE = "calibration.json"


@dataclass(frozen=True)
class BlockStatistics:
    """Float32 statistics of the matrices of one block (or of those outside all blocks), by name."""

    hessians: dict[str, Tensor]
    """Input name -> H [K, K]."""
    guided: dict[str, Tensor]
    """Matrix name -> H_guided [K, K]."""
    fisher: dict[str, Tensor]
    """Matrix name -> F [N, K]."""
    row_weights: dict[str, Tensor]
    """Head name -> [N], mean one."""
    lookups: dict[str, Tensor]
    """Embedding name -> diagonal Fisher of its look-ups [N, K]."""


@dataclass
class CalibrationReport:
    """What a calibration measured besides the statistics."""

    tokens: int
    perplexity: float
    seconds: float
    notes: list[str] = field(default_factory=list)


class _ReachedBlocksError(Exception):
    """Ends a forward pass once the first block has been reached."""


@dataclass(frozen=True)
class _Call:
    """How the model calls one block: everything but the hidden state."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    returns_tuple: bool


def statistics_path(folder: Path, block: int | None) -> Path:
    """File of the statistics of block number `block`, or of what lies outside the blocks."""
    return folder / (f"{OUTER}.safetensors" if block is None else f"block-{block:04d}.safetensors")


def read_statistics(folder: Path, block: int | None, matrices: Sequence[Matrix]) -> BlockStatistics:
    """Statistics of `matrices`, which all lie in `block`; nothing else is read."""
    path = statistics_path(folder, block)
    names = {m.name for m in matrices}
    wanted = {
        "hessian": {m.input for m in matrices},
        "guided": names,
        "fisher": names,
        "row_weight": names,
        "lookup": names,
    }
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in wanted}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, name = key.split("/", 1)
            if name in wanted[kind]:
                parts[kind][name] = file.get_tensor(key).float()
    return BlockStatistics(parts["hessian"], parts["guided"], parts["fisher"], parts["row_weight"], parts["lookup"])


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
    partial.replace(path)


class _Streamer:
    """The model, seen as a front (embeddings), a chain of blocks and a tail (norm and head)."""

    def __init__(self, loaded: LoadedModel, folder: Path, windows: Tensor, seed: int) -> None:
        self.loaded, self.folder, self.windows, self.seed = loaded, folder, windows, seed
        self.model = loaded.model
        self.blocks = [self.model.get_submodule(name) for name in loaded.blocks]
        self.calls: list[_Call] = []
        self.partial = folder / "partial"
        self.notes: list[str] = []
        self.inputs: Tensor = windows
        self.scored: Tensor | None = None
        if _is_encoder(loaded):
            self.inputs, self.scored = self._masked()

    def _masked(self) -> tuple[Tensor, Tensor]:
        """Windows with masked tokens, and where the loss of a masked language model is taken."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.rand(self.windows.shape, generator=generator) < MASK_SHARE
        token = getattr(self.loaded.tokenizer, "mask_token_id", None)
        if token is None:
            self.notes.append("the tokenizer has no mask token: all tokens are scored unmasked")
            return self.windows, torch.ones_like(chosen)
        chosen[:, 0] = True
        return self.windows.masked_fill(chosen, int(token)), chosen

    def _forward(self, window: int) -> Any:
        keywords = {} if _is_encoder(self.loaded) else {"use_cache": False}
        return self.model(input_ids=self.inputs[window : window + 1], **keywords)

    # -- the forward pass -------------------------------------------------------------------------------------------

    def store_inputs(self) -> None:
        """Run the model over all windows and keep every block's input (and the last block's output) on disk."""
        self.partial.mkdir(parents=True, exist_ok=True)
        complete = all(self._input_path(b).exists() for b in range(len(self.blocks) + 1))
        kept: list[list[Tensor]] = [[] for _ in range(len(self.blocks) + 1)]
        count = 1 if complete else len(self.windows)
        with torch.no_grad(), self._record(kept):
            for window in tqdm(range(count), desc="calibrate: forward", unit="window", disable=complete):
                self._forward(window)
        self._check_chain(kept)
        if not complete:
            for number, tensors in enumerate(kept):
                stacked = torch.cat(tensors)
                if not bool(torch.isfinite(stacked).all()):
                    where = self.loaded.blocks[number] if number < len(self.blocks) else "the last block's output"
                    raise UserError(f"{self.loaded.source}: activations at {where} are not finite; load it in float32")
                _save(self._input_path(number), {"hidden": stacked})

    def _input_path(self, block: int) -> Path:
        return self.partial / f"input-{block:04d}.safetensors"

    @contextmanager
    def _record(self, kept: list[list[Tensor]]) -> Iterator[None]:
        handles = []
        calls: list[_Call | None] = [None] * len(self.blocks)

        def before(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                kept[number].append(hidden.detach().clone())
                rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}
                calls[number] = _Call(args[1:], rest, returns_tuple=False)

            return hook

        def after(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                call = calls[number]
                assert call is not None
                calls[number] = _Call(call.arguments, call.keywords, isinstance(output, tuple))
                if number == len(self.blocks) - 1:
                    kept[-1].append((output[0] if isinstance(output, tuple) else output).detach().clone())

            return hook

        for number, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
            handles.append(block.register_forward_hook(after(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.calls = [call for call in calls if call is not None]

    def _check_chain(self, kept: list[list[Tensor]]) -> None:
        """The blocks must form a chain: replaying one gives the next one's input."""
        if len(self.calls) != len(self.blocks) or any(not tensors for tensors in kept):
            raise UserError(f"{self.loaded.source}: not every block ran; this architecture cannot be streamed yet")
        for number in {0, len(self.blocks) - 1}:
            with torch.no_grad():
                output = self._replay(number, kept[number][0])
            if not torch.equal(output, kept[number + 1][0]):
                gap = float((output - kept[number + 1][0]).abs().max())
                what = f"replaying {self.loaded.blocks[number]} differs from the model by {gap:.3g}"
                raise UserError(f"{self.loaded.source}: {what}; its blocks form no chain and cannot be streamed yet")

    def _replay(self, number: int, hidden: Tensor) -> Tensor:
        call = self.calls[number]
        output = self.blocks[number](hidden, *call.arguments, **call.keywords)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    # -- tail and front ---------------------------------------------------------------------------------------------

    @contextmanager
    def _bypassed(self, last_output: Tensor | None) -> Iterator[None]:
        """Blocks do nothing; the last one returns `last_output`. With None, the first block ends the pass."""
        originals = [block.forward for block in self.blocks]

        def pass_through(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if last_output is None:
                    raise _ReachedBlocksError(hidden)
                result = last_output if number == len(self.blocks) - 1 else hidden
                return (result,) if self.calls[number].returns_tuple else result

            return forward

        try:
            for number, block in enumerate(self.blocks):
                block.forward = pass_through(number)
            yield
        finally:
            for block, original in zip(self.blocks, originals, strict=True):
                block.forward = original

    def run_tail(self, taps: Taps) -> float:
        """Loss gradient at the last block's output, kept on disk; returns the perplexity of the text itself."""
        hidden = load_file(self._input_path(len(self.blocks)))["hidden"]
        generator = torch.Generator().manual_seed(self.seed)
        gradients, losses, scored_tokens = [], 0.0, 0
        for window in tqdm(range(len(self.windows)), desc="calibrate: head", unit="window"):
            leaf = hidden[window : window + 1].clone().requires_grad_()
            with taps.listen(), self._bypassed(leaf):
                logits = self._forward(window).logits[0]
                loss, text_loss, count = self._losses(logits, window, generator)
                torch.autograd.backward(loss)
            assert leaf.grad is not None
            gradients.append(leaf.grad.detach())
            losses, scored_tokens = losses + text_loss, scored_tokens + count
        self._save_gradient(len(self.blocks), torch.cat(gradients))
        return float(torch.tensor(losses / max(scored_tokens, 1)).exp())

    def _losses(self, logits: Tensor, window: int, generator: torch.Generator) -> tuple[Tensor, float, int]:
        """(summed loss against sampled labels, summed loss against the text, tokens of the latter)."""
        scores = logits.float()
        with torch.no_grad():
            sampled = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
        text = self.windows[window]
        if self.scored is not None:
            mask = self.scored[window]
            own = nn.functional.cross_entropy(scores[mask], sampled[mask], reduction="sum")
            with torch.no_grad():
                true = nn.functional.cross_entropy(scores[mask], text[mask], reduction="sum")
            return own, float(true), int(mask.sum())
        own = nn.functional.cross_entropy(scores, sampled, reduction="sum")
        with torch.no_grad():
            true = nn.functional.cross_entropy(scores[:-1], text[1:], reduction="sum")
        return own, float(true), len(text) - 1

    def _save_gradient(self, boundary: int, gradient: Tensor) -> None:
        _save(self.partial / f"gradient-{boundary:04d}.safetensors", {"gradient": gradient})
        (self.partial / f"gradient-{boundary + 1:04d}.safetensors").unlink(missing_ok=True)

    def gradient_at(self, boundary: int) -> Tensor | None:
        """Kept gradient at the input of block number `boundary`."""
        path = self.partial / f"gradient-{boundary:04d}.safetensors"
        return load_file(path)["gradient"] if path.exists() else None

    def run_block(self, number: int, taps: Taps) -> None:
        """Replay one block over all windows with gradients, and keep the gradient at its input."""
        hidden = load_file(self._input_path(number))["hidden"]
        gradient = self.gradient_at(number + 1)
        assert gradient is not None
        result = torch.empty_like(hidden)
        for window in range(len(self.windows)):
            part = slice(window, window + 1)
            leaf = hidden[part].clone().requires_grad_()
            with taps.listen():
                torch.autograd.backward(self._replay(number, leaf), gradient[part])
            assert leaf.grad is not None
            result[part] = leaf.grad
        self.finished = result
        self.finished_block = number

    def keep_gradient(self) -> None:
        """Store the gradient of the block that ran last: after its statistics, so that a resumed pass repeats it."""
        self._save_gradient(self.finished_block, self.finished)

    def run_front(self, taps: Taps) -> None:
        """Carry the gradient from the first block's input to the embeddings."""
        gradient = self.gradient_at(0)
        assert gradient is not None
        for window in range(len(self.windows)):
            with taps.listen(), self._bypassed(None):
                try:
                    self._forward(window)
                except _ReachedBlocksError as stopped:
                    (hidden,) = stopped.args
                if hidden.requires_grad:
                    torch.autograd.backward(hidden, gradient[window : window + 1])


def _is_encoder(loaded: LoadedModel) -> bool:
    return not loaded.model.can_generate()


def _matrices_of(loaded: LoadedModel, block: int | None) -> list[Matrix]:
    return [m for m in loaded.matrices if m.block == block]


def _finished_report(folder: Path) -> CalibrationReport | None:
    path = folder / DONE_FILE
    if not path.exists():
        return None
    return CalibrationReport(**json.loads(path.read_text(encoding="utf-8")))


def calibrate(loaded: LoadedModel, windows: Tensor, folder: Path, *, seed: int = 0) -> CalibrationReport:
    """Write the statistics of every matrix of `loaded` on `windows` (int64 [n, seqlen]) to `folder`; resumable.

    The caller gives every (model, text, settings) a folder of its own.
    """
    if (report := _finished_report(folder)) is not None:
        return report
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    streamer = _Streamer(loaded, folder, windows, seed)
    streamer.store_inputs()
    tokens = int(windows.numel())
    reached = next((b for b in range(len(loaded.blocks) + 1) if streamer.gradient_at(b) is not None), None)
    outer = Taps(loaded, _matrices_of(loaded, None), tokens)
    tail_path = streamer.partial / "tail.safetensors"
    note_path = streamer.partial / "tail.json"
    if reached is None or not note_path.exists():
        perplexity = streamer.run_tail(outer)
        _save(tail_path, outer.collected())
        write_text_atomic(note_path, canonical_json({"perplexity": perplexity}))
        reached = len(loaded.blocks)
    perplexity = float(json.loads(note_path.read_text(encoding="utf-8"))["perplexity"])
    for number in tqdm(range(reached - 1, -1, -1), desc="calibrate: blocks", unit="block"):
        taps = Taps(loaded, _matrices_of(loaded, number), tokens)
        streamer.run_block(number, taps)
        _save(statistics_path(folder, number), taps.collected())
        streamer.keep_gradient()
    front = Taps(loaded, _matrices_of(loaded, None), tokens)
    streamer.run_front(front)
    _save(statistics_path(folder, None), {**load_file(tail_path), **front.collected()})
    report = CalibrationReport(tokens, perplexity, time.monotonic() - began, streamer.notes)
    write_text_atomic(folder / DONE_FILE, canonical_json(vars(report)))
    shutil.rmtree(streamer.partial)
    return report


__all__ = ["BlockStatistics", "CalibrationReport", "Tap", "calibrate", "read_statistics", "statistics_path"]
