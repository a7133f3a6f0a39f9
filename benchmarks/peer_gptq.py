"""GPTQ (arXiv 2210.17323) by llmcompressor on every decoder linear; run in .venv-bench by quality.py.

    python peer_gptq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is a safetensors file with `windows`, int64 [n, seqlen]: the calibration tokens, the same as ours. Writes
OUTPUT/weights.safetensors (dequantised, by parameter name) and OUTPUT/report.json. Asymmetric, activation order static
(llmcompressor's default, which stores no permutation); bits per weight count the codes, an fp16 scale and a zero point
of BITS bits a group.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FLOAT_BITS = 16


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
    weights, stored_bits, numel = {}, 0, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            groups = weight.reshape(-1, group_size)[:64]
            if max(len(row.unique()) for row in groups) > 1 << bits:
                raise SystemExit(f"{name} is not quantised to {bits} bits")
            weights[f"{name}.weight"] = weight.contiguous()
            stored_bits += weight.numel() * bits + weight.numel() // group_size * (FLOAT_BITS + bits)
            numel += weight.numel()
    report = {
        "bits_per_weight": stored_bits / numel,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    save_file(weights, output / "weights.safetensors")
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
