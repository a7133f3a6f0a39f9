"""Native code: C++ sources, compiled by the system's compiler when first needed and kept in the user's cache folder.

A source is a file of kernels/native, or a generated text that includes headers from there. It is compiled for the tier
of this machine (AVX-512, AVX2 or the portable baseline), not for its exact processor, because several machines may
share a cache folder and each must be able to run the libraries in it. The name of a library contains the hash of
everything it was built from: source, headers, flags and compiler. REALLM_NATIVE=portable|avx2|avx512 selects a lower
tier than the machine's; with REALLM_NATIVE=off nothing is compiled, and callers run in torch instead. REALLM_CACHE
names another cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from reallm.kernels.storage.cache_folder import cache_folder

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "native"
HEADER_FOLDERS = tuple(SOURCES / name for name in ("core", "linear", "step"))
"""Folders in which the compiler looks for headers that generated sources include without a path."""
INCLUDE_FLAGS = tuple(part for folder in HEADER_FOLDERS for part in ("-I", str(folder)))
TIERS: dict[str, tuple[str, ...]] = {
    "portable": ("-DLANES=8",),
    "avx2": ("-march=x86-64-v3", "-DLANES=16"),
    "avx512": ("-march=x86-64-v4", "-DLANES=32"),
}
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi", "-ffp-contract=off")
GENERATED_FLAGS = (*FLAGS, "-pthread")
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
BUILD_SECONDS = 900
"""Time limit of one compilation, which takes a few seconds, or minutes on a busy machine. The limit is generous because
running without the library takes far longer."""


def machine_tier() -> str:
    """The best tier that this machine can run; REALLM_NATIVE can select a lower one, or "off"."""
    import torch  # imported late: it takes seconds, and planning does not need it

    capability = torch.backends.cpu.get_cpu_capability() if platform.machine() in ("x86_64", "AMD64") else ""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "portable")
    selected = os.environ.get("REALLM_NATIVE", best)
    if selected == "off" or selected not in TIERS:
        return "off" if selected == "off" else best
    return min(selected, best, key=list(TIERS).index)


def find_compiler() -> str | None:
    """The first of $CXX, g++ and clang++ that is installed; None if there is no C++ compiler."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library built from kernels/native/search/`name`.cpp; None, with one warning, if it cannot be built here."""
    return _library(
        name, (SOURCES / "search" / f"{name}.cpp").read_text("utf-8"), FLAGS, f"{name} runs in torch, many times slower"
    )


@cache
def generated_library(name: str, text: str) -> ctypes.CDLL | None:
    """The library built from a generated `text`, which may include headers of kernels/native; None if that fails.

    One warning is logged for all generated sources together, not one for each.
    """
    return _library(name, text, GENERATED_FLAGS, "matrices are decoded to dense weights, as large as the original")


def included_headers(text: str) -> dict[str, str]:
    """The headers of kernels/native that `text` includes, directly or indirectly: name -> source, sorted by name."""
    headers: dict[str, str] = {}
    names = _INCLUDE.findall(text)
    while names:
        name = names.pop()
        path = next((folder / name for folder in HEADER_FOLDERS if (folder / name).exists()), None)
        if name not in headers and path is not None:
            headers[name] = path.read_text("utf-8")
            names += _INCLUDE.findall(headers[name])
    return dict(sorted(headers.items()))


def _library(name: str, text: str, flags: tuple[str, ...], consequence: str) -> ctypes.CDLL | None:
    tier = machine_tier()
    if tier == "off":
        return None
    compiler = find_compiler()
    if compiler is None:
        _warn_once(f"no C++ compiler (g++ or clang++): {consequence}")
        return None
    flags = (*flags, *TIERS[tier])
    inputs = [text, *included_headers(text).values(), *flags, _version(compiler)]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:20]
    try:
        return ctypes.CDLL(str(_compiled(text, compiler, flags, f"{name}-{tier}-{key}.so")))
    except (OSError, subprocess.SubprocessError) as error:
        _warn_once(f"native code cannot be built ({_reason(error)}): {consequence}")
        return None


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _warn_once(message: str) -> None:
    """Log `message` as a warning, unless it has been logged before."""
    LOG.warning(message)


def _reason(error: Exception) -> str:
    """A short description of `error` that is the same for every source, so that it is logged only once."""
    if isinstance(error, subprocess.CalledProcessError):
        first_line = next((line for line in error.stderr.splitlines() if line.strip()), "")
        return first_line or f"{error.cmd[0]} ended with exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took over {BUILD_SECONDS} s"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _compiled(text: str, compiler: str, flags: tuple[str, ...], file: str) -> Path:
    """Path of the library `file` compiled from `text`: taken from the cache folder, or compiled now.

    If the cache folder cannot be written, the library is put in a temporary folder.
    """
    folder = cache_folder() / "native"
    if (folder / file).exists():
        return folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="reallm-"))
        scratch = tempfile.TemporaryDirectory(dir=folder)
    with scratch as name:
        source, output = Path(name, "source.cpp"), Path(name, file)
        source.write_text(text, "utf-8")
        command = [compiler, *flags, *INCLUDE_FLAGS, "-o", str(output), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        output.replace(folder / file)  # atomically: another process may be compiling the same file
    return folder / file
