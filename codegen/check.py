"""The sources that came with an artifact, compared with what this package generates; nothing of them is executed."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

from reallm.planner.plan import Plan

from .emit import emit
from .passes import run_passes
from .program import lower_plan


def check_sources(plan: Plan, folder: Path, biased: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the kernels of `plan` whose source in `folder`/kernels is missing or not, byte for byte, ours.

    Warns once when there are any: the installed package's sources run in any case.
    """
    different = []
    for spec in run_passes(lower_plan(plan, biased)).kernels:
        path = Path(folder) / "kernels" / f"{spec.name}.py"
        if not path.is_file() or path.read_bytes() != emit(spec).encode():
            different.append(spec.name)
    if different:
        warnings.warn(
            f"{Path(folder) / 'kernels'}: {len(different)} of its sources differ from what reallm generates "
            f"(first: {different[0]}); using reallm's own, compile again to renew them",
            stacklevel=2,
        )
    return tuple(different)
