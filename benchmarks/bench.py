"""What the quality benchmarks share: a base model, tokens, an evaluator, and a cache of results.

Every method compresses the decoder linears of one model, and one evaluator measures them all: KL to the float32 model
in nats per token on WINDOWS windows of SEQLEN tokens of held-out text. Finished parts are cached in .bench/quality
under the hash of model and texts; delete the folder to start from scratch.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.peers import ROOT, Peer, run_peer
from reallm.cli.demo import fetch_model
from reallm.cli.tables import columns_table
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.evaluation.compare import CachedLogits, Comparison, compare_models
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.cache import content_key
from reallm.measurement.calibration_text import sample_windows
from reallm.measurement.measure import measure
from reallm.measurement.search_space import load_space
from reallm.models.loaded import load_model
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Cost, Plan
from reallm.planner.tables.records import read_record, write_record
from reallm.planning.plan import plan
from reallm.runtime.load import load
from reallm.text.corpus import load_text
from reallm.text.windows import cut_windows

FOLDER = ROOT / ".bench" / "quality"
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
DEFAULT_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:train"
DEFAULT_TEST = "Salesforce/wikitext:wikitext-2-raw-v1:test"
ROUNDING = 1e-9
"""Bits per weight added so that a rounded decimal budget is not a byte short; far below a byte for 10^9 weights."""
NSAMPLES, SEQLEN, WINDOWS, SEED = 16, 1024, 8, 0


@dataclass(frozen=True)
class Figure:
    """One figure of ours beside its target or a peer's; unless the benchmark says otherwise, lower is better."""

    figure: str
    """What is compared."""
    unit: str
    ours: float
    peer_name: str
    """The peer, or "target"."""
    peer: float | None
    """None where the peer gave no result."""
    ratio: float | None
    """Ours divided by the peer's."""
    versions: dict[str, str]
    machine: str


@dataclass(frozen=True)
class Measured:
    """Size and quality of the model that one method made, and what the method cost."""

    name: str
    bits_per_weight: float
    kl: float
    """KL to the float32 base, in nats per token."""
    perplexity: float
    versions: dict[str, str]
    seconds: float | None = None
    """For a peer, as in PeerReport."""
    processor_seconds: float | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One comparison of two methods; lower is better."""

    figure: str
    unit: str
    ours: float
    ours_bits_per_weight: float
    ours_perplexity: float | None
    peer_name: str
    peer: float
    peer_bits_per_weight: float
    peer_perplexity: float | None
    ratio: float
    """Ours divided by the peer's."""
    versions: dict[str, str]
    machine: str


class Bench:
    """The base model, the calibration and evaluation tokens, and the results measured on them."""

    def __init__(
        self, model: str, text: str | None, test: str, nsamples: int = NSAMPLES, windows: int = WINDOWS
    ) -> None:
        """`nsamples` is the number of windows our own work folder is calibrated on; peers get NSAMPLES.

        `windows` is the number of windows that everything is evaluated on.
        """
        source = load_model(model)
        if source.tokenizer is None:
            raise UserError(f"{model} has no tokenizer")
        self.text = text
        calibration, held_out = load_text(text), load_text(test, split="test")
        key = content_key({"model": source.digest, "text": calibration.sha256, "test": held_out.sha256})
        self.folder = FOLDER / key[:12]
        self.base_folder = self.folder / "base"
        if not (self.base_folder / "config.json").exists():
            source.model.save_pretrained(self.base_folder)
            source.tokenizer.save_pretrained(self.base_folder)
        self.nsamples = nsamples
        self.work = self.folder / ("work" if nsamples == NSAMPLES else f"work-{nsamples}")
        self.base = load_model(self.base_folder)
        self.dense = CachedLogits(load_model(self.base_folder, dtype=torch.float32).model)
        self.calibration = self.folder / "calibration.safetensors"
        save_file(
            {"windows": sample_windows(source, calibration, NSAMPLES, SEQLEN, SEED, chat_template=False)},
            self.calibration,
        )
        self.windows = cut_windows(held_out, source.tokenizer, None, SEQLEN)[:windows]
        self.results = self.folder / ("results" if windows == WINDOWS else f"results-{windows}")

    def cached(self, name: str, make: Callable[[], Measured]) -> Measured:
        """The result called `name`, from an earlier run or computed now with `make`."""
        path = self.results / f"{name.replace(' ', '-')}.json"
        if path.exists():
            return Measured(**json.loads(path.read_text(encoding="utf-8")))
        result = make()
        write_text_atomic(path, canonical_json(asdict(result)))
        return result

    def compare(self, model: PreTrainedModel) -> Comparison:
        """Perplexity and KL of `model` to the float32 base."""
        return compare_models(self.dense, model, self.windows)

    def peer(self, peer: Peer) -> Measured:
        """The result of `peer` on the base model, from an earlier run or computed now."""
        return self.cached(peer.name, partial(self._run, peer))

    def _run(self, peer: Peer) -> Measured:
        weights, report = run_peer(peer, self.base_folder, self.calibration, self.folder / peer.name.replace(" ", "-"))
        model = load_model(self.base_folder, dtype=torch.float32).model
        incompatible = model.load_state_dict(weights, strict=False)
        linears = {f"{m.name}.weight" for m in self.base.matrices if m.kind == "linear"}
        assert not incompatible.unexpected_keys and linears <= set(weights)
        result = _measured(peer.name, report.bits_per_weight, self.compare(model), report.versions)
        cost = {name: getattr(report, name) for name in ("seconds", "processor_seconds", "peak_rss_bytes")}
        return replace(result, **cost)

    def ours(self, name: str, chosen: Plan) -> Measured:
        """Compile `chosen`, load the artifact and evaluate it."""
        with TemporaryDirectory(dir=self.folder) as folder:
            plan_path, output = Path(folder) / "plan.json", Path(folder) / "out"
            write_record(plan_path, chosen)
            compile_plan(plan_path, output, model=self.base, kernels=False)
            model, _ = load(output, dtype=torch.float32)
            result = self.compare(model)
        return _measured(name, chosen.bits_per_weight, result, {"reallm": version("reallm")})


def _measured(name: str, bits: float, comparison: Comparison, versions: dict[str, str]) -> Measured:
    assert comparison.divergence is not None and comparison.perplexity is not None
    return Measured(name, bits, comparison.divergence.mean, comparison.perplexity, versions)


def planned(bench: Bench, name: str, chosen: Plan) -> Measured:
    """The result of a plan, cached under the hash of its choices."""
    key = content_key({"choices": [choice.model_dump(mode="json") for choice in chosen.choices]})
    return bench.cached(f"{name} {key[:12]}", partial(bench.ours, name, chosen))


def row(ours: Measured, other: Measured) -> Row:
    """One row that compares two results, labelled with the bits per weight of the other."""
    return Row(
        figure=f"KL to the float32 model at {other.bits_per_weight:.4g} bits per weight",
        unit="nats per token",
        ours=ours.kl,
        ours_bits_per_weight=ours.bits_per_weight,
        ours_perplexity=ours.perplexity if math.isfinite(ours.perplexity) else None,
        peer_name=other.name,
        peer=other.kl,
        peer_bits_per_weight=other.bits_per_weight,
        peer_perplexity=other.perplexity if math.isfinite(other.perplexity) else None,
        ratio=ours.kl / other.kl,
        versions=other.versions | {"reallm": version("reallm"), "torch": torch.__version__},
        machine=machine(),
    )


def machine() -> str:
    """The CPU's name and number of cores, and the operating system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {psutil.cpu_count()} cores, {platform.system()} {platform.release()}"


def bench_from_environment(console: Console, nsamples: int = NSAMPLES) -> Bench:
    """The bench of MODEL, TEXT and TEST, or of their defaults."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text, test = os.environ.get("TEXT") or DEFAULT_TEXT, os.environ.get("TEST") or DEFAULT_TEST
    return Bench(os.environ.get("MODEL") or str(fetch_model(FOLDER, console)), text, test, nsamples)


def measure_formats(
    bench: Bench, label: str, formats: Iterable[str], bpw: tuple[float, float] | None = None
) -> MeasuredTable:
    """The measured table of `bench`, after measuring those of `formats` that it lacks; `bpw` as in `measure`."""
    space = bench.folder / f"{label}.yaml"
    space.write_text(f"linear: [{', '.join(formats)}]\n", encoding="utf-8")
    return measure(
        bench.base_folder,
        text=bench.text,
        output=bench.work,
        space=space,
        nsamples=bench.nsamples,
        seqlen=SEQLEN,
        jobs=int(os.environ.get("JOBS") or -1),
        bpw=bpw,
    )


def candidates() -> list[str]:
    """The formats that the planner may mix, whatever else was measured: those of SPACE for linear layers."""
    return [fmt.name for fmt in load_space(os.environ.get("SPACE")).formats["linear"]]


def mixed(bench: Bench, budget: str, cost: Cost = "two_sided") -> Plan:
    """The planner's mix of those `candidates` that were measured, within `budget`."""
    known = {r.format for r in read_record(bench.work / TABLE_FILE, MeasuredTable, "measure").measurements}
    return plan(bench.work, budget=budget, formats=[name for name in candidates() if name in known], cost=cost)


def report(name: str, rows: Iterable[Row], results: Path, console: Console, keep: bool = False) -> None:
    """Write every row to `results` as soon as it is there, and print all at the end.

    With `keep`, for runs of a part of the benchmark, rows of an earlier run stay unless a new row replaces them.
    """
    earlier = json.loads(results.read_text(encoding="utf-8")) if keep and results.exists() else []
    done: list[Row] = []
    for new in rows:
        done.append(new)
        known = {(r.figure, r.peer_name) for r in done}
        remaining = [old for old in earlier if (old["figure"], old["peer_name"]) not in known]
        write_text_atomic(results, canonical_json([*(asdict(r) for r in done), *remaining]))
    lines = [
        [*(f"{v:.4f}" for v in (r.ours_bits_per_weight, r.ours)), r.peer_name]
        + [f"{v:.4f}" for v in (r.peer_bits_per_weight, r.peer, r.ratio)]
        for r in done
    ]
    console.print(columns_table(name, ("bits", "our KL", "other", "its bits", "its KL", "ratio"), lines))
