"""Tests of native code need the system's C++ compiler."""

from __future__ import annotations

import pytest

from reallm.codegen.cpu import compiler as native

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
