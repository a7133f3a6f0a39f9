"""Lines of Triton code that read packed fields: bit planes of codes, plain scales and double-quantised scales.

All functions return text. An index is an expression over a tile; division by a power of two is written as a shift,
since Triton's `//` on signed numbers handles negative values, which indices never have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from reallm.kernels.formats.bit_planes import WORD_BITS, plane_widths
from reallm.kernels.formats.codecs import DoubleQuant

Planes: TypeAlias = tuple[tuple[str, int], ...]
"""(name of the pointer, width in bits) of every bit plane of a field of codes."""


def divide(expression: str, number: int) -> str:
    """An expression for `expression // number`, where `expression` is never negative."""
    if number == 1:
        return expression
    return f"({expression} >> {number.bit_length() - 1})" if _power(number) else f"({expression} // {number})"


def modulo(expression: str, number: int) -> str:
    """An expression for `expression % number`, where `expression` is never negative."""
    return f"({expression} & {number - 1})" if _power(number) else f"({expression} % {number})"


def _power(number: int) -> bool:
    return number & (number - 1) == 0


def planes(name: str, bits: int) -> Planes:
    """The bit planes of field `name`, whose codes have `bits` bits; `plane_lines` defines the pointers."""
    return tuple((f"{name}_{i}" if i else name, width) for i, width in enumerate(plane_widths(bits)))


def plane_lines(name: str, bits: int, per_row: str) -> list[str]:
    """Lines that set the pointers of the second and later planes of a field of rows * `per_row` codes."""
    parts, lines = planes(name, bits), []
    for (before, width), (pointer, _) in pairwise(parts):
        per_word = WORD_BITS // width
        words = divide(f"(tl.cast(rows, tl.int64) * {per_row} + {per_word - 1})", per_word)
        lines.append(f"{pointer} = {before} + {words}")
    return lines


def code_lines(parts: Planes, at: str, mask: str, target: str) -> list[str]:
    """Lines that load the codes at the flat indices named `at` into `target`; codes may start anywhere in a word."""
    lines, shift = [], 0
    for pointer, width in parts:
        per_word = WORD_BITS // width
        word = f"tl.load({pointer} + {divide(at, per_word)}{mask})"
        steps = f"({modulo(at, per_word)} * {width})" if width > 1 else modulo(at, per_word)
        part = f"(({word} >> {steps}.to(tl.int32)) & {(1 << width) - 1})"
        lines.append(_join(target, part, shift))
        shift += width
    return lines


def chunk_lines(parts: Planes, at: str, width: int, mask: str, target: str) -> list[str]:
    """Lines that load the chunks of `width` codes with the indices `at` [A, B] into `target` [A, B, width].

    `width` is the number of codes in a word of the widest plane, so a chunk is one word of this plane and a part of a
    word of every other plane.
    """
    lines, shift = [], 0
    for pointer, bits in parts:
        chunks = WORD_BITS // bits // width
        word = f"tl.load({pointer} + {divide(at, chunks)}{mask})"
        if chunks > 1:
            word = f"({word} >> ({modulo(at, chunks)} * {bits * width}))"
        steps = f"(lane * {bits})" if bits > 1 else "lane"
        part = f"(({word}[:, :, None] >> {steps}[None, None, :]) & {(1 << bits) - 1})"
        lines.append(_join(target, part, shift))
        shift += bits
    return lines


def _join(target: str, part: str, shift: int) -> str:
    return f"{target} |= {part} << {shift}" if shift else f"{target} = {part}"


def scale_setup(double: DoubleQuant | None, per_row: str) -> list[str]:
    """Lines that `scale_lines` needs before the loop, for rows of `per_row` scales each."""
    if double is None:
        return []
    return [*plane_lines("scale_codes", double.bits, per_row), "least = tl.load(scale_min)"]


def scale_lines(double: DoubleQuant | None, at: str, mask: str) -> list[str]:
    """Lines that set `scale` to the scales at the flat indices `at`: plain ones, or min + code / steps * range."""
    if double is None:
        return [f"scale = tl.load(scales + {at}{mask}).to(tl.float32)"]
    reach = f"tl.load(scale_ranges + {divide(at, double.block)}{mask}).to(tl.float32)"
    return [
        *code_lines(planes("scale_codes", double.bits), at, mask, "step"),
        f"scale = least + step.to(tl.float32) * {1 / (2**double.bits - 1)!r} * {reach}",
    ]


def indent(lines: Sequence[str], spaces: int) -> str:
    """The lines, each indented by `spaces`."""
    return "\n".join(" " * spaces + line for line in lines)
