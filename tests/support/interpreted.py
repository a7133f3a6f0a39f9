"""Runs generated kernels under Triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before Triton is imported, and would change every other test of the session.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packed_fields import Packed

from reallm.codegen.program import Tile
from reallm.kernels.formats import Format


@dataclass(frozen=True)
class Call:
    """One y = W_hat x (+ bias): x float32 [batch, cols], rounded to `dtype` before the call."""

    format: str
    rows: int
    cols: int
    dtype: str
    packed: Packed
    x: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    tile: Tile | None = None
    prefill: bool | None = None


def start(cache: Path) -> None:
    """Initialise the process: the interpreter, and a cache folder of its own."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["REALLM_CACHE"] = str(cache)


def run(call: Call) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """y, and x and bias as the kernel saw them, in float64. The output buffer is filled with NaN before."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    from reallm.codegen.launch import kernels_for, load_kernel, multiply

    torch.set_num_threads(1)
    fmt, dtype = Format.parse(call.format), getattr(torch, call.dtype)
    assert isinstance(load_kernel(kernels_for(fmt, call.rows, call.cols)[-1]), InterpretedFunction)
    x = torch.from_numpy(call.x).to(dtype)
    bias = None if call.bias is None else torch.from_numpy(call.bias).to(dtype)
    fields = {name: torch.from_numpy(raw.copy()) for name, raw in call.packed.items()}
    out = torch.full((x.shape[0], call.rows), float("nan"), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        y = multiply(fmt, fields, x, call.rows, call.cols, bias, out, call.tile, prefill=call.prefill)
    assert y is out
    return y.double().numpy(), x.double().numpy(), None if bias is None else bias.double().numpy()
