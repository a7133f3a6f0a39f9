"""HQQ (Half-Quadratic Quantization, Badri & Shaji 2023) on every decoder linear; run in .venv-bench by peers.py.

    python peer_hqq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

HQQ needs no calibration: WINDOWS is not read. Writes the files of peer_output.py to OUTPUT. Bits per weight count the
codes at their nominal width, and an fp16 scale and zero per group; HQQ's own file pads 3-bit codes to 3.2 bits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from peer_output import FLOAT_BITS, linears, write_output
from transformers import AutoModelForCausalLM


def dequantised(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """`weight` [N, K] quantised by HQQ and dequantised, float32 [N, K], with scales and zeros rounded to fp16."""
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, bitpack=False, **settings)
    scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
    return ((codes.float() - zero) * scale).reshape(weight.shape)


def main() -> None:
    source, bits, group_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[5])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    began, weights, stored_bits = time.perf_counter(), {}, 0
    for name, module in linears(model):
        weight = module.weight.data
        weights[f"{name}.weight"] = dequantised(weight, bits, group_size)
        stored_bits += weight.numel() * bits + weight.numel() // group_size * 2 * FLOAT_BITS
    write_output(output, weights, stored_bits, time.perf_counter() - began, ("hqq",))


if __name__ == "__main__":
    main()
