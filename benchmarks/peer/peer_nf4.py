"""NF4 with double quantisation (QLoRA, arXiv 2305.14314) with bitsandbytes on every decoder linear; run by peers.py.

    python peer_nf4.py MODEL 4 BLOCK_SIZE WINDOWS OUTPUT

NF4 needs no calibration: WINDOWS is not read. Writes the files of peer_output.py to OUTPUT. Bits per weight count the
codes, an 8-bit scale per block, an fp32 scale per 256 blocks and an fp32 offset per matrix; the two tables are
constants.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peer_output import linears, require_levels, write_output
from transformers import AutoModelForCausalLM

BITS, SCALE_BITS, FLOAT32_BITS = 4, 8, 32


def main() -> None:
    source, bits, block_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[5])
    if bits != BITS:
        raise SystemExit(f"NF4 has 4 bits, not {bits}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    began, weights, stored_bits = time.perf_counter(), {}, 0
    for name, module in linears(model):
        weight = module.weight.data
        codes, state = quantize_4bit(weight, blocksize=block_size, compress_statistics=True, quant_type="nf4")
        weights[f"{name}.weight"] = dequantize_4bit(codes, state)
        require_levels(name, weights[f"{name}.weight"], BITS, block_size)
        blocks = state.absmax.numel()
        stored_bits += codes.nbytes * 8 + blocks * SCALE_BITS + state.state2.absmax.numel() * FLOAT32_BITS
        stored_bits += FLOAT32_BITS
    write_output(output, weights, stored_bits, time.perf_counter() - began, ("bitsandbytes",))


if __name__ == "__main__":
    main()
