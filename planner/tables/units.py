"""Exact parsing of sizes and times as users write them, and PlanError, the planner's error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from reallm.kernels.errors import ReallmError

UNIT_BYTES: Mapping[str, int] = {
    **{"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
}
UNIT_NANOSECONDS: Mapping[str, int] = {"s": 10**9, "ms": 10**6, "us": 10**3}
MIB = 1 << 20
GIB = 1 << 30
_NUMBER = r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*"


class PlanError(ReallmError, ValueError):
    """A plan that cannot be made. The message names the option, what was found and expected, and how to proceed."""


def parse_amount(text: str) -> tuple[Fraction, str] | None:
    """(number, unit) of a text such as "4GiB"; None for a text that is not a number with a unit."""
    match = re.fullmatch(_NUMBER, text)
    return None if match is None else (Fraction(match[1]), match[2])


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a text such as "4GiB", at least 1. Raises PlanError, whose message begins with `option`."""
    return _parse(text, option, UNIT_BYTES, "a size, such as 48MiB, 4GiB or 500MB")


def parse_nanoseconds(text: str, option: str) -> int:
    """Nanoseconds of a text such as "20ms", at least 1. Raises PlanError, whose message begins with `option`."""
    return _parse(text, option, UNIT_NANOSECONDS, "a time, such as 20ms or 900us")


def _parse(text: str, option: str, units: Mapping[str, int], expected: str) -> int:
    amount, unit = parse_amount(text) or (Fraction(0), "")
    value = int(amount * units.get(unit.lower(), 0))
    if value < 1:
        raise PlanError(f"{option}: {text!r} is not {expected}")
    return value


def bytes_text(nbytes: float) -> str:
    """A size for people to read, such as "48.30 MiB"."""
    if nbytes >= GIB:
        return f"{nbytes / GIB:.2f} GiB"
    return f"{nbytes / MIB:.2f} MiB" if nbytes >= MIB else f"{nbytes / 1024:.1f} KiB"
