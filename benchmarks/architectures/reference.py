"""References that are computed without reallm's runtime: the dense model with the decoded weights in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import LoadedModel, Matrix
from reallm.planner.results.assembly import UNPACKED_SHARE
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Choice, Plan


def packed_choices(plan: Plan) -> Iterator[tuple[Choice, Format]]:
    """The choices of `plan` whose matrices are stored packed."""
    for choice in plan.choices:
        fmt = Format.parse(choice.format)
        if not isinstance(fmt.codec, DenseCodec):
            yield choice, fmt


def weight_slice(model: PreTrainedModel, matrix: Matrix) -> Tensor:
    """The part of the model's tensor that is `matrix`, as a view [rows, cols]."""
    tensor: Tensor = model.get_parameter(matrix.parameter).detach()
    if matrix.expert is not None:
        tensor = tensor[matrix.expert]
    return tensor.T if matrix.transposed else tensor


def replaced_model(dense: PreTrainedModel, loaded: LoadedModel, plan: Plan, work: Path) -> PreTrainedModel:
    """A copy of `dense` in which every packed matrix has the values that the float64 reference decodes."""
    model = copy.deepcopy(dense)
    codes = MeasuredCodes(work, loaded)
    matrices = {matrix.name: matrix for matrix in loaded.matrices}
    with torch.no_grad():
        for choice, fmt in packed_choices(plan):
            matrix = matrices[choice.matrix]
            values = decode_reference(fmt, codes.fields(choice), matrix.rows, matrix.cols)
            weight_slice(model, matrix).copy_(torch.from_numpy(values).float())
    return model


def check_plan(plan: Plan, table: MeasuredTable) -> None:
    """Raise ValueError if the planner takes a matrix for free, or if a large tensor is neither packed nor mentioned."""
    if free := [choice.matrix for choice, _ in packed_choices(plan) if choice.cost == 0]:
        raise ValueError(f"{len(free)} packed matrices cost nothing, such as {free[0]}")
    sizes = other_sizes(table)
    share = sum(sizes.values()) / (sum(sizes.values()) + sum(matrix.numel for matrix in table.matrices))
    if share >= UNPACKED_SHARE and not any("not packed" in note for note in plan.notes):
        raise ValueError(f"{share:.1%} of the weights are not packed and no note of the plan says so")


def other_sizes(table: MeasuredTable) -> dict[str, int]:
    """Name -> number of values of the tensors with several dimensions that are not matrices."""
    return {name: prod(shape) for name, shape in table.other_tensors.items() if len(shape) > 1}
