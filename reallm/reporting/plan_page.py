"""The text of the HTML pages that show a plan or a sweep: each section has a sentence, a figure and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from shlex import quote

from reallm.planner.results.breakdown import (
    PARTS,
    REST,
    Grid,
    Tally,
    by_family,
    by_layer,
    costliest,
    short_names,
    tally,
)
from reallm.planner.results.differences import differences
from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.units import bytes_text

from .figures.paint import Drawing
from .html_page import Section, Table, render
from .report_data import COSTLIEST, ReportData

CHANGES = 12
"""Largest number of changes that the section on the next MiB lists."""


def plan_page(data: ReportData, figures: Mapping[str, Drawing]) -> str:
    """The report as HTML; `figures` are those that `figures.drawings` returns."""
    plan = data.plan
    sections = [
        _bits(plan, figures["bits"]),
        *([_pareto(data, figures["pareto"])] if "pareto" in figures else []),
        _measured(plan, figures.get("measured")),
        _bytes(data, figures["bytes"]),
        _costliest(data, figures.get("costliest")),
        *([_next_mib(plan, data.richer)] if data.richer else []),
    ]
    notes = [*plan.notes, *([data.lacking] if data.lacking else [])]
    name = base_name(plan.model)
    return render(
        "report.html",
        sections,
        title=f"{name} in {plan.budget}",
        name=name,
        plan=plan,
        heads=_heads(plan),
        facts=[*_facts(plan), *_requested_options(plan)],
        digests=("model sha256", "table sha256", "text sha256"),
        notes=notes,
    )


def sweep_page(model: str, points: Sequence[Point], uniforms: Sequence[UniformPoint], drawing: Drawing) -> str:
    """An HTML page with the Pareto curve of a sweep."""
    low, high = points[0], points[-1]
    takeaway = (
        f"From {low.predicted_loss:.4g} nats per token at {low.bits_per_weight:.2f} bits per weight to "
        f"{high.predicted_loss:.4g} at {high.bits_per_weight:.2f}. {_proved(points)}"
    )
    section = Section("pareto", "Loss against size", takeaway, drawing, table=_sizes_table(points, uniforms))
    name = base_name(model)
    return render("sweep.html", [section], title=f"{name} at every size", name=name)


def base_name(model: str) -> str:
    """The last part of a model's path or name."""
    return model.rstrip("/").rpartition("/")[2] or model


def _heads(plan: Plan) -> list[dict[str, str]]:
    heads = [
        ("bits per weight", f"{plan.bits_per_weight:.4f}", plan.bits_per_weight),
        ("weights file", bytes_text(plan.file_bytes), plan.file_bytes),
        ("predicted nats per token", f"{plan.predicted_loss:.4g}", plan.predicted_loss),
    ]
    if plan.measured is not None:
        heads.append(("measured nats per token", f"{plan.measured.kl:.4g}", plan.measured.kl))
    heads.append((f"gap {plan.bound.mip_gap:.2g}", plan.bound.status, plan.bound.mip_gap))
    return [{"name": name, "value": value, "exact": repr(exact)} for name, value, exact in heads]


def _facts(plan: Plan) -> list[tuple[str, str]]:
    bound = plan.bound
    counts = "of the matrices" if plan.scope == "matrices" else "of the whole weights file"
    facts = [
        ("model", plan.model),
        ("budget", f"{plan.budget} = {plan.budget_bytes:,} bytes {counts}; {plan.counted_bytes:,} used"),
        ("bytes", f"matrices {plan.matrices_bytes:,}; weights file {plan.file_bytes:,}"),
        ("bound", f"{bound.best_bound:.6g} nats per token; {bound.lagrangian_bound:.6g} computed without the solver"),
        ("shadow price", f"{bound.shadow_price:.4g} nats per token saved by one more MiB"),
        ("solver", f"{bound.solver} {bound.solver_version}".strip()),
        ("best single format", _uniform(plan)),
        ("calibrated on", plan.calibration or "unknown"),
        ("work folder", plan.work),
        ("model sha256", plan.model_sha256),
        ("table sha256", plan.table_sha256),
    ]
    if plan.measured is not None:
        facts.append(("text sha256", plan.measured.text_sha256))
    return facts


def _uniform(plan: Plan) -> str:
    uniform = plan.uniform
    if uniform is None:
        return "none fits this budget"
    return f"{uniform.format}: {uniform.cost:.5g} nats per token, {uniform.nbytes:,} bytes"


def _requested_options(plan: Plan) -> list[tuple[str, str]]:
    """(name, value) of each planning option that is not at its default, and of the corrections of a refit."""
    options = [
        ("pins", ", ".join(plan.pins)),
        ("excluded", ", ".join(plan.exclude)),
        ("formats allowed", ", ".join(plan.formats or ())),
        ("tied", "" if plan.ties == "none" else f"by {plan.ties}"),
        ("cost", "" if plan.cost == "two_sided" else plan.cost),
        ("corrections", ", ".join(f"{family} {factor:.2f}" for family, factor in sorted(plan.corrections.items()))),
    ]
    return [(name, value) for name, value in options if value]


def _bits(plan: Plan, drawing: Drawing) -> Section:
    grid = by_layer(plan)
    families = {f: tally([c for c in plan.choices if (c.family or c.matrix) == f]) for f in _families(plan)}
    cells = [*grid.cells.values(), *grid.outside.values()]
    names, bits = short_names(families), [cell.bits for cell in cells]
    takeaway = f"Every matrix has {bits[0]:.2f} bits per weight."
    if f"{min(bits):.2f}" != f"{max(bits):.2f}":
        takeaway = f"From {min(bits):.2f} to {max(bits):.2f} bits per weight."
        highest = max(families, key=lambda f: families[f].bits)
        lowest = min(families, key=lambda f: families[f].bits)
        if len(families) > 1:
            takeaway += f" {names[highest]} gets the most, {families[highest].bits:.2f} on average,"
            takeaway += f" {names[lowest]} the fewest, {families[lowest].bits:.2f}."
    aside = _bits_aside(plan, any(cell.matrices > 1 for cell in cells))
    return Section("bits", "Bits of every matrix", takeaway, drawing, aside, _bits_table(grid))


def _bits_aside(plan: Plan, shared_cells: bool) -> str:
    asides = []
    if shared_cells:
        asides.append("Matrices with the same layer and role, such as experts, share a cell that shows their mean.")
    if plan.shared:
        asides.append("Shared codebooks are not counted here.")
    if plan.dense:
        first = plan.dense[0] if len(plan.dense) == 1 else f"{len(plan.dense)} matrices, such as {plan.dense[0]},"
        asides.append(f"{first} took no part and stayed uncompressed.")
    return " ".join(asides)


def _bits_table(grid: Grid) -> Table:
    rows = []
    for layer in grid.layers:
        row = [grid.cells.get((layer, family)) for family in grid.families]
        rows.append([f"layer {layer}", *(_bits_text(cell) for cell in row)])
    rows += [[family, _bits_text(cell), *[""] * (len(grid.families) - 1)] for family, cell in grid.outside.items()]
    labels = short_names(grid.families)
    columns = ["", *(labels[family] for family in grid.families)] if grid.families else ["", "bits per weight"]
    return Table("Bits per weight as a table", columns, rows)


def _families(plan: Plan) -> list[str]:
    return list(dict.fromkeys(choice.family or choice.matrix for choice in plan.choices))


def _bits_text(cell: Tally | None) -> str:
    return "" if cell is None else f"{cell.bits:.2f}"


def _pareto(data: ReportData, drawing: Drawing) -> Section:
    plan = data.plan
    takeaway = f"This plan is predicted to lose {plan.predicted_loss:.4g} nats per token."
    if plan.uniform is None:
        takeaway += " No single format fits this budget."
    elif plan.predicted_loss > 0:
        ratio = plan.uniform.cost / plan.predicted_loss
        takeaway += f" The best single format that fits, {plan.uniform.format}, loses {plan.uniform.cost:.4g},"
        takeaway += f" {ratio:.2f} times as much."
    aside = f"The curve shows the best plans from half to twice this size. {_proved(data.points)}"
    table = _sizes_table(data.points, data.uniforms)
    return Section("pareto", "Loss against size", takeaway, drawing, aside, table)


def _proved(points: Sequence[Point]) -> str:
    proved = sum(point.status == "optimal" for point in points)
    return f"{'All' if proved == len(points) else proved} of {len(points)} plans are proved optimal."


def _sizes_table(points: Sequence[Point], uniforms: Sequence[UniformPoint]) -> Table:
    rows = [("best mix", p.bits_per_weight, p.counted_bytes, p.predicted_loss) for p in points]
    rows += [(u.format, u.bits_per_weight, u.counted_bytes, u.predicted_loss) for u in uniforms]
    rows.sort(key=lambda row: (row[2], row[3], row[0]))
    texts = [[name, f"{bits:.4f}", f"{nbytes:,}", f"{loss:.4g}"] for name, bits, nbytes, loss in rows]
    return Table("Loss against size as a table", ["", "bits per weight", "bytes", "predicted loss"], texts)


def _measured(plan: Plan, drawing: Drawing | None) -> Section:
    title, measured = "Predicted against measured", plan.measured
    if measured is None:
        command = f"reallm plan {quote(plan.work)} --budget {quote(plan.budget)} --refit 2 --refit-text held.txt"
        takeaway = f"No plan was measured: all losses are predictions. `{command}` measures them."
        return Section("measured", title, takeaway)
    windows = f"{measured.windows} windows of {measured.seqlen} tokens"
    takeaway = f"This plan loses {measured.kl:.4g} nats per token on {windows}."
    if measured.uniform_kl is not None:
        takeaway += f" The best single format loses {measured.uniform_kl:.4g}."
    rows = [
        [name, f"{predicted:.5g}", f"{kl:.5g}", f"{kl / predicted:.3f}" if predicted else ""]
        for name, predicted, kl in measured.tried
    ]
    table = Table("The plans measured as a table", ["plan", "predicted", "measured", "ratio"], rows)
    return Section(
        "measured",
        title,
        takeaway,
        drawing,
        f"Measured on {measured.text}. The predictions do not include corrections.",
        table,
    )


def _bytes(data: ReportData, drawing: Drawing) -> Section:
    plan, families = data.plan, by_family(data.plan, data.dense)
    totals = {family: sum(parts.values()) for family, parts in families.items()}
    names, first = short_names(families), next(family for family in families if family != REST)
    takeaway = f"{names[first]} takes the most, {totals[first] / plan.file_bytes:.1%} of the weights file."
    sums = {part: sum(parts.get(part, 0) for parts in families.values()) for part in PARTS}
    present = [part for part in PARTS if sums[part]]
    shares = [f"{_share(sums[part] / plan.file_bytes)} are {part}" for part in present]
    takeaway += f" Of all bytes {', '.join(shares)}."
    rows = [
        [family, *(f"{parts.get(part, 0):,}" for part in present), f"{totals[family]:,}"]
        for family, parts in families.items()
    ]
    rows.append(["weights file", *(f"{sums[part]:,}" for part in present), f"{plan.file_bytes:,}"])
    unlisted = ", and matrices that took no part" if plan.dense and not data.dense else ""
    aside = f"All else in the file: norms and headers{unlisted}."
    return Section(
        "bytes",
        "Where the bytes go",
        takeaway,
        drawing,
        aside,
        Table("Bytes as a table", ["", *present, "bytes"], rows),
    )


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


def _costliest(data: ReportData, drawing: Drawing | None) -> Section:
    plan, title = data.plan, "The costliest matrices"
    chosen = costliest(plan, COSTLIEST)
    if drawing is None:
        return Section("costliest", title, "No matrix is predicted to lose anything.")
    share = sum(choice.cost for choice in chosen) / plan.predicted_loss
    takeaway = f"{len(chosen)} of {len(plan.choices)} matrices cause {share:.1%} of the predicted loss."
    rows = []
    for choice in chosen:
        row = [choice.matrix, choice.format, f"{choice.nbytes:,}", f"{choice.cost:.4g}", choice.runner_up or "none"]
        runner_up = data.runners_up.get(choice.matrix)
        differences_to_it = ["", "", ""]
        if runner_up is not None:
            nbytes, cost = runner_up.nbytes - choice.nbytes, runner_up.cost - choice.cost
            differences_to_it = [f"{nbytes:+,}", f"{cost:+.4g}", f"{runner_up.regret:.4g}"]
        rows.append([*row, *differences_to_it] if data.runners_up else row)
    columns = ["matrix", "format", "bytes", "loss", "runner-up"]
    columns += ["its bytes", "its loss", "regret"] if data.runners_up else []
    aside = "The runner-up is the second-best format at the plan's price of a byte."
    table = Table("The costliest matrices as a table", columns, rows)
    return Section("costliest", title, takeaway, drawing, aside, table)


def _next_mib(plan: Plan, richer: Plan) -> Section:
    title, changes = "What the next MiB buys", differences(plan, richer)
    if not changes:
        return Section("next", title, "One more MiB changes nothing.")
    gain = plan.predicted_loss - richer.predicted_loss
    takeaway = (
        f"One more MiB lowers the predicted loss by {gain:.4g} to {richer.predicted_loss:.4g} nats per token; the "
        f"shadow price predicted {plan.bound.shadow_price:.4g}. {len(changes)} of {len(plan.choices)} matrices change."
    )
    shown = changes[:CHANGES]
    rows = [[c.matrix, c.before, c.after, f"{c.nbytes:+,}", f"{c.cost:+.4g}"] for c in shown]
    count = "all" if len(shown) == len(changes) else f"the {len(shown)} largest"
    return Section(
        "next", title, takeaway, table=Table(f"Changes: {count}", ["matrix", "before", "after", "bytes", "loss"], rows)
    )
