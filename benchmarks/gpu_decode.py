"""Tokens per second on this machine's GPU: packed matrices beside bf16, with the recorded step and transformers' loop.

    make bench NAME=gpu_decode [MODELS=SmolLM2-135M,LLaMA-3-8B] [FORMATS=uint4-g64] [ROUNDS=3]

The models have the shapes of MODELS and random weights, which take as long as trained ones; nothing is downloaded. All
decoder linears are in one format, embedding and head in bf16. A contender reads PROMPT tokens and decodes DECODED
tokens greedily with `generate`; the time of a short text is subtracted. Peers: torch in bf16 with transformers' own
loop, and with our recorded step, so that only the products differ.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.bench import Figure, machine
from benchmarks.gpu_kernels import random_fields
from benchmarks.peers import ROOT
from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.cli.tables import columns_table
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.runtime.install import install
from reallm.runtime.packed import Packed
from reallm.runtime.step.generate import use_step

RESULTS = ROOT / "benchmarks" / "results" / "gpu_decode.json"
PROMPT, DECODED, SHORT, PREFILL = 64, 128, 8, 512
ROUNDS = int(os.environ.get("ROUNDS") or 3)
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
LLAMA3 = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {"SmolLM2-135M": SMOLLM2, "LLaMA-3-8B": LLAMA3}
ALL_FORMATS = "tq4-l12+ldl2+rot,tq3-l12+ldl2+rot,tq2-l12+ldl2+rot,uint4-g64,uint3-g64"
FORMATS = ("", *(os.environ.get("FORMATS") or ALL_FORMATS).split(","))
"""Formats of the decoder linears; "" is bf16."""
FAMILIES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
FAMILIES += ("mlp.up_proj", "mlp.down_proj")


def random_model(config: LlamaConfig, fmt: str) -> PreTrainedModel:
    """A model in bf16 on the GPU whose decoder linears hold random codes of `fmt`, or random bf16 values for ""."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if fmt:
            layers = range(config.num_hidden_layers)
            names = tuple(f"model.layers.{index}.{family}" for index in layers for family in FAMILIES)
            install(model, QuantizationRecord(formats={Format.parse(fmt).name: names}), torch.bfloat16)
    model.to_empty(device="cuda")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    rotary: Any = model.get_submodule("model.rotary_emb")
    model.model.rotary_emb = type(rotary)(config=config).to("cuda")
    for module in model.modules():
        if isinstance(module, Packed):
            module.write(random_fields(module.format, module.rows, module.cols).items())
    return model.eval()


def seconds(model: PreTrainedModel, prompt: int, tokens: int, own_loop: bool) -> float:
    """Seconds of generating `tokens` tokens after a prompt: the median of ROUNDS rounds after a warm-up."""
    ids = 10 + torch.arange(prompt, device="cuda")[None] % 1000
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": tokens}
    taken = []
    for turn in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        generate = use_step(model) if own_loop else lambda *a, **k: type(model).generate(model, *a, **k)
        generate(ids, attention_mask=torch.ones_like(ids), **settings)
        torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def rates(model: PreTrainedModel, own_loop: bool) -> tuple[float, float]:
    """(decoded tokens per second, prompt tokens per second)."""
    if own_loop:
        use_step(model).ready().reserve(PREFILL + DECODED)  # one recording for all texts
    long, short = (seconds(model, PROMPT, count, own_loop) for count in (DECODED + SHORT, SHORT))
    return DECODED / (long - short), PREFILL / seconds(model, PREFILL, 1, own_loop)


def race(name: str) -> Iterator[tuple[str, float, float]]:
    """(contender, decoded and prompt tokens per second) for one model."""
    for fmt in FORMATS:
        model = random_model(MODELS[name], fmt)
        yield f"reallm {fmt}" if fmt else "torch bf16, our step", *rates(model, own_loop=True)
        if not fmt:
            yield "torch bf16, transformers", *rates(model, own_loop=False)
        del model
        torch.cuda.empty_cache()


def main() -> None:
    """Run, write and print."""
    done: list[Figure] = []
    versions = {"reallm": version("reallm"), "triton": version("triton"), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    hardware = f"{machine()}, {torch.cuda.get_device_name()}"
    for name in (os.environ.get("MODELS") or ",".join(MODELS)).split(","):
        results = []
        for contender, *speeds in race(name):
            results.append((contender, speeds))
            print(name, contender, [round(speed, 1) for speed in speeds], flush=True)
        peers = [row for row in results if not row[0].startswith("reallm")]
        for contender, speeds in results:
            for peer, others in peers if contender.startswith("reallm") else ():
                for what, speed, other in zip(("decode", "prompt of 512"), speeds, others, strict=True):
                    figure = f"{name}, {what}: {contender}"
                    done.append(Figure(figure, "tokens/s", speed, peer, other, speed / other, versions, hardware))
        write_text_atomic(RESULTS, canonical_json([asdict(row) for row in done]))
    lines = [[r.figure, f"{r.ours:.1f}", r.peer_name, f"{r.peer:.1f}", f"{r.ratio:.2f}"] for r in done]
    Console(width=160).print(
        columns_table(f"tokens per second on {hardware}", ("", "ours", "beside", "its", "ratio"), lines)
    )


if __name__ == "__main__":
    main()
