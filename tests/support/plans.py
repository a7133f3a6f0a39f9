"""Plans written by hand, for tests of the steps after planning."""

from __future__ import annotations

from reallm.kernels.formats.formats import Format
from reallm.planner.tables.plan import Bound, Choice, Plan

BOUND = Bound(
    solver="none",
    solver_version="0",
    status="optimal",
    objective=0.0,
    best_bound=0.0,
    mip_gap=0.0,
    lagrangian_bound=0.0,
    shadow_price=0.0,
)


def plan_of(*rows: tuple[str, str, int, int]) -> Plan:
    """A plan of (matrix, format, rows, cols) with zero costs; the last part of a name is the family."""
    choices, shared = [], {}
    for name, fmt_name, n, k in rows:
        fmt, family = Format.parse(fmt_name), name.rsplit(".", 1)[-1]
        if fmt.shared_field:
            shared[f"{fmt.codec.name}@{family}"] = fmt.shared_field.nbytes
        choice = Choice(
            matrix=name,
            format=fmt_name,
            rows=n,
            cols=k,
            kind="linear",
            family=family,
            nbytes=fmt.nbytes(n, k),
            cost=0.0,
            codes_sha256="0" * 64,
        )
        choices.append(choice)
    nbytes = sum(choice.nbytes for choice in choices) + sum(shared.values())
    return Plan(
        model="tiny",
        model_sha256="1" * 64,
        work="work",
        table_sha256="2" * 64,
        budget="4bpw",
        budget_bytes=nbytes,
        scope="matrices",
        counted_bytes=nbytes,
        matrices_bytes=nbytes,
        file_bytes=nbytes,
        bits_per_weight=4.0,
        predicted_loss=0.0,
        bound=BOUND,
        choices=tuple(choices),
        shared=shared,
    )
