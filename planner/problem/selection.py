"""What takes part in a plan: the problem it becomes, and what the budget counts."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import fsum

from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import (
    MAX_SHARD_BYTES,
    TensorSpec,
    file_bytes,
    file_overhead,
    max_files,
    natural_key,
)
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable
from reallm.planner.tables.plan import Scope
from reallm.planner.tables.requirements import Reserved, reserved
from reallm.planner.tables.units import PlanError

from .candidates import (
    Options,
    PlanOptions,
    choosable,
    common_formats,
    dense_format,
    groups,
    measured_options,
    parsed_format,
)
from .limits import LimitCost, meters
from .problem import Candidate, Item, Problem, needed
from .tensor_layout import dense_nbytes, matrix_tensors, shared_tensor, stack_of, weights_tensors, whole_stacks


@dataclass(frozen=True, slots=True)
class Selection:
    """The matrices that take part, as items by name, with their options; `fixed` is the rest, always dense."""

    table: MeasuredTable
    scope: Scope
    plan_options: PlanOptions
    options: Options
    members: Mapping[str, tuple[MatrixRecord, ...]]
    fixed: tuple[MatrixRecord, ...]
    shared: Mapping[str, int]
    meters: tuple[LimitCost, ...]
    reserved: Reserved

    @property
    def numel(self) -> int:
        """Weights of the matrices that take part."""
        return sum(matrix.numel for group in self.members.values() for matrix in group)

    @property
    def optional(self) -> frozenset[str]:
        """Items that a uniform plan may leave dense: embedding and head."""
        return frozenset(n for n, group in self.members.items() if all(m.kind in ("embedding", "head") for m in group))

    def canonical(self, fmt: str) -> str:
        """The canonical name of a format. Raises PlanError."""
        return parsed_format(fmt, "format").name

    def problem(self, budget_bytes: int | None) -> Problem:
        """The problem for a budget; without one, everything fits."""
        items = tuple(Item(name, self._candidates(group)) for name, group in self.members.items())
        shared = {key: self._weight(shared_tensor(key, size)) for key, size in self.shared.items()}
        if budget_bytes is None:
            capacity = sum(max(c.nbytes for c in item.candidates) for item in items) + sum(shared.values())
        else:
            capacity = self.capacity(budget_bytes)
        limits = tuple(meter.limit(self._fixed(), shared) for meter in self.meters)
        return Problem(items, shared, capacity, limits, self.plan_options.requirements.max_formats)

    def _fixed(self) -> list[tuple[MatrixRecord, Format, int]]:
        """Matrices that take no part, with their format and what they weigh."""
        formats = [(m, dense_format(m, self.table.dtype)) for m in self.fixed]
        return [(m, fmt, sum(map(self._weight, matrix_tensors(m, fmt)))) for m, fmt in formats]

    def _candidates(self, group: tuple[MatrixRecord, ...]) -> tuple[Candidate, ...]:
        return tuple(self._candidate(group, name) for name in common_formats(group, self.options))

    def _candidate(self, group: tuple[MatrixRecord, ...], name: str) -> Candidate:
        options = [self.options[m.name][name] for m in group]
        weights = [sum(map(self._weight, matrix_tensors(m, o.format))) for m, o in zip(group, options, strict=True)]
        shared = sorted({o.shared for o in options if o.shared is not None})
        each = list(zip(group, options, weights, strict=True))
        uses = tuple(sum(meter.use(m, o.format, weight) for m, o, weight in each) for meter in self.meters)
        return Candidate(sum(weights), fsum(o.cost for o in options), name, tuple(shared), uses)

    def _weight(self, spec: TensorSpec) -> int:
        return spec.nbytes + spec.header_bytes if self.scope == "file" else spec.nbytes

    def _constant_bytes(self) -> int:
        """What a budget of the whole file pays for besides the items, file overheads left out."""
        formats = {m.name: dense_format(m, self.table.dtype) for m in self.fixed}
        taking = {stack_of(m) for group in self.members.values() for m in group} - {None}
        slices = [m for m in self.fixed if stack_of(m) in taking]
        whole = [m for m in self.fixed if stack_of(m) not in taking]
        specs = weights_tensors(whole, formats, {}, self.table.other_tensors, self.table.dtype)
        specs += [spec for m in slices for spec in matrix_tensors(m, formats[m.name])]
        return sum(spec.nbytes + spec.header_bytes for spec in specs)

    def capacity(self, budget_bytes: int) -> int:
        """Bytes left for the items.

        The overheads of the most files a budget can fill are set aside: one file up to MAX_SHARD_BYTES. Where their
        number rises, a budget is given at least what the boundary below it leaves, so more never buys less.
        """
        if self.scope == "matrices":
            return budget_bytes
        budget_bytes -= self.reserved.nbytes
        if budget_bytes <= 0:
            return 0
        below = (budget_bytes - 1) // MAX_SHARD_BYTES * MAX_SHARD_BYTES
        left = max(b - file_overhead() * max_files(b) for b in (budget_bytes, below))
        return max(left - self._constant_bytes(), 0)

    def smallest_budget(self, item_bytes: int) -> int:
        """The fewest budget bytes that leave `item_bytes` for the items."""
        if self.scope == "matrices":
            return item_bytes
        base, files = item_bytes + self._constant_bytes(), 1
        while max_files(base + file_overhead() * files) > files:
            files += 1
        return base + file_overhead() * files + self.reserved.nbytes

    def formats(self, chosen: Mapping[str, Candidate]) -> dict[str, Format]:
        """The format of every matrix of the model under a choice by item name."""
        result = {m.name: dense_format(m, self.table.dtype) for m in self.fixed}
        for name, group in self.members.items():
            result |= {m.name: self.options[m.name][chosen[name].format].format for m in group}
        return result

    def stored_bytes(self, matrix: MatrixRecord, formats: Mapping[str, Format], whole: Container[str | None]) -> int:
        """Bytes of one matrix in the file, headers left out; `whole` names the stacks that stay as they are."""
        fmt = formats[matrix.name]
        plain = dense_nbytes(fmt, matrix.rows, matrix.cols)
        if plain is not None and (matrix.kind != "expert" or stack_of(matrix) in whole):
            return plain
        return fmt.nbytes(matrix.rows, matrix.cols)

    def counted(self, chosen: Mapping[str, Candidate]) -> int:
        """Exact bytes of what the budget counts under a choice by item name."""
        matrices_bytes, whole_file = self.sizes(chosen)
        return whole_file if self.scope == "file" else matrices_bytes

    def sizes(self, chosen: Mapping[str, Candidate]) -> tuple[int, int]:
        """Exact bytes of the matrices that take part with their codebooks, and of all weights files."""
        formats, shared = self.formats(chosen), self.used(chosen)
        whole = whole_stacks(self.table.matrices, formats)
        taking = [m for group in self.members.values() for m in group]
        matrices_bytes = sum(self.stored_bytes(m, formats, whole) for m in taking) + sum(shared.values())
        tensors = weights_tensors(self.table.matrices, formats, shared, self.table.other_tensors, self.table.dtype)
        return matrices_bytes, file_bytes(tensors)

    def used(self, chosen: Mapping[str, Candidate]) -> dict[str, int]:
        """Key -> bytes of the shared codebooks that a choice needs."""
        return {key: self.shared[key] for key in sorted(needed(chosen.values()))}


def select(table: MeasuredTable, scope: Scope, plan_options: PlanOptions) -> Selection:
    """Who takes part, under which name, with which options. Raises PlanError."""
    options = choosable(
        table, scope, plan_options, measured_options(table, plan_options.cost, plan_options.corrections)
    )
    set_aside = reserved(table, plan_options.requirements)
    if set_aside.nbytes and scope == "matrices":
        raise PlanError(
            "--context, --adapter-rank and --workspace share the budget's memory with the whole weights file: give the "
            "budget in MiB or GiB, not in bits per weight"
        )
    taking = sorted((m for m in table.matrices if m.name in options), key=lambda m: natural_key(m.name))
    members = {group[0].name: tuple(group) for group in groups(taking, plan_options.ties)}
    fixed = tuple(m for m in table.matrices if m.name not in options)
    shared = {r.key: r.nbytes for r in table.shared}
    found = meters(table, plan_options.requirements)
    return Selection(table, scope, plan_options, options, members, fixed, shared, found, set_aside)
