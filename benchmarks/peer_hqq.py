"""HQQ (Half-Quadratic Quantization, Badri & Shaji 2023) on every decoder linear; run in .venv-bench by quality.py.

    python peer_hqq.py MODEL BITS GROUP_SIZE OUTPUT

Writes OUTPUT/weights.safetensors (dequantised, float32, by parameter name) and OUTPUT/report.json. Bits per weight
count the codes at their nominal width and an fp16 scale and zero a group: HQQ's own file pads 3-bit codes to 3.2 bits.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FLOAT_BITS = 16


def dequantised(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """What HQQ stores of weight [N, K], read back: float32 [N, K], its scales and zeros rounded to fp16."""
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, bitpack=False, **settings)
    scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
    return ((codes.float() - zero) * scale).reshape(weight.shape)


def main() -> None:
    source, bits, group_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    began, weights, stored_bits, numel = time.perf_counter(), {}, 0, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            weights[f"{name}.weight"] = dequantised(weight, bits, group_size).contiguous()
            stored_bits += weight.numel() * bits + weight.numel() // group_size * 2 * FLOAT_BITS
            numel += weight.numel()
    report = {
        "bits_per_weight": stored_bits / numel,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("hqq", "torch", "transformers")},
    }
    save_file(weights, output / "weights.safetensors")
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
