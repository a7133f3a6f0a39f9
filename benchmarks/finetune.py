"""Fine-tuning: artifacts before and after it, its stages, and the published methods for fine-tuning at equal bytes.

    make bench NAME=finetune [MODEL=...] [TEXT=training] [TEST=held-out] [PARTS=2.0,stages] [STEPS=40]

The work folder is calibrated on SAMPLES windows of the training text. PARTS are

- 2.0, 2.5, 3.0  bits per weight: the planner's mix after the default recipe, which does not change the size, compared
                 with the mix before it; its time and its peak memory
- stages         at 2.0 bits: the default recipe, end to end alone, compared with other stages, orders and fewer steps
- qlora, loftq, lq-lora   the preset's format and initialisation with its factors trained for STEPS steps, compared with
                 the planner's mix in at most as many bytes, with scales and norms trained for as many steps
- inits          at 2.5 bits with factors of rank 8: initialisations of the factors, after STEPS steps
- codebooks      additive codes everywhere: codebooks, scales and norms trained, or scales and norms alone, STEPS steps
- adapters       at 2.5 bits, an adapter of rank 8 in fp16 beside the artifact: LoRA and DoRA, after STEPS steps
- planning       at the bytes of one format everywhere: that format, and the mix planned with the relative error,
                 compared with the mix planned with the default cost; scales and norms trained STEPS steps in all

Every run is the command `reallm finetune` in a separate process. With PARTS, rows of the other parts stay as they were.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from benchmarks.bench import (
    ROUNDING,
    Bench,
    Measured,
    Row,
    bench_from_environment,
    candidates,
    machine,
    measure_formats,
    mixed,
    planned,
    report,
    row,
)
from benchmarks.peers import ROOT
from reallm.artifacts.adapter_layout import WEIGHTS_FILE
from reallm.compilation.compile import compile_plan
from reallm.measurement.cache import content_key
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.plan import Plan, read_plan
from reallm.planner.tables.records import write_record
from reallm.runtime.load import load

RESULTS = ROOT / "benchmarks" / "results" / "finetune.json"
STEPS = os.environ.get("STEPS") or "40"
SAMPLES = 64
"""Calibration windows, the default of `measure`; NAME=quality uses as few as its peers."""
NOTHING_GAINED = "nothing is written: try a smaller --learning-rate"
"""Part of the command's message when training did not help; the result is then the artifact as it was."""
FREE = {"train": "scales,norms"}
"""Options that do not change the size of the artifact."""
ONE_STAGE = FREE | {"order": "end-to-end", "steps": STEPS, "patience": "0"}
FACTORS = ONE_STAGE | {"train": "factors"}
Options = Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """A name, and options of `reallm finetune` by name; the value of a flag is empty."""

    name: str
    options: Options


CHOSEN = {"2.0": "160", "2.5": "60", "3.0": "60"}
"""Bits per weight -> the number of steps that the default recipe chooses."""
STAGES = {
    "end to end, 60 steps": "end-to-end",
    "new codes, then end to end, 60 steps": "codes,end-to-end",
    "blocks alone": "blocks",
    "blocks, then end to end, 60 steps": "blocks,end-to-end",
}
TUNED = Recipe(f"reallm, scales and norms, {STEPS} steps", ONE_STAGE)
PRESETS = {
    "qlora": ("nf4-g64-dq8x256", {"rank": "16", "factor-dtype": "f16", "init": "zero"}),
    "loftq": ("nf2-g64-dq8x256", {"rank": "16", "factor-dtype": "f16", "init": "loftq"}),
    "lq-lora": ("nf3-g64-dq8x256", {"rank": "16", "factor-dtype": "f16", "init": "lq-lora"}),
}
MAX_BITS = {"lq-lora": 3.9, "qlora": 4.9}
"""Bits per weight that these parts need; all others need at most three."""
UNPLANNED = ("codebooks",)
"""Parts that do not use the planner's mix."""
INITS = ("zero", "loftq")
UNIFORM = "tq2-l12+ldl2+rot"
ADDITIVE = "aq2x8-d8"


def of_order(name: str, order: str, steps: str = "60") -> Recipe:
    """The default recipe with the stages `order`; all options are explicit, so that the cache survives new defaults."""
    return Recipe(name, FREE | {"order": order, "steps": steps})


def default(bits: str) -> Recipe:
    """The default recipe at `bits` per weight, with explicit options."""
    return of_order("reallm, default recipe", "end-to-end", CHOSEN[bits])


def tuned(bench: Bench, recipe: Recipe, chosen: Plan) -> Measured:
    """The result of a plan after fine-tuning, cached under the hash of the plan's choices and the options."""
    choices = [choice.model_dump(mode="json") for choice in chosen.choices]
    key = content_key({"choices": choices, "options": dict(recipe.options)})
    return bench.cached(f"{recipe.name} {key[:12]}", partial(_tune, bench, recipe, chosen))


def _tune(bench: Bench, recipe: Recipe, chosen: Plan) -> Measured:
    with TemporaryDirectory(dir=bench.folder) as folder:
        plan_path, before, after = (Path(folder) / part for part in ("plan.json", "before", "after"))
        write_record(plan_path, chosen)
        compile_plan(plan_path, before, model=bench.base, kernels=False)
        paths: dict[str, str] = {"text": str(bench.text), "teacher": str(bench.base_folder), "work": str(bench.work)}
        pairs = (paths | dict(recipe.options)).items()
        options = [word for name, value in pairs for word in (f"--{name}", value) if word]
        command = [sys.executable, "-m", "reallm", "finetune", str(before), "-o", str(after), "--no-kernels", *options]
        began = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        messages = _echoed(process)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status and NOTHING_GAINED in messages:
            after = before
        elif status:
            raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
        adapter = after if "adapter" in recipe.options and after != before else None
        artifact = before if adapter else after
        comparison, bits = (
            bench.compare(load(artifact, dtype=torch.float32, adapter=adapter)[0]),
            chosen.bits_per_weight,
        )
        if adapter:
            weights = sum(choice.rows * choice.cols for choice in chosen.choices)
            bits += 8 * (adapter / WEIGHTS_FILE).stat().st_size / weights
        else:
            bits = read_plan(artifact).bits_per_weight
    assert comparison.divergence is not None
    result = Measured(
        recipe.name, bits, comparison.divergence.mean, comparison.perplexity, {"torch": torch.__version__}
    )
    processor = used.ru_utime + used.ru_stime
    return replace(result, seconds=seconds, processor_seconds=processor, peak_rss_bytes=used.ru_maxrss * 1024)


def _echoed(process: subprocess.Popen[bytes]) -> str:
    """Pass the stderr of `process` on as it comes; returns its last 4 KiB."""
    assert process.stderr is not None
    end = b""
    while chunk := os.read(process.stderr.fileno(), 1 << 16):
        sys.stderr.buffer.write(chunk)
        sys.stderr.flush()
        end = (end + chunk)[-4096:]
    return end.decode(errors="replace")


def costs(result: Measured, bits: str, weights: int) -> Iterator[Row]:
    """Rows on the cost of a run: its time beside the target of 20 minutes, its memory beside `weights` in float32."""
    assert result.seconds is not None and result.processor_seconds is not None and result.peak_rss_bytes is not None
    for figure, unit, ours, name, peer in (
        ("wall time", "s", result.seconds, "asked for", 1200.0),
        ("processor time", "s", result.processor_seconds, "two cores for the time asked for", 2400.0),
        ("peak memory", "GiB", result.peak_rss_bytes / 2**30, "the model in float32", weights * 4 / 2**30),
    ):
        yield Row(
            figure=f"{figure} of {result.name} at {bits} bits per weight",
            unit=unit,
            ours=ours,
            ours_bits_per_weight=result.bits_per_weight,
            ours_perplexity=None,
            peer_name=name,
            peer=peer,
            peer_bits_per_weight=32.0,
            peer_perplexity=None,
            ratio=ours / peer,
            versions=result.versions,
            machine=machine(),
        )


def budget_rows(bits: str, bench: Bench) -> Iterator[Row]:
    """The default recipe at `bits` per weight beside the plan without training, and what it cost."""
    chosen = mixed(bench, f"{bits}bpw")
    after = tuned(bench, default(bits), chosen)
    yield row(after, planned(bench, "reallm, not trained", chosen))
    yield from costs(after, bits, sum(tensor.numel() for tensor in bench.base.model.parameters()))


def stage_rows(bench: Bench) -> Iterator[Row]:
    """The default recipe beside other stages at 2.0 bits."""
    chosen = mixed(bench, "2.0bpw")
    ours = tuned(bench, default("2.0"), chosen)
    for name, order in STAGES.items():
        yield row(ours, tuned(bench, of_order(name, order), chosen))


def preset_rows(name: str, bench: Bench) -> Iterator[Row]:
    """The planner's mix beside a preset, both trained."""
    fmt, start = PRESETS[name]
    table = measure_formats(bench, "finetune", [fmt])
    recipe = Recipe(f"{name} {fmt}, rank 16, {STEPS} steps", FACTORS | start)
    other = tuned(bench, recipe, uniform_plan(table, fmt, work=str(bench.work)))
    yield row(tuned(bench, TUNED, mixed(bench, f"{other.bits_per_weight + ROUNDING:.9f}bpw")), other)


def init_rows(bench: Bench) -> Iterator[Row]:
    """Initialisations of new factors."""
    chosen = mixed(bench, "2.5bpw")
    ours = tuned(bench, Recipe(f"factors from lq-lora, {STEPS} steps", FACTORS | {"rank": "8"}), chosen)
    for init in INITS:
        options = FACTORS | {"rank": "8", "init": init}
        yield row(ours, tuned(bench, Recipe(f"factors from {init}, {STEPS} steps", options), chosen))


def codebook_rows(bench: Bench) -> Iterator[Row]:
    """With and without training of the codebooks."""
    table = measure_formats(bench, "finetune", [ADDITIVE])
    chosen = uniform_plan(table, ADDITIVE, work=str(bench.work))
    options = ONE_STAGE | {"train": "codebooks,scales,norms"}
    ours = tuned(bench, Recipe(f"{ADDITIVE} everywhere, codebooks, scales and norms, {STEPS} steps", options), chosen)
    others = replace(TUNED, name=f"{ADDITIVE} everywhere, scales and norms, {STEPS} steps")
    yield row(ours, tuned(bench, others, chosen))
    yield row(ours, planned(bench, f"{ADDITIVE} everywhere, not trained", chosen))


def adapter_rows(bench: Bench) -> Iterator[Row]:
    """A LoRA adapter beside a DoRA adapter."""
    chosen, options = mixed(bench, "2.5bpw"), {"adapter": "", "rank": "8", "steps": STEPS, "patience": "0"}
    lora = tuned(bench, Recipe(f"LoRA adapter, {STEPS} steps", options), chosen)
    yield row(lora, tuned(bench, Recipe(f"DoRA adapter, {STEPS} steps", options | {"dora": ""}), chosen))


def planning_rows(bench: Bench) -> Iterator[Row]:
    """The planner's mix beside one format everywhere, and beside a mix planned with the relative error."""
    table = measure_formats(bench, "finetune", [UNIFORM])
    uniform = uniform_plan(table, UNIFORM, work=str(bench.work))
    budget = f"{uniform.bits_per_weight + ROUNDING:.9f}bpw"
    ours = tuned(bench, TUNED, mixed(bench, budget))
    yield row(ours, tuned(bench, replace(TUNED, name=f"{UNIFORM} everywhere, {STEPS} steps"), uniform))
    plain = mixed(bench, budget, "relative")
    yield row(ours, tuned(bench, replace(TUNED, name=f"planned by the relative error, {STEPS} steps"), plain))


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    **{bits: partial(budget_rows, bits) for bits in ("2.0", "3.0", "2.5")},
    "stages": stage_rows,
    **{name: partial(preset_rows, name) for name in PRESETS},
    "inits": init_rows,
    "codebooks": codebook_rows,
    "adapters": adapter_rows,
    "planning": planning_rows,
}


def wanted_parts() -> Sequence[str]:
    """All parts, or those that the environment's PARTS names."""
    named = os.environ.get("PARTS")
    return named.split(",") if named else tuple(PARTS)


def main() -> None:
    """Plan, fine-tune, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console, SAMPLES)
    if mix_bits := [MAX_BITS.get(part, 3.0) for part in wanted_parts() if part not in UNPLANNED]:
        measure_formats(bench, "finetune", candidates(), bpw=(2.0, max(mix_bits)))
    rows = (row for part in wanted_parts() for row in PARTS[part](bench))
    report("finetune", rows, RESULTS, console, keep=bool(os.environ.get("PARTS")))


if __name__ == "__main__":
    main()
