"""Training of one model by several processes, which `torchrun` or `accelerate launch` starts.

    torchrun --nproc-per-node 2 -m reallm finetune out/ --text train.txt -o tuned/

Every process holds the whole compressed model. One optimiser step takes `batch_size` windows in each process, and the
gradients are averaged. The first process opens the folder, writes checkpoints and writes the result. With `accelerate
launch --use_fsdp` the processes share the weights of the dense model (`teacher`), which take most of the memory; the
compressed weights are not sharded.
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
    """The processes of a run, as seen from this one."""

    index: int
    """The number of this process, from 0."""
    count: int
    """The number of processes."""
    shards_teacher: bool = False
    """Whether each process holds only a shard of the dense model."""

    @staticmethod
    def from_environment(device: str) -> TrainingProcesses:
        """Join the processes that the launcher's environment variables describe, so that they can communicate."""
        count = int(os.environ.get("WORLD_SIZE") or 1)
        if count < 2:
            return SINGLE_PROCESS
        # the variable is removed: otherwise the Trainer would shard the trained parameters, which are small
        shards = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        state = PartialState(cpu=device == "cpu")
        if state.process_index:
            logging.getLogger("reallm").setLevel(logging.WARNING)  # the first process logs for all
        return TrainingProcesses(state.process_index, state.num_processes, shards)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def share_of(self, rows: Tensor, batch_size: int) -> Tensor:
        """The part of `rows`, int64 [steps * count * batch_size], that the Trainer's sampler gives to this process."""
        return rows.view(-1, self.count, batch_size)[:, self.index].flatten()

    def wait(self) -> None:
        """Wait until all processes have made this call."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def own_device(self, device: torch.device) -> torch.device:
        """The device of this process: on CUDA each process has its own GPU."""
        return PartialState().device if self.count > 1 and device.type == "cuda" else device

    @contextmanager
    def exclusive_lock(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of `folder`; the lock is released when all processes of this run have left the block."""
        if not self.is_first:
            yield
            self.wait()
            return
        with exclusive_lock(folder):
            yield
            self.wait()


SINGLE_PROCESS = TrainingProcesses(0, 1)


def true_in_all_processes(condition: bool) -> bool:
    """Whether `condition` holds in every process; all processes get the same answer."""
    return not max_over_processes(not condition)


def max_over_processes(count: int) -> int:
    """The largest `count` among the processes of the run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    largest = torch.tensor(int(count), device=PartialState().device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)
