"""Fine-tuning: artifacts before and after it, and what the presets for fine-tuning reach at equal bytes and steps.

    make bench NAME=finetune [MODEL=...] [TEXT=training] [TEST=held-out] [PARTS=2.0,3.0,qlora] [STEPS=200]

After NAME=quality, whose measured folder it uses. PARTS are bits per weight, or presets. For bits: the planner's mix
with its scales and norms trained, not a byte more ("ours"), beside the same plan untouched; then a mix of
fewer bits with factors trained by the default recipe, within the same budget. For a preset: such a mix with factors
("ours") beside the preset's format with its own start and its factors trained, in as many steps, at no fewer bytes.
The training text is the calibration text. Rows of some PARTS join those of an earlier run; a part takes half an hour.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from rich.console import Console

from benchmarks.bench import (
    ROUNDING,
    Bench,
    Measured,
    Row,
    bench_from_environment,
    measure_formats,
    mixed,
    planned,
    report,
    row,
)
from benchmarks.peers import ROOT
from reallm.cache import content_key
from reallm.compiler import compile_plan
from reallm.finetuning import finetune
from reallm.kernels.terms import LowRank
from reallm.loading import load
from reallm.planner.plan import Plan
from reallm.planner.records import write_record
from reallm.planner.uniform import uniform_plan
from reallm.verification import read_plan

RESULTS = ROOT / "benchmarks" / "results" / "finetune.json"
BITS = ("2.0", "2.5", "3.0")
FREE = ("scales", "norms")


@dataclass(frozen=True)
class Recipe:
    """What is trained, from where."""

    train: tuple[str, ...] = ("factors", *FREE)
    rank: int = 8
    factor_dtype: Literal["f16", "i8"] = "i8"
    init: Literal["zero", "loftq", "lq-lora"] = "lq-lora"


PRESETS: dict[str, tuple[str, Recipe]] = {
    "qlora": ("nf4-g64-dq8x256", Recipe(("factors",), 16, "f16", "zero")),
    "loftq": ("nf2-g64-dq8x256", Recipe(("factors",), 16, "f16", "loftq")),
    "lq-lora": ("nf3-g64-dq8x256", Recipe(("factors",), 16, "f16", "lq-lora")),
}


def wanted_parts() -> Sequence[str]:
    """All parts, or those that the environment's PARTS names."""
    named = os.environ.get("PARTS")
    return named.split(",") if named else (*BITS, *PRESETS)


def tuned(bench: Bench, name: str, chosen: Plan, recipe: Recipe) -> Measured:
    """The result of a plan after fine-tuning, kept under the hash of its choices and the recipe."""
    steps = int(os.environ.get("STEPS") or 200)
    choices = [choice.model_dump(mode="json") for choice in chosen.choices]
    key = content_key({"choices": choices, "recipe": repr(recipe), "steps": steps})
    return bench.kept(f"{name} {key[:12]}", partial(_tune, bench, name, chosen, recipe, steps))


def _tune(bench: Bench, name: str, chosen: Plan, recipe: Recipe, steps: int) -> Measured:
    with TemporaryDirectory(dir=bench.folder) as folder:
        plan_path, before, after = (Path(folder) / part for part in ("plan.json", "before", "after"))
        write_record(plan_path, chosen)
        compile_plan(plan_path, before, model=bench.base, kernels=False)
        finetune(
            before,
            text=bench.text,
            output=after,
            teacher=bench.base_folder,
            train=recipe.train,
            rank=recipe.rank,
            factor_dtype=recipe.factor_dtype,
            init=recipe.init,
            steps=steps,
            kernels=False,
        )
        found = bench.compare(load(after, dtype=torch.float32)[0])
        bits = read_plan(after).bits_per_weight
    assert found.divergence is not None
    return Measured(name, bits, found.divergence.mean, found.perplexity, {"torch": torch.__version__})


def factor_bits(chosen: Plan, recipe: Recipe) -> float:
    """What the new factors of `recipe` take, in bits a weight of the plan's matrices."""
    term = LowRank(recipe.rank, recipe.factor_dtype)
    nbytes = sum(field.nbytes for choice in chosen.choices for field in term.fields(choice.rows, choice.cols))
    return 8 * nbytes / sum(choice.rows * choice.cols for choice in chosen.choices)


def within(bench: Bench, bits: float, recipe: Recipe) -> Measured:
    """The mix that takes no more than `bits` with the factors of the recipe, fine-tuned."""
    left = bits - factor_bits(mixed(bench, f"{bits + ROUNDING}bpw"), recipe)
    return tuned(bench, "reallm, factors within", mixed(bench, f"{left:.6f}bpw"), recipe)


def rows(bench: Bench) -> Iterator[Row]:
    """Two rows for bits per weight, one for a preset."""
    for part in wanted_parts():
        if part not in PRESETS:
            bits = float(part)
            chosen = mixed(bench, f"{bits}bpw")
            before = planned(bench, "reallm, not trained", chosen)
            yield row(tuned(bench, "reallm, trained", chosen, Recipe(FREE, 0)), before)
            yield row(within(bench, bits, Recipe()), tuned(bench, "reallm, no factors", chosen, Recipe(FREE, 0)))
            continue
        fmt, recipe = PRESETS[part]
        table = measure_formats(bench, "finetune", [fmt])
        other = tuned(bench, f"{part} {fmt}", uniform_plan(table, fmt, work=str(bench.work)), recipe)
        yield row(within(bench, other.bits_per_weight, Recipe()), other)


def main() -> None:
    """Plan, fine-tune, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    report("finetune", rows(bench), RESULTS, console, keep=bool(os.environ.get("PARTS")))


if __name__ == "__main__":
    main()
