"""Products by generated GPU kernels, which read the codes as they are stored and keep no decoded weight in memory.

They are used on CUDA without autograd; everything else uses the decoded weight. Before their first use on a device, a
small matrix is multiplied both by a kernel and by its decoded weight. If that fails or the results differ, one warning
says so and decoded weights are used from then on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from reallm.codegen.ir.lower import has_kernel
from reallm.codegen.launch.launch import multiply
from reallm.decoding.decode import decode
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.system.torch_dtypes import FLOAT_NAMES

from .input_groups import GroupedLinear, stored_matrix
from .packed import Packed

PROBES, _PROBE_ROWS, _PROBE_COLS = ("int4-g16", "tq2-l12+rot"), 32, 64


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_kernel(packed: Packed, inputs: Tensor) -> bool:
    """Whether `packed_linear` may be used for these inputs [..., cols]."""
    if not (inputs.is_cuda or _interpreted()) or torch.is_grad_enabled() or inputs.dtype not in FLOAT_NAMES:
        return False
    fmt = packed.format
    if inputs.numel() == 0 or not has_kernel(fmt):
        return False
    return kernels_work(inputs.device, PROBES[isinstance(fmt.codec, TrellisCodec) or fmt.transformed])


def packed_linear(packed: GroupedLinear, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W_hat^T (+ bias), [..., rows], for x [..., cols], by the kernels generated for the matrix's format."""
    if packed.input_group is not None and (product := packed.input_group.product(packed, inputs)) is not None:
        return product
    m = stored_matrix(packed, bias)
    return multiply(m.format, m.fields, inputs, m.rows, m.cols, m.bias, derived=m.derived)


@cache
def kernels_work(device: torch.device, name: str) -> bool:
    """Whether generated kernels of the format `name` run on `device` and agree with `decode`; warns once if not."""
    if importlib.util.find_spec("triton") is None:
        return _unusable(device, "Triton is not installed")
    fmt = Format.parse(name)
    fields = {
        field.name: torch.full((field.nbytes,), 0x3C, dtype=torch.uint8, device=device)  # every fp16 is about 1.06
        for field in fmt.fields(_PROBE_ROWS, _PROBE_COLS)
    }
    if "widths" in fields:  # 2 bits per weight in each of the four blocks
        fields["widths"].zero_()[:2] = 0x44
    inputs = torch.linspace(-1, 1, _PROBE_COLS, device=device)[None]
    from triton.errors import TritonError  # raised for a kernel that does not compile

    try:
        product = multiply(fmt, fields, inputs, _PROBE_ROWS, _PROBE_COLS)
    except (ImportError, OSError, RuntimeError, ValueError, TritonError, subprocess.SubprocessError) as error:
        return _unusable(device, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    expected = linear(inputs, decode(fmt, fields, _PROBE_ROWS, _PROBE_COLS))
    if not torch.allclose(product, expected, rtol=0, atol=1e-2):  # 64 terms of size 4 or less, in float32 or tf32
        return _unusable(device, "their results differ from the decoded weight's")
    return True


def _unusable(device: torch.device, reason: str) -> bool:
    warnings.warn(
        f"generated kernels cannot be used on {device} ({reason}); using decoded weights instead, which needs several "
        "times the memory traffic",
        stacklevel=2,
    )
    return False
