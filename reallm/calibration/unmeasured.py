"""Matrices that calibration gave no statistics: what they get instead.

An expert that no token of the text was routed to borrows the average statistics per token of the other experts in its
place, as if one token of the text had reached it. Every other matrix keeps its dtype, because nothing is known about
what an error in it would cost: it was never run (a vision tower, on text), is used in a way that is not watched, or has
no gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reallm.models.loaded import LoadedModel, Matrix
from reallm.system.tensor_file import save_tensors

from .statistics import statistics_keys, statistics_path

BORROWED = ("guided", "fisher", "gram")
NOT_REACHED = "calibration saw no token multiplied by it"


@dataclass
class Unmeasured:
    """What became of the matrices without statistics."""

    kept: dict[str, str] = field(default_factory=dict)
    """Matrix that keeps its dtype -> the reason."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one line each."""


def complete_statistics(loaded: LoadedModel, folder: Path) -> Unmeasured:
    """Give statistics in `folder` to every expert without any, and list the other matrices without statistics."""
    for block in {m.block for m in loaded.matrices}:
        if not statistics_path(folder, block).exists():
            save_tensors(statistics_path(folder, block), {"empty/": torch.zeros(1)})
    keys = statistics_keys(folder, {m.block for m in loaded.matrices})
    result = Unmeasured()
    siblings: dict[tuple[int | None, str, int, int], list[Matrix]] = defaultdict(list)
    for matrix in loaded.matrices:
        siblings[_place(matrix)].append(matrix)
    borrowers: list[tuple[Matrix, list[Matrix]]] = []
    for matrix in loaded.matrices:
        if f"guided/{matrix.name}" in keys or f"lookup/{matrix.name}" in keys:
            continue
        lenders = [other for other in siblings[_place(matrix)] if f"count/{other.name}" in keys]
        if lenders:
            borrowers.append((matrix, lenders))
        else:
            result.kept[matrix.name] = NOT_REACHED
    _borrow(folder, borrowers)
    if borrowers:
        result.notes.append(
            f"no token of the text was routed to {len(borrowers)} experts, such as {borrowers[0][0].name}; their costs "
            "are estimated from the other experts in their place: calibrate on more text to measure them"
        )
    return result


def _place(matrix: Matrix) -> tuple[int | None, str, int, int]:
    """The same for all experts of a layer in one role."""
    return matrix.block, matrix.family, matrix.rows, matrix.cols


def _borrow(folder: Path, borrowers: Sequence[tuple[Matrix, list[Matrix]]]) -> None:
    """Store for each borrower the lenders' statistics per token, as if one token had reached it."""
    for block in {matrix.block for matrix, _ in borrowers}:
        path = statistics_path(folder, block)
        stored = load_file(path)
        added: dict[str, Tensor] = {}
        for matrix, lenders in borrowers:
            if matrix.block != block:
                continue
            count = sum(float(stored[f"count/{lender.name}"]) for lender in lenders)
            for kind in BORROWED:
                values = [stored[f"{kind}/{lender.name}"] for lender in lenders]
                total = torch.stack([value.float() for value in values]).sum(0)
                added[f"{kind}/{matrix.name}"] = (total / count).to(values[0].dtype)
        save_tensors(path, {**stored, **added})
