"""Shared by peer_gptq.py and peer_awq.py, in .venv-bench: runs a recipe of llmcompressor and writes the result."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from peer_output import FLOAT_BITS, linears, require_levels, write_output
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = ["lm_head"]


def asymmetric(bits: int, group_size: int, **changed: object) -> dict[str, Any]:
    """`config_groups` of asymmetric integers for every linear layer."""
    scheme = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    return {"group_0": {"targets": ["Linear"], "weights": scheme | changed}}


def run(recipe: object, max_windows: int | None = None) -> None:
    """Apply `recipe` to the model of the command line and write the result, with an fp16 scale and a zero per group."""
    source, bits, group_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[5])
    windows = load_file(sys.argv[4])["windows"][:max_windows]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
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
        weight = rounded(module)
        require_levels(name, weight, bits, group_size)
        weights[f"{name}.weight"] = weight
        stored_bits += weight.numel() * bits + weight.numel() // group_size * (FLOAT_BITS + bits)
    norms = {name: value for name, value in model.state_dict().items() if "norm" in name}
    write_output(output, weights, stored_bits, seconds, ("llmcompressor",), norms)


def rounded(module: torch.nn.Module) -> torch.Tensor:
    """The weight of `module`, decoded from codes, scales and zeros; unchanged if it was already rounded in place."""
    scale, zero, weight = module.weight_scale, module.weight_zero_point, module.weight.data
    args = module.quantization_scheme.weights
    wide = [t.float().repeat_interleave(args.group_size, 1) for t in (scale, zero)]
    low = -(1 << (args.num_bits - 1))
    codes = (weight / wide[0] + wide[1]).round().clamp(low, low + (1 << args.num_bits) - 1)
    return (codes - wide[1]) * wide[0]
