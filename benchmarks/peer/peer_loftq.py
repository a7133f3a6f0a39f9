"""LoftQ (arXiv 2310.08659) with peft on every decoder linear; run in .venv-bench by peers.py.

    python peer_loftq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is not read. Writes the files of peer_output.py to OUTPUT; the weights are the sum of codes and factors. peft
supports 4 bits in groups of 64 only. Rank 16, 5 alternations; bits per weight count the codes, an fp16 maximum per
group and fp16 factors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from peer_output import FLOAT_BITS, linears, write_output
from peft.utils import loftq_utils
from transformers import AutoModelForCausalLM

RANK, ITERATIONS = 16, 5


def main() -> None:
    source, bits, group_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[5])
    if (bits, group_size) != (4, 64):
        raise SystemExit("peft's LoftQ supports only 4 bits in groups of 64")
    loftq_utils.is_bnb_4bit_available = lambda: False  # its bitsandbytes path needs a GPU; its own code does not
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    began, weights, stored_bits = time.perf_counter(), {}, 0
    for name, module in linears(model):
        weight = module.weight.data
        plain, A, B = loftq_utils.loftq_init(weight, bits, RANK, num_iter=ITERATIONS)
        weights[f"{name}.weight"] = plain + B.half().float() @ A.half().float()
        stored_bits += weight.numel() * bits + weight.numel() // group_size * FLOAT_BITS
        stored_bits += FLOAT_BITS * (A.numel() + B.numel())
    write_output(output, weights, stored_bits, time.perf_counter() - began, ("peft",))


if __name__ == "__main__":
    main()
