"""Do predicted losses hold? A check of the costs that second order cannot be trusted with, against the true loss.

A cost is the second-order term of the loss in the error of a matrix, so it is only valid for small errors. Where
weights or activations have extreme outliers it fails: an error that is tiny beside the weights is large for the rest of
the model, which saturates, and predicted losses are wrong by orders of magnitude in either direction.

The symptom is free to see. No matrix can matter much more than log V nats per token in a model with V tokens, which is
the loss of a uniform guess. A cost c at the relative error r = |E|^2 / |W|^2 predicts c / r for an error as large as
the matrix itself, because costs are quadratic. Where that exceeds log V the prediction is doubtful, and only then the
true loss is measured: the matrix is replaced by its decoded candidate, all others stay as they are, and the KL
divergence from the original model is computed on a few calibration windows.

Ordinary models stay below the bound (SmolLM2-135M: 4 nats at most, the bound is 10.8), and for them nothing is run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.calibration.compute_dtype import whole_model_dtype
from reallm.calibration.objective import Objective, make_objective
from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.decoding.decode import decode
from reallm.kernels.formats.formats import Format
from reallm.models.conversion import computing_in, tensors_of
from reallm.models.loaded import LoadedModel, Matrix
from reallm.models.probe import eager_experts
from reallm.planner.tables.measured_table import MeasurementRecord
from reallm.planner.tables.tensor_layout import shared_key
from reallm.system.progress import progress_bar
from reallm.system.threads import one_thread

from .encoding import Job, codebook_bytes

CHECKED_MATRICES = 4
"""Maximum number of matrices whose loss is measured."""
CHECKED_WINDOWS = 8
"""Maximum number of calibration windows that it is measured on."""
SMALLEST_LOSS = 1e-4
"""Losses below this, in nats per token, are not checked: they matter to no plan, and rounding drowns them."""
LARGEST_ERROR = 10.0
"""A prediction off by more than this factor is reported. Others are within a factor of three in most models."""


@dataclass(frozen=True)
class CheckedLoss:
    """The predicted and the measured loss of one matrix in one format, in nats per token."""

    matrix: str
    format: str
    predicted: float
    measured: float

    @property
    def is_wrong(self) -> bool:
        """Whether the prediction is off by more than LARGEST_ERROR."""
        low, high = sorted((max(self.predicted, 0.0), max(self.measured, 0.0)))
        return high > SMALLEST_LOSS and high > LARGEST_ERROR * low


def check_second_order(
    loaded: LoadedModel,
    windows: Tensor,
    records: Sequence[MeasurementRecord],
    job: Job,
    codebooks: Mapping[str, Tensor],
) -> tuple[CheckedLoss, ...]:
    """Measure the true loss of the doubtful predictions among `records`; empty where none is doubtful.

    `windows`, int64 [n, seqlen], are the calibration windows, and `codebooks` the shared codebooks by key. Matrices
    that these windows do not run (an expert, a vision tower) are left out.
    """
    doubtful = doubtful_records(loaded, records)
    if not doubtful:
        return ()
    matrices = {matrix.name: matrix for matrix in loaded.matrices}
    stride = -(-len(windows) // CHECKED_WINDOWS)
    objective = make_objective(loaded, windows[::stride], job.seed)
    weights = [_decoded(loaded, matrices[record.matrix], record, job, codebooks) for record in doubtful]
    converted = computing_in(tensors_of(loaded.model), whole_model_dtype(loaded))
    with torch.no_grad(), eager_experts(loaded.model), converted:
        losses = _losses(loaded, objective, [matrices[record.matrix] for record in doubtful], weights)
    return tuple(
        CheckedLoss(record.matrix, record.format, record.two_sided, loss)
        for record, loss in zip(doubtful, losses, strict=True)
        if loss is not None
    )


def doubtful_records(loaded: LoadedModel, records: Sequence[MeasurementRecord]) -> list[MeasurementRecord]:
    """The middle doubtful format of each matrix that has any; of these, the CHECKED_MATRICES with the highest cost."""
    vocabulary = loaded.vocabulary or 2
    bound = 2.0 if loaded.sentence_encoder is not None else math.log(vocabulary)  # 1 - cosine is at most 2
    by_matrix: dict[str, list[MeasurementRecord]] = defaultdict(list)
    for record in records:
        if record.two_sided > SMALLEST_LOSS and record.two_sided > bound * min(record.relative, 1.0):
            by_matrix[record.matrix].append(record)
    middle = [sorted(group, key=lambda r: r.nbytes)[len(group) // 2] for group in by_matrix.values()]
    return sorted(middle, key=lambda record: -record.two_sided)[:CHECKED_MATRICES]


def warning(checks: Sequence[CheckedLoss]) -> str | None:
    """A note for the user if a prediction is wrong, else None."""
    wrong = [check for check in checks if check.is_wrong]
    if not wrong:
        return None
    worst = max(wrong, key=lambda check: max(check.predicted, check.measured))
    return (
        f"predicted losses cannot be relied on: {worst.matrix} in {worst.format} is predicted to lose "
        f"{worst.predicted:.2g} and loses {max(worst.measured, 0.0):.2g} ({len(wrong)} of {len(checks)} doubtful "
        f"matrices are off by more than {LARGEST_ERROR:.0f} times), because weights or activations have extreme "
        "outliers; measure plans with `reallm plan --refit-text` or `reallm eval`"
    )


def _decoded(
    loaded: LoadedModel, matrix: Matrix, record: MeasurementRecord, job: Job, codebooks: Mapping[str, Tensor]
) -> Tensor:
    """The decoded candidate, float32 [rows, cols], from the cached codes or encoded again."""
    fmt = Format.parse(record.format)
    shared = codebooks.get(shared_key(fmt, matrix.family) or "")
    fields = job.cache.fields(job.key(matrix.name, fmt))
    if not fields:
        with one_thread():
            fields = encode(
                loaded.weight(matrix),
                fmt,
                Workspace(job.metric(matrix)),
                shared=shared,
                seed=job.seed,
                device=job.device,
            )
    tensors = {name: torch.from_numpy(data.copy()) for name, data in fields.items()}
    return decode(fmt, tensors, matrix.rows, matrix.cols, shared=codebook_bytes(fmt, shared))


def _losses(
    loaded: LoadedModel, objective: Objective, matrices: Sequence[Matrix], weights: Sequence[Tensor]
) -> list[float | None]:
    """The mean loss per token (or per text) of replacing each of `matrices` alone by its weight.

    None for a matrix that no window runs: replacing it changes nothing.
    """
    totals, units = [0.0] * len(matrices), 0
    runs = [False] * len(matrices)
    for index in progress_bar(range(len(objective.inputs)), desc="check predictions", unit="window"):
        base = _outputs(loaded, objective, index)
        units += 1 if loaded.sentence_encoder is not None else len(objective.inputs[index])
        for number, (matrix, weight) in enumerate(zip(matrices, weights, strict=True)):
            target = _parameter(loaded, matrix)
            original = target.clone()
            try:
                target.copy_(weight.T if matrix.transposed else weight)
                changed = _outputs(loaded, objective, index)
                runs[number] |= not torch.equal(base, changed)
                totals[number] += _divergence(base, changed, loaded)
            finally:
                target.copy_(original)
    return [total / units if run else None for total, run in zip(totals, runs, strict=True)]


def _parameter(loaded: LoadedModel, matrix: Matrix) -> Tensor:
    """The tensor that holds the weights of `matrix`, in the model."""
    tensor: Tensor = loaded.model.get_parameter(matrix.parameter).data
    return tensor if matrix.expert is None else tensor[matrix.expert]


def _outputs(loaded: LoadedModel, objective: Objective, index: int) -> Tensor:
    """Log-probabilities of the scored tokens of a window [P, vocabulary], or the embedding of a text [1, width]."""
    ids = objective.inputs[index][None].to(loaded.model.device)
    scores = objective.scores(loaded.model(input_ids=ids))
    if loaded.sentence_encoder is not None:
        return loaded.sentence_encoder.embed(scores)
    scored = scores[0] if objective.scored is None else scores[0][objective.scored[index]]
    return scored.float().log_softmax(-1)


def _divergence(base: Tensor, changed: Tensor, loaded: LoadedModel) -> float:
    """KL(base || changed) summed over the tokens, or 1 - cosine."""
    if loaded.sentence_encoder is not None:
        return 1.0 - float((base * changed).sum())
    total: Tensor = (base.exp() * (base - changed)).sum(dtype=torch.float64)
    return float(total)
