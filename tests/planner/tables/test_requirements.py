"""What a deployment needs besides the budget: pools, latency, few formats, room for the KV cache and adapters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from strategies import make_table, tables

from reallm.kernels.formats.formats import Format
from reallm.planner.results.allocate import solve
from reallm.planner.tables.device import DEVICES, KINDS, Device
from reallm.planner.tables.measured_table import CacheLayer, MeasuredTable
from reallm.planner.tables.plan import Plan, Ties
from reallm.planner.tables.requirements import Requirements, cache_bytes, parse_pool
from reallm.planner.tables.units import PlanError, parse_bytes, parse_nanoseconds

COSTS = {"int2-g8": 0.4, "int4-g8": 0.1, "int8-g8": 0.001}
TABLE = make_table(*((f"l.{i}.{name}", 64, 128, "linear", COSTS) for i in range(4) for name in ("q", "k")))
CACHED = TABLE.model_copy(update={"kv_cache": (CacheLayer(values=256), CacheLayer(values=256, window=10))})
SLOW = Device(
    name="slow",
    bytes_per_second=1e6,
    weights_per_second=dict.fromkeys(KINDS.values(), 1000000000.0) | {"scalar": 2e6},
    launch_seconds=1e-6,
)


def plan_with(table: MeasuredTable, budget: str, **requirements: object) -> Plan:
    """The plan with these requirements."""
    return solve(table, budget, requirements=Requirements.model_validate(requirements))


def test_a_pool_limits_its_matrices_only() -> None:
    free = plan_with(TABLE, "16bpw")
    nbytes = sum(c.nbytes for c in free.choices if c.matrix.startswith("l.0"))
    plan = plan_with(TABLE, "16bpw", pools=(rf"gpu0={nbytes - 1}B:^l\.0\.", r"gpu1=1MiB:^l\.[123]\."))
    first, second = plan.limits
    in_pool = [c for c in plan.choices if c.matrix.startswith("l.0")]
    # blocks.0.norm is not a tensor of l.0, so the pool has all its bytes for matrices
    assert first.used == sum(c.nbytes for c in in_pool) <= first.capacity == nbytes - 1
    assert second.used == sum(c.nbytes for c in plan.choices) - first.used
    assert [c.format for c in plan.choices if c not in in_pool] == ["bf16"] * 6
    assert first.shadow_price > 0 == second.shadow_price


def test_a_pool_pays_for_what_stays_dense_and_for_its_cache() -> None:
    table = CACHED.model_copy(
        update={"matrices": tuple(m.model_copy(update={"block": int(m.name[2]) % 2}) for m in CACHED.matrices)}
    )
    pool = r"a=100KiB:^l\.1\."
    plan = solve(
        table, "1MiB", exclude=["l.1.k"], requirements=Requirements(pools=(pool,), context=100, batch=2, kv_dtype="f16")
    )
    dense = 2 * 64 * 128
    left = plan.limits[0].capacity
    # block 1 is the layer with a window of 10: 256 numbers, 10 tokens, 2 sequences, 2 bytes
    assert 100 * 1024 - dense - 256 * 10 * 2 * 2 - left < 256  # and one tensor's header
    assert plan.reserved.kv_cache_bytes == 256 * (100 + 10) * 2 * 2


def test_latency_is_the_sum_of_the_rooflines() -> None:
    free = plan_with(TABLE, "10bpw", latency="1s", device=SLOW)
    numel, nbytes = 64 * 128, free.choices[0].nbytes
    each = max(nbytes / 1e6, numel / 2e6) + 1e-6
    assert free.limits[0].used == pytest.approx(8 * each * 1e9, abs=8)  # each is rounded up to a nanosecond
    tight = plan_with(TABLE, "10bpw", latency=f"{free.limits[0].used // 1000 - 2}us", device=SLOW)
    assert tight.predicted_loss > free.predicted_loss
    assert tight.limits[0].used <= tight.limits[0].capacity


def test_an_expert_costs_its_share_of_tokens_and_a_plain_embedding_nothing() -> None:
    rows = [(f"moe.up.{e}", 32, 64, "expert", COSTS) for e in range(4)]
    table = make_table(("l.0.q", 32, 64, "linear", COSTS), *rows, ("embed", 32, 64, "embedding", COSTS))
    table = table.model_copy(
        update={
            "experts_per_token": 1,
            "matrices": tuple(m.model_copy(update={"input": ""}) if m.name == "embed" else m for m in table.matrices),
        }
    )
    plan = plan_with(table, "1MiB", latency="1s", device=SLOW)
    one = SLOW.nanoseconds(Format.parse("int8-g8"), 32 * 64, plan.choices[0].nbytes)
    by_name = {c.matrix: c.format for c in plan.choices}
    assert by_name["l.0.q"] == "bf16"  # at cost 0 where it fits
    dense = SLOW.nanoseconds(Format.parse("bf16"), 32 * 64, 2 * 32 * 64)
    assert plan.limits[0].used < 2.1 * dense and one > 0


def test_few_formats() -> None:
    plan = plan_with(TABLE, "5.5bpw", max_formats=1)
    assert len({c.format for c in plan.choices}) == 1
    more = plan_with(TABLE, "5.5bpw", max_formats=2)
    assert len({c.format for c in more.choices}) == 2 and more.predicted_loss < plan.predicted_loss
    assert more.bound.status == "optimal"


def test_the_budget_pays_for_keys_values_adapters_and_workspace() -> None:
    plain = plan_with(CACHED, "100KiB")
    plan = plan_with(CACHED, "100KiB", context=100, batch=1, kv_dtype="i8", adapter_rank=4, workspace="1KiB")
    assert plan.reserved.kv_cache_bytes == 256 * (100 + 10)
    assert plan.reserved.adapter_bytes == 8 * 4 * (64 + 128) * 2
    assert plan.reserved.workspace_bytes == 1024
    assert plan.counted_bytes + plan.reserved.nbytes <= plan.budget_bytes == 102400
    assert plan.predicted_loss > plain.predicted_loss
    with pytest.raises(PlanError, match="of them not for weights"):
        plan_with(CACHED, "100KiB", context=100, batch=100)
    with pytest.raises(PlanError, match="in MiB or GiB"):
        plan_with(CACHED, "4bpw", context=100)
    with pytest.raises(PlanError, match="has no KV-cache measurement"):
        plan_with(TABLE, "100KiB", context=100)


@given(st.lists(st.builds(CacheLayer, values=st.integers(1, 99), window=st.none() | st.integers(1, 50)), max_size=4))
def test_a_cache_keeps_no_more_than_its_window(layers: list[CacheLayer]) -> None:
    requirements = Requirements(context=20, batch=3, kv_dtype="f32")
    numbers = [layer.values * min(20, layer.window or 20) for layer in layers]
    assert cache_bytes(tuple(layers), requirements) == 4 * 3 * sum(numbers)


@given(tables(experts=True), st.sampled_from(("none", "inputs", "experts", "family")))
def test_ties_hold(table: MeasuredTable, ties: Ties) -> None:
    try:
        plan = solve(table, "16bpw", ties=ties)
    except PlanError as error:
        assert "no format in common" in str(error) or "smallest plan" in str(error)
        return
    names = {m.name: m for m in table.matrices}
    groups: dict[str, set[str]] = {}
    for choice in plan.choices:
        m = names[choice.matrix]
        stack = m.name.rpartition(".")[0] if m.kind == "expert" else m.name
        label = {"none": m.name, "inputs": m.input or m.name, "experts": stack, "family": m.family or m.name}[ties]
        groups.setdefault(label, set()).add(choice.format)
    assert all(len(formats) == 1 for formats in groups.values())


def test_errors_name_what_binds() -> None:
    with pytest.raises(PlanError, match=r"pool a leaves 10 bytes .* take \d+ or more"):
        plan_with(TABLE, "9bpw", pools=("a=10B:q",))
    with pytest.raises(PlanError, match=r"latency leaves \d+ ns"):
        plan_with(TABLE, "9bpw", latency="1us", device=SLOW)
    # int2 takes the fewest bytes, dense the least time: the two limits can be kept alone, not together
    fast = SLOW.model_copy(update={"weights_per_second": SLOW.weights_per_second | {"scalar": 1e5}})
    time = plan_with(TABLE, "16bpw", latency="100s", device=fast).limits[0].used
    with pytest.raises(PlanError, match=r"no plan keeps the budget and all limits together; .*raise them by"):
        plan_with(TABLE, "4bpw", latency=f"{time // 1000 + 1000}us", device=fast)
    other = make_table(("l.0.q", 8, 16, "linear", {"int2-g8": 1.0}), ("l.0.k", 8, 16, "linear", {"int4-g8": 1.0}))
    with pytest.raises(PlanError, match="no 1 formats cover every matrix"):
        solve(other, "9bpw", formats=["int*"], requirements=Requirements(max_formats=1))


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ({"pools": ("a=1GiB",)}, "expected NAME=SIZE:REGEX"),
        ({"pools": ("a=1GiB:(",)}, "not a regular expression"),
        ({"pools": ("a=lots:q",)}, "is not a size"),
        ({"pools": ("a=1GiB:nothing",)}, "matches none of the 8 matrices"),
        ({"pools": ("a=1GiB:q", "a=1GiB:k")}, "the same name"),
        ({"latency": "20ms"}, "depends on the device"),
        ({"latency": "soon", "device": SLOW}, "is not a time"),
        ({"workspace": "0B"}, "is not a size"),
    ],
)
def test_invalid_requirements_are_refused(requirements: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_with(TABLE, "9bpw", **requirements)


def test_numbers_out_of_range_are_refused() -> None:
    for requirements in ({"max_formats": 0}, {"batch": 0}, {"context": -1}, {"kv_dtype": "i4"}, {"adapter_rank": -1}):
        with pytest.raises(ValidationError):
            Requirements.model_validate(requirements)


def test_units_are_exact() -> None:
    assert parse_bytes("1.5GiB", "x") == 3 << 29 and parse_bytes("2kb", "x") == 2000
    assert parse_nanoseconds("0.5ms", "x") == 500_000 and parse_nanoseconds("3us", "x") == 3000
    assert parse_pool(" gpu0 = 4GiB :layers[.]0").holds("model.layers.0.q")


def test_devices_have_a_rate_for_every_codec() -> None:
    for device in DEVICES.values():
        assert set(device.weights_per_second) == set(KINDS.values())
        fmt = Format.parse("tq3-l12+rot")
        assert device.nanoseconds(fmt, 4096**2, 6_000_000) >= 6e6 / device.bytes_per_second * 1e9
