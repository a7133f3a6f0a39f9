"""Budgets as users write them, parsed exactly.

A budget in bits per weight, such as `3.0bpw`, counts all bits stored for the matrices that take part, divided by the
number of weights in these matrices. A budget in bytes (`48MiB`, `4GiB`, `500MB`, `50331648B`) counts the whole weights
file with embeddings, head, norms and headers.
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
    """An amount in bits per weight (scope "matrices"), or in B, KB, KiB and so on (scope "file")."""

    text: str
    amount: Fraction
    unit: str

    @property
    def scope(self) -> Scope:
        """What this budget counts: "matrices" for bits per weight, otherwise "file"."""
        return "matrices" if self.unit == "bpw" else "file"

    def nbytes(self, numel: int) -> int:
        """Bytes of this budget, rounded down, for matrices with `numel` weights in total."""
        return int(self.amount * numel // 8) if self.unit == "bpw" else int(self.amount * UNIT_BYTES[self.unit.lower()])

    def smallest_text(self, nbytes: int, numel: int) -> str:
        """Text of the smallest budget that allows `nbytes` bytes, in this budget's unit with up to four decimals."""
        unit_bytes = Fraction(numel, 8) if self.unit == "bpw" else Fraction(UNIT_BYTES[self.unit.lower()])
        steps = -(-nbytes * 10_000 // unit_bytes)
        return f"{steps // 10_000}.{steps % 10_000:04d}".rstrip("0").rstrip(".") + self.unit


def budget_of(plan: Plan, extra_bytes: int = 0) -> Budget:
    """The exact budget of `plan`, enlarged by `extra_bytes`."""
    nbytes = plan.budget_bytes + extra_bytes
    if plan.scope == "file":
        return Budget(f"{nbytes}B" if extra_bytes else plan.budget, Fraction(nbytes), "B")
    bits = Fraction(8 * nbytes, sum(choice.rows * choice.cols for choice in plan.choices))
    return Budget(f"{float(bits):.6g}bpw" if extra_bytes else plan.budget, bits, "bpw")


def parse_budget(text: str) -> Budget:
    """Parse a budget such as "3.0bpw" or "48MiB". Raises PlanError."""
    number_and_unit = parse_amount(text)
    if number_and_unit is None:
        raise PlanError(f"--budget {text!r}: {_EXPECTED}")
    amount, unit = number_and_unit
    if amount == 0:
        raise PlanError(f"--budget {text!r} is zero; {_EXPECTED}")
    if unit.lower() == "bpw":
        if amount > MAX_BITS_PER_WEIGHT:
            raise PlanError(f"--budget {text!r}: expected more than 0 and at most {MAX_BITS_PER_WEIGHT}bpw")
        return Budget(text.strip(), amount, "bpw")
    if unit.lower() not in UNIT_BYTES:
        raise PlanError(f"--budget {text!r}: {_EXPECTED}")
    if amount * UNIT_BYTES[unit.lower()] < 1:
        raise PlanError(f"--budget {text!r} is less than one byte; {_EXPECTED}")
    return Budget(text.strip(), amount, unit)
