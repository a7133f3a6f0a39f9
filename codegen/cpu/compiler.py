"""Native code: C++ sources of ours, built by the system's compiler when first needed, kept in the user's cache.

A source, a file of kernels/native or a generated text that includes headers from there, is built for the tier of this
machine (AVX-512, AVX2 or the portable baseline), never for the very processor, so that a cache that several machines
share holds no instruction one of them lacks. The name of a built library carries the hash of all that made it: source,
headers, flags, compiler. REALLM_NATIVE=portable|avx2|avx512 takes a lower tier than the machine's, off none: callers
then take their portable path. REALLM_CACHE names another cache folder.
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

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "native"
TIERS: dict[str, tuple[str, ...]] = {
    "portable": ("-DLANES=8",),
    "avx2": ("-march=x86-64-v3", "-DLANES=16"),
    "avx512": ("-march=x86-64-v4", "-DLANES=32"),
}
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi", "-ffp-contract=off")
GENERATED_FLAGS = (*FLAGS, "-pthread")
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
BUILD_SECONDS = 900
"""Seconds of processor time are a few; a busy machine may take minutes, and giving up costs far more."""


def machine_tier() -> str:
    """The best tier this machine can run, or what REALLM_NATIVE asks for if that is lower; "off" for none."""
    import torch  # here, as a plan needs no torch: it takes seconds to import

    capability = torch.backends.cpu.get_cpu_capability() if platform.machine() in ("x86_64", "AMD64") else ""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "portable")
    asked = os.environ.get("REALLM_NATIVE", best)
    if asked == "off" or asked not in TIERS:
        return "off" if asked == "off" else best
    return min(asked, best, key=list(TIERS).index)


def cache_folder() -> Path:
    """Where built libraries are kept: REALLM_CACHE, or the user's cache folder."""
    if named := os.environ.get("REALLM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reallm"


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library built from `name`.cpp, or None, having said why once, if it cannot be built here."""
    return _library(
        name, (SOURCES / f"{name}.cpp").read_text("utf-8"), FLAGS, f"{name} runs in torch, many times slower"
    )


@cache
def generated(name: str, text: str) -> ctypes.CDLL | None:
    """The library built from a generated `text`, which may include headers of kernels/native; None as for `library`.

    Why not is said once for all of them.
    """
    return _library(name, text, GENERATED_FLAGS, "matrices run on decoded weights, as large as the original's")


def _headers(text: str) -> dict[str, str]:
    """The headers of kernels/native that `text` includes, directly or not: name -> source, in order of names."""
    found: dict[str, str] = {}
    wanted = _INCLUDE.findall(text)
    while wanted:
        name = wanted.pop()
        if name not in found and (SOURCES / name).exists():
            found[name] = (SOURCES / name).read_text("utf-8")
            wanted += _INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


def _library(name: str, text: str, flags: tuple[str, ...], otherwise: str) -> ctypes.CDLL | None:
    tier = machine_tier()
    if tier == "off":
        return None
    compiler = _compiler()
    if compiler is None:
        _warn(f"no C++ compiler (g++ or clang++): {otherwise}")
        return None
    flags = (*flags, *TIERS[tier])
    key = hashlib.sha256("\n".join([text, *_headers(text).values(), *flags, _version(compiler)]).encode()).hexdigest()[
        :20
    ]
    try:
        return ctypes.CDLL(str(_built(text, compiler, flags, f"{name}-{tier}-{key}.so")))
    except (OSError, subprocess.SubprocessError) as error:
        _warn(f"native code cannot be built ({_reason(error)}): {otherwise}")
        return None


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _warn(message: str) -> None:
    """Log `message` the first time."""
    LOG.warning(message)


def _reason(error: Exception) -> str:
    """What went wrong, without what differs from source to source."""
    if isinstance(error, subprocess.CalledProcessError):
        said = next((line for line in error.stderr.splitlines() if line.strip()), "")
        return said or f"{error.cmd[0]} ended with exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took over {BUILD_SECONDS} s"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _built(source: Path | str, compiler: str, flags: tuple[str, ...], file: str) -> Path:
    """The library built from a file or a text: from the cache, or made now; elsewhere if that cannot be written."""
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
        made = Path(name, file)
        if isinstance(source, str):
            text, source = source, Path(name, "source.cpp")
            source.write_text(text, "utf-8")
        command = [compiler, *flags, "-I", str(SOURCES), "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        made.replace(folder / file)  # whole or not at all, whoever else builds it
    return folder / file
