"""One kernel for all matrices of a group: how an instance finds its matrix, and the tensors and sizes of that matrix.

Members are the matrices of a group. Their tiles follow each other along one axis of the grid. The arguments of all
members are passed to the kernel (`words_of_0`, `words_of_1`, ...). An instance compares its index with the running
counts of tiles to select the arguments of its member. This needs no table in memory, and the compiler knows the
alignment of the pointers. The rest is the same as in the kernel of a single matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

from reallm.codegen.ir.operations import Unrotate
from reallm.codegen.ir.program import KernelSpec

MEMBER_TENSORS = frozenset({"y", "part", "t", "bias", "base_out", "signs_out"})
"""Tensors that each member has separately, besides its stored fields and the tensors derived from them."""
MEMBER_SIZES = frozenset({"rows", "pieces"})
"""Integer arguments that each member has separately."""


def member_name(name: str, member: int) -> str:
    """The name of the kernel argument for one member's tensor or size; `name` is what a single matrix calls it."""
    return f"{name}_of_{member}"


def _tiles(spec: KernelSpec) -> str:
    """A format string for an expression: the number of tiles of a member, whose number is inserted for `{}`."""
    order, size = "rows_of_{}", spec.tile.block_n
    if spec.function == "finish":
        rotated = any(isinstance(operation, Unrotate) and operation.rotated for operation in spec.operations)
        order, size = ("pieces_of_{}", spec.tile.block_n) if rotated else ("rows_of_{}", spec.tile.block_k)
    return f"({order} + {size - 1}) // {size}"


def tile_index(spec: KernelSpec) -> str:
    """An expression for the index of the instance's tile within its matrix."""
    return "down" if spec.members > 1 else f"tl.program_id({_axis(spec)})"


def _axis(spec: KernelSpec) -> int:
    return 1 if spec.function == "finish" else 0


def select_lines(spec: KernelSpec, names: Sequence[str]) -> list[str]:
    """Lines that set the variables `names` to the arguments of the instance's matrix.

    They also set `down` to the index of the instance's tile in this matrix. A kernel of a single matrix needs no such
    lines.
    """
    if spec.members == 1:
        return []
    lines = [f"down = tl.program_id({_axis(spec)})"]
    later, count = range(1, spec.members), _tiles(spec)
    for member in later:
        before = f"tiles_{member - 1} + " if member > 1 else ""
        lines.append(f"tiles_{member} = {before}{count.format(member - 1)}  # of the matrices before {member}")
        lines.append(f"from_{member} = down >= tiles_{member}")
    members = range(spec.members)
    lines.append(f"down -= {_selected(['0', *(f'tiles_{member}' for member in later)])}")
    return [*lines, *(f"{name} = {_selected([member_name(name, member) for member in members])}" for name in names)]


def _selected(choices: Sequence[str]) -> str:
    """An expression that selects the entry of `choices` for the member that the instance belongs to."""
    text = choices[0]
    for member, choice in enumerate(choices[1:], 1):
        text = f"tl.where(from_{member}, {choice}, {text})"
    return text
