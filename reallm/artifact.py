"""Artifacts as others use them: is it one, is it whole, what is in it. Format: docs/format.md; writing: `compiler`."""

from .adapter_places import AdapterView
from .folder import is_artifact
from .inspection import FormatView, Inspection, MatrixView, inspect
from .verification import Report, verify

__all__ = ["AdapterView", "FormatView", "Inspection", "MatrixView", "Report", "inspect", "is_artifact", "verify"]
