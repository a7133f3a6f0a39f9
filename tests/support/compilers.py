"""A mark for tests of native code, which need the system's C++ compiler."""

from __future__ import annotations

import pytest

from reallm.codegen.cpu import compiler as native

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler here")
