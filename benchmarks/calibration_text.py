"""Calibration texts compared: the same model, formats and number of tokens, calibrated on different texts.

    make bench NAME=calibration_text [MODEL=...] [C4=FILE] [WIKIPEDIA=FILE] [TEST=FILE] [JOBS=1]

The texts are Python's documentation, C4, Wikipedia and what the model writes itself. C4 and Wikipedia are split in two
parts that share no document; models are calibrated on the first part only. Every decoder linear is stored in one
format, without planning, and embedding and head are left as they are, so that nothing but the text differs. All models
are compared with the float32 model on the same windows of the second parts of all texts, and of WikiText-2's test text.

C4, WIKIPEDIA and TEST are files or data sets of the hub, by default the latter. A text that is missing is skipped with
a line that says so. Finished parts are kept in .bench/calibration_text.
"""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.bench import machine
from benchmarks.peers import ROOT
from reallm.cli.demo import fetch_model
from reallm.cli.tables import columns_table
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.evaluation.compare import compare_models
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.cache import content_key
from reallm.measurement.measure import measure
from reallm.models.loaded import LoadedModel, load_model
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.records import write_record
from reallm.runtime.load import load
from reallm.text.corpus import Text, load_text
from reallm.text.documents import Conversation
from reallm.text.windows import cut_windows

FOLDER = ROOT / ".bench" / "calibration_text"
RESULTS = ROOT / "benchmarks" / "results" / "calibration_text.json"
BITS = (3, 2, 4)
"""Rates, the most telling first."""
RECIPE = "tq{}-l10+ldl2+rot"
"""The trellis of the preset `quick`."""
NSAMPLES, SEQLEN, WINDOWS, SEED = 16, 512, 8, 0
"""Calibration windows, their tokens, and windows of every evaluation text."""
CALIBRATION_SHARE, GAP_SHARE = 0.6, 0.05
"""Shares of a text for calibration, and between this part and the held-out rest."""
SOURCES = {
    "C4": ("C4", "allenai/c4:en:validation"),
    "Wikipedia": ("WIKIPEDIA", "wikimedia/wikipedia:20231101.en:train"),
    "WikiText-2": ("TEST", "Salesforce/wikitext:wikitext-2-raw-v1:test"),
}
"""Text -> the environment variable that names its file, and the data set without it."""
PYTHON, WRITTEN = "Python docs", "the model's own"
REFERENCE = PYTHON
"""The text that others are compared with: what reallm used without --text before this benchmark."""


def split_text(text: Text) -> tuple[str, str]:
    """The calibration part and the held-out part of `text`. A text of one document is split between its lines."""
    documents = [d for d in text.documents if not isinstance(d, Conversation)]
    separator = "\n\n" if len(documents) > 1 else "\n"
    pieces = documents if len(documents) > 1 else documents[0].split("\n")
    total, position = sum(map(len, pieces)), 0
    parts: tuple[list[str], list[str]] = ([], [])
    for piece in pieces:
        share = position / total
        position += len(piece)
        if position / total <= CALIBRATION_SHARE:
            parts[0].append(piece)
        elif share >= CALIBRATION_SHARE + GAP_SHARE:
            parts[1].append(piece)
    return separator.join(parts[0]), separator.join(parts[1])


class KeptLogits:
    """The float32 model, whose logits on each window are computed once and kept in a file."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self.device, self.folder = model, model.device, folder
        folder.mkdir(parents=True, exist_ok=True)

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.model.eval()

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        path = self.folder / f"{content_key({'ids': input_ids.tolist()})[:16]}.safetensors"
        if not path.exists():
            save_file({"logits": self.model(input_ids=input_ids).logits}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        return SimpleNamespace(logits=load_file(path)["logits"])


@dataclass
class Bench:
    """The model, and the files of the texts' parts."""

    model: Path
    folder: Path
    calibration: Mapping[str, str]
    """Calibration text -> the value of --text."""
    held_out: Mapping[str, Tensor]
    """Evaluation text -> its windows [n, seqlen]."""

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model in its own dtype."""
        return load_model(self.model)

    @cached_property
    def dense(self) -> KeptLogits:
        """The float32 model."""
        return KeptLogits(load_model(self.model, dtype=torch.float32).model, self.folder / "logits")

    def result(self, text: str, bits: float) -> dict[str, list[float]]:
        """Evaluation text -> KL of each window, of the model calibrated on `text`; from an earlier run where known."""
        name = RECIPE.format(bits)
        path = self.folder / "results" / f"{content_key({'text': text, 'format': name})[:16]}.json"
        known: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if missing := [on for on in self.held_out if on not in known]:
            model = self._compressed(text, name)
            for on in missing:
                known[on] = [self._kl(model, window) for window in self.held_out[on]]
                write_text_atomic(path, canonical_json(known))
        return known

    def _kl(self, model: PreTrainedModel, window: Tensor) -> float:
        """KL of `model` to the dense one on one window, mean nats per token."""
        result = compare_models(self.dense, model, window[None], progress=False)
        assert result.divergence is not None
        return result.divergence.mean

    def _compressed(self, text: str, name: str) -> PreTrainedModel:
        """The model with every linear in format `name`, calibrated on `text`."""
        work = self.folder / f"work-{text.replace(' ', '-')}"
        space = self.folder / "space.yaml"
        space.write_text(f"linear: [{name}]\n", encoding="utf-8")
        table = measure(
            self.model,
            text=self.calibration[text],
            output=work,
            space=space,
            nsamples=NSAMPLES,
            seqlen=SEQLEN,
            seed=SEED,
            jobs=int(os.environ.get("JOBS") or 1),
        )
        plan_path, output = work / "plan.json", work / "out"
        write_record(plan_path, uniform_plan(table, name, work=str(work)))
        compile_plan(plan_path, output, model=self.loaded, kernels=False, force=True)
        return load(output, dtype=torch.float32)[0]


def open_bench(console: Console) -> Bench:
    """Read the texts, and write their calibration parts into the bench's folder."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = Path(os.environ.get("MODEL") or fetch_model(FOLDER, console))
    loaded = load_model(model)
    parts = {PYTHON: ("\n\n".join(_plain(load_text(None, "train"))), "\n\n".join(_plain(load_text(None, "test"))))}
    for name, (variable, default) in SOURCES.items():
        try:
            text = load_text(os.environ.get(variable) or default)
        except UserError as error:
            console.print(f"{name} is skipped: {error} ({variable}=FILE names a file)", highlight=False)
            continue
        parts[name] = split_text(text) if variable != "TEST" else ("", "\n".join(_plain(text)))
    key = content_key({"model": loaded.digest, "parts": parts, "sizes": [NSAMPLES, SEQLEN, WINDOWS, SEED]})
    folder = FOLDER / key[:12]
    folder.mkdir(exist_ok=True)
    calibration = {}
    for name, (text, _) in parts.items():
        if text:
            path = folder / f"{name.replace(' ', '-')}.txt"
            path.write_text(text, encoding="utf-8")
            calibration[name] = str(path)
    assert loaded.tokenizer is not None
    held_out = {
        name: cut_windows(Text((part,), name, ""), loaded.tokenizer, WINDOWS, SEQLEN, SEED + 1)
        for name, (_, part) in parts.items()
    }
    return Bench(model, folder, {PYTHON: calibration.pop(PYTHON), WRITTEN: "self", **calibration}, held_out)


def _plain(text: Text) -> list[str]:
    """The documents of `text` that are not conversations."""
    return [d for d in text.documents if not isinstance(d, Conversation)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of `values` and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def rows_of(results: Mapping[tuple[str, int], dict[str, list[float]]], bits: int) -> Iterator[dict[str, Any]]:
    """One row per calibration and evaluation text: KL, and its change from that of every other calibration text.

    A change is a share of the other text's KL, with the standard error of the differences by window.
    """
    for (text, rate), known in results.items():
        if rate != bits:
            continue
        for on, values in known.items():
            kl, error = mean_and_error(values)
            row: dict[str, Any] = {
                "calibrated_on": text,
                "bits": bits,
                "evaluated_on": on,
                "kl": kl,
                "kl_standard_error": error,
            }
            others = {name: other[on] for (name, rate), other in results.items() if rate == bits and name != text}
            yield row | {
                "change_from": {name: _change(values, base) for name, base in others.items()},
                "windows": values,
            }


def _change(values: list[float], base: list[float]) -> tuple[float, float]:
    """The change from `base` to `values`, KL of the same windows, as a share of its mean; its standard error."""
    level = sum(base) / len(base)
    return mean_and_error([(v - b) / level for v, b in zip(values, base, strict=True)])


def _cell(row: Mapping[str, Any]) -> str:
    change = row["change_from"].get(REFERENCE)
    return f"{row['kl']:.4f}" + (f" ({change[0]:+.1%} ± {change[1]:.1%})" if change else "")


def main() -> None:
    """Run what is missing, and print and write the results after every model."""
    console = Console(width=160)
    bench = open_bench(console)
    results: dict[tuple[str, int], dict[str, list[float]]] = {}
    for bits, text in product(BITS, bench.calibration):
        results[text, bits] = bench.result(text, bits)
        rows = [row for rate in sorted(BITS) for row in rows_of(results, rate)]
        used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        console.print(f"{text} at {bits} bits: {results[text, bits]}; {used:.0f} processor seconds so far")
        record = {
            "command": "make bench NAME=calibration_text",
            "recipe": RECIPE,
            "calibration": {"windows": NSAMPLES, "tokens": SEQLEN},
            "evaluation": {"windows": WINDOWS, "tokens": SEQLEN},
            "unit": "KL to the float32 model, nats per token; changes: shares of it, standard error",
            "machine": machine(),
            "versions": {"reallm": version("reallm"), "torch": torch.__version__},
            "rows": rows,
        }
        write_text_atomic(RESULTS, canonical_json(record))
    for bits in sorted(BITS):
        lines = []
        for text in bench.calibration:
            cells = [row for row in rows_of(results, bits) if row["calibrated_on"] == text]
            lines.append(
                [text, *(f"{c['kl']:.4f} ({c['change']:+.1%} ± {c['change_standard_error']:.1%})" for c in cells)]
            )
        console.print(columns_table(f"KL at {bits} bits", ("calibrated on", *bench.held_out), lines))


if __name__ == "__main__":
    main()
