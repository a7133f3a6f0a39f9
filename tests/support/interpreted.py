"""Runs generated kernels under Triton's interpreter, for a separate process.

TRITON_INTERPRET must be set before Triton is imported, and would affect all other tests in the process.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packed_fields import Packed, coded_magnitudes, product_bound, random_fields

from reallm.codegen.ir.program import Tile
from reallm.codegen.launch.instances import MAX_BATCH
from reallm.codegen.launch.launch import DENSE_ROWS
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference

Result = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]
"""(y, and x and bias as the kernel saw them)."""
CAST_ERROR = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-7}
"""Relative error of a cast to the activations' dtype, which rounds, except that the interpreter truncates bfloat16."""


@dataclass(frozen=True)
class Call:
    """One product y = W_hat x (+ bias), with x float32 [batch, cols] rounded to `dtype` before the call."""

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
    """Initialise the process: switch the interpreter on and use `cache` as cache folder."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["REALLM_CACHE"] = str(cache)


def run(call: Call) -> Result:
    """Compute `call` under the interpreter; returns float64 arrays."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    from reallm.codegen.launch.launch import kernels_for
    from reallm.codegen.launch.source_cache import load_kernel

    torch.set_num_threads(1)
    fmt = Format.parse(call.format)
    assert isinstance(load_kernel(kernels_for(fmt, call.rows, call.cols)[-1]), InterpretedFunction)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return run_on(call, "cpu")


def run_on(call: Call, device: str) -> Result:
    """As `run`, on `device`. The output is filled with NaN before the call."""
    import torch

    from reallm.codegen.launch.launch import multiply

    dtype = getattr(torch, call.dtype)
    x = torch.from_numpy(call.x).to(device, dtype)
    bias = None if call.bias is None else torch.from_numpy(call.bias).to(device, dtype)
    fields = {name: torch.from_numpy(raw.copy()).to(device) for name, raw in call.packed.items()}
    out = torch.full((x.shape[0], call.rows), float("nan"), dtype=dtype, device=device)
    y = multiply(Format.parse(call.format), fields, x, call.rows, call.cols, bias, out, call.tile, prefill=call.prefill)
    assert y is out
    shift = None if bias is None else bias.double().cpu().numpy()
    return y.double().cpu().numpy(), x.double().cpu().numpy(), shift


def run_together(calls: tuple[Call, ...]) -> list[Result]:
    """As `run`, for matrices that share x and are multiplied in one launch; uninitialised memory is filled with NaN."""
    import torch

    from reallm.codegen.launch.bindings import StoredMatrix
    from reallm.codegen.launch.grouped import Member, multiply_group

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills memory with NaN
    x = torch.from_numpy(calls[0].x).to(getattr(torch, calls[0].dtype))
    members, matrices = [], []
    for name, call in zip(("q_proj", "k_proj", "v_proj"), calls, strict=False):
        fmt = Format.parse(call.format)
        bias = None if call.bias is None else torch.from_numpy(call.bias).to(x.dtype)
        fields = {name: torch.from_numpy(raw.copy()) for name, raw in call.packed.items()}
        members.append(Member(name, fmt, call.rows, call.cols, bias is not None))
        matrices.append(StoredMatrix(fmt, fields, call.rows, call.cols, bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        outputs = multiply_group(members, matrices, x)
    results = []
    for y, matrix in zip(outputs, matrices, strict=True):
        bias = matrix.bias
        results.append((y.double().numpy(), x.double().numpy(), None if bias is None else bias.double().numpy()))
    return results


def assert_matches(
    call: Call, y: NDArray[np.float64], x: NDArray[np.float64], bias: NDArray[np.float64] | None
) -> None:
    """Compare y with the product with the float64 reference decode, within the derived bound."""
    fmt = Format.parse(call.format)
    shift = np.zeros(call.rows) if bias is None else bias
    expected = x @ decode_reference(fmt, call.packed, call.rows, call.cols).T + shift
    many = len(x) > MAX_BATCH
    half = many and (isinstance(fmt.codec, TrellisCodec) or fmt.transformed)
    bound = product_bound(fmt, call.rows, call.cols, call.packed, x, half, len(x) > DENSE_ROWS)
    if many and not half and call.dtype != "float32":  # weights are rounded like decoded weights, tiny ones by 2^-25
        coded = coded_magnitudes(fmt, call.rows, call.cols, call.packed)
        bound = bound + np.abs(x) @ (CAST_ERROR[call.dtype] * coded + 2.0**-25).T
    bound = bound + np.abs(shift) * (call.cols + 100) * 2.0**-24
    bound = bound + CAST_ERROR[call.dtype] * (np.abs(expected) + bound) + 2.0**-25
    excess = np.abs(y - expected) - bound
    assert np.all(excess <= 0), f"{call.format} [{call.rows}, {call.cols}]: {np.nanmax(excess)} over the bound, y {y}"


def random_call(
    name: str, rows: int, cols: int, batch: int, dtype: str = "float32", bias: bool = False, tile: Tile | None = None
) -> Call:
    """A call on random fields, x and bias, which depend only on the shape."""
    seed = rows * 1000 + cols * 10 + batch
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, cols)).astype(np.float32)
    shift = rng.normal(size=rows).astype(np.float32) if bias else None
    return Call(name, rows, cols, dtype, random_fields(Format.parse(name), rows, cols, seed), x, shift, tile)
