"""Pass that multiplies matrices in one launch if they have the same input and the same operations in their product."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from reallm.codegen.ir.dataflow import shared_inputs
from reallm.codegen.ir.operations import Trellis
from reallm.codegen.ir.program import Group, KernelSpec, MatrixProgram, Program

from .choose_tiles import product_tile
from .kernel_specs import nominal_widths, product_kernel


def group_products(program: Program) -> Program:
    """Form groups of products with the same input and the same operations; one launch computes all products of a group.

    The tile is chosen as for a single matrix with as many rows as all matrices of the group have together. The kernels
    that finish these products are also grouped if they compute pieces of the same size.
    """
    inputs = shared_inputs(matrix.name for matrix in program.matrices)
    alike: dict[tuple[object, ...], list[MatrixProgram]] = {}
    for matrix in program.matrices:
        product = _product(matrix)
        key = inputs[matrix.name], matrix.prepared_by, matrix.cols, product.label, product.operations
        alike.setdefault(key, []).append(matrix)
    groups = chain.from_iterable(_groups(members) for members in alike.values() if len(members) > 1)
    return replace(program, groups=tuple(groups))


def _product(matrix: MatrixProgram) -> KernelSpec:
    product = matrix.kernel("gemv", "gemm")
    assert product is not None  # share_kernels gives every matrix a product
    return product


def _groups(members: list[MatrixProgram]) -> list[Group]:
    """The group that computes the products of `members`, then the groups that finish these products."""
    joined = replace(members[0], rows=sum(matrix.rows for matrix in members))
    operations = _product(members[0]).operations
    kernel = product_kernel(joined, operations, product_tile(joined))
    if isinstance(operations[0], Trellis):
        kernel = replace(kernel, widths=nominal_widths([matrix.format for matrix in members], operations[0]))
    product = Group(tuple(matrix.name for matrix in members), replace(kernel, members=len(members)))
    return [product, *_finish_groups(members)]


def _finish_groups(members: list[MatrixProgram]) -> list[Group]:
    same_pieces: dict[KernelSpec, list[tuple[str, KernelSpec]]] = {}
    for matrix in members:
        if finish := matrix.kernel("finish"):
            key = replace(finish, tile=replace(finish.tile, num_warps=1), even=True, pieces=0)
            same_pieces.setdefault(key, []).append((matrix.name, finish))
    groups = []
    for entries in same_pieces.values():
        if len(entries) > 1:
            names, kernels = zip(*entries, strict=True)
            largest = max(kernels, key=lambda kernel: kernel.pieces)  # pieces that other members lack are masked
            even = all(kernel.even for kernel in kernels)
            groups.append(Group(names, replace(largest, even=even, members=len(names))))
    return groups
