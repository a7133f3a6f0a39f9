"""The base class of all errors that reallm raises on purpose."""

from __future__ import annotations


class ReallmError(Exception):
    """An error that the caller can act on. The message says what was found, what was expected and how to proceed.

    Subclasses: UserError (a command, option or file), FormatError, LayoutError, RecordError, PlanError, CodegenError.
    """
