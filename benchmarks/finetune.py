"""Fine-tuning: artifacts before and after it, its stages, and what the presets for fine-tuning reach at equal bytes.

    make bench NAME=finetune [MODEL=...] [TEXT=training] [TEST=held-out] [PARTS=2.0,stages] [STEPS=40]

The measured folder is calibrated on SAMPLES windows of the training text. PARTS are

- 2.0, 2.5, 3.0  bits per weight: the planner's mix and the default recipe, not a byte more, beside the mix untouched;
                 its seconds and its peak memory
- stages         at 2.0 bits: the default recipe, end to end alone, beside other stages, orders and fewer steps
- qlora, loftq, lq-lora   the preset's format with its own start, its factors trained STEPS steps, beside the planner's
                 mix in no more bytes, its scales and norms trained as many
- inits          at 2.5 bits with factors of rank 8: where they start, after STEPS steps
- codebooks      additive codes everywhere: their codebooks trained as well, beside scales and norms alone, STEPS steps
- adapters       at 2.5 bits, an adapter of rank 8 in fp16 beside the artifact: LoRA and DoRA, after STEPS steps
- planning       at the bytes of one format everywhere: that format, and the mix that the plain relative error gives,
                 beside the mix that the Fisher information gives, all with scales and norms trained STEPS steps

Every run is the command `reallm finetune` in a process of its own. Rows of some PARTS join those of an earlier run.
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
from reallm.artifacts.peft_files import WEIGHTS_FILE
from reallm.artifacts.verify import read_plan
from reallm.compilation.compile import compile_plan
from reallm.measurement.cache import content_key
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import write_record
from reallm.runtime.load import load

RESULTS = ROOT / "benchmarks" / "results" / "finetune.json"
STEPS = os.environ.get("STEPS") or "40"
SAMPLES = 64
"""Windows of calibration, the default of `measure`; NAME=quality takes as few as its peers."""
NOTHING_GAINED = "nothing is written: try a smaller --learning-rate"
"""What the command says of a run that brought nothing: the artifact as it was is its result."""
FREE = {"train": "scales,norms"}
"""Not a byte more."""
ONE_STAGE = FREE | {"order": "end-to-end", "steps": STEPS, "patience": "0"}
FACTORS = ONE_STAGE | {"train": "factors"}
Options = Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """A name, and the options of `reallm finetune`; a flag's value is empty."""

    name: str
    options: Options


CHOSEN = {"2.0": "160", "2.5": "60", "3.0": "60"}
"""The steps that the default takes by itself at these bits."""
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
MOST_BITS = {"lq-lora": 3.9, "qlora": 4.9}
"""Of the presets; no other part has more than three."""
UNPLANNED = ("codebooks",)
"""Parts that need no mix."""
INITS = ("zero", "loftq")
UNIFORM = "tq2-l12+ldl2+rot"
ADDITIVE = "aq2x8-d8"


def of_order(name: str, order: str, steps: str = "60") -> Recipe:
    """The default recipe with these stages; written out, so that no result of other defaults is taken for it."""
    return Recipe(name, FREE | {"order": order, "steps": steps})


def default(bits: str) -> Recipe:
    """The default recipe, as it comes out at so many bits."""
    return of_order("reallm, default recipe", "end-to-end", CHOSEN[bits])


def tuned(bench: Bench, recipe: Recipe, chosen: Plan) -> Measured:
    """The artifact of a plan after fine-tuning, kept under the hash of its choices and the options."""
    choices = [choice.model_dump(mode="json") for choice in chosen.choices]
    key = content_key({"choices": choices, "options": dict(recipe.options)})
    return bench.kept(f"{recipe.name} {key[:12]}", partial(_tune, bench, recipe, chosen))


def _tune(bench: Bench, recipe: Recipe, chosen: Plan) -> Measured:
    with TemporaryDirectory(dir=bench.folder) as folder:
        plan_path, before, after = (Path(folder) / part for part in ("plan.json", "before", "after"))
        write_record(plan_path, chosen)
        compile_plan(plan_path, before, model=bench.base, kernels=False)
        given: dict[str, str] = {"text": bench.text, "teacher": str(bench.base_folder), "work": str(bench.work)}
        pairs = (given | dict(recipe.options)).items()
        options = [word for name, value in pairs for word in (f"--{name}", value) if word]
        command = [sys.executable, "-m", "reallm", "finetune", str(before), "-o", str(after), "--no-kernels", *options]
        began = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        said = _echoed(process)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status and NOTHING_GAINED in said:
            after = before
        elif status:
            raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
        adapter = after if "adapter" in recipe.options and after != before else None
        artifact = before if adapter else after
        found, bits = bench.compare(load(artifact, dtype=torch.float32, adapter=adapter)[0]), chosen.bits_per_weight
        if adapter:
            weights = sum(choice.rows * choice.cols for choice in chosen.choices)
            bits += 8 * (adapter / WEIGHTS_FILE).stat().st_size / weights
        else:
            bits = read_plan(artifact).bits_per_weight
    assert found.divergence is not None
    result = Measured(recipe.name, bits, found.divergence.mean, found.perplexity, {"torch": torch.__version__})
    processor = used.ru_utime + used.ru_stime
    return replace(result, seconds=seconds, processor_seconds=processor, peak_rss_bytes=used.ru_maxrss * 1024)


def _echoed(process: subprocess.Popen[bytes]) -> str:
    """What `process` writes to its stderr, passed on as it comes; the end of it."""
    assert process.stderr is not None
    end = b""
    while some := os.read(process.stderr.fileno(), 1 << 16):
        sys.stderr.buffer.write(some)
        sys.stderr.flush()
        end = (end + some)[-4096:]
    return end.decode(errors="replace")


def costs(result: Measured, bits: str, weights: int) -> Iterator[Row]:
    """Rows of what a run took: its time beside the 20 minutes asked for, its memory beside the float32 `weights`."""
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
    """The default recipe at so many bits beside the plan untouched, and what it took."""
    chosen = mixed(bench, f"{bits}bpw")
    after = tuned(bench, default(bits), chosen)
    yield row(after, planned(bench, "reallm, not trained", chosen))
    yield from costs(after, bits, sum(tensor.numel() for tensor in bench.base.model.parameters()))


def stage_rows(bench: Bench) -> Iterator[Row]:
    """The default recipe beside others at 2.0 bits."""
    chosen = mixed(bench, "2.0bpw")
    ours = tuned(bench, default("2.0"), chosen)
    for name, order in STAGES.items():
        yield row(ours, tuned(bench, of_order(name, order), chosen))


def preset_rows(name: str, bench: Bench) -> Iterator[Row]:
    """The mix beside a preset, both trained."""
    fmt, start = PRESETS[name]
    table = measure_formats(bench, "finetune", [fmt])
    recipe = Recipe(f"{name} {fmt}, rank 16, {STEPS} steps", FACTORS | start)
    other = tuned(bench, recipe, uniform_plan(table, fmt, work=str(bench.work)))
    yield row(tuned(bench, TUNED, mixed(bench, f"{other.bits_per_weight + ROUNDING:.9f}bpw")), other)


def init_rows(bench: Bench) -> Iterator[Row]:
    """Starts of new factors."""
    chosen = mixed(bench, "2.5bpw")
    ours = tuned(bench, Recipe(f"factors from lq-lora, {STEPS} steps", FACTORS | {"rank": "8"}), chosen)
    for init in INITS:
        options = FACTORS | {"rank": "8", "init": init}
        yield row(ours, tuned(bench, Recipe(f"factors from {init}, {STEPS} steps", options), chosen))


def codebook_rows(bench: Bench) -> Iterator[Row]:
    """With and without the values of the codebooks."""
    table = measure_formats(bench, "finetune", [ADDITIVE])
    chosen = uniform_plan(table, ADDITIVE, work=str(bench.work))
    options = ONE_STAGE | {"train": "codebooks,scales,norms"}
    ours = tuned(bench, Recipe(f"{ADDITIVE} everywhere, codebooks, scales and norms, {STEPS} steps", options), chosen)
    others = replace(TUNED, name=f"{ADDITIVE} everywhere, scales and norms, {STEPS} steps")
    yield row(ours, tuned(bench, others, chosen))
    yield row(ours, planned(bench, f"{ADDITIVE} everywhere, not trained", chosen))


def adapter_rows(bench: Bench) -> Iterator[Row]:
    """LoRA and DoRA."""
    chosen, options = mixed(bench, "2.5bpw"), {"adapter": "", "rank": "8", "steps": STEPS, "patience": "0"}
    lora = tuned(bench, Recipe(f"LoRA adapter, {STEPS} steps", options), chosen)
    yield row(lora, tuned(bench, Recipe(f"DoRA adapter, {STEPS} steps", options | {"dora": ""}), chosen))


def planning_rows(bench: Bench) -> Iterator[Row]:
    """With and without the planner, and the Fisher information in it."""
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
    if of_mixes := [MOST_BITS.get(part, 3.0) for part in wanted_parts() if part not in UNPLANNED]:
        measure_formats(bench, "finetune", candidates(), bpw=(2.0, max(of_mixes)))
    rows = (found for part in wanted_parts() for found in PARTS[part](bench))
    report("finetune", rows, RESULTS, console, keep=bool(os.environ.get("PARTS")))


if __name__ == "__main__":
    main()
