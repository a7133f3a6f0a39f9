"""Adapters that lie inside the artifact they belong to, at `adapters/NAME/`: found by name, shown and checked.

They are no part of the artifact: its manifest does not name them, and adding or removing one changes none of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.safetensors import StoredTensor
from reallm.planner.tables.plan import Plan

from .directory import adapters_in
from .manifest import ADAPTERS_FOLDER, MANIFEST_FILE, sha256_file
from .peft_files import read_adapter, read_layout

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterView:
    """One adapter inside an artifact."""

    name: str
    kind: str
    """LoRA or DoRA; empty if it cannot be read."""
    rank: int
    """The largest of its modules."""
    modules: int
    nbytes: int
    """Of its weights file."""
    fault: str | None
    """Why it cannot be used, one line; None if it can."""


def find_adapter(artifact: Path, adapter: Path | str) -> Path:
    """The folder of `adapter`: a name in `artifact`, else itself a folder. Raises UserError, which lists the names."""
    inside = adapters_in(artifact)
    if str(adapter) in inside:
        return inside[str(adapter)]
    if Path(adapter).is_dir():
        return Path(adapter)
    names = ", ".join(inside) or "none"
    raise UserError(
        f"there is no adapter {str(adapter)!r}: it is no folder, and the adapters inside {artifact} are: {names}"
    )


def linear_shapes(plan: Plan, tensors: Mapping[str, StoredTensor]) -> Shapes:
    """Module name -> (rows, cols) of the matrices of an artifact that an adapter may change."""
    stored = {name.removesuffix(".weight"): t.shape for name, t in tensors.items() if name.endswith(".weight")}
    chosen = {c.matrix: (c.rows, c.cols) for c in plan.choices if c.kind in ("linear", "head")}
    return {name: shape for name, shape in stored.items() if len(shape) == 2} | chosen


def view_adapters(artifact: Path, shapes: Shapes) -> tuple[AdapterView, ...]:
    """Every adapter inside `artifact`, whose linear modules have `shapes`, by name; no value is read."""
    own = sha256_file(artifact / MANIFEST_FILE)
    return tuple(_view(name, folder, artifact, own, shapes) for name, folder in adapters_in(artifact).items())


def _view(name: str, folder: Path, artifact: Path, own: str, shapes: Shapes) -> AdapterView:
    try:
        layout = read_layout(folder)
    except UserError as error:
        return AdapterView(name, "", 0, 0, 0, str(error))
    fault = None
    if layout.artifact_sha256 not in (None, own):
        fault = f"{folder} was trained on another artifact than {artifact}; remove it, or train it again"
    for module, (rows, _, cols) in layout.shapes.items():
        if fault is None and shapes.get(module) != (rows, cols):
            found = f"is {list(shapes[module])}" if module in shapes else "is no linear module"
            fault = f"{folder} is an adapter for another model: {module} {found} in {artifact}, not {[rows, cols]}"
    rank = max(rank for _, rank, _ in layout.shapes.values())
    return AdapterView(name, "DoRA" if layout.dora else "LoRA", rank, len(layout.shapes), layout.nbytes, fault)


def check_adapters(artifact: Path, shapes: Shapes, deep: bool) -> tuple[AdapterView, ...]:
    """As `view_adapters`. Raises UserError for the first that cannot be used; `deep` reads every value."""
    place = artifact / ADAPTERS_FOLDER
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if not path.is_dir() and not path.name.startswith("."):
            raise UserError(f"{path} is no folder of an adapter; remove it")
    views = view_adapters(artifact, shapes)
    for view in views:
        if view.fault is not None:
            raise UserError(view.fault)
        if deep:
            read_adapter(place / view.name)
    return views
