"""Several processes that train one model together, as `torchrun` and `accelerate launch` start them.

    torchrun --nproc-per-node 2 -m reallm finetune out/ --text train.txt -o tuned/

All hold the whole compressed model; one step takes `batch_size` windows of each, and their gradients are averaged. The
first of them opens the folder, keeps checkpoints and writes the result. With `accelerate launch --use_fsdp` they share
the weights of the dense model (`original`), which are what is large; the compressed ones are not sharded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from reallm.system.lock import exclusive_lock


@dataclass(frozen=True)
class TrainingProcesses:
    """This process among those of the run."""

    index: int
    count: int
    shares_original: bool = False
    """Whether each holds a part of the dense model only."""

    @staticmethod
    def found(device: str) -> TrainingProcesses:
        """What the environment says; joins the others, so that they can wait for each other."""
        count = int(os.environ.get("WORLD_SIZE") or 1)
        if count < 2:
            return TrainingProcesses(0, 1)
        # from here on: or else the Trainer would shard what is trained, which is small
        shares = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        state = PartialState(cpu=device == "cpu")
        if state.process_index:
            logging.getLogger("reallm").setLevel(logging.WARNING)  # the first speaks for all
        return TrainingProcesses(state.process_index, state.num_processes, shares)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def own(self, rows: Tensor, batch_size: int) -> Tensor:
        """Those of `rows`, int64 [steps * count * batch_size], that this process is given by the Trainer's sampler."""
        return rows.view(-1, self.count, batch_size)[:, self.index].flatten()

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def place(self, device: torch.device) -> torch.device:
        """The device of this process: each has a GPU of its own."""
        return PartialState().device if self.count > 1 and device.type == "cuda" else device

    @contextmanager
    def exclusive_lock(self, folder: Path) -> Iterator[None]:
        """Within it no other run is in `folder`; ends when all processes of this one have ended it."""
        if not self.first:
            yield
            self.wait()
            return
        with exclusive_lock(folder):
            yield
            self.wait()


ALONE = TrainingProcesses(0, 1)


def everywhere(holds: bool) -> bool:
    """Whether it holds in every process of the run: all go on, or none."""
    return not most(not holds)


def most(count: int) -> int:
    """The largest `count` of all processes of the run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    found = torch.tensor(int(count), device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)
