"""Block-wise training: each block's output is brought nearer to the dense block's, one block at a time, first to last.

    loss = 1/2 mean over tokens of d G d^T,   d = y - y_dense,   G = mean over tokens of g g^T

y is what the block makes of the outputs of the blocks before it, trained already; y_dense is the hidden state of the
dense model on the same text. G is the second moment of the gradient of the dense model's loss at y_dense, for labels
drawn from that model: to second order the loss is the divergence in nats per token that d causes (the Fisher
information, as in `calibration`); the plain squared error, which block-wise methods minimise (AQLM, arXiv 2401.06118;
OmniQuant, arXiv 2308.13137), is ruled by the few features of largest size. Of conversations the tokens up to a window's
last answer count. Adam, a cosine a block; a block whose loss on held-out windows did not fall is put back. Memory holds
one block's activations.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from reallm.calibration.block_streaming import Streamer
from reallm.calibration.calibrate import frozen
from reallm.calibration.hidden_states import save_tensors
from reallm.calibration.hooks import StatisticsHooks

from .chat_windows import SampledWindows
from .distillation import BETAS, training_order
from .pair import Pair, Training
from .trained import Trained

LOG = logging.getLogger(__name__)
GRADIENT_WINDOWS = 8
DAMPING = 0.01
"""Share of G's mean diagonal that is added to it."""
DONE_FILE = "blocks.safetensors"


@dataclass(frozen=True)
class _Window:
    """The hidden state that one window has reached, the dense model's at that place, both [1, seqlen, hidden]."""

    own: Tensor
    dense: Tensor
    weights: Tensor
    """Of its tokens, float32 [seqlen], sum one."""


def train_blocks(pair: Pair, trained: Trained, training: Training, folder: Path) -> None:
    """Train what lies in the blocks of `pair.model`, one after another; what lies outside them stays as it is.

    Goes on after the last block that an interrupted run finished in `folder`. Raises UserError for a model that cannot
    be run block by block.
    """
    path, blocks = folder / DONE_FILE, [pair.model.get_submodule(name) for name in pair.original.blocks]
    done = _restore(path, trained)
    if done == len(blocks):
        return
    count = min(training.block_windows, len(pair.train.tokens))
    learned = pair.train[:count]
    windows = torch.cat([learned.tokens, pair.held_out.tokens])
    weights = [*_token_weights(learned), *_token_weights(pair.held_out)]
    streamer = Streamer(pair.original, folder / "blocks", windows, training.seed, masked=True)
    with frozen(pair.original.model):
        streamer.store_inputs()
        moments = _output_moments(streamer, training.seed)
    states = _inputs(pair.model, blocks[0], windows)
    for number, block in enumerate(tqdm(blocks, desc="blocks", disable=not LOG.isEnabledFor(logging.INFO))):
        dense = _each(streamer.boundaries.read(number + 1))
        flow = [_Window(*parts) for parts in zip(states, dense, weights, strict=True)]
        work = _Block(streamer, number, block, moments[number])
        if number >= done:
            work.train(flow[:count], flow[count:], trained.groups_within(block), training)
            save_tensors(path, {"done": torch.tensor(number + 1), **trained.state()})
        states = work.outputs(states)
    shutil.rmtree(streamer.boundaries.folder)


def _each(states: Tensor) -> list[Tensor]:
    return [states[index : index + 1] for index in range(len(states))]


def _token_weights(sample: SampledWindows) -> list[Tensor]:
    """Of every window's tokens, float32 [seqlen], sum one; none after the last that is scored, which may be padding."""
    if sample.scored is None:
        return [torch.full((sample.tokens.shape[1],), 1 / sample.tokens.shape[1])] * len(sample.tokens)
    before_the_end = sample.scored.flip(1).cumsum(1).flip(1) > 0
    return [row / row.sum() for row in before_the_end.float()]


def _restore(path: Path, trained: Trained) -> int:
    """Blocks that an interrupted run has trained; their state is loaded."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return 0
    done = int(found.pop("done"))
    trained.load_state(found)
    return done


def _output_moments(streamer: Streamer, seed: int) -> list[Tensor]:
    """G [hidden, hidden] at every block's output, of mean diagonal as found, damped; from the first windows."""
    folder, windows = streamer.boundaries.folder / "few", streamer.inputs[:GRADIENT_WINDOWS]
    few = Streamer(streamer.loaded, folder, windows, seed, masked=True)
    few.store_inputs()
    few.run_tail(StatisticsHooks(streamer.loaded, [], 1))
    moments: list[Tensor] = []
    for number in reversed(range(len(few.blocks))):
        g = few.boundaries.gradient(number + 1).float().flatten(0, -2)
        G = g.T @ g / len(g)
        moments.append(G + torch.diag(DAMPING * G.diagonal().mean().expand(len(G))))
        few.boundaries.keep_gradient(number, few.run_block(number, StatisticsHooks(streamer.loaded, [], 1)))
    return moments[::-1]


class _ReachedBlocksError(Exception):
    """Ends a forward pass at the first block."""


@torch.no_grad()
def _inputs(model: PreTrainedModel, first: nn.Module, windows: Tensor) -> list[Tensor]:
    """What `model` gives its first block for every window of token ids [windows, seqlen]: [1, seqlen, hidden] each."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedBlocksError

    with first.register_forward_pre_hook(stop, with_kwargs=True):
        for window in _each(windows):
            with suppress(_ReachedBlocksError):
                model(input_ids=window.to(model.device))
    return found


class _Block:
    """One block of the compressed model."""

    def __init__(self, streamer: Streamer, number: int, block: nn.Module, moment: Tensor) -> None:
        self.streamer, self.number, self.block, self.moment = streamer, number, block, moment

    def loss(self, window: _Window) -> Tensor:
        """Of what it makes of a window, in nats per token."""
        place = window.own.device
        d = (self.streamer.replay(self.number, window.own, self.block) - window.dense.to(place)).float()[0]
        return 0.5 * (((d @ self.moment.to(place)) * d).sum(-1) * window.weights.to(place)).sum()

    @torch.no_grad()
    def outputs(self, states: Sequence[Tensor]) -> list[Tensor]:
        """What it makes of every hidden state [1, seqlen, hidden]."""
        return [self.streamer.replay(self.number, state, self.block) for state in states]

    @torch.no_grad()
    def mean_loss(self, flow: Sequence[_Window]) -> float:
        """Over all windows."""
        return sum(float(self.loss(window)) for window in flow) / len(flow)

    def train(
        self,
        learn: Sequence[_Window],
        check: Sequence[_Window],
        groups: Mapping[str, Sequence[nn.Parameter]],
        training: Training,
    ) -> None:
        """Lower the loss on `learn`; nothing is changed if that on `check` does not fall."""
        parameters = [parameter for group in groups.values() for parameter in group]
        if not parameters:
            return
        start, before = [p.detach().clone() for p in parameters], self.mean_loss(check)
        rates = training.rates
        optimiser = torch.optim.Adam(
            [{"params": group, "lr": rates[name]} for name, group in groups.items()], betas=BETAS
        )
        steps = training.block_epochs * len(learn)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        for index in training_order(len(learn), steps, training.seed).tolist():
            optimiser.zero_grad()
            torch.autograd.backward(self.loss(learn[index]))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
        after = self.mean_loss(check)
        LOG.debug("block %d: %.5f nats per token on held-out windows, %.5f after", self.number, before, after)
        if not after < before:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
