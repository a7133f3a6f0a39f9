"""Products of several matrices with the same x; the products that `passes.group_products` groups run in one launch.

A program here contains only matrices that share an input. It names them by the last part of their names, so that all
layers of a model use the same programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from reallm.codegen.ir.lower import has_kernel, lower
from reallm.codegen.ir.operations import CodegenError, Reuse
from reallm.codegen.ir.program import MatrixProgram, Program
from reallm.codegen.passes.run import run_passes
from reallm.kernels.formats.formats import Format

from .bindings import ProductCall, StoredMatrix, begin_product
from .instances import MAX_BATCH
from .launch import launch_kernel, on_device

if TYPE_CHECKING:
    import torch


MAX_ROWS = 32
"""Maximum number of rows of x in a grouped launch. With more rows, a single product is enough work for a launch, and
the pointers of a group's GEMM cost registers (with 64 rows of x per instance 152, against 128 for a single matrix)."""


@dataclass(frozen=True)
class Member:
    """The properties of a matrix that its program depends on; `name` is one of `dataflow.SAME_INPUT`."""

    name: str
    format: Format
    rows: int
    cols: int
    biased: bool


@cache
def program_of(members: tuple[Member, ...], prefill: bool) -> Program:
    """The program, after the passes, of those `members` that have kernels; all members share one input."""
    return run_passes(
        Program(
            tuple(
                MatrixProgram(m.name, m.rows, m.cols, m.format, lower(m.format, m.biased, prefill), prefill=prefill)
                for m in members
                if has_kernel(m.format)
            )
        )
    )


@cache
def group_of_leader(members: tuple[Member, ...], leader: str) -> tuple[Member, ...]:
    """The members of the group that `leader` leads, whose products run in one launch; empty if it leads no group."""
    groups = [group.matrices for group in program_of(members, prefill=False).groups]
    names = next((names for names in groups if names[0] == leader), ())
    return tuple(member for member in members if member.name in names)


def multiply_group(
    members: Sequence[Member], matrices: Sequence[StoredMatrix], x: torch.Tensor, prefill: bool | None = None
) -> list[torch.Tensor]:
    """y = x W_hat^T (+ bias) for each matrix, [..., rows] in the dtype of x [..., cols]; one launch for all products.

    The results equal those of `launch.multiply`, except that sums are added in another order. `members` is a whole
    group, as returned by `group_of_leader`. Raises CodegenError if it is not, for more than MAX_ROWS rows of x, and
    where `launch.multiply` does.
    """
    import torch

    outputs = [torch.empty((*x.shape[:-1], m.rows), dtype=x.dtype, device=x.device) for m in matrices]
    calls = {m.name: begin_product(matrix, x, y) for m, matrix, y in zip(members, matrices, outputs, strict=True)}
    count = next(iter(calls.values())).count
    if not count:
        return outputs
    if count > MAX_ROWS:
        raise CodegenError(f"x has {count} rows; a grouped product takes at most {MAX_ROWS}: multiply one by one")
    many = count > MAX_BATCH if prefill is None else prefill
    program = program_of(tuple(members), many)
    if not program.groups or len(program.groups[0].matrices) != len(members):
        raise CodegenError(f"{', '.join(calls)} have no product in common; multiply them one by one")
    with on_device(x):
        _launch_program(program, calls, many)
    return outputs


def _launch_program(program: Program, calls: dict[str, ProductCall], many: bool) -> None:
    """Launch the kernels before the products, those of the groups, and those that finish matrices outside a group."""
    for matrix in program.matrices:
        for spec in matrix.kernels:
            if spec.function in ("project", "prepare"):
                launch_kernel(spec, [calls[matrix.name]], many)
        for operation in matrix.operations:
            if isinstance(operation, Reuse):
                prepared = calls[operation.leader].tensors
                calls[matrix.name].tensors |= {name: prepared[name] for name in ("ready", "norms")}
    for group in program.groups:
        launch_kernel(group.kernel, [calls[name] for name in group.matrices], many)
    finished = {name for group in program.groups[1:] for name in group.matrices}
    for matrix in program.matrices:
        if (finish := matrix.kernel("finish")) and matrix.name not in finished:
            launch_kernel(finish, [calls[matrix.name]], many)
