"""Compiles gemlite's and AQLM's Triton kernels for sm_80 without a GPU.

    python peer_triton.py [ROWS,COLS] OUTPUT NAME...

Run in the peers' own environment. Writes OUTPUT/<n>.cubin, and OUTPUT/kernels.json with one entry per compiled setting:
name, file, threads and weights of a kernel instance, a note, versions. Names are "gemlite BITS" and "aqlm MxB".
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

GROUP_SIZE = 64
DIM = 8
"""Weights per word of an AQLM codebook."""


def pretend_gpu() -> None:
    """Pretend that there is an A100, because gemlite asks for the GPU when it is imported."""
    facts = SimpleNamespace(
        name="NVIDIA A100", multi_processor_count=108, shared_memory_per_block_optin=166912, major=8, minor=0
    )
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: facts  # type: ignore[assignment, return-value]
    torch.cuda.current_device = lambda: 0
    active = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 80, 32), get_current_device=lambda: 0)
    triton.runtime.driver.set_active(active)


def compiled(function: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> bytes:
    """The cubin of `function`, whose arguments not in `types` are constants."""
    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    defaults = {p.name: p.default for p in function.params if p.has_default}
    values = {name: constants.get(name, defaults.get(name)) for name in names if name not in types}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in types}
    kernel = triton.compile(
        ASTSource(function, signature, values, aligned),
        target=GPUTarget("cuda", 80, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    cubin: bytes = kernel.asm["cubin"]
    return cubin


def gemlite(bits: int, rows: int, cols: int) -> list[dict[str, Any]]:
    """gemv_revsplitK with scales and zeros per group and float32 sums, in each of its settings that suits the group."""
    from gemlite.triton_kernels.gemv_revsplitK_kernels import (
        gemv_INT_revsplitK_kernel,
        get_fast_autotune_config_nvidia,
    )

    types = {"a_ptr": "*fp16", "b_ptr": "*i32", "c_ptr": "*fp16", "scales_ptr": "*fp16", "zeros_ptr": "*fp16"}
    fixed = {
        "scales_a_ptr": None,
        "M": 1,
        "N": rows,
        "K": cols,
        "W_nbits": bits,
        "group_size": GROUP_SIZE,
        "unpack_mask": (1 << bits) - 1,
        "elements_per_sample": 32 // bits,
        "type_id": 0,
        "use_prehook": False,
        "stride_am": cols,
        "stride_ak": 1,
        "stride_bk": rows,
        "stride_bn": 1,
        "stride_cm": rows,
        "stride_cn": 1,
        "stride_meta_a_m": 0,
        "stride_meta_a_g": 0,
        "stride_meta_g": rows,
        "stride_meta_n": 1,
        "input_dtype": tl.float16,
        "output_dtype": tl.float16,
        "acc_dtype": tl.float32,
        "meta_dtype": tl.float16,
        "channel_scale_mode": 0,
        "W_group_mode": 4,
        "zero_is_scalar": False,
        "data_contiguous": True,
        "EVEN_K": True,
        "EVEN_N": True,
    }
    kernels, seen = [], set()
    for config in get_fast_autotune_config_nvidia():
        block = {**config.kwargs, "BLOCK_SIZE_K": min(config.kwargs["BLOCK_SIZE_K"], GROUP_SIZE // 2)}
        key = (*block.values(), config.num_warps)
        if block["BLOCK_SIZE_K"] < 32 // bits or key in seen:
            continue
        seen.add(key)
        cubin = compiled(gemv_INT_revsplitK_kernel.fn, types, fixed | block, config.num_warps, config.num_stages)
        note = f"n{block['BLOCK_SIZE_N']} k2x{block['BLOCK_SIZE_K']} w{config.num_warps}"
        weights = 2 * block["BLOCK_SIZE_N"] * block["BLOCK_SIZE_K"]
        kernels.append({"cubin": cubin, "threads": 32 * config.num_warps, "weights": weights, "note": note})
    return kernels


def aqlm(codebooks: int, bits: int, cols: int) -> list[dict[str, Any]]:
    """The GEMV with one row of W per instance and words of DIM weights from codebooks of 2^bits, in 1 to 8 warps."""
    from aqlm.inference_kernels.triton_kernel import _aqlm_gemv_simple

    pointers = ("input_vec_ptr", "output_vec_ptr", "codebooks_ptr", "scales_ptr")
    types = dict.fromkeys(pointers, "*fp16") | {"codes_ptr": "*i8" if bits == 8 else "*i16"}
    groups = cols // DIM
    fixed = {
        "bias_ptr": None,
        "in_features": cols,
        "out_features": 0,
        "num_codebooks": codebooks,
        "codebook_size": 1 << bits,
        "out_group_size": 1,
        "in_group_size": DIM,
        "num_input_groups": groups,
        "num_input_groups_next_power_of_2": 1 << (groups - 1).bit_length(),
        "compute_in_fp32": True,
        "has_output_scale": True,
        "has_bias": False,
        "UNUSED": 1,
    }
    return [
        {
            "cubin": compiled(_aqlm_gemv_simple.fn, types, fixed, warps, 1),
            "threads": 32 * warps,
            "weights": cols,
            "note": f"w{warps}",
        }
        for warps in (1, 2, 4, 8)
    ]


def main() -> None:
    """Compile the kernels named on the command line."""
    (rows, cols), output = json.loads(sys.argv[1]), Path(sys.argv[2])
    pretend_gpu()
    entries: list[dict[str, Any]] = []
    for name in sys.argv[3:]:
        method, setting = name.split()
        versions = {package: version(package) for package in (method, "triton")}
        sizes = [int(size) for size in setting.split("x")]
        settings = gemlite(sizes[0], rows, cols) if method == "gemlite" else aqlm(sizes[0], sizes[1], cols)
        for kernel in settings:
            file = f"{len(entries)}.cubin"
            (output / file).write_bytes(kernel.pop("cubin"))
            entries.append({"name": name, "file": file, "versions": versions, **kernel})
    (output / "kernels.json").write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
