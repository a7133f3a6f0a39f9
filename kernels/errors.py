"""The base class of every error that reallm raises on purpose."""

from __future__ import annotations


class ReallmError(Exception):
    """Something went wrong that the caller can act on: the message says what was found, what was expected, the way out.

    Its children: UserError (a command, option or file), FormatError, LayoutError, RecordError, PlanError, CodegenError.
    """
