"""Errors: ReallmError is the base class of all errors that reallm raises on purpose. The command then exits with 2."""

from __future__ import annotations

from reallm.kernels.formats.fields import FormatError

from .codegen.ir.operations import CodegenError
from .kernels.errors import ReallmError
from .kernels.storage.layout import LayoutError
from .planner.tables.records import RecordError
from .planner.tables.units import PlanError

__all__ = ["CodegenError", "FormatError", "LayoutError", "PlanError", "ReallmError", "RecordError", "UserError"]


class UserError(ReallmError):
    """A command, option or file cannot be used. The message says which, what was found and expected, and what to do."""
