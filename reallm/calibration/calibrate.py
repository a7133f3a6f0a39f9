"""Calibration: one streaming pass over the blocks that gives every matrix its metric.

Forward once, keeping each block's input on disk; then from the last block to the first replay one block at a time with
gradients. Only one block's statistics are ever in memory. With labels sampled from the model, g_t the gradient of the
summed loss at a matrix's output and x_t its input at token t, over the n tokens of the text (of which an encoder's loss
is taken at the masked ones):

    H_guided  = 1/n sum mean_i(g_ti^2) x_t x_t^T         per matrix (GuidedQuant, arXiv 2505.07004)
    F_ij      = 1/n sum g_ti^2 x_tj^2                    per matrix, the diagonal Fisher (LQ-LoRA, arXiv 2311.12023)
    G         = 1/n sum mean_j(x_tj^2) g_t g_t^T         per linear layer: H_guided x G is a Kronecker factorisation of
                                                         the Fisher information (as in K-FAC, arXiv 1503.05671)

An output head also gets a weight per row, mean_t(g_ti^2) over its mean; an embedding gets the diagonal Fisher of its
look-ups. One file a block; a pass that is interrupted goes on at the block it had reached.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.models.loaded import LoadedModel, Matrix
from reallm.models.probe import eager_experts
from reallm.system.lock import exclusive_lock

from .block_streaming import Streamer
from .compressed_prefix import weights_of
from .hidden_states import save_tensors
from .hooks import StatisticsHooks

OUTER = "outer"
DONE_FILE = "calibration.json"
MEMORY_SHARE = 0.3


@dataclass(frozen=True)
class BlockStatistics:
    """Float32 statistics of the matrices of one block (or of those outside all blocks), by name."""

    guided: dict[str, Tensor]
    """Matrix name -> H_guided [K, K]."""
    fisher: dict[str, Tensor]
    """Matrix name -> F [N, K]."""
    row_weights: dict[str, Tensor]
    """Head name -> [N], mean one."""
    lookups: dict[str, Tensor]
    """Embedding name -> diagonal Fisher of its look-ups [N, K]."""
    grams: dict[str, Tensor]
    """Linear layer or expert -> second moment of its output's gradients [N, N]."""


@dataclass
class CalibrationReport:
    """What a calibration measured besides the statistics."""

    tokens: int
    perplexity: float
    seconds: float
    """Of the run that finished it."""
    notes: list[str] = field(default_factory=list)
    """What the user should hear, one line each."""


def statistics_path(folder: Path, block: int | None) -> Path:
    """File of the statistics of block number `block`, or of what lies outside the blocks."""
    return folder / (f"{OUTER}.safetensors" if block is None else f"block-{block:04d}.safetensors")


def read_statistics(folder: Path, block: int | None, matrices: Sequence[Matrix]) -> BlockStatistics:
    """Statistics of `matrices`, which all lie in `block`; nothing else is read. Raises UserError for a damaged file."""
    path = statistics_path(folder, block)
    names = {m.name for m in matrices}
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("guided", "fisher", "row_weight", "lookup", "gram")}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, name = key.split("/", 1)
                if kind in parts and name in names:
                    parts[kind][name] = file.get_tensor(key).float()
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the folder {folder} and measure again") from None
    return BlockStatistics(*parts.values())


def calibrate(
    loaded: LoadedModel, windows: Tensor, folder: Path, *, seed: int = 0, prefix: Path | None = None
) -> CalibrationReport:
    """Write the statistics of every matrix of `loaded` on `windows` (int64 [n, seqlen]) to `folder`; resumable.

    `prefix`: an artifact whose weights give the blocks their inputs (see `prefix`); None for the model's own.
    The caller gives every (model, text, settings) a folder of its own; a second process in it waits for the first.
    Raises UserError for activations or gradients that are not finite, and for blocks that form no chain.
    """
    with exclusive_lock(folder):
        done, partial = folder / DONE_FILE, folder / "partial"
        if not done.exists():
            with ExitStack() as stack:
                if prefix is not None:
                    stack.enter_context(weights_of(prefix, loaded))
                stack.enter_context(eager_experts(loaded.model))
                stack.enter_context(frozen(loaded.model))
                stack.enter_context(computing_in(loaded.model, compute_dtype(loaded)))
                report = _calibrate(loaded, windows, folder, seed)
            write_text_atomic(done, canonical_json(vars(report)))
        shutil.rmtree(partial, ignore_errors=True)
        return CalibrationReport(**json.loads(done.read_text(encoding="utf-8")))


def compute_dtype(loaded: LoadedModel) -> torch.dtype:
    """Float32, unless a copy of the model in it would take over MEMORY_SHARE of the free memory: then its own dtype.

    More exact, and on processors without bfloat16 arithmetic six times as fast.
    """
    nbytes = 4 * sum(tensor.numel() for tensor in loaded.model.parameters())
    fits = nbytes <= MEMORY_SHARE * psutil.virtual_memory().available
    return torch.float32 if fits else loaded.dtype


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of another floating dtype are in `dtype` meanwhile; afterwards they are what they were."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype not in (dtype, torch.float32)]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _calibrate(loaded: LoadedModel, windows: Tensor, folder: Path, seed: int) -> CalibrationReport:
    """Every step leaves a whole file behind it, and is skipped when that is there."""
    began = time.monotonic()
    partial = folder / "partial"
    streamer = Streamer(loaded, partial, windows, seed)
    streamer.store_inputs()
    tokens = int(windows.numel())
    outside = [m for m in loaded.matrices if m.block is None]
    tail_path, perplexity_path = partial / "tail.safetensors", partial / "tail.json"
    if not perplexity_path.exists():
        tail = StatisticsHooks(loaded, outside, tokens)
        perplexity = streamer.run_tail(tail)
        save_tensors(tail_path, tail.collected())
        write_text_atomic(perplexity_path, canonical_json(perplexity))
    reached = streamer.boundaries.first_gradient()
    assert reached is not None
    for number in tqdm(range(reached - 1, -1, -1), desc="calibrate: blocks", unit="block"):
        taps = StatisticsHooks(loaded, [m for m in loaded.matrices if m.block == number], tokens)
        gradient = streamer.run_block(number, taps)
        save_tensors(statistics_path(folder, number), taps.collected())
        streamer.boundaries.keep_gradient(number, gradient)  # after the statistics: a resumed pass repeats the block
    front = StatisticsHooks(loaded, outside, tokens)
    streamer.run_front(front)
    save_tensors(statistics_path(folder, None), {**load_file(tail_path), **front.collected()})
    perplexity = float(json.loads(perplexity_path.read_text(encoding="utf-8")))
    notes = streamer.notes + _untouched(loaded, folder)
    return CalibrationReport(tokens, perplexity, time.monotonic() - began, notes)


def _untouched(loaded: LoadedModel, folder: Path) -> list[str]:
    """What to say of matrices that no token of the text reached: they have no statistics.

    Raises UserError for a stack of experts none of which was seen: its products are hidden from the taps.
    """
    keys: set[str] = set()
    for block in {m.block for m in loaded.matrices}:
        with safe_open(statistics_path(folder, block), framework="pt") as file:
            keys.update(file.keys())
    empty = [m for m in loaded.matrices if not {f"guided/{m.name}", f"lookup/{m.name}"} & keys]
    reached = {m.parameter for m in loaded.matrices if f"guided/{m.name}" in keys}
    if hidden := [m.parameter for m in empty if m.kind == "expert" and m.parameter not in reached]:
        what = f"the products of {hidden[0]} cannot be watched; expected one matrix product an expert"
        raise UserError(f"{loaded.source}: {what}: this architecture cannot be calibrated")
    if not empty:
        return []
    what = f"no token of the text reached {len(empty)} of {len(loaded.matrices)} matrices, such as {empty[0].name}"
    return [f"{what}; any error in them counts as free: calibrate on more text"]
