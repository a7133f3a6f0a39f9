"""Kernels of an artifact: sources, objects compiled for GPUs that need not be present, and a manifest of them all.

    OUT/kernels/<kernel>.py              generated source
    OUT/kernels/<kernel>.<target>.cubin  compiled object, batch 1, for each target; .hsaco for AMD's
    OUT/kernels/<kernel>.sm_80.ptx       portable form of the lowest target, for GPUs newer than all of them
    OUT/kernels/manifest.json            sha256 of every file, toolchain, and which kernels each matrix runs

An object of a trellis decodes blocks of the widths that the manifest names for it, around the format's rate, and one of
`finish` adds up SPLITS parts: they are for inspection. The same plan and toolchain give the same bytes. Objects are
compiled by `worker`, in processes of their own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import KernelSpec, Program, lower_plan
from reallm.codegen.passes.run import run_passes
from reallm.codegen.triton.emit import constants, emit, pointers, scalars
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.tables.plan import Plan

Activation = Literal["f16", "bf16", "f32"]
TARGETS = ("sm_80", "sm_90", "gfx942")
PTX_TARGET = "sm_80"
"""PTX of sm_90 is that of sm_90a, which no later GPU takes."""
MANIFEST_FILE = "manifest.json"
SPLITS = 8
"""Of the products that compiled objects finish."""
MAX_WORKERS = 4
COMPILE_SECONDS = 1800
WITHOUT = "--no-kernels makes the artifact without them"
_POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "i8": "*i8", "i32": "*i32"}


def emit_kernels(
    plan: Plan,
    folder: Path,
    targets: Sequence[str] = TARGETS,
    *,
    activation: Activation = "bf16",
    biased: Collection[str] = (),
) -> dict[str, Any]:
    """Write `folder`/kernels for `plan` and return its manifest.

    `activation` is the dtype of x and y in the compiled objects; `biased` names the matrices whose module has a bias.
    Without Triton the sources are written and "objects" says why there is nothing else. Raises CodegenError on an
    unknown target or when a kernel does not compile.
    """
    for target in targets:
        if not re.fullmatch(r"sm_\d{2,3}|gfx\d{3,4}[a-f]?", target):
            raise CodegenError(f"target {target!r}: expected the name of a GPU such as sm_80, sm_90 or gfx942")
    program = run_passes(lower_plan(plan, biased))
    place = Path(folder) / "kernels"
    place.mkdir(parents=True, exist_ok=True)
    for spec in program.kernels:
        write_text_atomic(place / f"{spec.name}.py", emit(spec))
    has_triton = importlib.util.find_spec("triton") is not None
    facts = compile_kernels(program.kernels, place, targets, activation) if has_triton else {}
    manifest = _manifest(program, place, activation, facts)
    write_text_atomic(place / MANIFEST_FILE, canonical_json(manifest))
    return manifest


def _manifest(program: Program, place: Path, activation: str, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kernels = {spec.name: _kernel_entry(spec, facts) for spec in program.kernels}
    names = {f"{spec.name}.py" for spec in program.kernels} | {
        name for fact in facts.values() for name in fact["files"]
    }
    return {
        "version": 1,
        "activation": activation,
        "objects": "compiled" if facts else "none: Triton is not installed",
        "toolchain": _toolchain(bool(facts)),
        "kernels": kernels,
        "matrices": {matrix.name: [spec.name for spec in matrix.kernels] for matrix in program.matrices},
        "groups": [{"matrices": list(group.matrices), "kernel": group.kernel.name} for group in program.groups],
        "files": {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in sorted(names)},
    }


def _kernel_entry(spec: KernelSpec, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tile = spec.tile
    return {
        "function": spec.function,
        "operations": [str(operation) for operation in spec.operations],
        "tensors": [list(pair) for pair in pointers(spec)],
        "scalars": list(scalars(spec)),
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        "num_warps": tile.num_warps,
        "widths": list(spec.widths),
        "constants": {"SPLITS": SPLITS} if "SPLITS" in constants(spec) else {},
        "targets": {fact["target"]: fact["facts"] for fact in facts.values() if fact["kernel"] == spec.name},
    }


def _toolchain(compiled: bool) -> dict[str, str]:
    versions = {"reallm": importlib.metadata.version("reallm")}
    if compiled:
        versions["triton"] = importlib.metadata.version("triton")
    return versions


def _job(spec: KernelSpec, place: Path, target: str, activation: str) -> dict[str, Any]:
    """What `worker.compile_one` needs to know."""
    tensors = pointers(spec)
    signature = {name: _pointer(activation if dtype == "x" else dtype) for name, dtype in tensors}
    amd = target.startswith("gfx")
    known = {"DEVICE": "hip" if amd else "cuda", "SPLITS": SPLITS}
    outputs = {"hsaco" if amd else "cubin": str(place / f"{spec.name}.{target}.{'hsaco' if amd else 'cubin'}")}
    if target == PTX_TARGET:
        outputs["ptx"] = str(place / f"{spec.name}.{target}.ptx")
    return {
        "source": str(place / f"{spec.name}.py"),
        "function": spec.function,
        "pointers": len(tensors),
        "signature": signature | dict.fromkeys(scalars(spec), "i32") | dict.fromkeys(constants(spec), "constexpr"),
        "constants": {name: known[name] for name in constants(spec)},
        "target": ["hip", target, 64] if amd else ["cuda", int(target[3:]), 32],
        "num_warps": spec.tile.num_warps,
        "outputs": outputs,
    }


def _pointer(dtype: str) -> str:
    return "*i32" if dtype[0] == "u" else _POINTERS[dtype]


def compile_kernels(
    kernels: Sequence[KernelSpec], place: Path, targets: Sequence[str], activation: str
) -> dict[str, dict[str, Any]]:
    """Compile every kernel, whose source is in `place`, for every target: facts and files by "<kernel>.<target>".

    Shared out among processes. Raises CodegenError when a kernel does not compile.
    """
    wanted = [(spec, target) for spec in kernels for target in targets]
    jobs = [_job(spec, place, target, activation) for spec, target in wanted]
    workers = max(1, min(MAX_WORKERS, os.cpu_count() or 1, len(jobs)))
    with ThreadPoolExecutor(workers) as pool:
        shares = list(pool.map(_run_worker, (jobs[index::workers] for index in range(workers))))
    facts = {}
    for index, ((spec, target), job) in enumerate(zip(wanted, jobs, strict=True)):
        files = [Path(path).name for path in job["outputs"].values()]
        entry = {
            "kernel": spec.name,
            "target": target,
            "files": files,
            "facts": shares[index % workers][index // workers],
        }
        facts[f"{spec.name}.{target}"] = entry
    return facts


def _run_worker(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile `jobs` in one process. Raises CodegenError with the last line it said."""
    script = Path(__file__).with_name("compile_worker.py")
    with tempfile.TemporaryDirectory(prefix="reallm-build-") as scratch:
        asked, answered = Path(scratch, "jobs.json"), Path(scratch, "results.json")
        asked.write_text(json.dumps(jobs), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": scratch, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", str(script), str(asked), str(answered)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise CodegenError(f"compiling {len(jobs)} kernels took over {COMPILE_SECONDS} s; {WITHOUT}") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise CodegenError(f"compiling kernels with Triton failed (exit code {done.returncode}): {said}; {WITHOUT}")
        results: list[dict[str, Any]] = json.loads(answered.read_text(encoding="utf-8"))
        return results
