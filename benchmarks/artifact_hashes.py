"""Hashes of the files that reallm writes for fixed inputs, to check that a refactoring does not change them.

    python -m benchmarks.artifact_hashes [--check] [--demo demo]

Three tiny random models are measured, planned and compiled with the commands that a user would type: llama with a LoRA
adapter inside its artifact, Mixtral with experts, GPT-2 with shared codebooks. `--demo FOLDER` adds the artifact of
`make demo`. For each artifact the list has the SHA-256 of every file that determines what the model computes (tensors,
plan, configuration, adapter), and of the plan's choices. `--check` compares with the committed list instead of writing
it. Floating-point sums differ between processors, so compare on the machine that wrote the list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

RESULTS = Path(__file__).parent / "results" / "artifact_hashes.json"
HASHED = ("plan.json", "config.json", "*.safetensors", "adapters/*/adapter_*")
LLAMA = {
    "vocab_size": 261,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[PretrainedConfig, tuple[str, ...]]] = {
    "adapter": (LlamaConfig(**LLAMA), ("lm3-g16-dq6x64+ldl", "tq2.5-l8+ldl2+rot", "int8-g16")),
    "experts": (MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2), ("int4-g16", "int8-g16", "km3")),
    "shared": (
        GPT2Config(
            vocab_size=261, n_embd=48, n_inner=80, n_layer=2, n_head=3, n_positions=256, bos_token_id=0, eos_token_id=2
        ),
        ("aq2x4-d4-shared", "int4-g16"),
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with five special tokens and one token per byte."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    vocab = {token: i for i, token in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=256)


def run(folder: Path, *arguments: str) -> None:
    """Run a `reallm` command in `folder`; relative paths keep the folder's location out of the plan."""
    subprocess.run([sys.executable, "-m", "reallm", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def build(name: str, folder: Path) -> Path:
    """Make the artifact called `name` in `folder`; returns its path."""
    config, formats = MODELS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    letters = "".join(random.Random(1).choices("abcdefgh .", k=40 * 32))
    (folder / "train.txt").write_text(letters, encoding="utf-8")
    (folder / "space.yaml").write_text(f"linear: [{', '.join(formats)}]\n", encoding="utf-8")
    calibration = ("--text", "train.txt", "--nsamples", "8", "--seqlen", "32", "--space", "space.yaml", "--jobs", "1")
    run(folder, "measure", "model", *calibration, "-o", "work")
    run(folder, "plan", "work", "--budget", "6bpw", "-o", "plan.json")
    run(folder, "compile", "plan.json", "-o", "out")
    if name == "adapter":
        training = ("--steps", "2", "--seqlen", "32", "--adapter", "--rank", "2")
        run(folder, "finetune", "out", "--text", "train.txt", *training, "-o", "out/adapters/letters")
    return folder / "out"


def tensors_sha256(path: Path) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all tensors of a safetensors file; its metadata does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashes(artifact: Path) -> dict[str, str]:
    """File -> SHA-256, for the files of HASHED; and of the plan's choices (matrix, format, bytes) alone."""
    files = sorted(path for pattern in HASHED for path in artifact.glob(pattern))
    listed = {
        str(path.relative_to(artifact)): tensors_sha256(path)
        if path.suffix == ".safetensors"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    choices = json.loads((artifact / "plan.json").read_text(encoding="utf-8"))["choices"]
    chosen = json.dumps([[choice["matrix"], choice["format"], choice["nbytes"]] for choice in choices])
    return listed | {"choices": hashlib.sha256(chosen.encode()).hexdigest()}


def main() -> int:
    """Write or check the list; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed list instead of writing it")
    parser.add_argument("--demo", type=Path, help="also hash the artifact in this folder of `make demo`")
    options = parser.parse_args()
    current: dict[str, dict[str, str]] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            current[name] = hashes(build(name, Path(folder)))
    if options.demo:
        current["demo"] = hashes(options.demo / "out")
    if not options.check:
        RESULTS.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    expected = json.loads(RESULTS.read_text(encoding="utf-8"))
    differing = [
        f"{name}/{file}"
        for name in current
        for file in sorted({*current[name], *expected[name]})
        if current[name].get(file) != expected[name].get(file)
    ]
    print("\n".join(f"differs: {file}" for file in differing) or "every hash equals the committed one")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
