"""The demo's artifact beside llama.cpp's smallest file of the same model: IQ2_XXS with an importance matrix.

    make demo
    make bench NAME=smallest_file [TEXT=calibration] [TEST=held-out]

`llama-quantize` (of ik-llama-cpp-python, installed for this) makes the file from the GGUF that the demo starts from.
Its importance matrix, the mean squared inputs of every matrix, comes from the windows that the demo calibrates on.
Blocks of 256 do not fit this model's rows of 576 weights: llama-quantize itself stores those matrices in larger types.
Both files are evaluated against the same original, in float32 on the same windows.
"""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

import reallm
from benchmarks.peers import ROOT
from reallm.cli.demo import MODEL_FILE, NSAMPLES, WINDOWS
from reallm.kernels.storage.atomic import canonical_json
from reallm.models.loaded import load_model
from reallm.text.corpus import load_text
from reallm.text.windows import cut_windows

RESULTS = ROOT / "benchmarks" / "results" / "smallest_file.json"
FOLDER = ROOT / ".bench" / "smallest_file"
DEMO = ROOT / "demo"
PACKAGE = "ik-llama-cpp-python==0.1.5"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def mean_squares(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """GGUF tensor name -> mean square of each input of that matrix, float32 [cols], over `windows` [n, seqlen]."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].float().square().mean(dim=(0, 1))
        sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

    handles = []
    for path, module in model.named_modules():
        for suffix, gguf_name in GGUF_NAMES.items():
            if path.endswith(suffix):
                block = path.removesuffix(f".{suffix}").rpartition(".")[2]
                handles.append(module.register_forward_pre_hook(partial(add, f"blk.{block}.{gguf_name}.weight")))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: total / len(windows) for name, total in sums.items()}


def write_imatrix(path: Path, squares: dict[str, torch.Tensor]) -> None:
    """Write the importance matrix in llama.cpp's binary form: per tensor its name, a count and float32 values."""
    with path.open("wb") as stream:
        stream.write(struct.pack("<i", len(squares)))
        for name, values in squares.items():
            encoded = name.encode()
            stream.write(struct.pack(f"<i{len(encoded)}sii", len(encoded), encoded, 1, values.numel()))
            stream.write(values.numpy().astype("<f4").tobytes())


def installed_engine() -> Path:
    """The folder that ik-llama-cpp-python is installed in, for this only."""
    site = FOLDER / "site"
    if not site.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), PACKAGE]
        subprocess.run(pip, check=True)
    return site


def quantize(source: Path, imatrix: Path, output: Path, kind: str = "IQ2_XXS", options: tuple[str, ...] = ()) -> None:
    """Run llama-quantize. Raises CalledProcessError with its output on stderr."""
    site = installed_engine()
    program = site / "ik_llama_cpp" / "bin" / "llama-quantize"
    libraries = os.pathsep.join(
        str(place) for place in (site / "ik_llama_cpp" / "lib", site / "ik_llama_cpp_python.libs")
    )
    options = ("--imatrix", str(imatrix), "--allow-requantize", *options)
    subprocess.run(
        [str(program), *options, str(source), str(output), kind],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"LD_LIBRARY_PATH": libraries},
    )


def row(name: str, model: Path, test: str | None) -> dict[str, object]:
    """Bytes, perplexity and KL of one file."""
    result = reallm.evaluate(model, against=DEMO / MODEL_FILE, text=test, windows=WINDOWS)
    comparison = result.comparison
    assert comparison.divergence is not None
    return {
        "name": name,
        "file_bytes": result.sizes.file_bytes,
        "perplexity": comparison.perplexity,
        "base_perplexity": comparison.base_perplexity,
        "kl": comparison.divergence.mean,
        "text": result.text,
    }


def main() -> None:
    """Make the peer's file, evaluate both, write and print the rows."""
    text, test = os.environ.get("TEXT") or None, os.environ.get("TEST") or None
    FOLDER.mkdir(parents=True, exist_ok=True)
    loaded = load_model(DEMO / MODEL_FILE)
    windows = cut_windows(load_text(text), loaded.tokenizer, nsamples=NSAMPLES, seqlen=1024, seed=0)
    write_imatrix(FOLDER / "imatrix.dat", mean_squares(loaded.model.float(), windows))
    quantize(DEMO / MODEL_FILE, FOLDER / "imatrix.dat", FOLDER / "IQ2_XXS.gguf")
    rows = [
        row("reallm, the demo's artifact", DEMO / "out", test),
        row("llama.cpp IQ2_XXS with imatrix", FOLDER / "IQ2_XXS.gguf", test),
    ]
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "llama.cpp": PACKAGE}
    RESULTS.write_text(canonical_json({"rows": rows, **machine}), encoding="utf-8")
    for entry in rows:
        print(
            f"{entry['name']}: {entry['file_bytes']} bytes, perplexity {entry['perplexity']:.3f}, KL {entry['kl']:.4f}"
        )


if __name__ == "__main__":
    main()
