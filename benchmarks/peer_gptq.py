"""GPTQ (arXiv 2210.17323) by llmcompressor on every decoder linear; run in .venv-bench by peers.py.

    python peer_gptq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is a safetensors file with `windows`, int64 [n, seqlen]: the calibration tokens, the same as ours. Writes OUTPUT
as peer_output.py tells. Asymmetric, activation order static (llmcompressor's default, which stores no permutation);
bits per weight count the codes, an fp16 scale and a zero point of BITS bits a group.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer_output import FLOAT_BITS, linears, require_levels, write_output
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    source, bits, group_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[5])
    windows = load_file(sys.argv[4])["windows"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scheme = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": scheme}})
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()]
    began = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(source),
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1],
    )
    seconds = time.perf_counter() - began
    weights, stored_bits = {}, 0
    for name, module in linears(model):
        weight = module.weight.data
        require_levels(name, weight, bits, group_size)
        weights[f"{name}.weight"] = weight
        stored_bits += weight.numel() * bits + weight.numel() // group_size * (FLOAT_BITS + bits)
    write_output(output, weights, stored_bits, seconds, ("llmcompressor",))


if __name__ == "__main__":
    main()
