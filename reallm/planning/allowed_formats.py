"""The formats that a plan may use, when the user names a published method (preset) or a target instead of formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from reallm.planner.tables.work_folder import folder_of


def _on_triton(fmt: Format) -> bool:
    from reallm.codegen.ir.lower import has_kernel  # code generation is only needed for a target

    return has_kernel(fmt)


def _on_cpu(fmt: Format) -> bool:
    from reallm.codegen.cpu.linear import kernel_for  # likewise

    return isinstance(fmt.codec, DenseCodec) or kernel_for(fmt) is not None


TARGETS: Mapping[str, Callable[[Format], bool]] = {"triton": _on_triton, "cpu": _on_cpu}
"""Target -> function that says whether the target has a kernel for a format."""


def supported_formats(formats: Sequence[Format], target: str) -> tuple[Format, ...]:
    """Those of `formats` that `target` has kernels for. Raises UserError for an unknown target."""
    if target not in TARGETS:
        raise UserError(f"--target {target}: unknown target; expected one of {', '.join(TARGETS)}")
    return tuple(fmt for fmt in formats if TARGETS[target](fmt))


def with_allowed_formats(options: PlanOptions, table: MeasuredTable, work: str | Path) -> PlanOptions:
    """`options` with its preset and target turned into a list of formats. Raises UserError."""
    formats: Sequence[str] | None = options.formats
    if options.preset is not None:
        formats = [*(formats or ()), *preset_formats(table, options.preset, work)]
    if options.target is not None:
        formats = target_formats(table, options.target, formats)
    return replace(options, formats=None if formats is None else tuple(formats), preset=None, target=None)


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
    """The measured formats that `target` has kernels for, among those that `formats` allows (None: all).

    `formats` are names or patterns. Raises UserError when none is left.
    """
    measured = sorted({record.format for record in table.measurements})
    allowed = [name for name in measured if formats is None or any(fnmatchcase(name, f.lower()) for f in formats)]
    supported = [fmt.name for fmt in supported_formats([Format.parse(name) for name in allowed], target)]
    if not supported:
        raise UserError(
            f"--target {target} has no kernel for any of {', '.join(allowed) or 'these formats'}: measure others"
        )
    return supported
