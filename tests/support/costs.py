"""Matrices with made-up costs whose logarithms are a size per matrix, an offset per format and noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix
from reallm.planner.tables.measured_table import MeasurementRecord

RATES = tuple(Format.parse(f"tq{rate:g}-l10+ldl2+rot") for rate in (2, 2.5, 3, 3.5, 4))


def make_matrix(number: int, kind: str = "linear", family: str | None = None) -> Matrix:
    name = f"blocks.{number}.{kind}"
    values = {"parameter": f"{name}.weight", "rows": 64, "cols": 64, "kind": kind, "block": number, "input": name}
    return Matrix(**values, name=name, family=family or kind, transposed=False, expert=None, tied=(), source_bytes=8192)  # type: ignore[arg-type]


def record(matrix: Matrix, fmt: Format, cost: float) -> MeasurementRecord:
    costs = {"guided": cost, "two_sided": 2 * cost, "fisher": 3 * cost, "relative": cost / 2}
    return MeasurementRecord(
        matrix=matrix.name,
        format=fmt.name,
        nbytes=fmt.nbytes(64, 64),
        seconds=1.0,
        codes_sha256="0" * 64,
        **costs,
    )


def true_costs(matrices: Sequence[Matrix], noise: float, seed: int = 0) -> dict[tuple[str, str], float]:
    random = np.random.default_rng(seed)
    sizes = {matrix.name: random.normal(0, 2) for matrix in matrices}
    return {
        (m.name, fmt.name): float(np.exp(sizes[m.name] - 0.7 * i + random.normal(0, noise)))
        for m in matrices
        for i, fmt in enumerate(RATES)
    }
