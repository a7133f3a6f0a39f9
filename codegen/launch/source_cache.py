"""Writes generated sources to the user's cache folder and imports the Triton functions from there.

The source that runs is always the one that the installed package generates; a cached file that differs is rewritten.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import KernelSpec
from reallm.codegen.triton.emit import emit
from reallm.kernels.storage.atomic import write_text_atomic
from reallm.kernels.storage.cache_folder import cache_folder


@cache
def load_kernel(spec: KernelSpec) -> Any:
    """The Triton function for the kernel `spec`; Triton compiles it at its first launch."""
    text = emit(spec)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = cache_folder() / "kernels" / f"{spec.name}-{digest[:16]}.py"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text_atomic(path, text)
    return getattr(_import(path, f"reallm_generated_{digest[:16]}"), spec.function)


def _import(path: Path, name: str) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise CodegenError(f"{path} cannot be imported; remove it and try again")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
