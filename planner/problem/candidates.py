"""From the measured table and the user's wishes to the matrices that take part and the formats each may have.

A budget in bits per weight concerns linear and expert matrices; embedding and head take part when a pin names them. A
budget in bytes concerns every matrix. Excluded matrices take no part and stay dense. The model's own dtype is a
candidate of every matrix at cost 0, unless `formats` leaves it out and another candidate remains. What was not measured
is no candidate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from reallm.kernels.formats.codecs import FLOAT_NBYTES, FormatError
from reallm.kernels.formats.formats import Format
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable
from reallm.planner.tables.plan import Cost, Plan, Scope, Ties
from reallm.planner.tables.requirements import Requirements
from reallm.planner.tables.units import PlanError

from .tensor_layout import DENSE_NAME, shared_key, stack_of


@dataclass(frozen=True, slots=True)
class Option:
    """A matrix in one format: its cost, the key of a shared codebook or None, the digest of its packed fields."""

    format: Format
    cost: float
    shared: str | None
    codes_sha256: str


Options = dict[str, dict[str, Option]]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user asks beyond the budget.

    `pins` are "regex=format", `exclude` regexes, both searched for in matrix names; `formats` are format names or
    patterns with * and ?; `ties` makes matrices with the same input, all experts of a layer in the same role, or a
    family take one format; `requirements` are what else the plan must keep.
    """

    pins: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] | None = None
    ties: Ties = "none"
    cost: Cost = "two_sided"
    requirements: Requirements = field(default_factory=Requirements)
    corrections: Mapping[str, float] = field(default_factory=dict)
    """Family -> factor for the measured costs of its matrices; 1 where it is not named."""

    @classmethod
    def of(cls, plan: Plan) -> PlanOptions:
        """What `plan` was asked for."""
        return cls(plan.pins, plan.exclude, plan.formats, plan.ties, plan.cost, plan.requirements, plan.corrections)


def dense_format(matrix: MatrixRecord, dtype: str) -> Format:
    """The format of a matrix as the model has it. Raises PlanError when source_bytes fits no float type."""
    for name in (dtype, "f32"):
        if matrix.source_bytes == matrix.numel * FLOAT_NBYTES[name]:
            return Format.parse(DENSE_NAME[name])
    raise PlanError(
        f"table.json: {matrix.name} has {matrix.source_bytes} source bytes for {matrix.numel} {dtype} weights"
    )


def measured_options(table: MeasuredTable, cost: Cost, corrections: Mapping[str, float] | None = None) -> Options:
    """Every matrix's options by format name, costs times `corrections` of the matrix's family.

    Raises PlanError for a table that contradicts itself.
    """
    matrices = {matrix.name: matrix for matrix in table.matrices}
    sizes = {record.key: record.nbytes for record in table.shared}
    options: Options = {name: {} for name in matrices}
    for record in table.measurements:
        where = f"table.json: {record.matrix} in {record.format}"
        if record.matrix not in matrices:
            raise PlanError(f"{where}: no such matrix in the table; run `reallm measure` again")
        matrix, fmt = matrices[record.matrix], parsed_format(record.format, where)
        if fmt.name in options[matrix.name]:
            raise PlanError(f"{where} was measured twice; run `reallm measure` again")
        expected = fmt.nbytes(matrix.rows, matrix.cols)
        if record.nbytes != expected:
            raise PlanError(f"{where} has {record.nbytes} bytes, this version stores {expected}; measure again")
        key = shared_key(fmt, matrix.family)
        if key and fmt.shared_field and sizes.get(key) != fmt.shared_field.nbytes:
            raise PlanError(f"{where}: shared codebook {key!r} is missing or of another size; measure again")
        value: float = getattr(record, cost) * (corrections or {}).get(matrix.family, 1.0)
        options[matrix.name][fmt.name] = Option(fmt, value, key, record.codes_sha256)
    for matrix in table.matrices:
        dense = dense_format(matrix, table.dtype)
        options[matrix.name][dense.name] = Option(dense, 0.0, None, "")
    return options


def choosable(table: MeasuredTable, scope: Scope, plan_options: PlanOptions, options: Options) -> Options:
    """The options of every matrix that takes part, after pins, exclusions and the list of formats."""
    pinned = _pinned(table, plan_options.pins, options)
    excluded = _excluded(table, plan_options.exclude)
    if both := sorted(set(pinned) & excluded):
        raise PlanError(f"{both[0]} is both pinned and excluded; drop one of the two")
    patterns = _patterns(plan_options.formats, options)
    result: Options = {}
    for matrix in table.matrices:
        name, own = matrix.name, options[matrix.name]
        if name in pinned:
            result[name] = {pinned[name]: own[pinned[name]]}
        elif name not in excluded and (scope == "file" or matrix.kind in ("linear", "expert")):
            wanted = {f: o for f, o in own.items() if any(fnmatchcase(f, pattern) for pattern in patterns)}
            dense = dense_format(matrix, table.dtype).name
            result[name] = wanted or {dense: own[dense]}
    if not result:
        raise PlanError("no matrix takes part: the model has none, or --exclude names them all")
    return result


def groups(matrices: Sequence[MatrixRecord], ties: Ties) -> list[list[MatrixRecord]]:
    """Matrices that must take one format, together; untied ones alone."""
    tied: dict[tuple[str, str], list[MatrixRecord]] = defaultdict(list)
    for matrix in matrices:
        experts = stack_of(matrix) or ""
        label = {"none": "", "inputs": matrix.input, "experts": experts, "family": matrix.family}[ties]
        tied[("tie", label) if label else ("matrix", matrix.name)].append(matrix)
    return list(tied.values())


def common_formats(group: Sequence[MatrixRecord], options: Options) -> list[str]:
    """Formats that all of a group may have. Raises PlanError when there is none."""
    common = sorted(set.intersection(*(set(options[m.name]) for m in group)))
    if not common:
        each = "; ".join(f"{m.name}: {', '.join(sorted(options[m.name]))}" for m in group[:3])
        raise PlanError(f"tied matrices have no format in common ({each}); change the pins or the ties")
    return common


def parsed_format(name: str, where: str) -> Format:
    """Read a format's name; PlanError begins with `where`."""
    try:
        return Format.parse(name)
    except FormatError as error:
        raise PlanError(f"{where}: {error}") from None


def _matches(table: MeasuredTable, option: str, pattern: str) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise PlanError(f"{option} {pattern!r} is no regular expression: {error}") from None
    found = [matrix.name for matrix in table.matrices if regex.search(matrix.name)]
    if not found:
        example = table.matrices[0].name if table.matrices else "none"
        raise PlanError(f"{option} {pattern!r} matches none of the {len(table.matrices)} matrices, such as {example}")
    return found


def _pinned(table: MeasuredTable, pins: Sequence[str], options: Options) -> Mapping[str, str]:
    pinned: dict[str, tuple[str, str]] = {}
    for pin in pins:
        pattern, equals, name = pin.rpartition("=")
        if not equals or not pattern or not name:
            raise PlanError(f"--pin {pin!r}: expected 'regex=format', such as 'lm_head=int8-g64'")
        fmt = parsed_format(name, f"--pin {pin!r}").name
        for matrix in _matches(table, "--pin", pattern):
            if fmt not in options[matrix]:
                known = ", ".join(sorted(options[matrix]))
                raise PlanError(f"--pin {pin!r}: {matrix} was not measured in {fmt}; there are {known}")
            if pinned.setdefault(matrix, (fmt, pin))[0] != fmt:
                raise PlanError(f"--pin {pinned[matrix][1]!r} and --pin {pin!r} contradict each other over {matrix}")
    return {matrix: fmt for matrix, (fmt, _) in pinned.items()}


def _excluded(table: MeasuredTable, patterns: Sequence[str]) -> set[str]:
    return {name for pattern in patterns for name in _matches(table, "--exclude", pattern)}


def _patterns(formats: Sequence[str] | None, options: Options) -> tuple[str, ...]:
    """Canonical names and patterns of the formats that are wanted; each must stand for a measured one."""
    if formats is None:
        return ("*",)
    known = sorted({name for own in options.values() for name in own})
    patterns = []
    for text in formats:
        pattern = text.strip().lower() if "*" in text or "?" in text else parsed_format(text, f"--format {text!r}").name
        if not any(fnmatchcase(name, pattern) for name in known):
            raise PlanError(f"--format {text!r} was not measured; there are {', '.join(known)}")
        patterns.append(pattern)
    return tuple(patterns)
