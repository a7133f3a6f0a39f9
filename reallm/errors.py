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


def raised_by_library(error: BaseException) -> bool:
    """Whether a library's code raised `error`: any Exception, or a Rust library's PanicException, which is none.

    KeyboardInterrupt and SystemExit are the user's and are passed on.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
