"""Pass that prepares an input once for all matrices that share it (q, k, v; gate, up) and transform it alike."""

from __future__ import annotations

from dataclasses import replace

from reallm.codegen.ir.dataflow import shared_inputs
from reallm.codegen.ir.operations import Operation, Prepare, Reuse
from reallm.codegen.ir.program import MatrixProgram, Program


def share_inputs(program: Program) -> Program:
    """Let the first matrix of those with the same input and transform prepare x' for the others.

    A permutation or channel scales belong to one matrix, so a vector prepared with them is not shared.
    """
    inputs = shared_inputs(matrix.name for matrix in program.matrices)
    leaders: dict[tuple[str, Prepare], str] = {}

    def reuse(matrix: MatrixProgram, operation: Operation) -> Operation:
        if not isinstance(operation, Prepare) or operation.reads:
            return operation
        leader = leaders.setdefault((inputs[matrix.name], operation), matrix.name)
        return operation if leader == matrix.name else Reuse(leader, operation.rotated)

    return program.map(lambda m: replace(m, operations=tuple(reuse(m, operation) for operation in m.operations)))
