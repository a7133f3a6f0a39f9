"""Writes the kernels `prepare` and `finish`, which run before and after the product of a transformed matrix.

    x' = R_K P (channel_scales * x) / norm          y = R_N^T (sums of the parts) norm + S x + L t + bias

Here P is the permutation of the input, R_K and R_N are rotations, S x is the product of the outliers, and L t is the
low-rank term. A rotation of n entries is kron(B, H) diag(signs) / sqrt(n), where B is [m, m] and H is the
Sylvester-Hadamard matrix of order n / m, a power of two (`kernels.codes.hadamard`). The input is divided into m pieces
of n / m entries. To compute a piece of the output, an instance adds up all pieces of the input, weighted by a row of B,
and applies the Walsh-Hadamard transform to the sum.

The float32 tensors `base_in` and `signs_in` hold B / sqrt(n) and the signs for n = K, `base_out` and `signs_out` those
for n = N.
"""

from __future__ import annotations

from reallm.codegen.ir.operations import (
    AddBias,
    AddLowRank,
    AddSparse,
    CodegenError,
    Operation,
    Prepare,
    Store,
    Unrotate,
)
from reallm.codegen.ir.program import KernelSpec

from .group_select import tile_index
from .snippets import code_lines, indent, planes

BLOCK_TILE = 16
LARGEST_EXPONENT = 100
"""The norm is limited to 2^-100 to 2^100, so that its inverse is a normal float32 for all x."""
CHUNK = 1024
"""Number of entries of a row that one instance computes in `prepare` or `finish` if there is no rotation."""
NORM_CHUNK = 4096
"""Maximum number of entries that an instance loads at once while it searches a row for the largest magnitude."""
MAX_PIECES = 64
"""Maximum number of pieces of the input that an instance holds in registers at once."""


def butterfly_lines(pieces: int, size: int, name: str) -> list[str]:
    """Lines that apply the Walsh-Hadamard transform to each row of `name` [pieces, size], then flatten `name`.

    Each step computes the butterflies of the lowest bit of the flat index, then moves this bit to the top. After all
    steps the row number is in the lowest bits, so a transposition restores the order.
    """
    flat = pieces * size
    lines = [f"{name} = tl.reshape({name}, ({flat},))"]
    for _ in range(size.bit_length() - 1):
        lines.append(f"even, odd = tl.split(tl.reshape({name}, ({flat // 2}, 2)))")
        lines.append(f"{name} = tl.reshape(tl.trans(tl.join(even + odd, even - odd)), ({flat},))")
    if pieces > 1 and size > 1:
        lines.append(f"{name} = tl.reshape(tl.trans(tl.reshape({name}, ({size}, {pieces}))), ({flat},))")
    return lines


def pieces_at_once(computed: int, base: int, size: int, entries: int) -> int:
    """How many pieces of the input an instance can hold in its registers at once.

    The registers of the instance have room for `entries` entries. The input vector has `base` pieces of `size` entries,
    and the instance computes `computed` pieces of the output, so each piece of the input is held `computed` times.
    """
    return max(1, min(MAX_PIECES, entries // (computed * size), 1 << (base - 1).bit_length()))


def _mix(spec: KernelSpec, begin: str, base: str, load: list[str]) -> list[str]:
    """Lines that multiply `count` pieces of the input by entries of B and add the products to `total`.

    `total` is [computed pieces, size]. The pieces are those from number `begin` on; the variable `other` [count] holds
    their numbers. The lines `load` must set `value` [1, count, size] to these pieces. There may be fewer than `count`
    pieces left: `known` is false for the missing ones, and their values must be zero.
    """
    count = spec.pieces
    return [
        f"other = {begin} + tl.arange(0, {count})",
        "known = (other < pieces)[None, :, None]",
        f"weight = tl.load({base}, mask=(other < pieces)[None, :], other=0)  # [{spec.tile.block_n}, {count}]",
        *load,
        "total += tl.sum(weight[:, :, None] * value, 1)",
    ]


def _mixing(spec: KernelSpec, base: str, load: list[str]) -> list[str]:
    """Lines that set `total` [computed pieces, size] to rows of B times all input pieces; `load` is as in `_mix`."""
    computed, size = spec.tile.block_n, spec.tile.block_k
    zero = [
        f"own = tl.minimum(first * {computed} + tl.arange(0, {computed}), pieces - 1)",
        f"lane = tl.arange(0, {size})[None, None, :]",
        f"total = tl.zeros(({computed}, {size}), tl.float32)",
    ]
    if spec.even:
        return [*zero, *_mix(spec, "0", base, load)]
    loop = f"for begin in range(0, pieces, {spec.pieces}):"
    return [*zero, loop, *(f"    {line}" for line in _mix(spec, "begin", base, load))]


def _value_lines(prepare: Prepare, target: str, mask: str) -> list[str]:
    """Lines that set `target` to entry `k` of P (channel_scales * x), in float32; `mask` is the mask of the loads."""
    lines, at = [], "k"
    if prepare.permuted:
        lines, at = code_lines(planes("permutation", 16), "k", mask, "source"), "source"
    lines.append(f"{target} = tl.load(origin + {at}{mask}).to(tl.float32)")
    if prepare.channel_scales:
        lines.append(f"{target} *= tl.load(channel_scales + {at}{mask}).to(tl.float32)")
    return lines


def _norm_lines(prepare: Prepare, warps: int) -> list[str]:
    """Lines that set `norm` to the largest magnitude in the row, rounded down to a power of two."""
    plain, chunk = Prepare(channel_scales=prepare.channel_scales), min(NORM_CHUNK, CHUNK * warps)
    return [
        f"largest = tl.zeros(({chunk},), tl.float32)",
        f"for begin in range(0, cols, {chunk}):",
        f"    k = begin + tl.arange(0, {chunk})",
        *(f"    {line}" for line in _value_lines(plain, "value", ", mask=k < cols, other=0")),
        "    largest = tl.maximum(largest, tl.abs(value))",
        *_power_lines("tl.max(largest, 0)"),
    ]


def _power_lines(largest: str) -> list[str]:
    """Lines that set `norm` to the expression `largest`, rounded down to a power of two.

    The first instance of a row also stores `norm`.
    """
    return [
        f"top = tl.minimum({largest}, {2.0**LARGEST_EXPONENT!r})",
        f"top = tl.maximum(top, {2.0**-LARGEST_EXPONENT!r})",
        "norm = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)",
        "if first == 0:",
        "    tl.store(norms + m, norm)",
    ]


def emit_prepare(spec: KernelSpec, prepare: Prepare) -> str:
    """The body of the kernel that computes x' and norm.

    An instance computes one or more pieces of x' if there is a rotation, otherwise CHUNK entries of x'.
    """
    size, entries = spec.tile.block_k, spec.tile.block_n * spec.tile.block_k
    lines = [
        "m = tl.program_id(0)",
        "first = tl.program_id(1)",
        "origin = x + m.to(tl.int64) * cols",
        f"padded = (cols + {BLOCK_TILE - 1}) // {BLOCK_TILE} * {BLOCK_TILE}",
        "goal = ready + m.to(tl.int64) * padded",
    ]
    has_row = prepare.rotated and spec.even  # every instance holds the whole row in registers
    if not has_row:
        lines += _norm_lines(prepare, spec.tile.num_warps)
    factor = "(1 / norm)" + (f" * {2.0**prepare.lift!r}" if prepare.lift else "")  # not one factor: it might overflow
    if prepare.rotated:
        load = [
            f"k = other[None, :, None] * {size} + lane",
            *_value_lines(prepare, "value", ", mask=known, other=0"),
            *(_power_lines(f"tl.max(tl.reshape(tl.abs(value), ({spec.pieces * size},)), 0)") if has_row else ()),
            "value *= tl.load(signs_in + k, mask=known, other=0)",
        ]
        lines += [
            *_mixing(spec, "base_in + own[:, None] * pieces + other[None, :]", load),
            f"total = total * {factor}",
            *butterfly_lines(spec.tile.block_n, size, "total"),
            f"k = first * {entries} + tl.arange(0, {entries})",
            "tl.store(goal + k, total, mask=k < cols)",
            "if first == 0:",
            f"    rest = cols + tl.arange(0, {BLOCK_TILE})",
            f"    tl.store(goal + rest, tl.zeros(({BLOCK_TILE},), tl.float32), mask=rest < padded)",
        ]
    else:
        lines += [
            f"k = first * {size} + tl.arange(0, {size})",
            *_value_lines(prepare, "value", ", mask=k < cols, other=0"),
            f"tl.store(goal + k, value * {factor}, mask=k < padded)",
        ]
    return (
        "    # x [batch, cols], ready float32 [batch, cols in whole blocks], norms float32 [batch]\n"
        f"    # one instance: {entries} entries of a row\n"
        f"{indent(lines, 4)}\n"
    )


def sparse_lines(sums: list[str], rows_of_x: list[str]) -> list[str]:
    """Lines that add S x to the variables `sums`, for the rows `row` of W.

    There is one variable in `sums` for each row of x in `rows_of_x`.
    """
    lines = [
        "begin = tl.load(sparse_offsets + row)",
        "many = tl.load(sparse_offsets + row + 1) - begin",
        "for entry in range(0, tl.max(many, 0)):",
        "    there = begin + entry",
        *(
            f"    {line}"
            for line in code_lines(planes("sparse_cols", 16), "there", ", mask=entry < many, other=0", "column")
        ),
        "    outlier = tl.load(sparse_values + there, mask=entry < many, other=0).to(tl.float32)",
    ]
    for total, m in zip(sums, rows_of_x, strict=True):
        entry = f"tl.load(x + {m}.to(tl.int64) * cols + column, mask=entry < many, other=0)"
        lines.append(f"    {total} += outlier * {entry}.to(tl.float32)")
    return lines


def factor_lines(dtype: str, at: str, mask: str, target: str) -> list[str]:
    """Lines that set `target` to the entries of the factor L at the flat indices `at`, before they are scaled."""
    if dtype != "i4":
        return [f"{target} = tl.load(left + {at}{mask}).to(tl.float32)"]
    return [*code_lines(planes("left", 4), at, mask, target), f"{target} = ({target} - 8).to(tl.float32)"]


def _finish_step(spec: KernelSpec, operation: Operation) -> list[str]:
    match operation:
        case Unrotate(rotated):
            return [*_unrotate_lines(spec, rotated), "total *= tl.load(norms + m)"]
        case AddSparse():
            return sparse_lines(["total"], ["m"])
        case AddLowRank(rank, dtype):
            return [
                f"for r in range(0, {rank}):",
                f"    there = row * {rank} + r",
                *(f"    {line}" for line in factor_lines(dtype, "there", "", "factor")),
                f"    total += factor * tl.load(t + m.to(tl.int64) * {rank} + r)",
            ]
        case AddBias():
            return ["total += tl.load(bias + row).to(tl.float32)"]
        case Store():
            return ["tl.store(y + m.to(tl.int64) * rows + n, total.to(y.dtype.element_ty), mask=n < rows)"]
    raise CodegenError(f"{operation} cannot be part of what finishes a product")


def _unrotate_lines(spec: KernelSpec, rotated: bool) -> list[str]:
    """Lines that set `total` to the sum of the parts and, if `rotated`, undo the rotation of this sum."""
    size = spec.tile.block_k
    at = f"other[None, :, None] * {size} + lane" if rotated else "row"
    mask = ", mask=known, other=0" if rotated else ""
    load = [
        f"part_at = part + m.to(tl.int64) * rows + {at}",
        f"value = tl.load(part_at{mask})",
        "for split in tl.static_range(1, SPLITS):",
        f"    value += tl.load(part_at + split * batch.to(tl.int64) * rows{mask})",
    ]
    if not rotated:
        return [*load, "total = value"]
    return [
        *_mixing(spec, "base_out + other[None, :] * pieces + own[:, None]", load),
        *butterfly_lines(spec.tile.block_n, size, "total"),
        "total *= tl.load(signs_out + row)",
    ]


def emit_finish(spec: KernelSpec, select: list[str]) -> str:
    """The body of the kernel that turns the parts into y.

    An instance computes one or more pieces of y if there is a rotation, otherwise CHUNK entries of y. `select` holds
    the lines that find the instance's matrix in a group.
    """
    entries = spec.tile.block_n * spec.tile.block_k
    lines = [
        "m = tl.program_id(0)",
        *select,
        f"first = {tile_index(spec)}",
        f"n = first * {entries} + tl.arange(0, {entries})  # [{entries}]",
        "row = tl.minimum(n, rows - 1)",
    ]
    for operation in spec.operations:
        lines += _finish_step(spec, operation)
    return (
        f"    # part float32 [SPLITS, batch, rows], y [batch, rows]; one instance: {entries} entries of a row of y\n"
        f"{indent(lines, 4)}\n"
    )
