"""Adapters inside the artifact they belong to, at `adapters/NAME/`: find them by name, list and check them.

They are not part of the artifact: its manifest does not list them, so adding or removing one does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import Plan

from .adapter_layout import read_layout, read_terms
from .directory import adapters_in
from .manifest import ADAPTERS_FOLDER, artifact_digest

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterView:
    """One adapter inside an artifact."""

    name: str
    kind: str
    """LoRA or DoRA; empty if the adapter cannot be read."""
    rank: int
    """The largest rank among its modules."""
    modules: int
    """Number of modules it changes."""
    nbytes: int
    """Size of its weights file."""
    fault: str | None
    """Why it cannot be used, in one line; None if it can."""


def find_adapter(artifact: Path, adapter: Path | str) -> Path:
    """The folder of an adapter; `adapter` is the name of one inside `artifact`, or the folder itself.

    Raises UserError, which lists the names inside `artifact`, if it is neither.
    """
    inside = adapters_in(artifact)
    if str(adapter) in inside:
        return inside[str(adapter)]
    if Path(adapter).is_dir():
        return Path(adapter)
    names = ", ".join(inside) or "none"
    raise UserError(
        f"there is no adapter {str(adapter)!r}: it is not a folder, and the adapters inside {artifact} are: {names}"
    )


def linear_shapes(plan: Plan, tensors: Mapping[str, StoredTensor]) -> Shapes:
    """Module name -> (rows, cols) of the matrices of an artifact that an adapter can change."""
    stored = {name.removesuffix(".weight"): t.shape for name, t in tensors.items() if name.endswith(".weight")}
    chosen = {c.matrix: (c.rows, c.cols) for c in plan.choices if c.kind in ("linear", "head")}
    return {name: shape for name, shape in stored.items() if len(shape) == 2} | chosen


def view_adapters(artifact: Path, shapes: Shapes) -> tuple[AdapterView, ...]:
    """Describe every adapter inside `artifact`, whose linear modules have `shapes`, sorted by name.

    Reads headers, but no values.
    """
    artifact_sha256 = artifact_digest(artifact)
    return tuple(
        _view(name, folder, artifact, artifact_sha256, shapes) for name, folder in adapters_in(artifact).items()
    )


def _view(name: str, folder: Path, artifact: Path, artifact_sha256: str | None, shapes: Shapes) -> AdapterView:
    try:
        layout = read_layout(folder)
    except UserError as error:
        return AdapterView(name, "", 0, 0, 0, str(error))
    fault = None
    if layout.artifact_sha256 not in (None, artifact_sha256):
        fault = f"{folder} was trained on another artifact than {artifact}; remove it, or train it again"
    for module, (rows, _, cols) in layout.shapes.items():
        if fault is None and shapes.get(module) != (rows, cols):
            found = f"is {list(shapes[module])}" if module in shapes else "is not a linear module"
            fault = f"{folder} is an adapter for another model: {module} {found} in {artifact}, not {[rows, cols]}"
    rank = max(rank for _, rank, _ in layout.shapes.values())
    return AdapterView(name, "DoRA" if layout.dora else "LoRA", rank, len(layout.shapes), layout.nbytes, fault)


def check_adapters(artifact: Path, shapes: Shapes, deep: bool) -> tuple[AdapterView, ...]:
    """Like `view_adapters`, but raise UserError for an adapter that cannot be used; `deep` reads all values too."""
    parent = artifact / ADAPTERS_FOLDER
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if not path.is_dir() and not path.name.startswith("."):
            raise UserError(f"{path} is not the folder of an adapter; remove it")
    views = view_adapters(artifact, shapes)
    for view in views:
        if view.fault is not None:
            raise UserError(view.fault)
        if deep:
            read_terms(parent / view.name, read_layout(parent / view.name))
    return views
