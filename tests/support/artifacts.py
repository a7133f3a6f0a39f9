"""Tiny artifacts for tests: a tiny model with random codes in a mix of formats, compiled without GPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from packing import Codes, PackedModel
from tiny import save_tiny
from torch import Tensor
from transformers import PreTrainedModel

from reallm.compilation.compile import compile_plan
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.models.loaded import LoadedModel, Matrix, load_model
from reallm.planner.tables.tensor_layout import shared_key

MIX = ("int4-g16", "nf3-g8-dq8x8+r2i8", "aq2x4-d4-shared", "uint5-g24+ldl", "tq2.5-l8+ldl2+rot", "aq1x6-d8+r3")
MIX += ("lm2-g0", "km3+o20", "e8p2+rot+r2i4", "uint4-g16+perm+cs")


def mixed(kinds: tuple[str, ...] = ("linear", "embedding", "head", "expert")) -> Callable[[Matrix], str | None]:
    """Assigns the formats of MIX in turn to the matrices of `kinds`, and none to the others."""
    turn = count()
    return lambda matrix: MIX[next(turn) % len(MIX)] if matrix.kind in kinds else None


@dataclass(frozen=True)
class Made:
    """One compiled artifact and what it was made from."""

    folder: Path
    source: Path
    plan: Path
    loaded: LoadedModel
    packed: PackedModel

    def again(self, output: Path, force: bool = False) -> Path:
        """Compile the same plan into the folder `output`."""
        return compile_plan(self.plan, output, model=self.loaded, codes=Codes(self.packed), kernels=False, force=force)

    def reference(self, matrix: Matrix) -> Tensor:
        """W_hat of a packed matrix from the independent float64 decode, as float32 [rows, cols]."""
        fmt = Format.parse(self.packed.names[matrix.name])
        fields: Mapping = self.packed.fields[matrix.name]
        if key := shared_key(fmt, matrix.family):
            fields = {**fields, "codebooks": self.packed.shared[key]}
        return torch.from_numpy(decode_reference(fmt, fields, matrix.rows, matrix.cols)).float()

    def replaced(self) -> PreTrainedModel:
        """The original model with every packed W replaced by its reference decode."""
        model = load_model(self.source).model
        with torch.no_grad():
            for matrix in self.loaded.matrices:
                if matrix.name in self.packed.fields:
                    weight = self.reference(matrix)
                    target = model.get_parameter(matrix.parameter)
                    target = target if matrix.expert is None else target[matrix.expert]
                    target.copy_(weight.T if matrix.transposed else weight)
        return model


def make(
    architecture: str,
    folder: Path,
    choose: Callable[[Matrix], str | None] | None = None,
    dtype: torch.dtype = torch.float32,
    kernels: bool = False,
) -> Made:
    """Save a tiny model, plan it with random codes and compile it, all inside `folder`."""
    source = save_tiny(architecture, folder / "model", dtype=dtype)
    loaded = load_model(source)
    packed = PackedModel(loaded, choose or mixed())
    plan = packed.write_plan(folder / "plan.json")
    output = compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=kernels)
    return Made(output, source, plan, loaded, packed)
