"""Verifies programs with two tables of checks: one for single matrices, one for groups of matrices.

The docstring of a check states the condition that must hold. The check yields a description of each fault that it
finds. `verify_program` raises an error with the first description, after the name of the matrix or group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from reallm.kernels.formats.codecs import AdditiveCodec

from .dataflow import shared_inputs
from .operations import (
    AddLowRank,
    Centre,
    CodegenError,
    ColumnScale,
    Dot,
    GroupScale,
    Prepare,
    Project,
    Reuse,
    RowLevels,
    RowScale,
    Trellis,
    Unrotate,
)
from .program import Group, KernelSpec, MatrixProgram, Program

MAX_CODES = 2**31
"""A matrix must have fewer codes (or chunks of codes) than this, so that their indices fit 32 bits."""

Faults: TypeAlias = Iterator[str]
Earlier: TypeAlias = Mapping[str, MatrixProgram]
"""The matrices that precede the checked one in the program, by name."""
Members: TypeAlias = Sequence[MatrixProgram]


def verify_program(program: Program) -> None:
    """Raise CodegenError if a matrix or a group fails a check; the message names it and says what is wrong."""
    earlier: dict[str, MatrixProgram] = {}
    for matrix in program.matrices:
        for check in MATRIX_CHECKS:
            for fault in check(matrix, earlier):
                raise CodegenError(f"program of {matrix.name!r} ({matrix.format.name}): {fault}")
        earlier[matrix.name] = matrix
    for group in program.groups:
        for fault in _group_faults(group, program, earlier):
            raise CodegenError(f"group {' '.join(group.matrices)} ({group.kernel.name}): {fault}")
    names = [kernel.name for kernel in program.kernels]
    if len(set(names)) != len(names):
        raise CodegenError(f"two different kernels share a name among {', '.join(names)}")


def _group_faults(group: Group, program: Program, matrices: Mapping[str, MatrixProgram]) -> Faults:
    if unknown := [name for name in group.matrices if name not in matrices]:
        yield f"there is no matrix {unknown[0]!r}"
        return
    members = [matrices[name] for name in group.matrices]
    for check in GROUP_CHECKS:
        yield from check(group, members, program)


# A matrix


def kinds_meet(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """Each operation takes the kind of value that the previous one gives; the first takes words, the last stores."""
    kind = "words"
    for operation in matrix.operations:
        if operation.takes != kind:
            yield f"{operation} takes {operation.takes}, not {kind}"
        kind = operation.gives
    if kind != "stored":
        yield f"ends in {kind}, not in a store"


def is_scaled_once(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """Exactly one operation applies scales; if it is a `RowScale`, it directly follows the product (`Dot`)."""
    operations = matrix.operations
    scales = [i for i, op in enumerate(operations) if isinstance(op, GroupScale | RowScale | ColumnScale | RowLevels)]
    if len(scales) != 1:
        yield f"has {len(scales)} scales, not one"
    elif isinstance(operations[scales[0]], RowScale) and not isinstance(operations[scales[0] - 1], Dot):
        yield "scales a row after something was added to it"


def low_rank_is_projected(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """A matrix has either both `Project` and `AddLowRank`, with the same dtype, or neither of them."""
    projected = [op.dtype for op in matrix.operations if isinstance(op, Project)]
    if projected != [op.dtype for op in matrix.operations if isinstance(op, AddLowRank)]:
        yield "has a projection without its low-rank term, or the reverse"


def both_sides_are_rotated(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """A matrix that prepares or reuses x' also has an `Unrotate`, and either both of these rotate or neither does."""
    rotated = [op.rotated for op in matrix.operations if isinstance(op, Prepare | Reuse)]
    if rotated != [op.rotated for op in matrix.operations if isinstance(op, Unrotate)]:
        yield "rotates its input and not its output, or the reverse"


def only_a_trellis_is_centred(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """A mean is subtracted (`Centre`) only from the sums of a trellis; other decoded values contain no mean."""
    kinds = {type(op) for op in matrix.operations}
    if Centre in kinds and Trellis not in kinds:
        yield "subtracts a mean that its values do not contain"


def reads_its_fields(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """The operations read all fields that the format stores, and no others."""
    fields = matrix.format.fields(matrix.rows, matrix.cols)
    if shared := matrix.format.shared_field:
        fields = (*fields, shared)
    stored = {(field.name, field.dtype) for field in fields}
    read = {pair for operation in matrix.operations for pair in operation.reads}
    if read != stored:
        yield f"reads {sorted(read)}, but {sorted(stored)} are stored"


def codes_fit_32_bit_indices(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """The matrix is small enough that 32-bit integers can index all of its codes, or all chunks of codes."""
    codec = matrix.format.codec
    per_row = codec.group_count(matrix.cols) * codec.num_codebooks if isinstance(codec, AdditiveCodec) else 0
    if matrix.rows * max(per_row, -(-matrix.cols // 4)) >= MAX_CODES:
        yield f"[{matrix.rows}, {matrix.cols}] has more codes than 32-bit indices reach"


def tile_is_powers_of_two(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """The sizes of the tile and its number of warps are powers of two, as Triton requires."""
    tile = matrix.tile
    if tile and any(size < 1 or size & (size - 1) for size in (tile.block_n, tile.block_k, tile.num_warps)):
        yield f"tile {tile} is not made of powers of two"


def kernels_run_its_operations(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """If the matrix already has kernels, they run all of its operations in order, except `Reuse`, which needs none."""
    in_kernels = tuple(operation for kernel in matrix.kernels for operation in kernel.operations)
    needed = tuple(operation for operation in matrix.operations if not isinstance(operation, Reuse))
    if matrix.kernels and in_kernels != needed:
        yield "its kernels do not run its operations in order"


def reuses_what_an_earlier_matrix_prepares(matrix: MatrixProgram, earlier: Earlier) -> Faults:
    """If x' is reused, an earlier matrix with equally many columns prepares it, without channel scales or permutation.

    Both matrices must also agree on whether the input is rotated.
    """
    for operation in matrix.operations:
        if isinstance(operation, Reuse):
            leader = earlier.get(operation.leader)
            prepared = [op for op in leader.operations if isinstance(op, Prepare)] if leader else []
            same = [(op.rotated, op.reads) for op in prepared] == [(operation.rotated, ())]
            if not leader or leader.cols != matrix.cols or not same:
                yield f"{operation}, which no earlier matrix of {matrix.cols} columns can share"


MATRIX_CHECKS: tuple[Callable[[MatrixProgram, Earlier], Faults], ...] = (
    kinds_meet,
    is_scaled_once,
    low_rank_is_projected,
    both_sides_are_rotated,
    only_a_trellis_is_centred,
    reads_its_fields,
    codes_fit_32_bit_indices,
    tile_is_powers_of_two,
    kernels_run_its_operations,
    reuses_what_an_earlier_matrix_prepares,
)


# A group


def names_its_matrices_in_order(group: Group, members: Members, program: Program) -> Faults:
    """The group names two or more matrices, each once, in the program's order; its kernel is made for that number."""
    if group.kernel.members != len(members) or len(members) < 2:
        yield f"has {len(members)} matrices for a kernel of {group.kernel.members}"
    names = set(group.matrices)
    if group.matrices != tuple(matrix.name for matrix in program.matrices if matrix.name in names):
        yield "does not name each matrix once in the program's order, the leader first"


def shares_its_input(group: Group, members: Members, program: Program) -> Faults:
    """All matrices of the group multiply the same vector; if they need x', one matrix prepares it for all."""
    if len(set(shared_inputs(group.matrices).values())) > 1 or len({matrix.prepared_by for matrix in members}) > 1:
        yield "multiplies different inputs"
    if len({matrix.cols for matrix in members}) > 1:
        yield "multiplies matrices of different numbers of columns"


def runs_its_members_operations(group: Group, members: Members, program: Program) -> Faults:
    """The kernel of the group has the same operations as the kernel that each of its matrices has for itself."""
    single = [matrix.kernel(group.kernel.function) for matrix in members]
    if any(kernel is None or kernel.operations != group.kernel.operations for kernel in single):
        yield "has a kernel whose operations differ from those of its matrices' kernels"


def computes_nothing_twice(group: Group, members: Members, program: Program) -> Faults:
    """No product is computed by two groups, and no product is finished by two groups."""
    for other in program.groups:
        in_both = sorted(set(other.matrices) & set(group.matrices))
        if other is not group and in_both and _is_finish(other.kernel) == _is_finish(group.kernel):
            yield f"shares {in_both[0]!r} with another group"


def finishes_one_group_of_products(group: Group, members: Members, program: Program) -> Faults:
    """If this group finishes products, there is one group that computes all of these products."""
    products = [other for other in program.groups if not _is_finish(other.kernel)]
    if _is_finish(group.kernel) and not any(set(group.matrices) <= set(other.matrices) for other in products):
        yield "finishes matrices whose products are not one group"


def _is_finish(kernel: KernelSpec) -> bool:
    return kernel.function == "finish"


GROUP_CHECKS: tuple[Callable[[Group, Members, Program], Faults], ...] = (
    names_its_matrices_in_order,
    shares_its_input,
    runs_its_members_operations,
    computes_nothing_twice,
    finishes_one_group_of_products,
)
