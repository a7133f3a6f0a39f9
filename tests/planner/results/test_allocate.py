"""Plans from tables: exact bytes, within budget, equal to brute force over the real files, reproducible to the byte."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import make_table, tables

from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json
from reallm.kernels.storage.layout import TensorSpec, file_bytes
from reallm.planner.problem.candidates import dense_format
from reallm.planner.results.allocate import solve
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.solvers.solve import OPTIMAL_GAP
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable
from reallm.planner.tables.plan import Plan, Ties
from reallm.planner.tables.records import read_record, write_record
from reallm.planner.tables.tensor_layout import matrix_tensors, other_specs, shared_key, shared_tensor, weights_tensors
from reallm.planner.tables.units import PlanError

budgets = st.one_of(
    st.integers(20, 1700).map(lambda n: f"{n / 100}bpw"),
    st.integers(500, 12_000).map(lambda n: f"{n}B"),
)


def taking(table: MeasuredTable, scope: str) -> list[MatrixRecord]:
    return [m for m in table.matrices if scope == "file" or m.kind in ("linear", "expert")]


def choices_of(table: MeasuredTable, matrix: MatrixRecord) -> dict[str, float]:
    measured = {r.format: r.two_sided for r in table.measurements if r.matrix == matrix.name}
    return {**measured, "bf16": 0.0}


def file_tensors(table: MeasuredTable, formats: dict[str, Format]) -> list[TensorSpec]:
    """The tensors of a file without expert stacks, independently of the code under test."""
    books = {}
    tensors = [TensorSpec(name, "BF16", shape) for name, shape in table.other_tensors.items()]
    for m in table.matrices:
        fmt = formats.get(m.name, Format.parse("bf16"))
        if isinstance(fmt.codec, DenseCodec):
            tensors.append(TensorSpec(f"{m.name}.weight", "BF16", (m.rows, m.cols)))
        else:
            tensors += [TensorSpec(f"{m.name}.{f.name}", "U8", (f.nbytes,)) for f in fmt.fields(m.rows, m.cols)]
        if fmt.shared_field:
            books[f"{fmt.codec.name}@{m.family}"] = fmt.shared_field.nbytes
    return tensors + [shared_tensor(key, size) for key, size in books.items()]


def brute_force(table: MeasuredTable, budget: str, ties: Ties) -> float | None:
    """The lowest cost of any assignment whose bytes, counted over its tensors, fit the budget."""
    parsed = parse_budget(budget)
    matrices = taking(table, parsed.scope)
    limit = parsed.nbytes(sum(m.numel for m in matrices))
    best = None
    for names in product(*(sorted(choices_of(table, m)) for m in matrices)):
        formats = dict(zip((m.name for m in matrices), map(Format.parse, names), strict=True))
        label = {"none": "name", "inputs": "input", "family": "family"}[ties]
        if len({(getattr(m, label), formats[m.name]) for m in matrices}) != len({getattr(m, label) for m in matrices}):
            continue
        tensors = file_tensors(table, formats)
        if parsed.scope == "file":
            nbytes = file_bytes(tensors)
        else:
            prefixes = (*(f"{m.name}." for m in matrices), "reallm_shared.")
            others = set(table.other_tensors)
            nbytes = sum(t.nbytes for t in tensors if t.name.startswith(prefixes) and t.name not in others)
        cost = sum(choices_of(table, m)[name] for m, name in zip(matrices, names, strict=True))
        if nbytes <= limit and (best is None or cost < best):
            best = cost
    return best


def plan_or_none(table: MeasuredTable, budget: str, ties: Ties = "none") -> Plan | None:
    try:
        return solve(table, budget, ties=ties)
    except PlanError as error:
        assert "smallest plan takes" in str(error)
        return None


@settings(max_examples=120)
@given(tables(max_matrices=3), budgets, st.sampled_from(("none", "inputs", "family")))
def test_plans_equal_brute_force_over_the_files(table: MeasuredTable, budget: str, ties: Ties) -> None:
    best, plan = brute_force(table, budget, ties), plan_or_none(table, budget, ties)
    assert (best is None) == (plan is None)
    if plan is not None:
        assert plan.predicted_loss == pytest.approx(best, rel=OPTIMAL_GAP, abs=1e-300)
        assert plan.bound.status == "optimal" and plan.bound.lagrangian_bound <= plan.predicted_loss * (1 + 1e-15)


@settings(max_examples=120)
@given(tables(experts=True), budgets)
def test_plans_never_exceed_the_budget_and_their_bytes_are_the_files(table: MeasuredTable, budget: str) -> None:
    plan = plan_or_none(table, budget)
    assume(plan is not None)
    chosen = {c.matrix: Format.parse(c.format) for c in plan.choices}
    formats = {m.name: chosen.get(m.name, dense_format(m, table.dtype)) for m in table.matrices}
    tensors = weights_tensors(table.matrices, formats, plan.shared, other_specs(table.other_tensors, {}, table.dtype))
    assert plan.file_bytes == file_bytes(tensors)
    prefixes = (*(f"{c.matrix}." for c in plan.choices), "reallm_shared.")
    whole = {t.name for t in tensors if t.name.startswith("moe.") and len(t.shape) == 3}
    counted = [
        t for t in tensors if (t.name.startswith(prefixes) and t.name not in table.other_tensors) or t.name in whole
    ]
    assert plan.matrices_bytes == sum(t.nbytes for t in counted)
    assert plan.counted_bytes == (plan.file_bytes if plan.scope == "file" else plan.matrices_bytes)
    numel = sum(c.rows * c.cols for c in plan.choices)
    assert plan.counted_bytes <= plan.budget_bytes == parse_budget(budget).nbytes(numel)
    assert sorted([*chosen, *plan.dense]) == sorted(m.name for m in table.matrices)
    assert set(plan.shared) == {k for c in plan.choices if (k := shared_key(Format.parse(c.format), c.family))}


@settings(max_examples=60)
@given(tables(), budgets)
def test_an_infeasible_budget_names_the_smallest_feasible_one(table: MeasuredTable, budget: str) -> None:
    try:
        solve(table, budget)
    except PlanError as error:
        smallest = str(error).split("ask for ")[1].split(" or more")[0]
        assert "\n" not in str(error)
        assert smallest.endswith("bpw") == budget.endswith("bpw")
        plan = solve(table, smallest)
        smallest_bytes = int(str(error).split("takes ")[1].split(":")[0])
        assert plan.counted_bytes <= smallest_bytes <= plan.budget_bytes
        if budget.endswith("B"):
            with pytest.raises(PlanError, match="smallest plan takes"):
                solve(table, f"{smallest_bytes - 1}B")


@settings(max_examples=60)
@given(tables(experts=True), st.integers(1000, 9000), st.integers(0, 3000))
def test_more_budget_never_costs_more(table: MeasuredTable, nbytes: int, more: int) -> None:
    less = plan_or_none(table, f"{nbytes}B")
    assume(less is not None)
    assert solve(table, f"{nbytes + more}B").predicted_loss <= less.predicted_loss * (1 + OPTIMAL_GAP)


@settings(max_examples=40)
@given(tables(experts=True), budgets, st.randoms(use_true_random=False))
def test_the_same_inputs_in_any_order_give_the_same_plan(table: MeasuredTable, budget: str, shuffle: Random) -> None:
    plan = plan_or_none(table, budget)
    assume(plan is not None)
    assert canonical_json(solve(table, budget).model_dump(mode="json")) == canonical_json(plan.model_dump(mode="json"))
    parts = {}
    for name in ("matrices", "measurements", "shared"):
        rows = list(getattr(table, name))
        shuffle.shuffle(rows)
        parts[name] = tuple(rows)
    shuffled = solve(table.model_copy(update=parts), budget)
    assert shuffled.model_copy(update={"table_sha256": plan.table_sha256}) == plan


def two_matrices() -> MeasuredTable:
    """Two matrices of equal shape, the second ten times as sensitive, and an embedding."""
    return make_table(
        ("m.0.a", 16, 64, "linear", {"int2-g8": 8.0, "nf3-g16": 2.0, "int4-g8": 0.5}),
        ("m.0.b", 16, 64, "linear", {"int2-g8": 80.0, "nf3-g16": 20.0, "int4-g8": 5.0}),
        ("embed", 32, 16, "embedding", {"int4-g8": 0.25}),
    )


def test_bits_go_to_the_sensitive_matrix() -> None:
    # With scales, int2-g8 takes 4 bits per weight (256 + 256 bytes), nf3-g16 4 (384 + 128), int4-g8 6 (512 + 256).
    plan = solve(two_matrices(), "5bpw", work="w")
    assert {c.matrix: c.format for c in plan.choices} == {"m.0.a": "nf3-g16", "m.0.b": "int4-g8"}
    assert (plan.counted_bytes, plan.matrices_bytes, plan.bits_per_weight) == (1280, 1280, 5.0)
    assert plan.predicted_loss == 7.0 and plan.dense == ("embed",) and plan.work == "w"
    assert plan.uniform is not None
    assert (plan.uniform.format, plan.uniform.nbytes, plan.uniform.cost) == ("nf3-g16", 1024, 22.0)
    # The next 256 bytes would save 1.5 (in a), the last 256 saved 15 (in b): the price is the lower of the two.
    assert plan.bound.shadow_price / 2**20 == pytest.approx(1.5 / 256, rel=1e-9)
    # At that price b costs 9.5 as planned, 12 in bf16 (2048 bytes), 23 in nf3-g16.
    assert [c.runner_up for c in plan.choices] == ["int4-g8", "bf16"]


def test_a_file_budget_counts_everything() -> None:
    table = two_matrices()
    plan = solve(table, "8KiB")
    assert [c.matrix for c in plan.choices] == ["embed", "m.0.a", "m.0.b"] and plan.dense == ()
    assert plan.file_bytes == plan.counted_bytes <= 8192
    everything = solve(table, "1MiB")
    assert everything.predicted_loss == 0 and {c.format for c in everything.choices} == {"bf16"}
    assert any("uncompressed" in note for note in everything.notes)


def test_a_generous_bpw_budget_succeeds_with_a_note() -> None:
    plan = solve(two_matrices(), "17bpw")
    assert plan.predicted_loss == 0 and plan.bits_per_weight == 16.0
    assert any("uncompressed" in note for note in plan.notes)
    assert plan.bound.status == "optimal" and plan.bound.mip_gap == 0


def test_a_stack_left_dense_stays_one_parameter() -> None:
    table = make_table(*((f"moe.up.{e}", 12, 13, "expert", {"int4-g8": 1.0}) for e in range(4)))
    dense = solve(table, "32bpw")
    # 4 slices of 312 bytes are one tensor [4, 12, 13]; packed, each slice would take 320.
    assert dense.matrices_bytes == 4 * 312 and [c.nbytes for c in dense.choices] == [312] * 4
    formats = dict.fromkeys((m.name for m in table.matrices), Format.parse("bf16"))
    assert TensorSpec("moe.up", "BF16", (4, 12, 13)) in weights_tensors(table.matrices, formats, {}, [])
    mixed = solve(table, "4KiB", pins=["up.2=int4-g8"])
    # 78 bytes of codes -> 128, 24 scales -> 64.
    assert [c.nbytes for c in mixed.choices] == [320, 320, 192, 320]


def test_an_expert_is_named_after_its_stack_and_index() -> None:
    table = make_table(("moe.up.0", 3, 5, "expert", {"int4-g8": 1.0}))
    names = [t.name for t in matrix_tensors(table.matrices[0], Format.parse("bf16"))]
    assert names == ["moe.up.0.values"]


def test_a_uniform_plan_is_one_format_everywhere() -> None:
    table = two_matrices()
    plan = uniform_plan(table, "nf3-g16")
    assert {c.format for c in plan.choices} == {"nf3-g16"} and plan.predicted_loss == 22.0
    assert plan.counted_bytes == plan.budget_bytes == 1024 and plan.bound.status == "feasible"
    assert plan.bound.lagrangian_bound <= solve(table, "4bpw").predicted_loss
    assert solve(table, "4bpw").predicted_loss <= plan.predicted_loss
    whole = uniform_plan(table, "NF3-g16", scope="file")
    assert {c.matrix: c.format for c in whole.choices}["embed"] == "bf16"
    with pytest.raises(PlanError, match=r"m\.0\.a was not measured in it; expected one of bf16, int2-g8"):
        uniform_plan(table, "int8-g0+r1")


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=5), st.integers(450, 1700))
def test_the_plan_is_never_worse_than_the_best_uniform_one(costs: list[tuple[float, ...]], hundredths: int) -> None:
    names = ("int2-g8", "int4-g8", "int8-g8")  # 4, 6 and 10 bits per weight
    rows = [(f"l.{i}.q", 16, 32 + 8 * i, "linear", dict(zip(names, row, strict=True))) for i, row in enumerate(costs)]
    plan = solve(make_table(*rows), f"{hundredths / 100}bpw")
    assert plan.uniform is not None and plan.uniform.nbytes <= plan.budget_bytes
    assert plan.predicted_loss <= plan.uniform.cost * (1 + OPTIMAL_GAP)


def test_plans_read_back_and_record_their_table(tmp_path: Path) -> None:
    table = two_matrices()
    plan = solve(table, "5bpw")
    path = tmp_path / "plan.json"
    write_record(path, plan)
    assert read_record(path, Plan, "plan") == plan
    assert plan.table_sha256 == table.digest()


def test_other_costs_are_used_and_noted() -> None:
    plan = solve(two_matrices(), "5bpw", cost="fisher")
    assert plan.predicted_loss == 14.0
    assert any("fisher" in note for note in plan.notes)
