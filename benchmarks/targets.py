"""Files for llama.cpp: ours beside those of llama-quantize, by KL in the engine at equal file sizes.

    make bench NAME=targets [TEXT=calibration] [TEST=held-out] [NSAMPLES=64] [TYPES=Q4_0,IQ4_NL,Q5_0,Q8_0]

For every type, llama-quantize makes a file with an importance matrix from 16 of the windows that we calibrate on, and
we plan, compile and export a file that is not larger. Both keep the embedding of the base file. The logits are those of
ik_llama.cpp on the CPU, 16 tokens at a time, on WINDOWS windows of SEQLEN tokens of TEST; the base file runs there too,
which shows what the engine's own rounding of activations costs. All files are made from the 4-bit base file, which is
the reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.bench import DEFAULT_TEST, DEFAULT_TEXT, FOLDER, SEQLEN, WINDOWS, Bench, machine
from benchmarks.peers import ROOT
from benchmarks.smallest_file import PACKAGE, installed_engine, mean_squares, quantize, write_imatrix
from reallm.cli.demo import fetch_model
from reallm.cli.tables import columns_table
from reallm.compilation.compile import compile_plan
from reallm.evaluation.compare import Comparison, compare_models
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.measure import measure
from reallm.planning.plan import plan
from reallm.targets.export import export

RESULTS = ROOT / "benchmarks" / "results" / "targets.json"
ENGINE = ROOT / "benchmarks" / "peer" / "engine_llama.py"
TYPES = "Q4_0,IQ4_NL,Q5_0,Q8_0"
IMATRIX_WINDOWS = 16
COLUMNS = {"file_bytes": "file bytes", "linear_bits": "bits per linear weight", "kl": "KL", "perplexity": "perplexity"}


class EngineModel:
    """A GGUF file in the engine, called like a transformers model."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.device = path, folder, torch.device("cpu")

    def eval(self) -> None:
        """The engine has no training mode."""

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        tokens, logits = self.folder / "tokens.npy", self.folder / "logits.npy"
        np.save(tokens, input_ids[0].numpy().astype(np.int32))
        site = installed_engine()
        libraries = os.pathsep.join(map(str, (site / "ik_llama_cpp" / "lib", site / "ik_llama_cpp_python.libs")))
        env = os.environ | {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": libraries}
        command = [sys.executable, str(ENGINE), str(self.path), str(tokens), str(logits)]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return SimpleNamespace(logits=torch.from_numpy(np.load(logits))[None])


class Targets:
    """The files of one base model, and their results."""

    def __init__(self, bench: Bench, base: Path, fixed_bytes: int) -> None:
        self.bench, self.base, self.fixed_bytes = bench, base, fixed_bytes
        self.folder = bench.folder / "targets"
        self.work = self.folder / "work"
        self.numel = sum(m.numel for m in bench.base.matrices if m.kind == "linear")
        self.rows: dict[str, dict[str, Any]] = {}

    def compare(self, name: str, path: Path) -> None:
        """Measure one file in the engine, and write the results so far."""
        model: Any = EngineModel(path, self.folder)
        result: Comparison = compare_models(self.bench.dense, model, self.bench.windows)
        assert result.divergence is not None
        nbytes = path.stat().st_size
        self.rows[name] = {
            "file_bytes": nbytes,
            "linear_bits": 8 * (nbytes - self.fixed_bytes) / self.numel,
            "kl": result.divergence.mean,
            "perplexity": result.perplexity,
        }
        content = {
            "rows": self.rows,
            "machine": machine(),
            "engine": PACKAGE,
            "windows": WINDOWS,
            "base": self.base.name,
        }
        write_text_atomic(RESULTS, canonical_json(content))

    def ours(self, nbytes: int, name: str) -> Path:
        """Plan, compile and export a file of at most `nbytes` bytes."""
        bits = 8 * (nbytes - self.fixed_bytes) / self.numel
        place, artifact = self.folder / f"{name}.plan.json", self.folder / f"{name}-artifact"
        plan(self.work, budget=f"{bits:.6f}bpw", output=place, target="gguf")
        compile_plan(place, artifact, model=self.bench.base, kernels=False, force=True)
        return export(artifact, self.folder / f"{name}.gguf", target="gguf", base=self.base, force=True).path

    def peer(self, kind: str) -> Path:
        """The file of llama-quantize."""
        output = self.folder / f"{kind}.gguf"
        if not output.exists():
            quantize(self.base, self.folder / "imatrix.dat", output, kind, ("--token-embedding-type", "q8_0"))
        return output


def fixed_bytes(base: Path, names: Callable[[str], bool]) -> int:
    """Bytes of a GGUF file less those of the tensors that `names` accepts."""
    from gguf import GGUFReader

    return base.stat().st_size - sum(int(t.n_bytes) for t in GGUFReader(base).tensors if names(t.name))


def main() -> None:
    """Make all files, measure them, print the table."""
    console = Console()
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = fetch_model(FOLDER, console)
    text, test = os.environ.get("TEXT") or DEFAULT_TEXT, os.environ.get("TEST") or DEFAULT_TEST
    nsamples = int(os.environ.get("NSAMPLES") or 64)
    bench = Bench(str(base), text, test, nsamples, WINDOWS)
    targets = Targets(bench, base, fixed_bytes(base, lambda name: name.startswith("blk.") and "norm" not in name))
    targets.folder.mkdir(exist_ok=True)
    measure(bench.base_folder, text=text, output=targets.work, space="gguf", nsamples=nsamples, seqlen=SEQLEN)
    imatrix = targets.folder / "imatrix.dat"
    if not imatrix.exists():
        from safetensors.torch import load_file

        windows = load_file(bench.calibration)["windows"][:IMATRIX_WINDOWS]
        write_imatrix(imatrix, mean_squares(bench.dense.model, windows))
    targets.compare("base, Q4_1", base)
    for kind in (os.environ.get("TYPES") or TYPES).split(","):
        theirs = targets.peer(kind)
        targets.compare(f"llama-quantize {kind}", theirs)
        targets.compare(f"reallm at {kind}'s size", targets.ours(theirs.stat().st_size, kind.lower()))
    rows = [[name, *(f"{row[key]:.6g}" for key in COLUMNS)] for name, row in targets.rows.items()]
    console.print(columns_table("files for llama.cpp, measured in the engine", ("file", *COLUMNS.values()), rows))


if __name__ == "__main__":
    main()
