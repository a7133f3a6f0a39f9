"""Compile: a plan, the model it was made for and the codes that were measured become an artifact.

Nothing is decided here. Every matrix is written in the format the plan names, from codes whose digest the plan holds,
in the bytes the plan counted; any difference is an error and no artifact.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.artifacts.directory import CARD_FILE, PLAN_FILE, check_output, new_artifact
from reallm.artifacts.manifest import sha256_file, write_manifest
from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.codecs.packed_fields import store
from reallm.codegen.artifact.build import Activation, emit_kernels
from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import TensorSpec
from reallm.kernels.storage.safetensors import write_weights
from reallm.measurement.encoding import Encoded
from reallm.models.loaded import LoadedModel, Matrix, load_model
from reallm.planner.problem.tensor_layout import (
    DENSE_NAME,
    dense_nbytes,
    matrix_tensors,
    shared_key,
    shared_tensor,
    weights_tensors,
    whole_stacks,
)
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.records import RecordError, read_record, write_record

from .model_card import model_card

Bytes = NDArray[np.uint8]


class CodeSource(Protocol):
    """Where the codes of a plan come from; `encoding.Encoded` is the usual one."""

    def fields(self, choice: Choice) -> Mapping[str, Bytes]:
        """The packed fields of a choice whose format is not dense."""
        ...

    def shared(self, key: str) -> Bytes:
        """The packed codebooks of a shared key."""
        ...


_DTYPE_NAMES: Mapping[torch.dtype, Activation] = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def codes_digest(fmt: Format, rows: int, cols: int, fields: Mapping[str, Bytes]) -> str:
    """sha256 over the bytes of the fields, in the order of `fmt.fields(rows, cols)`."""
    digest = hashlib.sha256()
    for stored in fmt.fields(rows, cols):
        digest.update(fields[stored.name].tobytes())
    return digest.hexdigest()


@dataclass
class Compilation:
    """One plan on its way into a folder."""

    plan: Plan
    loaded: LoadedModel
    codes: CodeSource
    digests: dict[str, str] = field(default_factory=dict)
    """Tensor name -> sha256, filled while writing."""
    tuned: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that take the place of the model's own of that name, in the model's dtype."""

    def __post_init__(self) -> None:
        self.matrices = {matrix.name: matrix for matrix in self.loaded.matrices}
        self.choices = {choice.matrix: choice for choice in self.plan.choices}
        own = DENSE_NAME[_DTYPE_NAMES[self.loaded.dtype]]
        self.formats = {
            name: Format.parse(self.choices[name].format if name in self.choices else own) for name in self.matrices
        }
        self._last: tuple[str, Mapping[str, Bytes]] = ("", {})
        _check_choices(self.plan, self.matrices)

    def packed(self) -> dict[str, Matrix]:
        """The matrices stored as fields, by name; the others keep the model's own tensors."""
        records = [matrix.record() for matrix in self.loaded.matrices]
        whole = {matrix.name for slices in whole_stacks(records, self.formats).values() for matrix in slices}
        return {
            name: matrix
            for name, matrix in self.matrices.items()
            if name not in whole and (matrix.kind == "expert" or not self.is_dense(name))
        }

    def is_dense(self, name: str) -> bool:
        """Whether a matrix is stored as plain floats."""
        return isinstance(self.formats[name].codec, DenseCodec)

    def specs(self) -> list[TensorSpec]:
        """Every tensor of the weights files, as the planner counted them; dense ones the way round the model has them.

        The planner knows rows and columns only. A transposed shape has as many digits, so no size changes.
        """
        records = [matrix.record() for matrix in self.loaded.matrices]
        others = self.loaded.other_tensors()
        specs = weights_tensors(records, self.formats, self.plan.shared, others, _DTYPE_NAMES[self.loaded.dtype])
        own = {matrix.parameter: self.loaded.model.get_parameter(matrix.parameter) for matrix in self.loaded.matrices}
        return [replace(spec, shape=tuple(own[spec.name].shape)) if spec.name in own else spec for spec in specs]

    def fields(self, name: str) -> Mapping[str, Bytes]:
        """The packed fields of a matrix, checked; the last ones are kept, as fields of a matrix are written in turn."""
        if self._last[0] == name:
            return self._last[1]
        matrix, fmt = self.matrices[name], self.formats[name]
        stored = fmt.fields(matrix.rows, matrix.cols)
        if self.is_dense(name):
            fields: Mapping[str, Bytes] = {stored[0].name: store(stored[0], self.loaded.weight(matrix))}
        else:
            fields = self.codes.fields(self.choices[name])
            if wrong := [f.name for f in stored if f.name not in fields or fields[f.name].shape != (f.nbytes,)]:
                raise UserError(
                    f"{name} in {fmt.name}: field {wrong[0]!r} has a wrong size; run `reallm measure` again"
                )
            if codes_digest(fmt, matrix.rows, matrix.cols, fields) != self.choices[name].codes_sha256:
                raise UserError(
                    f"{name} in {fmt.name}: its codes are gone or changed, and encoding again gives others "
                    "than the plan measured; measure into a new folder, then plan again"
                )
        self._last = (name, fields)
        return fields

    def payload(self, spec: TensorSpec, owner: Mapping[str, tuple[str, str]]) -> Bytes:
        """The bytes of one tensor; its digest is noted."""
        if spec.name in owner:
            matrix, field_name = owner[spec.name]
            data = self.fields(matrix)[field_name] if field_name else self.codes.shared(matrix)
        else:
            data = _float_bytes(self.loaded, spec, self.tuned)
        self.digests[spec.name] = hashlib.sha256(data.tobytes()).hexdigest()
        return data

    def owners(self) -> dict[str, tuple[str, str]]:
        """Tensor name -> (matrix, field), or (shared key, "")."""
        result = {
            f"{name}.{stored.name}": (name, stored.name)
            for name, matrix in self.packed().items()
            for stored in self.formats[name].fields(matrix.rows, matrix.cols)
        }
        return result | {shared_tensor(key, nbytes).name: (key, "") for key, nbytes in self.plan.shared.items()}

    def write_weights(self, folder: Path) -> None:
        """Write the weights files; raise UserError unless they have exactly the planned bytes."""
        specs, owner = self.specs(), self.owners()
        self._check_bytes(specs)
        tensors = {spec.name: (spec.dtype, spec.shape, lambda spec=spec: self.payload(spec, owner)) for spec in specs}
        files = write_weights(folder, tensors)
        written = sum(file.stat().st_size for file in files)
        if written != self.plan.file_bytes:
            raise UserError(
                f"the weights came out at {written} bytes, the plan says {self.plan.file_bytes}; plan again"
            )

    def _check_bytes(self, specs: list[TensorSpec]) -> None:
        """Planned bytes == bytes to be written, for every matrix (invariant 1)."""
        sizes = {spec.name: spec.nbytes for spec in specs}
        packed = self.packed()
        for name, choice in self.choices.items():
            record, fmt = self.matrices[name].record(), self.formats[name]
            nbytes = sum(sizes.get(spec.name, 0) for spec in matrix_tensors(record, fmt))
            if name not in packed and record.kind == "expert":  # its stack is one tensor
                nbytes = dense_nbytes(fmt, record.rows, record.cols) or 0
            if nbytes != choice.nbytes:
                raise UserError(f"{name} in {fmt.name} takes {nbytes} bytes, the plan says {choice.nbytes}; plan again")

    def record(self) -> QuantizationRecord:
        """What config.json will say."""
        packed = self.packed()
        formats: dict[str, list[str]] = {}
        shared: dict[str, list[str]] = {}
        tied: dict[str, str] = {}
        for name, matrix in packed.items():
            fmt = self.formats[name]
            formats.setdefault(fmt.name, []).append(name)
            if key := shared_key(fmt, matrix.family):
                shared.setdefault(key, []).append(name)
            tied |= {parameter.removesuffix(".weight"): name for parameter in matrix.tied}
        transposed = {m.parameter for m in packed.values() if m.kind == "expert" and m.transposed}
        gone = {m.parameter for m in packed.values()} | {name for m in packed.values() for name in m.tied}
        ties = getattr(self.loaded.model, "all_tied_weights_keys", {})
        aliases = {target: source for target, source in ties.items() if target not in gone and source not in gone}
        return QuantizationRecord(
            formats={name: tuple(names) for name, names in sorted(formats.items())},
            shared={key: tuple(names) for key, names in sorted(shared.items())},
            tied=tied,
            aliases=aliases if tied else {},
            transposed=tuple(sorted(transposed)),
        )


def _check_choices(plan: Plan, matrices: Mapping[str, Matrix]) -> None:
    for choice in plan.choices:
        matrix = matrices.get(choice.matrix)
        if matrix is None or (matrix.rows, matrix.cols) != (choice.rows, choice.cols):
            found = "no such matrix" if matrix is None else f"[{matrix.rows}, {matrix.cols}]"
            raise UserError(
                f"the plan chooses for {choice.matrix} [{choice.rows}, {choice.cols}], the model has {found}"
            )


def _float_bytes(loaded: LoadedModel, spec: TensorSpec, tuned: Mapping[str, Tensor]) -> Bytes:
    """A tensor of the model itself, or tuned, in the dtype planned. Raises UserError if that would lose bits."""
    tensor = tuned[spec.name] if spec.name in tuned else loaded.model.state_dict()[spec.name].detach()
    result = tensor.to(_TORCH[spec.dtype])
    if spec.name in loaded.other_tensors() and not torch.equal(result.to(tensor.dtype), tensor):
        raise UserError(
            f"tensor {spec.name} is {tensor.dtype} and loses bits as {spec.dtype}; load the model in that dtype"
        )
    data: Bytes = result.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def write_config(folder: Path, loaded: LoadedModel, record: QuantizationRecord) -> None:
    """Write config.json, the generation configuration and the tokenizer's files."""
    config = copy.deepcopy(loaded.model.config)
    config.architectures = [type(loaded.model).__name__]
    config.dtype = loaded.dtype
    config.quantization_config = record.model_dump(mode="json")
    if record.tied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(folder)
    if loaded.model.can_generate():
        loaded.model.generation_config.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)


def biased_matrices(loaded: LoadedModel) -> frozenset[str]:
    """Names of the matrices whose module adds a bias."""
    modules = dict(loaded.model.named_modules())
    return frozenset(m.name for m in loaded.matrices if getattr(modules.get(m.name), "bias", None) is not None)


def write_artifact(compilation: Compilation, output: Path, *, force: bool = False, kernels: bool = True) -> Path:
    """Write everything of an artifact to `output`. Raises UserError; leaves nothing half-written."""
    plan, loaded = compilation.plan, compilation.loaded
    with new_artifact(output, force) as folder:
        write_config(folder, loaded, compilation.record())
        compilation.write_weights(folder)
        write_record(folder / PLAN_FILE, plan)
        (folder / CARD_FILE).write_text(model_card(plan), encoding="utf-8")
        if kernels:
            emit_kernels(plan, folder, activation=_DTYPE_NAMES[loaded.dtype], biased=biased_matrices(loaded))
        write_manifest(folder, compilation.digests, plan.model_sha256, sha256_file(folder / PLAN_FILE))
    return output


def compile_plan(
    plan_path: Path | str,
    output: Path | str,
    *,
    model: Path | str | LoadedModel | None = None,
    work: Path | str | None = None,
    codes: CodeSource | None = None,
    kernels: bool = True,
    force: bool = False,
) -> Path:
    """Compile the plan in `plan_path` into the folder `output`.

    `model` and the measured folder `work` are the plan's own unless given; the model must be the very one the plan was
    made for. `codes` replaces the measured folder. `kernels` generates kernels for GPUs too. Raises UserError.
    """
    output = Path(output)
    check_output(output, force)
    try:
        plan = read_record(Path(plan_path), Plan, "plan")
    except RecordError as error:
        raise UserError(str(error)) from None
    loaded = model if isinstance(model, LoadedModel) else load_model(model or plan.model)
    if loaded.digest != plan.model_sha256:
        raise UserError(
            f"{plan_path} is a plan for another model than {loaded.source}; plan again, or give its --model"
        )
    codes = codes or Encoded(Path(work or plan.work), loaded)
    return write_artifact(Compilation(plan, loaded, codes), output, force=force, kernels=kernels)
