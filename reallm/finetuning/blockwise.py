"""The stage "blocks": train one block at a time, first to last, to reproduce the output of the dense model's block.

    loss = 1/2 mean over tokens of d G d^T,   d = y - y_dense,   G = mean over tokens of g g^T

y is the output of the student's block, whose input comes from the student's earlier, already trained blocks; y_dense is
the dense model's hidden state after the same block, on the same text. g is the gradient of the dense model's loss with
respect to y_dense, for labels sampled from that model. G is therefore the Fisher information (as in `calibration`), and
to second order the loss is the divergence in nats per token that d causes. The plain squared error, which other
block-wise methods minimise (AQLM, arXiv 2401.06118; OmniQuant, arXiv 2308.13137), is dominated by the few largest
features. In conversations the mean is over the tokens up to a window's last answer. Each block is trained by Adam with
a cosine schedule; if its loss on held-out windows does not fall, its old values are restored. Only the activations of
one block are in memory at a time.
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
from transformers import PreTrainedModel

from reallm.calibration.block_streaming import BlockStreamer
from reallm.calibration.calibrate import frozen
from reallm.calibration.objective import Objective
from reallm.errors import UserError
from reallm.system.progress import progress_bar
from reallm.system.tensor_file import save_tensors

from .chat_windows import SampledWindows
from .distillation import BETAS, training_order
from .resolved_settings import ResolvedSettings
from .student_teacher import StudentTeacher
from .trainable_parts import TrainableParts

LOG = logging.getLogger(__name__)
GRADIENT_WINDOWS = 8
"""Number of windows over which G is averaged."""
DAMPING = 0.01
"""Damping of G: this share of the mean of G's diagonal is added to the diagonal."""
DONE_FILE = "blocks.safetensors"


@dataclass(frozen=True)
class BlockWindow:
    """One window on its way through the blocks."""

    index: int
    """Its number among the streamer's windows."""
    student: Tensor
    """The input of the student's block, [1, seqlen, hidden]."""
    dense: Tensor
    """The output of the dense model's block, [1, seqlen, hidden]."""
    weights: Tensor
    """Weight of each token in the mean, float32 [seqlen]; the weights add up to one."""


def train_blocks(pair: StudentTeacher, parts: TrainableParts, settings: ResolvedSettings, folder: Path) -> None:
    """Train the parts inside the student's blocks, one block after another; parts outside the blocks stay as they are.

    Continues after the last block that an interrupted run finished in `folder`. Raises UserError for a model that
    cannot be run block by block.
    """
    path, blocks = folder / DONE_FILE, [pair.student.get_submodule(name) for name in pair.dense.blocks]
    done = _load_state(path, parts)
    if done == len(blocks):
        return
    count = min(settings.block_windows, len(pair.train.tokens))
    train = pair.train[:count]
    windows = torch.cat([train.tokens, pair.held_out.tokens])
    weights = [*mean_weights(train), *mean_weights(pair.held_out)]
    objective = Objective(pair.dense, windows, settings.seed, masked=True)
    streamer = BlockStreamer(pair.dense, folder / "blocks", objective)
    with frozen(pair.dense.model):
        streamer.store_results()
        if not streamer.is_chain:
            raise UserError(
                f"{pair.dense.source}: its blocks do not form a chain, so they cannot be trained one by one; leave the "
                "stage `blocks` out"
            )
        blocks = [pair.student.get_submodule(call.path) for call in streamer.calls]
        moments = output_moments(streamer, settings.seed)
    states = _first_inputs(pair.student, blocks[0], windows)
    quiet = not LOG.isEnabledFor(logging.INFO)
    for number, block in enumerate(progress_bar(blocks, desc="blocks", unit="block", disable=quiet)):
        inputs = [
            BlockWindow(index, state, streamer.results.read(number, index)[0], weight)
            for index, (state, weight) in enumerate(zip(states, weights, strict=True))
        ]
        trainer = BlockTrainer(streamer, number, block, moments[number])
        if number >= done:
            trainer.train(inputs[:count], inputs[count:], parts.parameter_groups_within(block), settings)
            save_tensors(path, {"done": torch.tensor(number + 1), **parts.state()})
        states = trainer.outputs(states)
    shutil.rmtree(streamer.results.folder)


def _windows_of(states: Tensor) -> list[Tensor]:
    """`states` [windows, ...] as one tensor [1, ...] per window."""
    return [states[index : index + 1] for index in range(len(states))]


def mean_weights(sample: SampledWindows) -> list[Tensor]:
    """The token weights of every window, float32 [seqlen] each, adding up to one per window.

    Tokens after the last scored one, which may be padding, have weight zero.
    """
    if sample.scored is None:
        return [torch.full((sample.tokens.shape[1],), 1 / sample.tokens.shape[1])] * len(sample.tokens)
    up_to_last = sample.scored.flip(1).cumsum(1).flip(1) > 0
    return [row / row.sum() for row in up_to_last.float()]


def _load_state(path: Path, parts: TrainableParts) -> int:
    """Load the state that an interrupted run saved, if there is one; returns how many blocks that run had trained."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError):
        return 0
    done = int(state.pop("done"))
    parts.load_state(state)
    return done


def output_moments(streamer: BlockStreamer, seed: int) -> list[Tensor]:
    """G [hidden, hidden] at every block's output, damped, from the first GRADIENT_WINDOWS windows."""
    loaded, windows = streamer.loaded, streamer.objective.inputs[:GRADIENT_WINDOWS]
    few = BlockStreamer(loaded, streamer.results.folder / "few", Objective(loaded, windows, seed, masked=True))
    few.store_results()
    few.run_tail(few.hooks([]))
    moments: list[Tensor] = []
    for number in reversed(range(len(few.calls))):
        gradients = few.gradients.of_results(number)
        g = torch.cat([gradients.read(window)[0] for window in range(few.windows)]).float().flatten(0, -2)
        G = g.T @ g / len(g)
        moments.append(G + torch.diag(DAMPING * G.diagonal().mean().expand(len(G))))
        few.gradients.store(number, *few.run_call(number, few.hooks([])))
    return moments[::-1]


class _ReachedBlocksError(Exception):
    """Raised in a forward pass to end it when it reaches the first block."""


@torch.no_grad()
def _first_inputs(model: PreTrainedModel, first: nn.Module, windows: Tensor) -> list[Tensor]:
    """The inputs of the block `first`, one tensor [1, seqlen, hidden] per window of `windows` (token ids [n,
    seqlen]).
    """
    inputs: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedBlocksError

    with first.register_forward_pre_hook(stop, with_kwargs=True):
        for window in _windows_of(windows):
            with suppress(_ReachedBlocksError):
                model(input_ids=window.to(model.device))
    return inputs


class BlockTrainer:
    """Trains one block of the student; `moment` is G at its output."""

    def __init__(self, streamer: BlockStreamer, number: int, block: nn.Module, moment: Tensor) -> None:
        self.streamer, self.number, self.block, self.moment = streamer, number, block, moment

    def loss(self, window: BlockWindow) -> Tensor:
        """The loss of the block's output on one window, nats per token."""
        device = window.student.device
        output = self.streamer.replay(self.number, window.index, window.student, self.block)
        d = (output - window.dense.to(device)).float()[0]
        return 0.5 * (((d @ self.moment.to(device)) * d).sum(-1) * window.weights.to(device)).sum()

    @torch.no_grad()
    def outputs(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The block's output [1, seqlen, hidden] for each of the hidden states [1, seqlen, hidden] in `states`."""
        return [self.streamer.replay(self.number, index, state, self.block) for index, state in enumerate(states)]

    @torch.no_grad()
    def mean_loss(self, windows: Sequence[BlockWindow]) -> float:
        """The mean loss over `windows`, nats per token."""
        return sum(float(self.loss(window)) for window in windows) / len(windows)

    def train(
        self,
        train: Sequence[BlockWindow],
        held_out: Sequence[BlockWindow],
        groups: Mapping[str, Sequence[nn.Parameter]],
        settings: ResolvedSettings,
    ) -> None:
        """Minimise the loss on `train`; restore the parameters if the loss on `held_out` does not fall."""
        parameters = [parameter for group in groups.values() for parameter in group]
        if not parameters:
            return
        start, before = [p.detach().clone() for p in parameters], self.mean_loss(held_out)
        rates = settings.learning_rates
        optimiser = torch.optim.Adam(
            [{"params": group, "lr": rates[name]} for name, group in groups.items()], betas=BETAS
        )
        steps = settings.block_epochs * len(train)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        for index in training_order(len(train), steps, settings.seed).tolist():
            optimiser.zero_grad()
            torch.autograd.backward(self.loss(train[index]))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
        after = self.mean_loss(held_out)
        LOG.debug("block %d: held-out loss %.5f -> %.5f nats per token", self.number, before, after)
        if not after < before:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
