"""The writer of a GEMV for scalar codecs by spans: rows consist of whole spans of SPAN columns.

A thread processes one span of each row of the tile at a time. All tensors are [CHUNKS], one entry per thread. Every row
and column of the tile has separate lines, so that the position of each code is known when the kernel is compiled. Codes
are loaded 64 bits at a time, that is, two words of a bit plane.

    integers     The bits of a code are masked where they are in the word, at bit p, and read as the bits of a float:
                 code 2^p 2^-149, a denormal number that FMA multiplies exactly. x is multiplied by 2^(LIFT - p) once
                 for all rows. A group has a single zero point, so the zero point times the sum of the group's x is
                 subtracted from the group's sum.
    tables       The level of a code is loaded from a table that fits one cache line. Tables with the levels of pairs of
                 codes would need fewer loads, but from several cache lines: on an H100, lm2 took 14 us with them
                 instead of 9 us, lm4 13 us instead of 11 us.

The sums of a group are float32 and are multiplied by the group's scale.
"""

from __future__ import annotations

from reallm.codegen.ir.operations import LIFT, GroupScale, Levels, Offset, Operation, Unpack
from reallm.codegen.ir.program import SPAN, KernelSpec
from reallm.kernels.formats.bit_planes import WORD_BITS, plane_widths

from .group_select import tile_index
from .snippets import code_lines, divide, plane_lines, planes, scale_lines, scale_setup
from .trellis import DENORMAL

QUAD = 4
"""Number of columns whose x is loaded together."""
HALF_WORD = 16
"""A code at this bit of a word or above is shifted down by HALF_WORD bits, since a denormal number has only 23 bits."""


def takes_span(operations: tuple[Operation, ...], cols: int) -> bool:
    """Whether a product of these operations can be computed by spans.

    The rows must consist of whole spans, and the group size must be a multiple or a divisor of the span's length.
    """
    unpack = next((op for op in operations if isinstance(op, Unpack)), None)
    groups = [op.group_size for op in operations if isinstance(op, GroupScale | Offset)]
    known = any(isinstance(op, Levels | Offset) for op in operations)
    fits = all(size == 0 or size % SPAN == 0 or SPAN % size == 0 for size in groups)
    return unpack is not None and unpack.dim == 1 and known and fits and cols % SPAN == 0


class SpanWriter:
    """The lines of the loop over spans; `gemv.GemvWriter` writes what follows the loop."""

    def __init__(self, spec: KernelSpec, source: str, stride: str) -> None:
        self.spec, self.source, self.stride = spec, source, stride
        self.rows, self.batch = range(spec.tile.block_n), range(spec.batch)
        operations = spec.operations
        self.unpack = next(op for op in operations if isinstance(op, Unpack))
        self.offset = next((op for op in operations if isinstance(op, Offset)), None)
        self.levels = next((op for op in operations if isinstance(op, Levels)), None)
        self.scale = next((op for op in operations if isinstance(op, GroupScale)), None)
        self.integers = self.levels is None or self.levels.table == "int"
        self.group = self.scale.group_size if self.scale else 0
        self.per_flush = min(self.group, SPAN) if self.group else SPAN
        self.live = "" if spec.even else ", mask=live, other=0"
        self.setup: list[str] = []
        self.body: list[str] = []
        self.after: list[str] = []

    def write(self) -> None:
        """Write the setup and the body of the loop."""
        self._prologue()
        self._load_codes()
        for column in range(0, SPAN, QUAD):
            if column % self.per_flush == 0:
                self.body += [f"sum_{r}_{m} = tl.zeros(({self._chunks()},), tl.float32)" for r, m in self._sums()]
                self.body += [
                    f"plain_{m} = tl.zeros(({self._chunks()},), tl.float32)" for m in self.batch if self.integers
                ]
            self._quad(column)
            if (column + QUAD) % self.per_flush == 0:
                self._flush(column // self.per_flush)
        if not self.group:
            self._finish_row()

    def _chunks(self) -> int:
        return self.spec.tile.block_k // SPAN

    def _sums(self) -> list[tuple[int, int]]:
        return [(r, m) for r in self.rows for m in self.batch]

    def _prologue(self) -> None:
        self.setup += plane_lines("codes", self.unpack.bits, "cols")
        for index, (name, width) in enumerate(planes("codes", self.unpack.bits)):
            if width > 1:
                self.setup.append(f"wide_{index} = {name}.to(tl.pointer_type(tl.int64))")
        if self.scale:
            self.setup += scale_setup(self.scale.double_quant, "scale_count")
            if self.group:
                self.setup.insert(0, f"scale_count = (cols + {self.group - 1}) // {self.group}")
        if self.offset:
            self.setup += plane_lines("zeros", self.offset.bits, "scale_count" if self.group else "1")
        for m in self.batch:
            chosen = f"tl.minimum(first + {m}, batch - 1)" if self.spec.batch > 1 else "first"
            self.setup.append(f"row_{m} = {chosen}")
            self.setup.append(f"x_at_{m} = {self.source} + row_{m}.to(tl.int64) * {self.stride}")
        for r in self.rows:
            self.setup.append(f"line_{r} = tl.minimum({tile_index(self.spec)} * {len(self.rows)} + {r}, rows - 1)")
        for r, m in self._sums():
            self.setup.append(f"total_{r}_{m} = tl.zeros(({self._chunks()},), tl.float32)")
        if not self.group and self.integers:
            self.setup += [f"whole_{m} = tl.zeros(({self._chunks()},), tl.float32)" for m in self.batch]

    def _load_codes(self) -> None:
        for r in self.rows:
            self.body.append(f"at_{r} = line_{r} * spans + place")
            for index, (name, width) in enumerate(planes("codes", self.unpack.bits)):
                if width == 1:
                    self.body.append(f"w_{r}_{index}_0 = tl.load({name} + at_{r}{self.live})")
                    continue
                loads = width * SPAN // 64
                for load in range(loads):
                    self.body.append(f"pair = tl.load(wide_{index} + (at_{r} * {loads} + {load}){self.live})")
                    self.body.append(f"w_{r}_{index}_{2 * load} = pair.to(tl.int32)")
                    self.body.append(f"w_{r}_{index}_{2 * load + 1} = (pair >> 32).to(tl.int32)")

    def _quad(self, column: int) -> None:
        """Write the lines for four columns: they load x, then multiply it by the values of each row."""
        for m in self.batch:
            names = ", ".join(f"x_{i}_{m}" for i in range(QUAD))
            masked = "place < spans" if self.live else "place >= 0"
            self.body.append(f"{names} = four(x_at_{m} + place * {SPAN} + {column}, {masked})")
            if self.integers:
                self.body.append(f"plain_{m} += (x_0_{m} + x_1_{m}) + (x_2_{m} + x_3_{m})")
        if self.integers:
            self._integers(column)
        else:
            self._levels(column)

    def _integers(self, column: int) -> None:
        shift = 0
        for index, width in enumerate(plane_widths(self.unpack.bits)):
            for i in range(QUAD):
                word, bit = divmod((column + i) * width, WORD_BITS)
                low = bit % HALF_WORD
                for m in self.batch:
                    self.body.append(f"lifted_{m} = x_{i}_{m} * {2.0 ** (LIFT - low + shift)!r}")
                mask = ((1 << width) - 1) << low
                for r in self.rows:
                    source = f"w_{r}_{index}_{word}" if bit < HALF_WORD else f"(w_{r}_{index}_{word} >> {HALF_WORD})"
                    self.body.append(f"code = ({source} & {mask:#x}).to(tl.float32, bitcast=True)")
                    self.body += [f"sum_{r}_{m} += code * lifted_{m}" for m in self.batch]
            shift += width

    def _index(self, r: int, column: int) -> str:
        """An expression for the code of a column, put together from its bits in all planes."""
        parts, at = [], 0
        for index, width in enumerate(plane_widths(self.unpack.bits)):
            word, bit = divmod(column * width, WORD_BITS)
            moved = bit - at
            name = f"w_{r}_{index}_{word}"
            shifted = f"({name} >> {moved})" if moved > 0 else f"({name} << {-moved})" if moved else name
            parts.append(f"({shifted} & {((1 << width) - 1) << at:#x})")
            at += width
        return " | ".join(parts)

    def _levels(self, column: int) -> None:
        for r in self.rows:
            for i in range(QUAD):
                self.body.append(f"level = tl.load(levels + ({self._index(r, column + i)}))")
                self.body += [f"sum_{r}_{m} += level * x_{i}_{m}" for m in self.batch]

    def _flush(self, group: int) -> None:
        """Write the lines that add the current sums, multiplied by the scale of their group, to the totals."""
        if not self.group:
            self.body += [f"total_{r}_{m} += sum_{r}_{m}" for r, m in self._sums()]
            self.body += [f"whole_{m} += plain_{m}" for m in self.batch if self.integers]
            return
        per_span = SPAN // self.group
        index = f"place * {per_span} + {group}" if per_span > 1 else divide("place", self.group // SPAN)
        for r in self.rows:
            self.body.append(f"group_at = line_{r} * scale_count + {index}")
            assert self.scale
            self.body += scale_lines(self.scale.double_quant, "group_at", self.live)
            if self.offset:
                self.body += code_lines(planes("zeros", self.offset.bits), "group_at", self.live, "zero")
            for m in self.batch:
                self.body.append(f"total_{r}_{m} += scale * ({self._centred(f'sum_{r}_{m}', f'plain_{m}')})")

    def _centred(self, total: str, plain: str) -> str:
        """An expression for the sum of (code - zero) * x, from which the factor 2^LIFT has been removed."""
        if not self.integers:
            return total
        if self.offset:
            return f"{total} * {2.0**-LIFT / DENORMAL!r} - zero.to(tl.float32) * {plain}"
        half = 1 << (self.unpack.bits - 1)
        return f"{total} * {2.0**-LIFT / DENORMAL / half!r} - {plain}"

    def _finish_row(self) -> None:
        """Write the lines that subtract the zero points after the loop, for rows that are not divided into groups.

        The scale of such a row is applied later, by `RowScale`.
        """
        for r in self.rows if self.integers else ():
            if self.offset:
                self.after.append(f"group_at = line_{r}")
                self.after += code_lines(planes("zeros", self.offset.bits), "group_at", "", "zero")
            for m in self.batch:
                self.after.append(f"total_{r}_{m} = {self._centred(f'total_{r}_{m}', f'whole_{m}')}")

    def tail(self) -> list[str]:
        """Lines that set `sum_m` [BLOCK_N] to the totals of the rows."""
        lines = [*self.after, f"which = tl.arange(0, {len(self.rows)})"]
        for m in self.batch:
            lines.append(f"sum_{m} = tl.zeros(({len(self.rows)},), tl.float32)")
            lines += [f"sum_{m} = tl.where(which == {r}, tl.sum(total_{r}_{m}, 0), sum_{m})" for r in self.rows]
        return lines


FOUR = """\
@triton.jit
def four(place, live):
    # four entries from `place` on, 8-byte aligned in half precision: float32 [CHUNKS] each
    if place.dtype.element_ty.primitive_bitwidth == 16:
        word = tl.load(place.to(tl.pointer_type(tl.int64)), mask=live, other=0)
        a = word.to(tl.int16).to(place.dtype.element_ty, bitcast=True)
        b = (word >> 16).to(tl.int16).to(place.dtype.element_ty, bitcast=True)
        c = (word >> 32).to(tl.int16).to(place.dtype.element_ty, bitcast=True)
        d = (word >> 48).to(tl.int16).to(place.dtype.element_ty, bitcast=True)
    else:
        low = tl.load(place.to(tl.pointer_type(tl.int64)), mask=live, other=0)
        high = tl.load(place.to(tl.pointer_type(tl.int64)) + 1, mask=live, other=0)
        a = low.to(tl.int32).to(tl.float32, bitcast=True)
        b = (low >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        c = high.to(tl.int32).to(tl.float32, bitcast=True)
        d = (high >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
"""
