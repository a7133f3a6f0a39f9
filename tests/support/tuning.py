"""Tiny artifacts to fine-tune, and how near one is to the model it was made from."""

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
from reallm.planner.problem.tensor_layout import shared_key

SEQLEN = 32


class StopError(Exception):
    """Stands for a killed process."""


def write_letters(path: Path, windows: int) -> str:
    """A text of so many windows of SEQLEN letters, the same every time; its path."""
    path.write_text("".join(random.Random(1).choices("abcdefgh .", k=windows * SEQLEN)), encoding="utf-8")
    return str(path)


def pack(architecture: str, folder: Path, choose: Callable[[Matrix], str | None], seed: int = 0) -> Path:
    """A tiny model encoded with plain squared error, in the formats that `choose` gives: folder/out."""
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
    """`formats` in turn for the linears."""
    turn = iter(formats * 100)
    return lambda matrix: next(turn) if matrix.kind == "linear" else None


def kl(artifact: Path, source: Path, text: str) -> float:
    found = evaluate(artifact, against=source, text=text, seqlen=SEQLEN, progress=False).comparison.divergence
    assert found is not None
    return found.mean


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
