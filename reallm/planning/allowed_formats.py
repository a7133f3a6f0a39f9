"""The formats that a plan may use, when the user names a published method (preset) or a target instead of formats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.measurement.search_space import PRESETS, load_space
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Ties
from reallm.planner.tables.work_folder import folder_of
from reallm.targets.engines import ENGINES


def _on_triton(fmt: Format) -> bool:
    from reallm.codegen.ir.lower import has_kernel  # code generation is only needed for a target

    return has_kernel(fmt)


def _on_cpu(fmt: Format) -> bool:
    from reallm.codegen.cpu.linear import kernel_for  # likewise

    return isinstance(fmt.codec, DenseCodec) or kernel_for(fmt) is not None


RUNTIMES: Mapping[str, Callable[[Format], bool]] = {"triton": _on_triton, "cpu": _on_cpu}
"""Target of our own runtime -> function that says whether it has a kernel for a format."""
_ANY_SIZE = 1 << 16
"""A number of rows and columns that every group size divides."""


def supported_formats(
    formats: Sequence[Format], target: str, shapes: Iterable[tuple[int, int]] = ((_ANY_SIZE, _ANY_SIZE),)
) -> tuple[Format, ...]:
    """Those of `formats` that `target` can run for matrices of all `shapes`. Raises UserError for an unknown target."""
    shapes = set(shapes)
    if target in RUNTIMES:
        return tuple(fmt for fmt in formats if RUNTIMES[target](fmt))
    if target in ENGINES:
        type_of = ENGINES[target].type_of
        return tuple(
            fmt
            for fmt in formats
            if isinstance(fmt.codec, DenseCodec) or all(type_of(fmt, rows, cols) is not None for rows, cols in shapes)
        )
    raise UserError(f"--target {target}: unknown target; expected one of {', '.join([*RUNTIMES, *ENGINES])}")


def with_allowed_formats(options: PlanOptions, table: MeasuredTable, work: str | Path) -> PlanOptions:
    """`options` with its preset and target turned into a list of formats. Raises UserError."""
    formats: Sequence[str] | None = options.formats
    if options.preset is not None:
        formats = [*(formats or ()), *preset_formats(table, options.preset, work)]
    if options.target is not None:
        formats = target_formats(table, options.target, formats)
        options = replace(options, ties=required_ties(options))
    return replace(options, formats=None if formats is None else tuple(formats), preset=None, target=None)


def required_ties(options: PlanOptions) -> Ties:
    """The ties of a plan for the target of `options`. Raises UserError if the user asks for others."""
    engine = ENGINES.get(options.target or "")
    if engine is None or engine.ties in ("none", options.ties):
        return options.ties
    if options.ties != "none":
        raise UserError(
            f"--ties {options.ties}: {options.target} stores matrices of one input in one format; leave --ties out"
        )
    return engine.ties


def preset_formats(table: MeasuredTable, preset: str, work: str | Path) -> list[str]:
    """The measured formats of `preset`. Raises UserError for an unknown preset, and for one that was not measured."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown preset; expected one of {', '.join(PRESETS)}")
    space, measured = load_space(preset).formats, {record.format for record in table.measurements}
    if not measured.intersection(fmt.name for fmt in space["linear"]):
        command = f"reallm measure {quote(table.model)} -o {quote(str(folder_of(work)))} --space {preset}"
        way_out = f"{command} (with the same --text and settings) adds them"
        raise UserError(f"--preset {preset}: none of its formats was measured in {work}; {way_out}")
    return sorted({fmt.name for formats in space.values() for fmt in formats} & measured)


def target_formats(table: MeasuredTable, target: str, formats: Sequence[str] | None) -> list[str]:
    """The measured formats that `target` can run, among those that `formats` allows (None: all).

    `formats` are names or patterns. A format of an engine must fit the shape of every matrix that was measured in it.
    Raises UserError when none is left.
    """
    measured = sorted({record.format for record in table.measurements})
    allowed = [name for name in measured if formats is None or any(fnmatchcase(name, f.lower()) for f in formats)]
    shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)
    matrices = {matrix.name: (matrix.rows, matrix.cols) for matrix in table.matrices}
    for record in table.measurements:
        shapes[record.format].add(matrices[record.matrix])
    supported = [name for name in allowed if supported_formats([Format.parse(name)], target, shapes[name])]
    if not supported:
        way_out = f"measure others (reallm measure --space {target})" if target in ENGINES else "measure others"
        raise UserError(f"--target {target} can run none of {', '.join(allowed) or 'these formats'}: {way_out}")
    return supported
