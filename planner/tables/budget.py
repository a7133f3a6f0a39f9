"""Budgets as users write them, read exactly.

`3.0bpw` counts all bytes of the matrices that take part over their weights; `48MiB`, `4GiB`, `500MB`, `50331648B` count
the whole weights file, embeddings, head, norms and headers included.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .plan import Plan, Scope
from .units import UNIT_BYTES, PlanError, parse_amount

MAX_BITS_PER_WEIGHT = 32
_EXPECTED = "expected a number with a unit, such as 3.0bpw, 48MiB, 4GiB, 500MB or 50331648B"


@dataclass(frozen=True, slots=True)
class Budget:
    """`amount` in `unit`: bits per weight (scope "matrices") or bytes, KB, KiB and so on (scope "file")."""

    text: str
    amount: Fraction
    unit: str

    @property
    def scope(self) -> Scope:
        """What the bytes of this budget count."""
        return "matrices" if self.unit == "bpw" else "file"

    def nbytes(self, numel: int) -> int:
        """Bytes of this budget for matrices of `numel` weights in all, rounded down."""
        return int(self.amount * numel // 8) if self.unit == "bpw" else int(self.amount * UNIT_BYTES[self.unit.lower()])

    def smallest(self, nbytes: int, numel: int) -> str:
        """The least budget in this unit, rounded up to four decimals, that is at least `nbytes`."""
        unit_bytes = Fraction(numel, 8) if self.unit == "bpw" else Fraction(UNIT_BYTES[self.unit.lower()])
        steps = -(-nbytes * 10_000 // unit_bytes)
        return f"{steps // 10_000}.{steps % 10_000:04d}".rstrip("0").rstrip(".") + self.unit


def budget_of(plan: Plan, more: int = 0) -> Budget:
    """The budget of `plan` to the byte, or one of `more` bytes beside it."""
    nbytes = plan.budget_bytes + more
    if plan.scope == "file":
        return Budget(f"{nbytes}B" if more else plan.budget, Fraction(nbytes), "B")
    bits = Fraction(8 * nbytes, sum(choice.rows * choice.cols for choice in plan.choices))
    return Budget(f"{float(bits):.6g}bpw" if more else plan.budget, bits, "bpw")


def parse_budget(text: str) -> Budget:
    """Read a budget. Raises PlanError that says what was found and what was expected."""
    found = parse_amount(text)
    if found is None:
        raise PlanError(f"--budget {text!r}: {_EXPECTED}")
    amount, unit = found
    if amount == 0:
        raise PlanError(f"--budget {text!r} is nothing at all; {_EXPECTED}")
    if unit.lower() == "bpw":
        if amount > MAX_BITS_PER_WEIGHT:
            raise PlanError(f"--budget {text!r}: bits per weight are above 0 and at most {MAX_BITS_PER_WEIGHT}")
        return Budget(text.strip(), amount, "bpw")
    if unit.lower() not in UNIT_BYTES:
        raise PlanError(f"--budget {text!r}: {_EXPECTED}")
    if amount * UNIT_BYTES[unit.lower()] < 1:
        raise PlanError(f"--budget {text!r} is less than one byte; {_EXPECTED}")
    return Budget(text.strip(), amount, unit)
