"""The matrices that take part in a plan: the problem they pose, and the bytes that the budget counts."""

from __future__ import annotations

from collections.abc import Mapping
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
from reallm.planner.tables.requirements import Reserved, reserved_memory
from reallm.planner.tables.tensor_layout import (
    matrices_nbytes,
    matrix_tensors,
    other_specs,
    shared_tensor,
    stack_of,
    weights_tensors,
)
from reallm.planner.tables.units import PlanError

from .candidates import FormatOptions, allowed_options, common_formats, dense_format, measured_options, tied_groups
from .limits import LimitCost, limit_costs
from .plan_options import PlanOptions
from .problem import Candidate, Item, Problem, needed_codebooks


@dataclass(frozen=True, slots=True)
class Selection:
    """The matrices that take part, in groups that share a format, and all that is needed to count their bytes."""

    table: MeasuredTable
    scope: Scope
    plan_options: PlanOptions
    format_options: FormatOptions
    """The formats that each matrix may have."""
    members: Mapping[str, tuple[MatrixRecord, ...]]
    """Item name -> its matrices: one, or several that are tied."""
    fixed: tuple[MatrixRecord, ...]
    """Matrices that take no part and stay dense."""
    shared: Mapping[str, int]
    """Key -> bytes of each shared codebook that was measured."""
    limit_costs: tuple[LimitCost, ...]
    reserved: Reserved

    @property
    def numel(self) -> int:
        """Number of weights in the matrices that take part."""
        return sum(matrix.numel for group in self.members.values() for matrix in group)

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """Reason -> matrices that keep their dtype because calibration could not measure them."""
        fixed = {matrix.name for matrix in self.fixed}
        names = {reason: tuple(name for name in names if name in fixed) for reason, names in self.table.kept.items()}
        return {reason: listed for reason, listed in names.items() if listed}

    @property
    def optional(self) -> frozenset[str]:
        """Items that a plan with a single format may leave dense: embedding and head."""
        return frozenset(n for n, group in self.members.items() if all(m.kind in ("embedding", "head") for m in group))

    def problem(self, budget_bytes: int | None) -> Problem:
        """The problem for a budget; None for a budget that everything fits into."""
        items = tuple(Item(name, self._candidates(group)) for name, group in self.members.items())
        shared = {key: self._counted_bytes(shared_tensor(key, size)) for key, size in self.shared.items()}
        if budget_bytes is None:
            capacity = sum(max(c.nbytes for c in item.candidates) for item in items) + sum(shared.values())
        else:
            capacity = self.capacity(budget_bytes)
        limits = tuple(cost.limit(self._fixed_matrices(), shared) for cost in self.limit_costs)
        return Problem(items, shared, capacity, limits, self.plan_options.requirements.max_formats)

    def _fixed_matrices(self) -> list[tuple[MatrixRecord, Format, int]]:
        """Matrices that take no part, with their format and the bytes counted for them."""
        formats = [(m, dense_format(m, self.table.dtype)) for m in self.fixed]
        return [(m, fmt, sum(map(self._counted_bytes, matrix_tensors(m, fmt)))) for m, fmt in formats]

    def _candidates(self, group: tuple[MatrixRecord, ...]) -> tuple[Candidate, ...]:
        return tuple(self._candidate(group, name) for name in common_formats(group, self.format_options))

    def _candidate(self, group: tuple[MatrixRecord, ...], name: str) -> Candidate:
        options = [self.format_options[m.name][name] for m in group]
        sizes = [
            sum(map(self._counted_bytes, matrix_tensors(m, option.format)))
            for m, option in zip(group, options, strict=True)
        ]
        shared = sorted({option.shared for option in options if option.shared is not None})
        rows = list(zip(group, options, sizes, strict=True))
        uses = tuple(sum(cost.use(m, option.format, size) for m, option, size in rows) for cost in self.limit_costs)
        return Candidate(sum(sizes), fsum(option.cost for option in options), name, tuple(shared), uses)

    def _counted_bytes(self, spec: TensorSpec) -> int:
        """Bytes that the budget counts for a tensor: with its header entry if the whole file counts."""
        return spec.nbytes + spec.header_bytes if self.scope == "file" else spec.nbytes

    def _constant_bytes(self) -> int:
        """Bytes of fixed matrices and other tensors with their header entries, without the overhead of each file."""
        formats = {m.name: dense_format(m, self.table.dtype) for m in self.fixed}
        mixed_stacks = {stack_of(m) for group in self.members.values() for m in group} - {None}
        slices = [m for m in self.fixed if stack_of(m) in mixed_stacks]
        others = [m for m in self.fixed if stack_of(m) not in mixed_stacks]
        specs = weights_tensors(others, formats, {}, self._other_specs())
        specs += [spec for m in slices for spec in matrix_tensors(m, formats[m.name])]
        return sum(spec.nbytes + spec.header_bytes for spec in specs)

    def _other_specs(self) -> list[TensorSpec]:
        """The tensors that are not matrices."""
        return other_specs(self.table.other_tensors, self.table.other_dtypes, self.table.dtype)

    def capacity(self, budget_bytes: int) -> int:
        """Bytes of a budget that are left for the items.

        For a budget of the whole file, the overhead of as many files as the budget can fill is set aside (a file holds
        at most MAX_SHARD_BYTES). Where one more file becomes possible, the capacity never falls below what the budget
        just under that boundary leaves, so a larger budget never leaves less.
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
        """The smallest budget, in bytes, that leaves `item_bytes` for the items."""
        if self.scope == "matrices":
            return item_bytes
        base, files = item_bytes + self._constant_bytes(), 1
        while max_files(base + file_overhead() * files) > files:
            files += 1
        return base + file_overhead() * files + self.reserved.nbytes

    def formats(self, chosen: Mapping[str, Candidate]) -> dict[str, Format]:
        """Matrix name -> format for the whole model; `chosen` has a candidate for every item."""
        result = {m.name: dense_format(m, self.table.dtype) for m in self.fixed}
        for name, group in self.members.items():
            result |= {m.name: self.format_options[m.name][chosen[name].format].format for m in group}
        return result

    def counted(self, chosen: Mapping[str, Candidate]) -> int:
        """Exact bytes that the budget counts for a choice."""
        matrices_bytes, all_file_bytes = self.sizes(chosen)
        return all_file_bytes if self.scope == "file" else matrices_bytes

    def sizes(self, chosen: Mapping[str, Candidate]) -> tuple[int, int]:
        """Exact bytes of the matrices that take part, including their codebooks, and of all weights files."""
        formats, shared = self.formats(chosen), self.used_codebooks(chosen)
        stored = matrices_nbytes(self.table.matrices, formats)
        matrices_bytes = sum(stored[m.name] for group in self.members.values() for m in group) + sum(shared.values())
        tensors = weights_tensors(self.table.matrices, formats, shared, self._other_specs())
        return matrices_bytes, file_bytes(tensors)

    def used_codebooks(self, chosen: Mapping[str, Candidate]) -> dict[str, int]:
        """Key -> bytes of the shared codebooks that a choice needs."""
        return {key: self.shared[key] for key in sorted(needed_codebooks(chosen.values()))}


def select(table: MeasuredTable, scope: Scope, plan_options: PlanOptions) -> Selection:
    """Decide which matrices take part, how they are tied, and which formats they may have.

    Raises PlanError for options that contradict each other or the table, and ValueError for a preset or target, which
    `reallm.planning` must have turned into a list of formats.
    """
    if plan_options.preset is not None or plan_options.target is not None:
        raise ValueError("preset and target must be turned into a list of formats before the planner is called")
    measured = measured_options(table, plan_options.cost, plan_options.corrections)
    options = allowed_options(table, scope, plan_options, measured)
    reserved = reserved_memory(table, plan_options.requirements)
    if reserved.nbytes and scope == "matrices":
        raise PlanError(
            "--context, --adapter-rank and --workspace share the budget's memory with the whole weights file: give the "
            "budget in MiB or GiB, not in bits per weight"
        )
    matrices = sorted((m for m in table.matrices if m.name in options), key=lambda m: natural_key(m.name))
    return Selection(
        table=table,
        scope=scope,
        plan_options=plan_options,
        format_options=options,
        members={group[0].name: tuple(group) for group in tied_groups(matrices, plan_options.ties)},
        fixed=tuple(m for m in table.matrices if m.name not in options),
        shared={record.key: record.nbytes for record in table.shared},
        limit_costs=limit_costs(table, plan_options.requirements),
        reserved=reserved,
    )
