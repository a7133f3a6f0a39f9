"""Kernels compiled for GPUs that need not be present, kept from one run of the tests to the next.

Compiling is most of what the tests of machine code take. An object is found again by everything that it was made from:
its source, the target, the modules that compile it, and the version of Triton.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

from machine_code.sass import Code, listing, parse_listing

from reallm.codegen.artifact import build
from reallm.codegen.artifact.build import TARGETS, compile_kernels
from reallm.codegen.ir.program import KernelSpec
from reallm.codegen.triton.emit import constants, emit, pointers, scalars
from reallm.kernels.storage.atomic import write_text_atomic
from reallm.kernels.storage.cache_folder import cache_folder

ACTIVATION = "bf16"


def gpu_objects(specs: Sequence[KernelSpec], targets: Sequence[str] = ("sm_80",)) -> dict[tuple[KernelSpec, str], Path]:
    """The object of each kernel for each target, for activations in bf16."""
    paths = {(spec, target): _path(spec, target) for spec in specs for target in targets}
    missing = [pair for pair, path in paths.items() if not path.exists()]
    if missing:
        _compile(list(dict.fromkeys(spec for spec, _ in missing)), sorted({target for _, target in missing}))
    return paths


def machine_code(path: Path) -> Code:
    """The code of an object for an NVIDIA GPU; its disassembly is kept beside the object."""
    text = path.with_suffix(".sass")
    if not text.exists():
        write_text_atomic(text, listing(path))
    return parse_listing(text.read_text("utf-8"))


def _path(spec: KernelSpec, target: str) -> Path:
    interface = [pointers(spec), scalars(spec), constants(spec), spec.tile.num_warps, spec.function]
    made_from = json.dumps([emit(spec), interface, target, ACTIVATION, *_compiler_version()])
    name = hashlib.sha256(made_from.encode()).hexdigest()[:24]
    return cache_folder() / "test-objects" / f"{name}.{TARGETS[target].object_kind}"


@cache
def _compiler_version() -> tuple[str, ...]:
    source = Path(build.__file__)
    modules = (source, source.with_name("compile_worker.py"))
    return (importlib.metadata.version("triton"), *(path.read_text("utf-8") for path in modules))


def _compile(specs: Sequence[KernelSpec], targets: Sequence[str]) -> None:
    folder = cache_folder() / "test-objects"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for spec in specs:
            Path(scratch, f"{spec.name}.py").write_text(emit(spec), "utf-8")
        objects = compile_kernels(specs, Path(scratch), targets, ACTIVATION)
        for spec, target in product(specs, targets):
            path = Path(scratch, objects[spec.name, target].files[0])
            path.replace(_path(spec, target))  # atomically: another process may compile the same kernel
