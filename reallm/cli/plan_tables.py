"""The tables of plans that the command line prints. All of them can be read on a terminal of 80 columns."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from reallm.planner.results.differences import differences
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.plan import Choice, LimitState, Plan
from reallm.planner.tables.requirements import parse_pool
from reallm.planner.tables.units import bytes_text, parse_nanoseconds

from .tables import columns_table, facts_table, print_first_that_fits

if TYPE_CHECKING:
    from reallm.planner.results.explain import Alternative
    from reallm.planner.results.sweep import Point

NARROW_NAME = 30
"""Columns for the name of a matrix in a table that would be too wide otherwise."""
LEAST_REST = {"bytes": 1, "ns": 500}
"""The least use of a limit by the rest of the model that is worth printing."""
MAX_BAR, MIN_BAR = 20, 4
"""Longest bar of a sweep, and the shortest that is worth drawing."""


def print_plan(plan: Plan, console: Console) -> None:
    """Print the budget, size, predicted loss and its proof, the best uniform plan for comparison, and the formats."""
    bound = plan.bound
    counts = "the matrices" if plan.scope == "matrices" else "the whole weights file"
    facts = [
        ("budget", f"{plan.budget} = {plan.budget_bytes} bytes for {counts}; {plan.counted_bytes} used"),
        ("size", f"{plan.bits_per_weight:.4f} bits per weight; weights file {bytes_text(plan.file_bytes)}"),
        ("predicted loss", f"{plan.predicted_loss:.5f} nats per token"),
        ("proof", f"{bound.status}: bound {bound.best_bound:.6g}, gap {bound.mip_gap:.2g}"),
        ("checked bound", f"{bound.lagrangian_bound:.6g}, computed without {bound.solver} {bound.solver_version}"),
        ("shadow price", f"{bound.shadow_price:.4g} nats per token for one more MiB"),
        ("best uniform", _uniform_text(plan)),
    ]
    facts += [("calibrated on", plan.calibration)] if plan.calibration else []
    facts += _limit_facts(plan) + _measured_facts(plan)
    console.print(facts_table("plan", facts))
    console.print(histogram(plan.choices))
    print_notes(plan, console)


def print_notes(plan: Plan, console: Console) -> None:
    """Print the plan's notes, among them which matrices it leaves as they are and why."""
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _limit_facts(plan: Plan) -> list[tuple[str, str]]:
    """(name, text) rows: the bytes that the budget reserves beside the weights, and how much of each limit is used."""
    reserved, facts = plan.reserved, []
    if reserved.nbytes:
        parts = {"keys and values": reserved.kv_cache_bytes, "adapters": reserved.adapter_bytes}
        parts["workspace"] = reserved.workspace_bytes
        text = ", ".join(f"{name} {bytes_text(nbytes)}" for name, nbytes in parts.items() if nbytes)
        facts.append(("reserved beside the weights", text))
    for limit in plan.limits:
        total, price = _whole_limit(plan, limit), "MiB" if limit.unit == "bytes" else "ms"
        rest = total - limit.capacity
        used = f"{_amount(limit, limit.used + rest)} of {_amount(limit, total)}"
        others = f", {_amount(limit, rest)} of it by the rest of the model" if rest >= LEAST_REST[limit.unit] else ""
        facts.append((limit.name, f"{used} used{others}; {limit.shadow_price:.4g} nats per token for one more {price}"))
    return facts


def _whole_limit(plan: Plan, limit: LimitState) -> int:
    """The limit as the user gave it, in its unit; `limit.capacity` is what is left of it for the matrices."""
    if limit.unit == "ns" and plan.requirements.latency is not None:
        return parse_nanoseconds(plan.requirements.latency, "--latency")
    pools = {f"pool {pool.name}": pool.nbytes for pool in map(parse_pool, plan.requirements.pools)}
    return pools.get(limit.name, limit.capacity)


def _amount(limit: LimitState, value: int) -> str:
    return bytes_text(value) if limit.unit == "bytes" else f"{value / 1e6:.3f} ms"


def print_sweep(points: Sequence[Point], console: Console) -> None:
    """Print one line per budget; the length of its bar is the loss on a logarithmic scale."""
    counted = "matrices" if parse_budget(points[0].budget).scope == "matrices" else "weights\nfile"
    heads = ("budget", "bits", counted, "loss", "one more\nMiB", "uniform\nloss", "uniform\nformat")
    rows = [
        [
            point.budget,
            f"{point.bits_per_weight:.3f}",
            bytes_text(point.counted_bytes),
            f"{point.predicted_loss:.5f}",
            f"{point.shadow_price:.3g}",
            "" if point.uniform_loss is None else f"{point.uniform_loss:.5f}",
            point.uniform,
        ]
        for point in points
    ]
    title = "predicted loss of the best plan at every budget, nats per token"
    tables = []
    for length in (MAX_BAR, MIN_BAR, 0):
        bars = _bars([point.predicted_loss for point in points], length)
        lines = [[*row, bar] for row, bar in zip(rows, bars, strict=True)]
        tables.append(_compact(columns_table(title, (*heads, ""), lines), left=(6, 7)))
    print_first_that_fits(console, *tables)


def _bars(losses: Sequence[float], length: int) -> list[str]:
    """One bar of at most `length` characters per loss, on a logarithmic scale."""
    positive = [loss for loss in losses if loss > 0]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 0.0)
    shares = [(math.log(loss) - low) / (high - low or 1.0) if loss > 0 else 0.0 for loss in losses]
    return ["█" * round(1 + (length - 1) * share) if length else "" for share in shares]


def print_changes(title: str, before: Plan, after: Plan, console: Console, most: int | None = 15) -> None:
    """Print bytes and predicted loss of two plans, and up to `most` of the matrices that differ (None: all)."""
    changes = differences(before, after)
    facts = [
        ("predicted loss", f"{before.predicted_loss:.6g} -> {after.predicted_loss:.6g} nats per token"),
        ("bytes", f"{before.counted_bytes} -> {after.counted_bytes} ({after.counted_bytes - before.counted_bytes:+d})"),
        ("changed", f"{len(changes)} of {len(before.choices)} matrices"),
    ]
    console.print(facts_table(title, facts))
    if not changes:
        return
    shown = changes[:most]
    heading = f"changes, {'all' if len(shown) == len(changes) else f'the {len(shown)} largest'}"
    numbers = [[f"{c.nbytes:+d}", f"{c.cost:+.3g}"] for c in shown]
    wide = [[c.matrix, c.before, c.after, *values] for c, values in zip(shown, numbers, strict=True)]
    prefix, names = _short([c.matrix for c in shown])
    narrow = [
        [name, f"{c.before}\n-> {c.after}", *values] for name, c, values in zip(names, shown, numbers, strict=True)
    ]
    print_first_that_fits(
        console,
        columns_table(heading, ("matrix", "before", "after", "bytes", "loss"), wide),
        _compact(columns_table(heading + prefix, ("matrix", "change", "bytes", "loss"), narrow), left=(1,)),
    )


def print_alternatives(alternatives: Sequence[Alternative], console: Console) -> None:
    """Print one table per matrix with a line per candidate; the chosen one is marked."""
    console.print("* chosen; regret: what a candidate loses at the plan's price per byte", highlight=False)
    by_matrix: dict[str, list[Alternative]] = defaultdict(list)
    for alternative in alternatives:
        by_matrix[alternative.matrix].append(alternative)
    for matrix, group in by_matrix.items():
        rows = [
            [f"{a.format} *" if a.chosen else a.format, str(a.nbytes), f"{a.cost:.4g}", f"{a.regret:.4g}"]
            for a in group
        ]
        console.print(columns_table(matrix, ("format", "bytes", "loss", "regret"), rows))


def _measured_facts(plan: Plan) -> list[tuple[str, str]]:
    measured = plan.measured
    if measured is None:
        return [("measured", "not yet; `reallm eval` measures an artifact, `plan --refit` measures plans")]
    tried = "; ".join(f"{name}: predicted {loss:.5f}, measured {kl:.5f}" for name, loss, kl in measured.tried)
    where = f"{measured.windows} windows of {measured.seqlen} tokens of {measured.text}"
    return [("measured", f"KL {measured.kl:.5f} nats per token on {where}"), ("plans measured", tried)]


def _uniform_text(plan: Plan) -> str:
    if plan.uniform is None:
        return "no single format fits this budget"
    ratio = f" ({plan.uniform.cost / plan.predicted_loss:.2f} x)" if plan.predicted_loss else ""
    return f"{plan.uniform.format}: {plan.uniform.cost:.5f} nats per token{ratio}, {plan.uniform.nbytes} bytes"


def _bits(choices: Sequence[Choice]) -> float:
    """Bits per weight of `choices`, without shared codebooks."""
    return 8 * sum(c.nbytes for c in choices) / sum(c.rows * c.cols for c in choices)


def histogram(choices: Sequence[Choice]) -> Table:
    """A table of the number of matrices and the share of weights in each format, sorted by bits per weight."""
    by_format: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_format[choice.format].append(choice)
    numel = {name: sum(c.rows * c.cols for c in group) for name, group in by_format.items()}
    bits = {name: _bits(group) for name, group in by_format.items()}
    total = sum(numel.values())
    rows = []
    for name in sorted(bits, key=lambda name: (bits[name], name)):
        share = numel[name] / total
        bar = "█" * max(1, round(20 * share))
        rows.append([name, f"{bits[name]:.3f}", str(len(by_format[name])), f"{share:.1%}", bar])
    table = columns_table("formats", ("format", "bits/weight", "matrices", "weights", ""), rows)
    table.columns[-1].justify = "left"
    return table


def print_matrices(choices: Sequence[Choice], console: Console, title: str = "matrices") -> None:
    """Print one line per matrix; a narrow console gets shorter names and no shapes."""
    rows = [
        [c.matrix, f"{c.rows}x{c.cols}", c.format, str(c.nbytes), f"{_bits([c]):.3f}", f"{c.cost:.3g}"] for c in choices
    ]
    heads = ("matrix", "shape", "format", "bytes", "bits", "loss")
    prefix, names = _short([choice.matrix for choice in choices])
    narrow = [[name, *row[2:]] for name, row in zip(names, rows, strict=True)]
    print_first_that_fits(
        console,
        columns_table(title, heads, rows),
        _compact(columns_table(title, heads, rows)),
        _compact(columns_table(title + prefix, (heads[0], *heads[2:]), narrow)),
    )


def families_table(choices: Sequence[Choice]) -> Table:
    """A table with one line per family: number of matrices, mean bits per weight, cost and formats."""
    by_family: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_family[choice.family].append(choice)
    rows = []
    for family, group in by_family.items():
        counts = Counter(c.format for c in group).most_common()
        formats = ", ".join(f"{count}\N{NO-BREAK SPACE}{name}" for name, count in counts)
        rows.append([family, str(len(group)), f"{_bits(group):.3f}", f"{sum(c.cost for c in group):.4f}", formats])
    table = columns_table("families", ("family", "matrices", "bits", "loss", "formats"), rows)
    return _compact(table, left=(4,))


def _compact(table: Table, left: Iterable[int] = ()) -> Table:
    """`table` without vertical lines, which saves a quarter of its width; the columns `left` are left-aligned."""
    table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, (0, 1, 0, 0)
    for index in left:
        if index < len(table.columns):
            table.columns[index].justify = "left"
    return table


def _short(names: Sequence[str]) -> tuple[str, list[str]]:
    """(text for the title, names): names without the parts that they begin with in common, broken at dots if long."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[: common + 1] == parts[0][: common + 1] for p in parts):
        common += 1
    title = f" (all names begin with {'.'.join(parts[0][:common])}.)" if common else ""
    return title, [_broken(p[common:]) for p in parts]


def _broken(parts: Sequence[str]) -> str:
    """The name with these parts, in lines of at most NARROW_NAME characters where dots allow it."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) > NARROW_NAME:
            lines.append(f".{part}")
        else:
            lines[-1] += f".{part}"
    return "\n".join(lines)
