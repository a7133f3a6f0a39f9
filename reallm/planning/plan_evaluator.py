"""Measure the loss of plans in memory, without compiling an artifact for each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from reallm.decoding.decode import decode
from reallm.evaluation.compare import CachedLogits, compare_models
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.measurement.encoding import codebook_bytes, codebook_values
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import LoadedModel, Matrix, load_model
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.tensor_layout import shared_key
from reallm.system.device import CPU
from reallm.system.progress import progress_bar


class PlanEvaluator:
    """Measures plans one after another: decodes them into a float32 model and compares it with the original model.

    From one plan to the next, only matrices whose format has changed are decoded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        work: Path,
        windows: Tensor,
        progress: bool = True,
        device: torch.device = CPU,
    ) -> None:
        """Measure on `windows`, int64 [n, seqlen], with both models on `device`.

        `work` is the work folder or the file of its table.
        """
        self.loaded, self.windows, self.progress = loaded, windows, progress
        self.codes = MeasuredCodes(work, loaded, device)
        self.model = load_model(loaded.source, dtype=torch.float32).model.to(device)
        dense = load_model(loaded.source, dtype=torch.float32).model.to(device)
        self.dense = CachedLogits(dense)
        self.matrices = {matrix.name: matrix for matrix in loaded.matrices}
        self.formats: dict[str, str] = {}
        """Matrix -> its current format, for the matrices that are not dense."""

    def loss(self, plan: Plan, dense: Collection[str] = ()) -> float:
        """KL divergence of `plan` from the original model, nats per token; families in `dense` stay uncompressed."""
        choices = {c.matrix: c for c in plan.choices if c.family not in dense and not _is_dense(c)}
        formats = {name: choice.format for name, choice in choices.items()}
        changed = [name for name in {*formats, *self.formats} if self.formats.get(name) != formats.get(name)]
        for name in progress_bar(changed, desc="decode", unit="matrix", disable=not self.progress, leave=False):
            matrix = self.matrices[name]
            weight = self._decoded(matrix, choices[name]) if name in choices else self.loaded.weight(matrix)
            self._set_weight(matrix, weight)
        self.formats = formats
        divergence = compare_models(self.dense, self.model, self.windows, progress=self.progress).divergence
        assert divergence is not None
        return divergence.mean

    def _decoded(self, matrix: Matrix, choice: Choice) -> Tensor:
        fmt = Format.parse(choice.format)
        key = shared_key(fmt, matrix.family)
        books = codebook_values(fmt, {"codebooks": self.codes.shared(key)}) if key else None
        fields = {name: torch.from_numpy(data.copy()) for name, data in self.codes.fields(choice).items()}
        return decode(fmt, fields, matrix.rows, matrix.cols, shared=codebook_bytes(fmt, books))

    @torch.no_grad()
    def _set_weight(self, matrix: Matrix, weight: Tensor) -> None:
        target = self.model.get_parameter(matrix.parameter)
        target = target if matrix.expert is None else target[matrix.expert]
        target.copy_(weight.T if matrix.transposed else weight)


def _is_dense(choice: Choice) -> bool:
    return isinstance(Format.parse(choice.format).codec, DenseCodec)
