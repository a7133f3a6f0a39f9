"""Compares the kernel sources in an artifact with those that this package generates; the former are not executed."""

from __future__ import annotations

from pathlib import Path

from reallm.codegen.ir.lower import lower_plan
from reallm.codegen.passes.run import run_passes
from reallm.codegen.triton.emit import emit
from reallm.planner.tables.plan import Plan


def check_sources(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Names of the sources in `folder`/kernels that differ in any byte from those this package generates for `plan`.

    The plan does not say which matrices have a bias, so sources with and without a bias are both accepted. In any case,
    the sources that run are those that the installed package generates.
    """
    all_matrices = [choice.matrix for choice in plan.choices]
    kernels = [spec for biased in ((), all_matrices) for spec in run_passes(lower_plan(plan, biased)).kernels]
    expected = {f"{spec.name}.py": emit(spec).encode() for spec in kernels}
    return tuple(
        path.stem for path in sorted((folder / "kernels").glob("*.py")) if path.read_bytes() != expected.get(path.name)
    )
