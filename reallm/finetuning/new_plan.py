"""The plan of a fine-tuned model, with its new formats and sizes, and the codes that its artifact is written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reallm.compilation.compile import Compilation
from reallm.kernels.codes.stored_fields import codes_sha256
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.storage.layout import file_bytes
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.plan import Choice, Plan
from reallm.runtime.install import packed_modules
from reallm.runtime.packed import Packed, SharedCodebooks

Bytes = NDArray[np.uint8]


def _numpy(raw: torch.Tensor) -> Bytes:
    data: Bytes = raw.detach().cpu().contiguous().numpy()
    return data


class TrainedCodes:
    """The codes of a packed model in memory, in the form that `Compilation` reads."""

    def __init__(self, model: nn.Module) -> None:
        self.packed: dict[str, Packed] = dict(packed_modules(model))
        self.codebooks = [module for module in model.modules() if isinstance(module, SharedCodebooks)]

    def fields(self, choice: Choice) -> Mapping[str, Bytes]:
        """The packed fields of the matrix of `choice`, by name."""
        return {name: _numpy(raw) for name, raw in self.packed[choice.matrix].fields.items()}

    def shared(self, key: str) -> Bytes:
        """The bytes of the codebook with the key `key`, which several matrices share."""
        return _numpy(self.codebooks[0][key])

    def updated(self, choice: Choice) -> Choice:
        """`choice` with the format, size and digest that its matrix has after training."""
        packed = self.packed.get(choice.matrix)
        if packed is None or isinstance(packed.format.codec, DenseCodec):
            return choice
        rows, cols = choice.rows, choice.cols
        return choice.model_copy(
            update={
                "format": packed.format.name,
                "nbytes": packed.format.nbytes(rows, cols),
                "codes_sha256": codes_sha256(packed.format, rows, cols, self.fields(choice)),
            }
        )


def new_plan(plan: Plan, dense: LoadedModel, codes: TrainedCodes, notes: Sequence[str]) -> Plan:
    """The plan of the trained model: sizes are recomputed; costs, bound and prices are copied from `plan`.

    `notes` are appended. If new factors exceed the budget, the budget is raised to the new size, and a note says so.
    """
    choices = tuple(codes.updated(choice) for choice in plan.choices)
    matrices_bytes = sum(choice.nbytes for choice in choices) + sum(plan.shared.values())
    draft = plan.model_copy(update={"choices": choices})
    new_file_bytes = file_bytes(Compilation(draft, dense, codes).specs())
    counted = new_file_bytes if plan.scope == "file" else matrices_bytes
    values = plan.model_dump() | {
        "choices": choices,
        "matrices_bytes": matrices_bytes,
        "file_bytes": new_file_bytes,
        "counted_bytes": counted,
        "bits_per_weight": 8 * matrices_bytes / sum(choice.rows * choice.cols for choice in choices),
        "notes": (*plan.notes, *notes),
    }
    if counted > plan.budget_bytes:
        over = f"the factors take it {counted - plan.budget_bytes} bytes over the budget of {plan.budget}"
        values |= {"budget": f"{counted}B", "budget_bytes": counted, "uniform": None, "notes": (*values["notes"], over)}
    return Plan.model_validate(values)
