"""Pass for scales of whole rows: such a scale multiplies the finished sum of its row instead of every weight."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from reallm.codegen.ir.operations import Dot, GroupScale, Operation, RowScale
from reallm.codegen.ir.program import MatrixProgram, Program


def hoist_row_scales(program: Program) -> Program:
    """Replace (values * s_n) . x by s_n * (values . x) where s_n is a single scale for row n."""
    return program.map(_hoist)


def _hoist(matrix: MatrixProgram) -> MatrixProgram:
    scale = next((op for op in matrix.operations if isinstance(op, GroupScale)), None)
    if scale is None or scale.group_size:
        return matrix
    moved = chain.from_iterable(_move(operation, scale) for operation in matrix.operations)
    return replace(matrix, operations=tuple(moved))


def _move(operation: Operation, scale: GroupScale) -> tuple[Operation, ...]:
    if operation is scale:
        return ()
    return (operation, RowScale(scale.double_quant)) if isinstance(operation, Dot) else (operation,)
