"""Compiles generated sources for GPUs that need not be present; `build` runs this module as a script.

It imports nothing from reallm, so it starts fast. `build` runs it without Triton's interpreter mode, without line
information (file times would make the objects differ), and with a temporary cache folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def load(path: str, function: str) -> Any:
    """The Triton function named `function` in the source file at `path`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def compile_one(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel for one target, write its files, and return what is needed to launch it."""
    function = load(job["source"], job["function"])
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(job["pointers"])}
    compiled = triton.compile(
        ASTSource(function, job["signature"], job["constants"], aligned),
        target=GPUTarget(*job["target"]),
        options={"num_warps": job["num_warps"], "enable_fp_fusion": True},
    )
    for kind, path in job["outputs"].items():
        content = compiled.asm[kind]
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return {"entry": compiled.metadata.name, "shared_bytes": compiled.metadata.shared}


def main() -> None:
    """Read the list of jobs from the first file on the command line, and write the results to the second."""
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([compile_one(job) for job in jobs]), encoding="utf-8")


if __name__ == "__main__":
    main()
