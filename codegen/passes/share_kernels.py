"""Pass that divides the operations of each matrix into kernels; kernels with equal specifications are shared."""

from __future__ import annotations

from dataclasses import replace

from reallm.codegen.ir.operations import Prepare, Project, Reuse, Unrotate
from reallm.codegen.ir.program import KernelSpec, MatrixProgram, Program

from .choose_tiles import product_tile
from .kernel_specs import finish_kernel, prepare_kernel, product_kernel, project_kernel


def share_kernels(program: Program) -> Program:
    """Give every matrix its kernels; equal specifications are the same kernel from here on."""
    return program.map(lambda matrix: replace(matrix, kernels=cut(matrix)))


def cut(matrix: MatrixProgram) -> tuple[KernelSpec, ...]:
    """The kernels of a matrix in order: projection, preparation, product, finish. Only the product is always there."""
    kernels, rest = [], list(matrix.operations)
    while rest and isinstance(first := rest[0], Project | Prepare | Reuse):
        if isinstance(first, Project):
            kernels.append(project_kernel(matrix, first))
        elif isinstance(first, Prepare):
            kernels.append(prepare_kernel(matrix, first))
        rest.pop(0)
    end = next((at for at, operation in enumerate(rest) if isinstance(operation, Unrotate)), len(rest))
    kernels.append(product_kernel(matrix, tuple(rest[:end]), matrix.tile or product_tile(matrix)))
    if end < len(rest):
        kernels.append(finish_kernel(matrix, tuple(rest[end:])))
    return tuple(kernels)
