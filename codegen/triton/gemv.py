"""The writer of a GEMV: each operation becomes lines before, inside or after the loop over K.

Names in the generated text: `row` [BLOCK_N], `place` [CHUNKS] and `k` [CHUNKS, WIDTH] are indices of rows, chunks and
columns. `code` and `value` are [BLOCK_N, CHUNKS, WIDTH], and `total_m` holds the running sums of their products with
row m of x; `sum_m` [BLOCK_N] holds the finished sums.
"""

from __future__ import annotations

from reallm.codegen.ir.operations import (
    AddBias,
    AddLowRank,
    AddSparse,
    Codebooks,
    CodegenError,
    ColumnScale,
    Dot,
    GroupScale,
    Keep,
    Lattice,
    Levels,
    Offset,
    Operation,
    RowLevels,
    RowScale,
    Store,
    Unpack,
)
from reallm.codegen.ir.program import KernelSpec
from reallm.kernels.codes.lattice import RESIDUAL_SCALE, SHIFT
from reallm.kernels.formats.codecs import DoubleQuant, TableName

from .prepare_finish import BLOCK_TILE, factor_lines, sparse_lines
from .snippets import chunk_lines, code_lines, divide, plane_lines, planes, scale_lines, scale_setup

RANK_BLOCK = 64
"""Number of columns of L that are in registers at once."""
CUBE = "[:, :, None]"


class GemvWriter:
    """The lines of one GEMV, collected by `write`; `width` is the number of columns of a chunk."""

    def __init__(self, spec: KernelSpec, width: int) -> None:
        self.spec, self.width = spec, width
        self.setup: list[str] = []
        self.body: list[str] = []
        self.tail: list[str] = []
        self.turns = f"range(0, cols, {spec.tile.block_k})"
        self.source, self.stride = "x", "cols"
        if not isinstance(spec.operations[-1], Store):
            self.source, self.stride = "ready", "padded"
            self.setup.append(f"padded = (cols + {BLOCK_TILE - 1}) // {BLOCK_TILE} * {BLOCK_TILE}")
        if spec.aligned:
            self.setup.append(f"cols = cols // {width} * {width}  # as it is: says that rows are whole chunks")
        if not spec.even:
            self.body += ["inside = k < cols", f"begun = (place * {width} < cols)[None, :]"]

    def write(self, operation: Operation) -> None:
        """Append the lines of one operation. Raises CodegenError for one that cannot be part of a GEMV."""
        match operation:
            case Unpack():
                self._unpack(operation)
            case Levels(table, bits):
                self.body.append(_level_line(table, bits))
            case Offset(bits, group_size):
                self._offset(bits, group_size)
            case Codebooks():
                self._codebooks(operation)
            case RowLevels(bits):
                self.body.append(f"value = tl.load(levels + row[:, None, None] * {1 << bits} + code).to(tl.float32)")
            case Lattice(bits):
                self._lattice(bits)
            case ColumnScale(block):
                part = divide("place", block // self.width)
                here = "" if self.spec.even else ", mask=begun, other=0"
                self.body.append(f"scale = tl.load(scales + {part}[None, :]{here}).to(tl.float32)")
                self.body.append("value = value * scale[:, :, None]")
            case GroupScale(group_size, double_quant):
                self._group_scale(group_size, double_quant)
            case Dot():
                self._dot()
            case Keep():
                seen = "" if self.spec.even else " & inside[None, :, :]"
                self.body.append("goal = dense + n.to(tl.int64)[:, None, None] * cols + k[None, :, :]")
                self.body.append(
                    f"tl.store(goal, value.to(dense.dtype.element_ty), mask=(n < rows)[:, None, None]{seen})"
                )
            case RowScale(double_quant):
                self._row_scale(double_quant)
            case AddSparse():
                count = range(self.spec.batch)
                self.tail += sparse_lines([f"sum_{m}" for m in count], [f"row_{m}" for m in count])
            case AddLowRank(rank, dtype):
                self._low_rank(rank, dtype)
            case AddBias():
                self.tail.append("shift = tl.load(bias + row).to(tl.float32)")
                self.tail += [f"sum_{m} += shift" for m in range(self.spec.batch)]
            case Store():
                self._store()
            case _:
                raise CodegenError(f"{operation} cannot be part of a GEMV")

    def _mask(self, cube: bool) -> str:
        """The mask argument for a load in the loop that reads an entry per weight (if `cube`) or else per chunk."""
        if self.spec.even:
            return ""
        return ", mask=inside[None, :, :], other=0" if cube else ", mask=begun, other=0"

    def _unpack(self, operation: Unpack) -> None:
        parts = planes("codes", operation.bits)
        if operation.dim > 1:  # one code for all columns of a chunk
            self.setup.append(f"groups = (cols + {operation.dim - 1}) // {operation.dim}")
            self.setup += plane_lines("codes", operation.bits, f"groups * {operation.count}")
            for index in range(operation.count):
                at = f"code_{index}_at"
                self.body.append(f"{at} = (row[:, None] * groups + place[None, :]) * {operation.count} + {index}")
                self.body += code_lines(parts, at, self._mask(False), f"code_{index}")
            return
        self.setup += plane_lines("codes", operation.bits, "cols")
        if self.spec.aligned:
            self.body.append(f"at = row[:, None] * (cols // {self.width}) + place[None, :]  # chunk of the matrix")
            self.body += chunk_lines(parts, "at", self.width, self._mask(False), "code")
        else:
            self.body.append("at = row[:, None, None].to(tl.int64) * cols + k[None, :, :]  # weight of the matrix")
            self.body += code_lines(parts, "at", self._mask(True), "code")

    def _group(self, group_size: int, target: str) -> bool:
        """Write lines that set `target` to the flat index of the group of each chunk, and return False.

        If a chunk may span two groups, they set it to the index of the group of each weight; then return True.
        """
        if group_size == 0:
            self.body.append(f"{target} = row[:, None] + tl.zeros_like(place)[None, :]")
            return False
        self.setup.append(f"{target}_count = (cols + {group_size - 1}) // {group_size}")
        if cube := group_size % self.width != 0:
            group = divide("k", group_size)
            self.body.append(f"{target} = row[:, None, None] * {target}_count + {group}[None, :, :]")
        else:
            group = divide("place", group_size // self.width)
            self.body.append(f"{target} = row[:, None] * {target}_count + {group}[None, :]")
        return cube

    def _offset(self, bits: int, group_size: int) -> None:
        cube = self._group(group_size, "zero_at")
        self.setup += plane_lines("zeros", bits, "zero_at_count" if group_size else "1")
        self.body += code_lines(planes("zeros", bits), "zero_at", self._mask(cube), "zero")
        self.body.append(f"value = (code - zero{'' if cube else CUBE}).to(tl.float32)")

    def _group_scale(self, group_size: int, double: DoubleQuant | None) -> None:
        cube = self._group(group_size, "scale_at")
        self.setup += scale_setup(double, "scale_at_count" if group_size else "1")
        self.body += scale_lines(double, "scale_at", self._mask(cube))
        self.body.append(f"value = value * scale{'' if cube else CUBE}")

    def _codebooks(self, operation: Codebooks) -> None:
        for index in range(operation.count):
            word = f"(code_{index} + {index << operation.bits}){CUBE} * {operation.dim} + lane[None, None, :]"
            self.body.append(f"value {'+=' if index else '='} tl.load(codebooks + {word}).to(tl.float32)")

    def _lattice(self, bits: int) -> None:
        self.body += _word_lines("code_0", "value")
        if bits == 2:
            return
        second = 8 if bits == 3 else 16
        self.setup += plane_lines("residuals", second, "groups")
        self.body.append("rest_at = row[:, None] * groups + place[None, :]")
        self.body += code_lines(planes("residuals", second), "rest_at", self._mask(False), "rest")
        if bits == 3:
            self.body.append(f"word = tl.load(roots + rest{CUBE} * 8 + lane[None, None, :])")
        else:
            self.body += _word_lines("rest", "word")
        self.body.append(f"value += word * {RESIDUAL_SCALE[bits]!r}")

    def _dot(self) -> None:
        tile, mask = self.spec.tile, "" if self.spec.even else ", mask=inside, other=0"
        shape = f"({tile.block_n}, {tile.block_k // self.width}, {self.width})"
        for m in range(self.spec.batch):
            self.setup.append(
                f"row_{m} = tl.minimum(first + {m}, batch - 1)" if self.spec.batch > 1 else "row_0 = first"
            )
            self.setup.append(f"total_{m} = tl.zeros({shape}, tl.float32)")
            self.body.append(f"x_{m} = tl.load({self.source} + row_{m} * {self.stride} + k{mask}).to(tl.float32)")
            self.body.append(f"total_{m} += value * x_{m}[None, :, :]")
            self.tail.append(f"sum_{m} = tl.sum(tl.sum(total_{m}, 2), 1)")

    def _row_scale(self, double: DoubleQuant | None) -> None:
        self.setup += scale_setup(double, "1")
        self.tail += scale_lines(double, "row", "")
        self.tail += [f"sum_{m} *= scale" for m in range(self.spec.batch)]

    def _low_rank(self, rank: int, dtype: str) -> None:
        block = min(RANK_BLOCK, 1 << (rank - 1).bit_length())
        self.tail += [
            f"for start in range(0, {rank}, {block}):",
            f"    r = start + tl.arange(0, {block})",
            f"    factor_at = row[:, None] * {rank} + r[None, :]",
            *(
                f"    {line}"
                for line in factor_lines(dtype, "factor_at", f", mask=(r < {rank})[None, :], other=0", "factor")
            ),
        ]
        for m in range(self.spec.batch):
            self.tail.append(f"    t_{m} = tl.load(t + row_{m} * {rank} + r, mask=r < {rank}, other=0)")
            self.tail.append(f"    sum_{m} += tl.sum(factor * t_{m}[None, :], 1)")

    def _store(self) -> None:
        for m in range(self.spec.batch):
            limit = "rows" if self.spec.batch == 1 else f"tl.where(first + {m} < batch, rows, 0)"
            self.tail.append(f"tl.store(y + row_{m} * rows + n, sum_{m}.to(y.dtype.element_ty), mask=n < {limit})")

    def finish(self) -> None:
        """Append the lines that store the sums for the kernel `finish`, unless the operations end with a Store."""
        if isinstance(self.spec.operations[-1], Store | Keep):
            return
        for m in range(self.spec.batch):
            limit = "rows" if self.spec.batch == 1 else f"tl.where(first + {m} < batch, rows, 0)"
            self.tail.append(f"tl.store(part + row_{m} * rows + n, sum_{m}, mask=n < {limit})")


def _word_lines(code: str, target: str) -> list[str]:
    """Lines that set `target` [BLOCK_N, CHUNKS, 8] to the E8P vectors that `code` [BLOCK_N, CHUNKS] selects.

    `grid` [256, 8] holds absolute vectors; the last entry is stored as negative where an odd number of signs is
    negative.
    """
    return [
        f"minus = ({code} >> 1) & 127",
        "odd = minus ^ (minus >> 4)",
        "odd = odd ^ (odd >> 2)",
        "minus = minus | (((odd ^ (odd >> 1)) & 1) << 7)",
        f"{target} = tl.load(grid + ({code} >> 8){CUBE} * 8 + lane[None, None, :])",
        f"{target} = tl.where((minus{CUBE} >> lane[None, None, :]) & 1 != 0, -{target}, {target})",
        f"{target} += (({code} & 1).to(tl.float32) * {2 * SHIFT!r} - {SHIFT!r}){CUBE}",
    ]


def _level_line(table: TableName, bits: int) -> str:
    if table == "int":
        half = 1 << (bits - 1)
        return f"value = (code - {half}).to(tl.float32) * {1 / half!r}"
    return "value = tl.load(levels + code)"
