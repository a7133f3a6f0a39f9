"""Tiny artifacts to fine-tune, and the divergence of an artifact from the model it was made from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from packing import Codes, PackedModel
from tiny import save_tiny

from reallm.codecs.encode import encode
from reallm.codecs.metric import Metric, Workspace
from reallm.compilation.compile import compile_plan
from reallm.evaluation.evaluate import evaluate
from reallm.kernels.formats.formats import Format
from reallm.measurement.encoding import codebook_values
from reallm.models.loaded import Matrix, load_model
from reallm.planner.tables.tensor_layout import shared_key

SEQLEN = 32


class StopError(Exception):
    """Raised by tests in place of killing the process."""


def write_letters(path: Path, windows: int) -> str:
    """Write a fixed text of `windows` windows of SEQLEN letters to `path`; returns the path as a string."""
    path.write_text("".join(random.Random(1).choices("abcdefgh .", k=windows * SEQLEN)), encoding="utf-8")
    return str(path)


def pack(architecture: str, folder: Path, choose: Callable[[Matrix], str | None], seed: int = 0) -> Path:
    """Compile a tiny model encoded with plain squared error in the formats of `choose`; returns folder/out."""
    loaded = load_model(save_tiny(architecture, folder / "model", seed=seed))
    packed = PackedModel(loaded, choose)
    for matrix in loaded.matrices:
        if matrix.name in packed.fields:
            metric = Metric(hessian=torch.eye(matrix.cols), fisher=torch.ones(matrix.rows, matrix.cols))
            fmt = Format.parse(packed.names[matrix.name])
            key = shared_key(fmt, matrix.family)
            books = codebook_values(fmt, {"codebooks": packed.shared[key]}) if key else None
            packed.fields[matrix.name] = encode(loaded.weight(matrix), fmt, Workspace(metric), shared=books)
    plan = packed.write_plan(folder / "plan.json")
    return compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)


def linears(*formats: str) -> Callable[[Matrix], str | None]:
    """Assigns `formats` in turn to the linear layers."""
    turn = iter(formats * 100)
    return lambda matrix: next(turn) if matrix.kind == "linear" else None


def kl(artifact: Path, source: Path, text: str) -> float:
    """Mean KL of `artifact` to the model `source` on `text`, in nats per token."""
    divergence = evaluate(artifact, against=source, text=text, seqlen=SEQLEN, progress=False).comparison.divergence
    assert divergence is not None
    return divergence.mean


def files(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file in `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
