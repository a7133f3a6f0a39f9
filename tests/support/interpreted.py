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
from packed_fields import Packed, coded_magnitudes, product_bound, random_fields

from reallm.codegen.ir.program import Tile
from reallm.codegen.launch.launch import DENSE_ROWS, MAX_BATCH
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference

Result = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]
CAST_ERROR = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-7}
"""Relative error of a cast to the activations' dtype: rounding, but for bfloat16, which the interpreter truncates."""


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


def run(call: Call) -> Result:
    """y, and x and bias as the kernel saw them, in float64."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    from reallm.codegen.launch.launch import kernels_for, load_kernel

    torch.set_num_threads(1)
    fmt = Format.parse(call.format)
    assert isinstance(load_kernel(kernels_for(fmt, call.rows, call.cols)[-1]), InterpretedFunction)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return run_on(call, "cpu")


def run_on(call: Call, device: str) -> Result:
    """As `run`, by whatever runs kernels on `device`. The output is filled with NaN before."""
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
    """As `run`, for matrices with one x whose products must be one launch; uninitialised memory is filled with NaN."""
    import torch

    from reallm.codegen.launch.grouped import Member, multiply_group
    from reallm.codegen.launch.launch import StoredMatrix

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
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
    """Hold y against the product with the float64 reference decode."""
    fmt = Format.parse(call.format)
    shift = np.zeros(call.rows) if bias is None else bias
    expected = x @ decode_reference(fmt, call.packed, call.rows, call.cols).T + shift
    many = len(x) > MAX_BATCH
    half = many and (isinstance(fmt.codec, TrellisCodec) or fmt.transformed)
    bound = product_bound(fmt, call.rows, call.cols, call.packed, x, half, len(x) > DENSE_ROWS)
    if many and not half and call.dtype != "float32":  # weights are rounded as a decoded weight is; tiny ones by 2^-25
        coded = coded_magnitudes(fmt, call.rows, call.cols, call.packed)
        bound = bound + np.abs(x) @ (CAST_ERROR[call.dtype] * coded + 2.0**-25).T
    bound = bound + np.abs(shift) * (call.cols + 100) * 2.0**-24
    bound = bound + CAST_ERROR[call.dtype] * (np.abs(expected) + bound) + 2.0**-25
    excess = np.abs(y - expected) - bound
    assert np.all(excess <= 0), f"{call.format} [{call.rows}, {call.cols}]: {np.nanmax(excess)} over the bound, y {y}"


def random_call(
    name: str, rows: int, cols: int, batch: int, dtype: str = "float32", bias: bool = False, tile: Tile | None = None
) -> Call:
    seed = rows * 1000 + cols * 10 + batch
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, cols)).astype(np.float32)
    shift = rng.normal(size=rows).astype(np.float32) if bias else None
    return Call(name, rows, cols, dtype, random_fields(Format.parse(name), rows, cols, seed), x, shift, tile)
