"""AutoRound (arXiv 2309.05516) with auto-round on every decoder linear; run in .venv-bench by peers.py.

    python peer_autoround.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is a safetensors file with `windows`, int64 [n, seqlen]: the calibration tokens, the same as ours. Writes the
files of peer_output.py to OUTPUT. Asymmetric, in float32, 50 iterations per block as in its "light" recipe, each on 2
windows: 6 passes over 16 windows, where that recipe makes 3 over its 128. Other settings have their defaults. Bits per
weight count the codes, an fp16 scale and a zero point of BITS bits per group.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from peer_output import FLOAT_BITS, linears, require_levels, write_output
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS, BATCH_SIZE = 50, 2


def main() -> None:
    source, bits, group_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[5])
    windows = load_file(sys.argv[4])["windows"]
    began = time.perf_counter()
    method = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        bits=bits,
        group_size=group_size,
        sym=False,
        iters=ITERATIONS,
        batch_size=BATCH_SIZE,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        low_cpu_mem_usage=False,
        enable_torch_compile=False,
        amp=False,
    )
    model, _ = method.quantize()
    seconds = time.perf_counter() - began
    weights, stored_bits = {}, 0
    for name, module in linears(model):
        weight = module.weight.data.float()
        require_levels(name, weight, bits, group_size)
        weights[f"{name}.weight"] = weight
        stored_bits += weight.numel() * bits + weight.numel() // group_size * (FLOAT_BITS + bits)
    write_output(output, weights, stored_bits, seconds, ("auto-round",))


if __name__ == "__main__":
    main()
