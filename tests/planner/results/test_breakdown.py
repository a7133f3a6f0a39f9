"""Sums over a plan: every byte has one part, every matrix one cell, and shortened names stay different."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_of
from strategies import formats, shapes, tables

from reallm.kernels.formats.formats import Format
from reallm.planner.results.allocate import solve
from reallm.planner.results.breakdown import (
    REST,
    SHARED,
    by_family,
    by_layer,
    costliest,
    layer_of,
    parts_of,
    short_names,
    tally,
)
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.tensor_layout import stored_nbytes
from reallm.planner.tables.units import PlanError


def choice(name: str, fmt: str, rows: int = 64, cols: int = 64, kind: str = "linear", cost: float = 0.0) -> Choice:
    nbytes = stored_nbytes(Format.parse(fmt), rows, cols, "linear")[0]
    return Choice.model_validate(
        {"matrix": name, "format": fmt, "rows": rows, "cols": cols, "kind": kind, "family": name.rsplit(".", 1)[-1]}
        | {"nbytes": nbytes, "cost": cost, "codes_sha256": ""}
    )


@given(formats, shapes)
def test_every_field_of_every_format_has_a_part_and_they_add_up(fmt: Format, shape: tuple[int, int]) -> None:
    one = choice("m", fmt.name, *shape)
    assert sum(parts_of(one).values()) == one.nbytes


@given(tables(experts=True), st.sampled_from(("17bpw", "30KB", "5bpw")))
def test_nothing_is_lost_in_the_sums(table: MeasuredTable, budget: str) -> None:
    try:
        plan = solve(table, budget)
    except PlanError:
        return
    families = by_family(plan)
    assert sum(sum(parts.values()) for parts in families.values()) == plan.file_bytes
    totals = [sum(parts.values()) for parts in families.values()]
    assert totals == sorted(totals, reverse=True)
    grid = by_layer(plan)
    cells = [*grid.cells.values(), *grid.outside.values()]
    assert sum(cell.matrices for cell in cells) == len(plan.choices)
    assert sum(cell.nbytes for cell in cells) == plan.matrices_bytes - sum(plan.shared.values())
    assert sum(cell.cost for cell in cells) == pytest.approx(plan.predicted_loss)
    assert {layer for layer, _ in grid.cells} == set(grid.layers)
    assert {family for _, family in grid.cells} == set(grid.families)


def test_shared_codebooks_and_the_rest_of_the_file_are_listed_apart() -> None:
    plan = plan_of(("layers.0.q", "aq1x4-d4-shared", 64, 64), ("layers.1.q", "int4-g64", 64, 64))
    plan = plan.model_copy(update={"file_bytes": plan.matrices_bytes + 1000})
    families = by_family(plan)
    assert sum(families[SHARED].values()) == sum(plan.shared.values()) > 0
    assert sum(families[REST].values()) == 1000


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.12.mlp.down_proj", "linear", 12),
        ("model.layers.3.mlp.experts.gate_up_proj.7", "expert", 3),
        ("model.layers.3.mlp.experts.7.w1", "linear", 3),
        ("moe.up.2", "expert", None),
        ("lm_head", "head", None),
        ("layers.\N{SUPERSCRIPT TWO}.q", "linear", None),
    ],
)
def test_the_layer_is_the_first_number_that_is_not_an_expert(name: str, kind: str, layer: int | None) -> None:
    assert layer_of(choice(name, "bf16", kind=kind)) == layer


def test_the_experts_of_a_layer_are_one_cell() -> None:
    plan = plan_of(*((f"layers.{i // 3}.experts.{i % 3}.up", f"int{4 if i % 3 else 8}-g64", 64, 64) for i in range(6)))
    grid = by_layer(plan)
    assert grid.layers == (0, 1) and grid.families == ("up",)
    assert grid.cells[0, "up"] == tally(plan.choices[:3])
    assert grid.cells[0, "up"].matrices == 3
    assert grid.cells[0, "up"].bits == pytest.approx(16 / 3, rel=0.1)  # 8, 4 and 4 bits, and scales


def test_the_costliest_come_first_and_equals_in_natural_order() -> None:
    plan = plan_of(*((f"layers.{i}.q", "int4-g64", 64, 64) for i in range(12)))
    costs = [0.1, 0.3, *[0.2] * 10]
    choices = tuple(c.model_copy(update={"cost": cost}) for c, cost in zip(plan.choices, costs, strict=True))
    top = costliest(plan.model_copy(update={"choices": choices}), 4)
    assert [c.matrix for c in top] == ["layers.1.q", "layers.2.q", "layers.3.q", "layers.4.q"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["self_attn.q_proj", "mlp.down_proj"], ["q", "down"]),
        (["attn.c_proj", "mlp.c_proj", "attn.c_attn"], ["attn.c", "mlp.c", "attn.c_attn"]),
        (["mlp.gate", "mlp.gate_proj"], ["gate", "gate_proj"]),
        (["_proj"], ["_proj"]),
        (["a.b", "b"], ["a.b", "b"]),
        ([], []),
    ],
)
def test_short_names_stay_different(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short
