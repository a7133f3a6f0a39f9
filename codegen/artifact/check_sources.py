"""The sources that came with an artifact, compared with what this package generates; nothing of them is executed."""

from __future__ import annotations

from pathlib import Path

from reallm.codegen.ir.program import lower_plan
from reallm.codegen.passes.run import run_passes
from reallm.codegen.triton.emit import emit
from reallm.planner.tables.plan import Plan


def check_sources(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Names of the sources in `folder`/kernels that are not, byte for byte, what this package generates for `plan`.

    A source counts as ours with a bias or without, as the plan does not know which matrices have one. What runs is the
    installed package's own in any case.
    """
    every = [choice.matrix for choice in plan.choices]
    kernels = [spec for biased in ((), every) for spec in run_passes(lower_plan(plan, biased)).kernels]
    ours = {f"{spec.name}.py": emit(spec).encode() for spec in kernels}
    return tuple(
        path.stem for path in sorted((folder / "kernels").glob("*.py")) if path.read_bytes() != ours.get(path.name)
    )
