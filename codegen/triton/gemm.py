"""The writer of a GEMM for many rows of x: it decodes as in `gemv`, then multiplies with tensor cores.

A tile of W is decoded in float32 as in a GEMV, rounded to the dtype of x as a decoded weight would be, and multiplied
with sums in float32. A float32 x is multiplied without rounding and without tensor cores; x' of a transformed matrix
and the values of its codes are rounded to half precision. Factors of the low-rank term are read in whole words where
the rank allows it.

Names in the generated text, besides those of `gemv`: `m` [BLOCK_M] are indices of rows of x, `total` [BLOCK_M, BLOCK_N]
their sums.
"""

from __future__ import annotations

from reallm.codegen.ir.operations import AddBias, AddLowRank, AddSparse, CodegenError, Dot, Operation, RowScale, Store
from reallm.codegen.ir.program import KernelSpec
from reallm.kernels.formats.bit_planes import WORD_BITS
from reallm.kernels.formats.codecs import DoubleQuant

from .gemv import GemvWriter
from .prepare_finish import factor_lines
from .snippets import code_lines, planes, scale_lines, scale_setup

FACTOR_BITS = {"f16": 16, "i8": 8}
"""Bits per entry of a low-rank factor stored as floats or bytes; int4 factors are stored as codes, in whole words."""


class GemmWriter(GemvWriter):
    """The lines of one GEMM, collected by `write`. Its loop is not pipelined: copies would cost registers."""

    def __init__(self, spec: KernelSpec, width: int) -> None:
        super().__init__(spec, width)
        self.turns = f"tl.range(0, cols, {spec.tile.block_k}, num_stages=1)"

    def write(self, operation: Operation) -> None:
        """Append the lines of one operation. Raises CodegenError for one that cannot be part of a GEMM."""
        match operation:
            case Dot():
                self._dot()
            case RowScale(double_quant):
                self._row_scale(double_quant)
            case AddSparse():
                self.tail += self._sparse_lines()
            case AddLowRank(rank, dtype):
                self._low_rank(rank, dtype)
            case AddBias():
                self.tail.append("total += tl.load(bias + row).to(tl.float32)[None, :]")
            case Store():
                self._store()
            case _:
                super().write(operation)

    def finish(self) -> None:
        """Append the lines that store the sums for the kernel `finish`, unless the operations end with a Store."""
        if not isinstance(self.spec.operations[-1], Store):
            self.tail.append("tl.store(part + m.to(tl.int64)[:, None] * rows + n[None, :], total, mask=wanted)")

    def _dot(self) -> None:
        tile, block_m = self.spec.tile, self.spec.batch
        if block_m < 16:
            raise CodegenError(f"a GEMM takes 16 rows of x or more, not {block_m}")
        self.setup += [
            f"m = first + tl.arange(0, {block_m})",
            "row_m = tl.minimum(m, batch - 1)",
            f"x_at = {self.source} + row_m.to(tl.int64)[:, None] * {self.stride}",
            f"total = tl.zeros(({block_m}, {tile.block_n}), tl.float32)",
        ]
        mask = "" if self.spec.even else ", mask=(column < cols)[None, :], other=0"
        half = ".to(tl.float16)" if self.source == "ready" else ""
        self.body += [
            f"column = start + tl.arange(0, {tile.block_k})",
            f"inputs = tl.load(x_at + column[None, :]{mask}){half}  # [{block_m}, {tile.block_k}]",
            f"weights = tl.reshape(value, ({tile.block_n}, {tile.block_k})).to(inputs.dtype)",
            'total = tl.dot(inputs, tl.trans(weights), total, input_precision="ieee")',
        ]
        self.tail.append("wanted = (m < batch)[:, None] & (n < rows)[None, :]")

    def _row_scale(self, double: DoubleQuant | None) -> None:
        self.setup += scale_setup(double, "1")
        self.tail += [*scale_lines(double, "row", ""), "total *= scale[None, :]"]

    def _low_rank(self, rank: int, dtype: str) -> None:
        per_word = WORD_BITS // FACTOR_BITS[dtype] if dtype in FACTOR_BITS else 1
        if per_word == 1 or rank % per_word:
            self.tail += [
                f"for r in range(0, {rank}):",
                f"    factor_at = row * {rank} + r",
                *(f"    {line}" for line in factor_lines(dtype, "factor_at", "", "factor")),
                f"    total += tl.load(t + row_m * {rank} + r)[:, None] * factor[None, :]",
            ]
            return
        self.tail += [
            f"for r in range(0, {rank}, {per_word}):",
            f"    word = tl.load((left + (row * {rank} + r)).to(tl.pointer_type(tl.int32)))",
        ]
        for i in range(per_word):
            bits = FACTOR_BITS[dtype]
            entry = f"(word >> {i * bits}).to(tl.int{bits})"
            value = f"{entry}.to(tl.float16, bitcast=True)" if dtype == "f16" else entry
            self.tail.append(f"    factor = {value}.to(tl.float32)")
            self.tail.append(f"    total += tl.load(t + row_m * {rank} + (r + {i}))[:, None] * factor[None, :]")

    def _sparse_lines(self) -> list[str]:
        mask = ", mask=entry < many, other=0"
        return [
            "begin = tl.load(sparse_offsets + row)",
            "many = tl.load(sparse_offsets + row + 1) - begin",
            "for entry in range(0, tl.max(many, 0)):",
            "    there = begin + entry",
            *(f"    {line}" for line in code_lines(planes("sparse_cols", 16), "there", mask, "where")),
            f"    outlier = tl.load(sparse_values + there{mask}).to(tl.float32)",
            "    there = row_m.to(tl.int64)[:, None] * cols + where[None, :]",
            "    total += outlier[None, :] * tl.load(x + there).to(tl.float32)",
        ]

    def _store(self) -> None:
        self.tail.append("place = m.to(tl.int64)[:, None] * rows + n[None, :]")
        self.tail.append("tl.store(y + place, total.to(y.dtype.element_ty), mask=wanted)")
