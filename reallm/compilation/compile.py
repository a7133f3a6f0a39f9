"""Compile a plan, the model it was made for and the measured codes into an artifact.

Compiling makes no choices. Every matrix is written in the format that the plan names, its codes have the digest that
the plan records, and it takes exactly as many bytes as planned. Any difference is an error, and no artifact is written.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.artifacts.directory import CARD_FILE, check_output, new_artifact
from reallm.artifacts.find import plan_of
from reallm.artifacts.manifest import sha256_file, write_manifest
from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.codecs.packed_fields import store
from reallm.codegen.artifact.build import check_targets, emit_kernels
from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import codes_sha256
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import SAFETENSORS_DTYPES
from reallm.kernels.storage.layout import TensorSpec
from reallm.kernels.storage.safetensors_writer import write_weights
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import LoadedModel, Matrix, stored_tensors
from reallm.planner.problem.candidates import dense_format
from reallm.planner.tables.plan import PLAN_FILE, Choice, Plan
from reallm.planner.tables.records import write_record
from reallm.planner.tables.tensor_layout import (
    dense_nbytes,
    matrix_tensors,
    other_specs,
    shared_key,
    shared_tensor,
    weights_tensors,
    whole_stacks,
)
from reallm.planner.tables.work_folder import find_table
from reallm.system.device import parse_device
from reallm.system.torch_dtypes import FLOAT_NAMES, TORCH_NAMES

from .model_card import hub_name, model_card
from .plan_model import load_plan_model

Bytes = NDArray[np.uint8]


class CodeSource(Protocol):
    """A source of the codes of a plan, such as `MeasuredCodes`."""

    def fields(self, choice: Choice) -> Mapping[str, Bytes]:
        """The packed fields, name -> uint8 [nbytes], of a choice whose format is not dense."""
        ...

    def shared(self, key: str) -> Bytes:
        """The packed codebooks that matrices share under `key`, uint8 [nbytes]."""
        ...


@dataclass
class Compilation:
    """Combines a plan, a model and codes into the tensors and the configuration of one artifact."""

    plan: Plan
    loaded: LoadedModel
    codes: CodeSource
    digests: dict[str, str] = field(default_factory=dict)
    """Tensor name -> sha256 of its bytes, filled while writing."""
    tuned: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> a fine-tuned tensor, in the model's dtype, that replaces the model's tensor of that name."""

    def __post_init__(self) -> None:
        self.matrices = {matrix.name: matrix for matrix in self.loaded.matrices}
        self.choices = {choice.matrix: choice for choice in self.plan.choices}
        dtype = FLOAT_NAMES[self.loaded.dtype]
        self.formats = {
            name: Format.parse(self.choices[name].format) if name in self.choices else dense_format(m.record(), dtype)
            for name, m in self.matrices.items()
        }
        self._last_fields: tuple[str, Mapping[str, Bytes]] = ("", {})
        self._tensors = dict(stored_tensors(self.loaded.model))
        self._others = self.loaded.other_tensors()
        _check_choices(self.plan, self.matrices)

    def packed(self) -> dict[str, Matrix]:
        """The matrices that are stored as fields, by name; the others keep the model's own tensors."""
        records = [matrix.record() for matrix in self.loaded.matrices]
        unpacked = {matrix.name for slices in whole_stacks(records, self.formats).values() for matrix in slices}
        return {
            name: matrix
            for name, matrix in self.matrices.items()
            if name not in unpacked and (matrix.kind == "expert" or not self.is_dense(name))
        }

    def is_dense(self, name: str) -> bool:
        """Whether a matrix is stored as plain floats."""
        return isinstance(self.formats[name].codec, DenseCodec)

    def specs(self) -> list[TensorSpec]:
        """Every tensor of the weights files, with the sizes that the planner counted.

        Dense matrices have the shape of the model's tensor, which may be transposed; the planner only knows rows and
        columns. A transposed shape has the same number of digits in the header, so no size changes.
        """
        records = [matrix.record() for matrix in self.loaded.matrices]
        dtype = FLOAT_NAMES[self.loaded.dtype]
        others = other_specs(self._others, self.loaded.other_dtypes(), dtype)
        specs = weights_tensors(records, self.formats, self.plan.shared, others)
        tensors = {m.parameter: self.loaded.model.get_parameter(m.parameter) for m in self.loaded.matrices}
        return [replace(s, shape=tuple(tensors[s.name].shape)) if s.name in tensors else s for s in specs]

    def fields(self, name: str) -> Mapping[str, Bytes]:
        """The packed fields of a matrix, checked against the plan. Raises UserError.

        The last result is kept, because the fields of a matrix are written one after another.
        """
        if self._last_fields[0] == name:
            return self._last_fields[1]
        matrix, fmt = self.matrices[name], self.formats[name]
        stored = fmt.fields(matrix.rows, matrix.cols)
        if self.is_dense(name):
            fields: Mapping[str, Bytes] = {stored[0].name: store(stored[0], self.loaded.weight(matrix))}
        else:
            fields = self.codes.fields(self.choices[name])
            if wrong := [f.name for f in stored if f.name not in fields or fields[f.name].shape != (f.nbytes,)]:
                raise UserError(
                    f"{name} in {fmt.name}: field {wrong[0]!r} is missing or has a wrong size; measure again"
                )
            if codes_sha256(fmt, matrix.rows, matrix.cols, fields) != self.choices[name].codes_sha256:
                raise UserError(
                    f"{name} in {fmt.name}: its measured codes are missing or changed, and encoding again gives other "
                    "codes than the plan was made with; measure into a new folder, then plan again"
                )
        self._last_fields = (name, fields)
        return fields

    def payload(self, spec: TensorSpec, owner: Mapping[str, tuple[str, str]]) -> Bytes:
        """The bytes of one tensor, uint8; `owner` is the result of `owners`. Records the digest in `digests`."""
        if spec.name in owner:
            matrix, field_name = owner[spec.name]
            data = self.fields(matrix)[field_name] if field_name else self.codes.shared(matrix)
        else:
            data = self._float_bytes(spec)
        self.digests[spec.name] = hashlib.sha256(data.data).hexdigest()
        return data

    def _float_bytes(self, spec: TensorSpec) -> Bytes:
        """The bytes of a tensor of the model, or of its tuned replacement, in the planned dtype.

        Raises UserError if the conversion would lose bits.
        """
        tensor = self.tuned[spec.name] if spec.name in self.tuned else self._tensors[spec.name].detach()
        dtype = {name: dtype for dtype, name in TORCH_NAMES.items()}[SAFETENSORS_DTYPES[spec.dtype].name]
        result = tensor.to(dtype)
        if result is not tensor and spec.name in self._others and not torch.equal(result.to(tensor.dtype), tensor):
            raise UserError(
                f"tensor {spec.name} is {tensor.dtype} and loses bits as {spec.dtype}; load the model in that dtype"
            )
        data: Bytes = result.contiguous().reshape(-1).view(torch.uint8).numpy()
        return data

    def owners(self) -> dict[str, tuple[str, str]]:
        """Tensor name -> (matrix, field) for packed fields, (key, "") for shared codebooks."""
        result = {
            f"{name}.{stored.name}": (name, stored.name)
            for name, matrix in self.packed().items()
            for stored in self.formats[name].fields(matrix.rows, matrix.cols)
        }
        return result | {shared_tensor(key, nbytes).name: (key, "") for key, nbytes in self.plan.shared.items()}

    def write_weights(self, folder: Path) -> None:
        """Write the weights files. Raises UserError unless their sizes are exactly the planned ones."""
        specs, owner = self.specs(), self.owners()
        self._check_bytes(specs)
        tensors = {spec.name: (spec.dtype, spec.shape, lambda spec=spec: self.payload(spec, owner)) for spec in specs}
        files = write_weights(folder, tensors)
        written = sum(file.stat().st_size for file in files)
        if written != self.plan.file_bytes:
            raise UserError(f"the weights files have {written} bytes, {self.plan.file_bytes} in the plan; plan again")

    def _check_bytes(self, specs: list[TensorSpec]) -> None:
        """Check that every matrix takes as many bytes as planned. Raises UserError."""
        sizes = {spec.name: spec.nbytes for spec in specs}
        packed = self.packed()
        for name, choice in self.choices.items():
            record, fmt = self.matrices[name].record(), self.formats[name]
            nbytes = sum(sizes.get(spec.name, 0) for spec in matrix_tensors(record, fmt))
            if name not in packed and record.kind == "expert":  # all experts of its stack are in one tensor
                nbytes = dense_nbytes(fmt, record.rows, record.cols) or 0
            if nbytes != choice.nbytes:
                raise UserError(f"{name} in {fmt.name} takes {nbytes} bytes, {choice.nbytes} in the plan; plan again")

    def record(self) -> QuantizationRecord:
        """The quantization_config of config.json."""
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
            found = "no such matrix" if matrix is None else f"[{matrix.rows}, {matrix.cols}] under that name"
            raise UserError(
                f"the plan has a format for {choice.matrix} [{choice.rows}, {choice.cols}], the model has {found}; "
                "plan again"
            )


def write_config(folder: Path, loaded: LoadedModel, record: QuantizationRecord) -> None:
    """Write config.json, the generation configuration and the files of the tokenizer, the processor and the pooling."""
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
    for path in loaded.processor_files:
        shutil.copyfile(path, folder / path.name)
    if loaded.sentence_encoder is not None:
        for name, path in loaded.sentence_encoder.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def biased_matrices(loaded: LoadedModel) -> frozenset[str]:
    """Names of the matrices whose modules have a bias."""
    modules = dict(loaded.model.named_modules())
    return frozenset(m.name for m in loaded.matrices if getattr(modules.get(m.name), "bias", None) is not None)


def write_artifact(
    compilation: Compilation,
    output: Path,
    *,
    force: bool = False,
    kernels: bool = True,
    objects: Sequence[str] = (),
) -> Path:
    """Write the artifact of `compilation` to the folder `output`, completely or not at all, and return `output`.

    `kernels` adds the generated kernel sources; `objects` are GPU targets to compile them for. Raises UserError, and
    CodegenError if a kernel does not compile.
    """
    plan, loaded = compilation.plan, compilation.loaded
    with new_artifact(output, force) as folder:
        write_config(folder, loaded, compilation.record())
        compilation.write_weights(folder)
        write_record(folder / PLAN_FILE, plan)
        card = model_card(plan, hub_name(loaded.source) or hub_name(plan.model))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        if kernels:
            activation, biased = FLOAT_NAMES[loaded.dtype], biased_matrices(loaded)
            emit_kernels(plan, folder, objects, activation=activation, biased=biased)
        write_manifest(folder, compilation.digests, plan.model_sha256, sha256_file(folder / PLAN_FILE))
    return output


def _measured_codes(table: Path, plan: Plan, loaded: LoadedModel, device: torch.device) -> CodeSource:
    """The measured codes of `plan`, checked against its table; logs how many must be encoded again."""
    codes = MeasuredCodes(table, loaded, device)
    codes.check_measured(plan)
    codes.log_missing(plan.choices)
    return codes


def compile_plan(
    plan_path: Path | str,
    output: Path | str,
    *,
    model: Path | str | LoadedModel | None = None,
    work: Path | str | None = None,
    codes: CodeSource | None = None,
    kernels: bool = True,
    objects: Sequence[str] = (),
    force: bool = False,
    device: str = "cpu",
) -> Path:
    """Compile a plan into an artifact: a folder that transformers loads after `import reallm`.

    Parameters
    ----------
    plan_path
        The plan.json that `reallm plan` wrote.
    output
        The folder to create. It appears only when it is complete.
    model
        The model that the plan was made for, if it has moved: a folder, .gguf file, hub name or loaded model.
    work
        The folder that `reallm measure` wrote, if it has moved.
    codes
        Another source of the packed codes, in place of `work`.
    kernels
        Add the generated sources of the GPU kernels in `output`/kernels.
    objects
        GPU targets ("sm_80", "sm_90", "gfx942", ...) for which the kernels are compiled too. They are for inspection:
        running an artifact compiles the kernels it needs. Needs Triton and takes minutes per target.
    force
        Replace an artifact at `output`.
    device
        Where codes that the work folder does not hold are encoded again: "cpu", "cuda", "cuda:1" or "auto"; use the
        device that they were measured on, otherwise they may differ from the plan's.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    UserError
        If `output` exists, or the plan was made for another model or with other measured codes.
    RecordError
        If the plan is missing or damaged.
    CodegenError
        For an unknown target, without Triton, or if a kernel does not compile. All of these are subclasses of
        ReallmError.

    Examples
    --------
    >>> reallm.compile("plan.json", "out")
    PosixPath('out')
    """
    output = Path(output)
    check_output(output, force)
    place = parse_device(device)
    if objects and not kernels:
        raise UserError("--objects compiles the generated kernels; leave out --no-kernels")
    check_targets(objects)
    plan = plan_of(plan_path)
    table = find_table(plan, plan_path, work) if codes is None else Path()
    loaded = model if isinstance(model, LoadedModel) else load_plan_model(plan, plan_path, model)
    if loaded.digest != plan.model_sha256:
        raise UserError(f"{plan_path} is a plan for another model than {loaded.source}; plan again, or give that model")
    compilation = Compilation(plan, loaded, codes or _measured_codes(table, plan, loaded, place))
    return write_artifact(compilation, output, force=force, kernels=kernels, objects=objects)
