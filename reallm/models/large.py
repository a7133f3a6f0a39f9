"""Models that do not fit into memory: their weights stay in files, which are mapped.

transformers loads a tensor as a view of its mapped weights file, unless it must convert it (another dtype, experts that
it stacks, quantised weights). `kept_in_files` puts converted tensors into scratch files, each as soon as it is made, so
that at most one of them is in memory. The kernel reads the pages that are used and drops them when memory is short.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.system.memory import available_memory
from reallm.system.scratch import Scratch, is_in_file

MEMORY_SHARE = 0.3
"""Largest share of the available memory that a float32 copy of a model may take; a larger model stays in files."""


def fits_in_memory(weights: int) -> bool:
    """Whether a model with that number of weights, in float32, takes at most MEMORY_SHARE of the available memory."""
    return 4 * weights <= MEMORY_SHARE * available_memory()


def stored_weights(tensors: Iterable[StoredTensor]) -> int:
    """The number of values in `tensors`."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


@contextmanager
def kept_in_files(scratch: Scratch | None) -> Iterator[None]:
    """Within the context, parameters that a module gets are moved to files in `scratch`, unless they are in a file
    already; None moves nothing. Raises UserError if the disk has no space for them.
    """
    if scratch is None:
        yield
        return

    def moved(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or not parameter.numel() or is_in_file(parameter):
            return None
        copy = nn.Parameter(scratch.copy(parameter), parameter.requires_grad)
        copy.__dict__.update(parameter.__dict__)  # transformers marks there what it has initialised
        return copy

    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # torch: what it returns counts
    try:
        yield
    finally:
        handle.remove()
