"""Several processes that train one model together, as `torchrun` and `accelerate launch` start them.

    torchrun --nproc-per-node 2 -m reallm finetune out/ --text train.txt -o tuned/

All hold the whole compressed model; one step takes `batch_size` windows of each, and their gradients are averaged. The
first of them opens the folder, keeps checkpoints and writes the result.
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

from ..lock import alone_in


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    index: int
    count: int

    @staticmethod
    def found(device: str) -> Ranks:
        """What the environment says; joins the others, so that they can wait for each other."""
        count = int(os.environ.get("WORLD_SIZE") or 1)
        if count < 2:
            return Ranks(0, 1)
        state = PartialState(cpu=device == "cpu")
        if state.process_index:
            logging.getLogger("reallm").setLevel(logging.WARNING)  # the first speaks for all
        return Ranks(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def place(self, device: torch.device) -> torch.device:
        """The device of this process: each has a GPU of its own."""
        return PartialState().device if self.count > 1 and device.type == "cuda" else device

    @contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Within it no other run is in `folder`; ends when all processes of this one have ended it."""
        if not self.first:
            yield
            self.wait()
            return
        with alone_in(folder):
            yield
            self.wait()


ALONE = Ranks(0, 1)


def everywhere(holds: bool) -> bool:
    """Whether it holds in every process of the run: all go on, or none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return holds
    found = torch.tensor(float(holds), device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return bool(found)
