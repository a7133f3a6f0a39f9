"""Which matrices take part in a plan, and which formats each of them may have.

With a budget in bits per weight the linear and expert matrices take part; an embedding or a head does so only when a
pin names it. With a budget in bytes every matrix takes part. Excluded matrices, and those that calibration could not
measure unless a pin names them, take no part and stay dense. The model's
own dtype is a candidate for every matrix, at cost 0, unless `formats` leaves it out and another candidate remains.
Other formats are candidates for the matrices that were measured in them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from reallm.kernels.formats.codecs import DENSE_NAMES
from reallm.kernels.formats.fields import FormatError
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import DTYPES, FloatName
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable
from reallm.planner.tables.plan import Cost, Scope, Ties
from reallm.planner.tables.tensor_layout import shared_key, stack_of
from reallm.planner.tables.units import PlanError

from .plan_options import PlanOptions


@dataclass(frozen=True, slots=True)
class FormatOption:
    """One matrix in one format."""

    format: Format
    cost: float
    """Predicted loss, nats per token."""
    shared: str | None
    """Key of the shared codebook that it needs, or None."""
    codes_sha256: str
    """Digest of the packed fields; empty for the model's own dtype."""


FormatOptions = dict[str, dict[str, FormatOption]]
"""Matrix name -> format name -> option."""


def dense_format(matrix: MatrixRecord, dtype: FloatName) -> Format:
    """The format of a matrix as the model stores it. Raises PlanError when `source_bytes` fits no float type."""
    names: tuple[FloatName, ...] = (dtype, "f32")
    for name in names:
        if matrix.source_bytes == DTYPES[name].nbytes(matrix.numel):
            return Format.parse(DENSE_NAMES[name])
    raise PlanError(
        f"table.json: {matrix.name} has {matrix.source_bytes} source bytes for {matrix.numel} weights in {dtype}; "
        "run `reallm measure` again"
    )


def measured_options(table: MeasuredTable, cost: Cost, corrections: Mapping[str, float] | None = None) -> FormatOptions:
    """The options of every matrix: its measured formats and the model's own dtype.

    `cost` selects the measured error; it is multiplied by the correction of the matrix's family, where there is one.
    Raises PlanError for a table that contradicts itself.
    """
    matrices = {matrix.name: matrix for matrix in table.matrices}
    codebook_sizes = {record.key: record.nbytes for record in table.shared}
    options: FormatOptions = {name: {} for name in matrices}
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
        if key and fmt.shared_field and codebook_sizes.get(key) != fmt.shared_field.nbytes:
            raise PlanError(f"{where}: shared codebook {key!r} is missing or has another size; measure again")
        value: float = getattr(record, cost) * (corrections or {}).get(matrix.family, 1.0)
        options[matrix.name][fmt.name] = FormatOption(fmt, value, key, record.codes_sha256)
    for matrix in table.matrices:
        dense = dense_format(matrix, table.dtype)
        options[matrix.name][dense.name] = FormatOption(dense, 0.0, None, "")
    return options


def allowed_options(
    table: MeasuredTable, scope: Scope, plan_options: PlanOptions, options: FormatOptions
) -> FormatOptions:
    """The options of every matrix that takes part, as pins, exclusions and formats allow. Raises PlanError."""
    pinned = _pinned_formats(table, plan_options.pins, options)
    participants = taking_part(table, scope, plan_options)
    patterns = _format_patterns(plan_options.formats, options)
    allowed: FormatOptions = {}
    for matrix in table.matrices:
        name, all_options = matrix.name, options[matrix.name]
        if name in pinned:
            allowed[name] = {pinned[name]: all_options[pinned[name]]}
        elif name in participants:
            matching = {f: o for f, o in all_options.items() if any(fnmatchcase(f, pattern) for pattern in patterns)}
            dense = dense_format(matrix, table.dtype).name
            allowed[name] = matching or {dense: all_options[dense]}
    if not allowed:
        raise PlanError("no matrix takes part: the model has none, or --exclude matches them all")
    return allowed


def taking_part(table: MeasuredTable, scope: Scope, plan_options: PlanOptions) -> set[str]:
    """Names of the matrices that take part in a plan, in whatever formats. Raises PlanError for bad pins."""
    names = [matrix.name for matrix in table.matrices]
    pinned = {n for pin in plan_options.pins for n in matching_names(names, "--pin", parse_pin(pin)[0])}
    excluded = {name for regex in plan_options.exclude for name in matching_names(names, "--exclude", regex)}
    if both := sorted(pinned & excluded):
        raise PlanError(f"{both[0]} is both pinned and excluded; drop one of the two")
    excluded |= {name for kept in table.kept.values() for name in kept}
    counted = {m.name for m in table.matrices if scope == "file" or m.kind in ("linear", "expert")}
    return pinned | (counted - excluded)


def tied_groups(matrices: Sequence[MatrixRecord], ties: Ties) -> list[list[MatrixRecord]]:
    """The matrices in groups that must share a format; a matrix that is not tied is a group of one."""
    groups: dict[tuple[str, str], list[MatrixRecord]] = defaultdict(list)
    for matrix in matrices:
        stack = stack_of(matrix) or ""
        label = {"none": "", "inputs": matrix.input, "experts": stack, "family": matrix.family}[ties]
        groups[("tie", label) if label else ("matrix", matrix.name)].append(matrix)
    return list(groups.values())


def common_formats(group: Sequence[MatrixRecord], options: FormatOptions) -> list[str]:
    """Formats that all matrices of a group may have. Raises PlanError when there is none."""
    common = sorted(set.intersection(*(set(options[m.name]) for m in group)))
    if not common:
        listed = "; ".join(f"{m.name}: {', '.join(sorted(options[m.name]))}" for m in group[:3])
        raise PlanError(f"tied matrices have no format in common ({listed}); change the pins or the ties")
    return common


def parsed_format(name: str, where: str) -> Format:
    """Parse a format's name. Raises PlanError, whose message begins with `where`."""
    try:
        return Format.parse(name)
    except FormatError as error:
        raise PlanError(f"{where}: {error}") from None


def parse_pin(text: str) -> tuple[str, Format]:
    """The regex and the format of a pin "REGEX=FORMAT". Raises PlanError.

    >>> parse_pin("lm_head=int8-g64")[0]
    'lm_head'
    """
    regex, equals, name = text.rpartition("=")
    if not equals or not regex or not name:
        raise PlanError(f"--pin {text!r}: expected 'regex=format', such as 'lm_head=int8-g64'")
    return regex, parsed_format(name, f"--pin {text!r}")


def matching_names(all_names: Sequence[str], option: str, regex: str) -> list[str]:
    """Those of the matrices' names that a user's regex matches, at least one. Raises PlanError when there is none."""
    try:
        compiled = re.compile(regex)
    except re.error as error:
        raise PlanError(f"{option} {regex!r} is not a regular expression: {error}") from None
    names = [name for name in all_names if compiled.search(name)]
    if not names:
        example = all_names[0] if all_names else "none"
        raise PlanError(f"{option} {regex!r} matches none of the {len(all_names)} matrices, such as {example}")
    return names


def _pinned_formats(table: MeasuredTable, pins: Sequence[str], options: FormatOptions) -> Mapping[str, str]:
    """Matrix name -> the format that it is pinned to."""
    pinned: dict[str, tuple[str, str]] = {}
    for pin in pins:
        regex, pinned_format = parse_pin(pin)
        fmt = pinned_format.name
        for matrix in matching_names([m.name for m in table.matrices], "--pin", regex):
            if fmt not in options[matrix]:
                measured = ", ".join(sorted(options[matrix]))
                raise PlanError(
                    f"--pin {pin!r}: {matrix} was not measured in {fmt}; expected one of {measured}, or measure it so: "
                    f"reallm measure --pin {pin!r}"
                )
            if pinned.setdefault(matrix, (fmt, pin))[0] != fmt:
                raise PlanError(
                    f"--pin {pinned[matrix][1]!r} and --pin {pin!r} contradict each other over {matrix}; drop one"
                )
    return {matrix: fmt for matrix, (fmt, _) in pinned.items()}


def _format_patterns(formats: Sequence[str] | None, options: FormatOptions) -> tuple[str, ...]:
    """The allowed formats as canonical names and patterns, each of which matches a measured format."""
    if formats is None:
        return ("*",)
    measured = sorted({name for matrix_options in options.values() for name in matrix_options})
    patterns = []
    for text in formats:
        pattern = text.strip().lower() if "*" in text or "?" in text else parsed_format(text, f"--format {text!r}").name
        if not any(fnmatchcase(name, pattern) for name in measured):
            raise PlanError(f"--format {text!r} was not measured; expected one of {', '.join(measured)}")
        patterns.append(pattern)
    return tuple(patterns)
