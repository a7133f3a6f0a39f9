"""The tables that the command line prints."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from reallm.planner.results.explain import Alternative, differences
from reallm.planner.results.sweep import Point
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.units import bytes_text

if TYPE_CHECKING:  # these modules import torch
    from reallm.artifacts.bundled_adapters import AdapterView
    from reallm.artifacts.inspect import Inspection
    from reallm.evaluation.evaluate import Evaluation
    from reallm.models.sizes import Sizes


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """A table of two columns: names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def columns_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with a title; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


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
    facts += _limit_facts(plan) + _measured_facts(plan)
    console.print(facts_table("plan", facts))
    console.print(histogram(plan.choices))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)


def _limit_facts(plan: Plan) -> list[tuple[str, str]]:
    """(name, text) rows: the bytes that the budget reserves beside the weights, and how much of each limit is used."""
    reserved, facts = plan.reserved, []
    if reserved.nbytes:
        parts = {"keys and values": reserved.kv_cache_bytes, "adapters": reserved.adapter_bytes}
        parts["workspace"] = reserved.workspace_bytes
        text = ", ".join(f"{name} {bytes_text(nbytes)}" for name, nbytes in parts.items() if nbytes)
        facts.append(("reserved beside the weights", text))
    for limit in plan.limits:
        if limit.unit == "bytes":
            used, price = f"{bytes_text(limit.used)} of {bytes_text(limit.capacity)}", "MiB"
        else:
            used, price = f"{limit.used / 1e6:.3f} of {limit.capacity / 1e6:.3f} ms", "ms"
        facts.append((limit.name, f"{used}; {limit.shadow_price:.4g} nats per token for one more {price}"))
    return facts


def print_sweep(points: Sequence[Point], console: Console) -> None:
    """Print one line per budget; the length of its bar is the loss on a logarithmic scale."""
    losses = [point.predicted_loss for point in points if point.predicted_loss > 0]
    low, high = (math.log(min(losses)), math.log(max(losses))) if losses else (0.0, 0.0)
    rows = []
    for point in points:
        share = (math.log(point.predicted_loss) - low) / (high - low or 1.0) if point.predicted_loss > 0 else 0.0
        single = "" if point.uniform_loss is None else f"{point.uniform_loss:.5f}"
        rows.append(
            [
                point.budget,
                f"{point.bits_per_weight:.4f}",
                bytes_text(point.counted_bytes),
                f"{point.predicted_loss:.5f}",
                f"{point.shadow_price:.3g}",
                single,
                point.uniform,
                "█" * round(1 + 19 * share),
            ]
        )
    headings = (
        "budget",
        "bits",
        "size",
        "predicted loss",
        "one more MiB",
        "uniform loss",
        "uniform format",
        "log loss",
    )
    table = columns_table("predicted loss in nats per token at every budget", headings, rows)
    for column in table.columns[-2:]:
        column.justify = "left"
    console.print(table)


def print_changes(title: str, before: Plan, after: Plan, console: Console, most: int | None = 15) -> None:
    """Print bytes and predicted loss of two plans, and up to `most` of the matrices that differ (None: all)."""
    changes = differences(before, after)
    facts = [
        ("predicted loss", f"{before.predicted_loss:.6g} -> {after.predicted_loss:.6g} nats per token"),
        ("bytes", f"{before.counted_bytes} -> {after.counted_bytes} ({after.counted_bytes - before.counted_bytes:+d})"),
        ("changed", f"{len(changes)} of {len(before.choices)} matrices"),
    ]
    console.print(facts_table(title, facts))
    if changes:
        shown = changes[:most]
        rows = [[c.matrix, c.before, c.after, f"{c.nbytes:+d}", f"{c.cost:+.4g}"] for c in shown]
        count = "all" if len(shown) == len(changes) else f"the {len(shown)} largest"
        console.print(columns_table(f"changes, {count}", ("matrix", "before", "after", "bytes", "loss"), rows))


def alternatives_table(alternatives: Sequence[Alternative]) -> Table:
    """A table with one line per candidate; the chosen one is marked."""
    rows = [
        [a.matrix, f"{a.format} *" if a.chosen else a.format, str(a.nbytes), f"{a.cost:.4g}", f"{a.regret:.4g}"]
        for a in alternatives
    ]
    title = "candidates; * is the chosen one; regret: what a candidate loses at the plan's price per byte"
    return columns_table(title, ("matrix", "format", "bytes", "loss", "regret"), rows)


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print what the bytes of an artifact's weights files are used for, and the distribution of bits per weight."""
    total = sum(inspection.bits_histogram.values()) or 1
    widths = ", ".join(f"up to {bits}: {count / total:.1%}" for bits, count in inspection.bits_histogram.items())
    facts = [
        ("architecture", inspection.architecture),
        ("matrices", f"{inspection.plan.matrices_bytes} bytes, {inspection.shared_bytes} of them shared codebooks"),
        ("everything else", f"{inspection.other_bytes} bytes in {inspection.other_tensors} tensors"),
        ("headers", f"{inspection.header_bytes} bytes"),
        ("weights files", f"{inspection.file_bytes} bytes ({bytes_text(inspection.file_bytes)})"),
        ("bits per weight", widths),
    ]
    facts += [("adapter", _adapter_text(view)) for view in inspection.adapters]
    console.print(facts_table(inspection.path, facts))


def _adapter_text(view: AdapterView) -> str:
    if view.fault is not None:
        return f"{view.name} cannot be used: {view.fault}"
    return f"{view.name}: {view.kind} of rank {view.rank}, {view.modules} matrices, {bytes_text(view.nbytes)}"


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


def matrices_table(choices: Sequence[Choice], title: str = "matrices") -> Table:
    """A table with one line per matrix."""
    rows = [
        [c.matrix, f"{c.rows}x{c.cols}", c.format, str(c.nbytes), f"{_bits([c]):.3f}", f"{c.cost:.3g}"] for c in choices
    ]
    return columns_table(title, ("matrix", "shape", "format", "bytes", "bits/weight", "cost"), rows)


def families_table(choices: Sequence[Choice]) -> Table:
    """A table with one line per family: number of matrices, mean bits per weight, cost and formats."""
    by_family: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_family[choice.family].append(choice)
    rows = []
    for family, group in by_family.items():
        formats = ", ".join(f"{count} {name}" for name, count in Counter(c.format for c in group).most_common())
        rows.append([family, str(len(group)), f"{_bits(group):.3f}", f"{sum(c.cost for c in group):.4f}", formats])
    table = columns_table("families", ("family", "matrices", "bits/weight", "cost", "formats"), rows)
    table.columns[-1].justify = "left"
    return table


def print_evaluation(result: Evaluation, console: Console) -> None:
    """Print perplexities, the KL divergence with its tail, the sizes, and the time and memory that evaluation took."""
    comparison = result.comparison
    context = f"{comparison.windows} windows of {comparison.seqlen} tokens, {comparison.tokens} scored, {result.dtype}"
    facts = [("text", result.text), ("protocol", context), ("perplexity", f"{comparison.perplexity:.4f}")]
    if comparison.base_perplexity is not None and comparison.divergence is not None:
        kl = comparison.divergence
        tail = f"median {kl.median:.4f}, 90% {kl.p90:.4f}, 95% {kl.p95:.4f}, 99% {kl.p99:.4f}, 99.9% {kl.p999:.4f}"
        facts.append(("original's perplexity", f"{comparison.base_perplexity:.4f}"))
        facts.append(("KL to the original", f"{kl.mean:.5f} nats per token; {tail}, maximum {kl.max:.4f}"))
        facts.append(("same first token", f"{kl.same_top1:.2%}"))
    facts += _size_facts("", result.sizes)
    if result.base_sizes is not None:
        facts += _size_facts("original's ", result.base_sizes)
    facts.append(("evaluation took", f"{result.seconds:.1f} s, peak memory {bytes_text(result.peak_rss_bytes)}"))
    console.print(facts_table(f"evaluation of {result.model}", facts))
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)


def _size_facts(whose: str, sizes: Sizes) -> list[tuple[str, str]]:
    matrices = f"{sizes.matrices_bpw:.4f} bits per weight, {sizes.matrices_bytes} bytes"
    return [
        (f"{whose}matrices", matrices),
        (f"{whose}all weights", f"{sizes.weights_bpw:.4f} bits per weight, {sizes.weights} weights"),
        (f"{whose}weights file", f"{sizes.file_bytes} bytes ({bytes_text(sizes.file_bytes)})"),
    ]
