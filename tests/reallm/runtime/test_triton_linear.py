"""Modules run the kernels generated for their format, for few rows of x and for many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import packing
import torch
from packed_fields import random_fields
from reallm.kernels.formats.formats import Format
from reallm.runtime.convert import pack_linear
from reallm.runtime.triton_linear import takes_kernel

fmt, rows, cols = Format.parse("tq2.25-l12+ldl2+rot"), 24, 48
module = pack_linear(torch.nn.Linear(cols, rows), fmt, "load", torch.float32, None)
module.write((name, torch.from_numpy(raw)) for name, raw in random_fields(fmt, rows, cols, 0).items())
with torch.no_grad():
    module.bias.normal_()
    expected_of = lambda x: torch.nn.functional.linear(x, module.decode_now(torch.float32), module.bias)
    x = torch.randn(1, 2, cols)
    assert takes_kernel(module, x)
    found = module(x)
    first = dict(x._reallm_kept[1])
    again = module(x)
    assert torch.equal(found, again) and all(x._reallm_kept[1][key] is kept for key, kept in first.items())
    # two rotations and a sum of 48 products of size 1 in float32
    torch.testing.assert_close(found, expected_of(x), rtol=1e-4, atol=1e-4)
    x += 1  # a changed input is rotated again
    torch.testing.assert_close(module(x), expected_of(x), rtol=1e-4, atol=1e-4)
    many = torch.randn(7, cols)
    # inputs of the GEMM are rounded to half precision: 2^-11 of sums of size 10
    torch.testing.assert_close(module(many), expected_of(many), rtol=2e-3, atol=2e-2)
    assert not module.decoded.numel() and module.derived is not None  # no weight was kept
    module.write((name, torch.from_numpy(raw)) for name, raw in random_fields(fmt, rows, cols, 1).items())
    assert module.derived is None
    torch.testing.assert_close(module(x), expected_of(x), rtol=1e-4, atol=1e-4)
    plain = module(x)
    module.set_gain(torch.linspace(-1, 2, rows))  # which is in the decoded weight too
    torch.testing.assert_close(module(x), expected_of(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module(x), plain, atol=1e-2)

fmt, rows, cols = Format.parse("nf4-g8-dq8x8+r2"), 20, 36
module = pack_linear(torch.nn.Linear(cols, rows), fmt, "load", torch.float32, None)
module.write((name, torch.from_numpy(raw)) for name, raw in packing.random_fields(fmt, rows, cols, 0, size=0.1).items())
x = torch.randn(2, cols)
with torch.no_grad():
    assert takes_kernel(module, x)
    found = module(x)
assert not takes_kernel(module, x)  # with autograd on
expected = torch.nn.functional.linear(x, module.weight, module.bias).detach()
torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
"""


def test_modules_run_their_kernels_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",  # arrays this small gain nothing from more threads
        "REALLM_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2] / "support"),
    }
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
