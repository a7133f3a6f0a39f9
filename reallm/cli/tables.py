"""Tables that the command line prints: the common parts, and those of artifacts and evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from reallm.planner.tables.units import bytes_text

if TYPE_CHECKING:  # these modules import torch
    from reallm.artifacts.bundled_adapters import AdapterView
    from reallm.artifacts.inspect import Inspection
    from reallm.evaluation.evaluate import Evaluation
    from reallm.models.sizes import Sizes


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """A table of two columns: names and values, which are printed as they are (brackets are not markup)."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(escape(name), escape(value))
    return table


def columns_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with a title; the first column is left-aligned, the others right-aligned."""
    table = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def print_first_that_fits(console: Console, *tables: Table) -> None:
    """Print the first of `tables` that is not wider than `console`; the last one if none fits."""
    unlimited = console.options.update(max_width=10_000)
    for table in tables:
        if table is tables[-1] or Measurement.get(console, unlimited, table).maximum <= console.width:
            console.print(table)
            return


def print_formats(inspection: Inspection, console: Console, matrices: bool) -> None:
    """Print the formats of an artifact without a plan, and with `matrices` every matrix."""
    note = "transformers saved this artifact, without its plan: budget, proof and predicted losses are not known"
    console.print(f"note: {note}", highlight=False)
    rows = [[name, f"{f.bits_per_weight:.3f}", str(f.matrices)] for name, f in inspection.formats.items()]
    console.print(columns_table("formats", ("format", "bits/weight", "matrices"), rows))
    if matrices:
        lines = [[m.name, m.format, str(m.nbytes), f"{m.bits_per_weight:.3f}"] for m in inspection.matrices]
        console.print(columns_table("matrices", ("matrix", "format", "bytes", "bits"), lines))


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print what the bytes of an artifact's weights files are used for, and the distribution of bits per weight."""
    total = sum(inspection.bits_histogram.values()) or 1
    widths = ", ".join(f"up to {bits}: {count / total:.1%}" for bits, count in inspection.bits_histogram.items())
    facts = [
        ("architecture", inspection.architecture),
        ("matrices", f"{_matrices_bytes(inspection)} bytes, {inspection.shared_bytes} of them shared codebooks"),
        ("everything else", f"{inspection.other_bytes} bytes in {inspection.other_tensors} tensors"),
        ("headers", f"{inspection.header_bytes} bytes"),
        ("weights files", f"{inspection.file_bytes} bytes ({bytes_text(inspection.file_bytes)})"),
        ("bits per weight", widths),
    ]
    facts += [("adapter", _adapter_text(view)) for view in inspection.adapters]
    console.print(facts_table(inspection.path, facts))


def _matrices_bytes(inspection: Inspection) -> int:
    """Bytes of the matrices with their shared codebooks."""
    return sum(matrix.nbytes for matrix in inspection.matrices) + inspection.shared_bytes


def _adapter_text(view: AdapterView) -> str:
    if view.fault is not None:
        return f"{view.name} cannot be used: {view.fault}"
    return f"{view.name}: {view.kind} of rank {view.rank}, {view.modules} matrices, {bytes_text(view.nbytes)}"


def print_evaluation(result: Evaluation, console: Console) -> None:
    """Print perplexities, the KL divergence with its tail, the sizes, and the time and memory that evaluation took."""
    comparison = result.comparison
    scored = f"{comparison.tokens} scored, " if comparison.tokens else ""
    context = f"{comparison.windows} windows of {comparison.seqlen} tokens, {scored}{result.dtype}"
    facts = [("text", result.text), ("protocol", context)]
    if comparison.perplexity is not None:
        facts.append(("perplexity", f"{comparison.perplexity:.4f}"))
    if comparison.base_perplexity is not None and comparison.divergence is not None:
        kl = comparison.divergence
        tail = f"median {kl.median:.4f}, 90% {kl.p90:.4f}, 95% {kl.p95:.4f}, 99% {kl.p99:.4f}, 99.9% {kl.p999:.4f}"
        facts.append(("original's perplexity", f"{comparison.base_perplexity:.4f}"))
        facts.append(("KL to the original", f"{kl.mean:.5f} nats per token; {tail}, maximum {kl.max:.4f}"))
        facts.append(("same first token", f"{kl.same_top1:.2%}"))
    if comparison.cosine is not None:
        facts.append(("cosine to the original", f"{comparison.cosine:.6f} (mean over windows)"))
    facts += _size_facts("", result.sizes)
    if result.base_sizes is not None:
        facts += _size_facts("original's ", result.base_sizes)
    facts.append(("evaluation took", f"{result.seconds:.1f} s, peak memory {bytes_text(result.peak_rss_bytes)}"))
    console.print(facts_table(f"evaluation of {result.model}", facts))
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _size_facts(whose: str, sizes: Sizes) -> list[tuple[str, str]]:
    matrices = f"{sizes.matrices_bpw:.4f} bits per weight, {sizes.matrices_bytes} bytes"
    return [
        (f"{whose}matrices", matrices),
        (f"{whose}all weights", f"{sizes.weights_bpw:.4f} bits per weight, {sizes.weights} weights"),
        (f"{whose}weights file", f"{sizes.file_bytes} bytes ({bytes_text(sizes.file_bytes)})"),
    ]
