"""References that are computed without reallm's runtime: the dense model with the decoded weights in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import LoadedModel, Matrix
from reallm.planner.tables.plan import Choice, Plan


def packed_choices(plan: Plan) -> Iterator[tuple[Choice, Format]]:
    """The choices of `plan` whose matrices are stored packed."""
    for choice in plan.choices:
        fmt = Format.parse(choice.format)
        if not isinstance(fmt.codec, DenseCodec):
            yield choice, fmt


def weight_slice(model: PreTrainedModel, matrix: Matrix) -> Tensor:
    """The part of the model's tensor that is `matrix`, as a view [rows, cols]."""
    tensor = model.get_parameter(matrix.parameter).detach()
    if matrix.expert is not None:
        tensor = tensor[matrix.expert]
    return tensor.T if matrix.transposed else tensor


def replaced_model(dense: PreTrainedModel, loaded: LoadedModel, plan: Plan, work: Path) -> PreTrainedModel:
    """A copy of `dense` in which every packed matrix has the values that the float64 reference decodes from its codes."""
    model = copy.deepcopy(dense)
    codes = MeasuredCodes(work, loaded)
    matrices = {matrix.name: matrix for matrix in loaded.matrices}
    with torch.no_grad():
        for choice, fmt in packed_choices(plan):
            matrix = matrices[choice.matrix]
            values = decode_reference(fmt, codes.fields(choice), matrix.rows, matrix.cols)
            weight_slice(model, matrix).copy_(torch.from_numpy(values).float())
    return model


def free_matrices(plan: Plan) -> list[str]:
    """Packed matrices whose predicted cost is zero: the planner gives them the fewest bits."""
    return [choice.matrix for choice, _ in packed_choices(plan) if choice.cost == 0]
