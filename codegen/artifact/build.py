"""The generated kernels of an artifact: their sources, optional compiled objects, and a manifest of all files.

    OUT/kernels/<kernel>.py              generated source
    OUT/kernels/<kernel>.<target>.cubin  compiled object, for one row of x and each requested target; AMD: .hsaco
    OUT/kernels/<kernel>.sm_80.ptx       portable form for NVIDIA GPUs newer than all targets; written with target sm_80
    OUT/kernels/manifest.json            sha256 of every file, toolchain, and the kernels that each matrix runs

The objects are not read at run time: they are for inspection, and can be compiled without the GPU. The objects of a
trellis product decode only blocks of the widths that the manifest lists, which are close to the format's bits per
weight; `finish` objects add up SPLITS partial sums. The same plan and toolchain give the same bytes. Objects are
compiled by `compile_worker`, in separate processes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reallm.codegen.ir.lower import lower_plan
from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import KernelSpec, Program
from reallm.codegen.passes.run import run_passes
from reallm.codegen.triton.emit import constants, emit, pointers, scalars
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.kernels.storage.dtypes import FloatName
from reallm.planner.tables.plan import Plan


@dataclass(frozen=True)
class Target:
    """A GPU that Triton compiles for."""

    backend: str
    """Triton's name of the compiler: "cuda" or "hip"."""
    architecture: int | str
    warp_size: int

    @property
    def object_kind(self) -> str:
        """The kind of compiled object; also the suffix of its file."""
        return "cubin" if self.backend == "cuda" else "hsaco"


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32),
    "sm_86": Target("cuda", 86, 32),
    "sm_89": Target("cuda", 89, 32),
    "sm_90": Target("cuda", 90, 32),
    "sm_100": Target("cuda", 100, 32),
    "sm_120": Target("cuda", 120, 32),
    "gfx90a": Target("hip", "gfx90a", 64),
    "gfx942": Target("hip", "gfx942", 64),
    "gfx950": Target("hip", "gfx950", 64),
}
"""The GPUs that kernels can be compiled for."""
PTX_TARGET = "sm_80"
"""The target whose PTX is written too. For sm_90, Triton would write PTX for sm_90a, which no later GPU accepts."""
MANIFEST_FILE = "manifest.json"
SPLITS = 8
"""Number of partial sums that compiled `finish` objects add up (see `triton.emit.constants`)."""
MAX_WORKERS = 4
COMPILE_SECONDS = 1800
WAY_OUT = "leave out the targets (--objects) to write the sources only"
_POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "i8": "*i8", "i32": "*i32"}


def emit_kernels(
    plan: Plan,
    folder: Path,
    targets: Sequence[str] = (),
    *,
    activation: FloatName = "bf16",
    biased: Collection[str] = (),
) -> dict[str, Any]:
    """Write the kernels of `plan` to `folder`/kernels and return their manifest.

    Sources are always written; `targets` names the GPUs (keys of TARGETS) for which objects are compiled too.
    `activation` is the dtype of x and y in these objects; `biased` names the matrices whose module has a bias. Raises
    CodegenError before anything is written if a target is unknown or if Triton is needed but missing, and later if a
    kernel does not compile.
    """
    check_targets(targets)
    program = run_passes(lower_plan(plan, biased))
    kernels_folder = Path(folder) / "kernels"
    kernels_folder.mkdir(parents=True, exist_ok=True)
    for spec in program.kernels:
        write_text_atomic(kernels_folder / f"{spec.name}.py", emit(spec))
    objects = compile_kernels(program.kernels, kernels_folder, targets, activation) if targets else {}
    manifest = _manifest(program, kernels_folder, activation, objects)
    write_text_atomic(kernels_folder / MANIFEST_FILE, canonical_json(manifest))
    return manifest


def check_targets(targets: Sequence[str]) -> None:
    """Raise CodegenError if a target is not in TARGETS, or if there are targets but Triton is not installed."""
    for target in targets:
        if target not in TARGETS:
            raise CodegenError(f"target {target!r}: expected one of {', '.join(TARGETS)}")
    if targets and importlib.util.find_spec("triton") is None:
        raise CodegenError(
            f"objects for {', '.join(targets)} need Triton, which is not installed: pip install 'reallm[triton]', or "
            f"{WAY_OUT}"
        )


@dataclass(frozen=True)
class CompiledObject:
    """One kernel compiled for one target."""

    kernel: str
    target: str
    files: tuple[str, ...]
    """Names of the files that were written."""
    facts: Mapping[str, Any]
    """What is needed to launch the object: its entry point and its bytes of shared memory."""


Objects = Mapping[tuple[str, str], CompiledObject]
"""(kernel, target) -> the compiled object."""


def _manifest(program: Program, folder: Path, activation: str, objects: Objects) -> dict[str, Any]:
    kernels = {spec.name: _kernel_entry(spec, objects) for spec in program.kernels}
    names = {f"{spec.name}.py" for spec in program.kernels}
    names |= {name for compiled in objects.values() for name in compiled.files}
    return {
        "version": 1,
        "activation": activation,
        "objects": "compiled" if objects else "none",
        "toolchain": _toolchain(bool(objects)),
        "kernels": kernels,
        "matrices": {matrix.name: [spec.name for spec in matrix.kernels] for matrix in program.matrices},
        "groups": [{"matrices": list(group.matrices), "kernel": group.kernel.name} for group in program.groups],
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)},
    }


def _kernel_entry(spec: KernelSpec, objects: Objects) -> dict[str, Any]:
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
        "targets": {target: compiled.facts for (kernel, target), compiled in objects.items() if kernel == spec.name},
    }


def _toolchain(compiled: bool) -> dict[str, str]:
    versions = {"reallm": importlib.metadata.version("reallm")}
    if compiled:
        versions["triton"] = importlib.metadata.version("triton")
    return versions


def compile_kernels(
    kernels: Sequence[KernelSpec], folder: Path, targets: Sequence[str], activation: FloatName
) -> dict[tuple[str, str], CompiledObject]:
    """Compile every kernel for every target; sources are read from `folder`, and objects are written beside them.

    The work is divided among up to MAX_WORKERS processes. Raises CodegenError when a kernel does not compile.
    """
    wanted = [(spec, target) for spec in kernels for target in targets]
    jobs = [_job(spec, folder, target, activation) for spec, target in wanted]
    workers = max(1, min(MAX_WORKERS, os.cpu_count() or 1, len(jobs)))
    with ThreadPoolExecutor(workers) as pool:
        shares = list(pool.map(_run_worker, (jobs[index::workers] for index in range(workers))))
    objects = {}
    for index, ((spec, target), job) in enumerate(zip(wanted, jobs, strict=True)):
        files = tuple(Path(path).name for path in job["outputs"].values())
        facts = shares[index % workers][index // workers]
        objects[spec.name, target] = CompiledObject(spec.name, target, files, facts)
    return objects


def _job(spec: KernelSpec, folder: Path, target: str, activation: FloatName) -> dict[str, Any]:
    """The argument of `compile_worker.compile_one` for one kernel and target, as a JSON object."""
    tensors, gpu = pointers(spec), TARGETS[target]
    signature = {name: _pointer_type(activation if dtype == "x" else dtype) for name, dtype in tensors}
    values = {"DEVICE": gpu.backend, "SPLITS": SPLITS}
    kinds = [gpu.object_kind, *(["ptx"] if target == PTX_TARGET else [])]
    return {
        "source": str(folder / f"{spec.name}.py"),
        "function": spec.function,
        "pointers": len(tensors),
        "signature": signature | dict.fromkeys(scalars(spec), "i32") | dict.fromkeys(constants(spec), "constexpr"),
        "constants": {name: values[name] for name in constants(spec)},
        "target": [gpu.backend, gpu.architecture, gpu.warp_size],
        "num_warps": spec.tile.num_warps,
        "outputs": {kind: str(folder / f"{spec.name}.{target}.{kind}") for kind in kinds},
    }


def _pointer_type(dtype: str) -> str:
    return "*i32" if dtype[0] == "u" else _POINTERS[dtype]


def _run_worker(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile `jobs` in one process and return its results.

    If the process fails, raises CodegenError with the last line of its output.
    """
    script = Path(__file__).with_name("compile_worker.py")
    with tempfile.TemporaryDirectory(prefix="reallm-build-") as scratch:
        jobs_file, results_file = Path(scratch, "jobs.json"), Path(scratch, "results.json")
        jobs_file.write_text(json.dumps(jobs), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": scratch, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", str(script), str(jobs_file), str(results_file)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise CodegenError(f"compiling {len(jobs)} kernels took over {COMPILE_SECONDS} s; {WAY_OUT}") from None
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise CodegenError(
                f"compiling kernels with Triton failed (exit code {done.returncode}): {last_line}; {WAY_OUT}"
            )
        results: list[dict[str, Any]] = json.loads(results_file.read_text(encoding="utf-8"))
        return results
