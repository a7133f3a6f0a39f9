"""The dtype that a model is calibrated in.

A model of which a float32 copy fits into memory is converted as a whole. A larger one stays mapped to its files, and is
run in its own dtype where the processor multiplies bfloat16, else in float32, block by block.
"""

from __future__ import annotations

import torch

from reallm.models.loaded import LoadedModel
from reallm.system.device import CPU, is_gpu


def compute_dtype(loaded: LoadedModel, device: torch.device = CPU) -> torch.dtype:
    """The dtype to calibrate in: float32, or bfloat16 for a large bfloat16 model where the processor multiplies it.

    Float32 is more exact and, on processors without bfloat16 arithmetic, six times as fast. On a GPU it is bfloat16;
    weights that are float32 stay so, and statistics are summed in float32.
    """
    if is_gpu(device):
        return torch.bfloat16
    if loaded.scratch is None:
        return torch.float32
    return torch.bfloat16 if loaded.dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


def whole_model_dtype(loaded: LoadedModel) -> torch.dtype:
    """The dtype to run the whole model in at once: float32 where it fits into memory, else its own."""
    return torch.float32 if loaded.scratch is None else loaded.dtype


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it, which torch tells by no public function."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
