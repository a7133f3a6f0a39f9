"""Verify that an artifact is byte for byte what was compiled, and that its formats and sizes are those of its plan.

The quick checks read no tensor values: they check the manifest, the names and sizes of files, the headers, and that
config.json agrees with the plan. The deep checks hash every tensor and every guarded file (see `manifest`), recompute
the digests of all codes, and look for padding that is not zero and values that are not finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import PLAN_FILE, Choice, Plan, read_plan
from reallm.planner.tables.tensor_layout import shared_tensor

from .bundled_adapters import AdapterView, check_adapters, linear_shapes
from .directory import read_record_of
from .find import is_saved_copy, require_artifact
from .manifest import MANIFEST_FILE, FileEntry, Manifest, artifact_files, free_files, read_manifest, sha256_file
from .quantization_config import QuantizationRecord
from .saved_copy import check_copy
from .stored_values import check_fields, check_values, read_bytes, read_tensors


@dataclass(frozen=True)
class Report:
    """What `verify` checked and found to be right; it raises an error instead of returning a report otherwise.

    >>> reallm.verify("out", deep=False).deep
    False
    """

    path: str
    files: int
    """Number of guarded files, including the manifest; 0 if there is no manifest."""
    file_bytes: int
    """Total size of the weights files, in bytes."""
    tensors: int
    matrices: int
    deep: bool
    """Whether every byte was read."""
    adapters: tuple[AdapterView, ...] = ()
    """The adapters inside the artifact."""
    unchecked: tuple[str, ...] = ()
    """Relative paths of the files that are not checked because they do not affect the model: cards, licences, pictures
    and files of git and of the hub. The path of a folder ends with a slash."""
    hashed: bool = True
    """Whether the artifact has a manifest. It has none after transformers loaded and saved it: then everything is
    checked except whether a value was changed, and `files` is 0."""


def verify(path: Path | str, deep: bool = True, adapters: bool = True) -> Report:
    """Check that an artifact is unchanged since it was compiled, and that its formats and sizes are those of its plan.

    Parameters
    ----------
    path
        The folder that `reallm compile` or `reallm finetune` wrote, its name on the Hugging Face hub, or a folder to
        which transformers saved it.
    deep
        Read and hash every byte. Otherwise only manifest, file sizes, headers, configuration and plan are checked.
    adapters
        Also check the adapters in the artifact's folder `adapters`; `deep` then reads all of their values too.

    Returns
    -------
    Report
        What was checked, and under `unchecked` the files that were not: cards, licences, pictures and files of git and
        of the hub may be changed, added and removed (`artifacts.manifest.is_free`).

    Raises
    ------
    UserError
        With one line about the first thing that is wrong: a file or tensor that is missing, changed or not listed, a
        configuration that differs from the plan, or an adapter that cannot be used.
    RecordError
        Likewise, for a plan that cannot be read. Both are subclasses of ReallmError.

    Examples
    --------
    >>> report = reallm.verify("out")
    >>> report.matrices, report.deep
    (14, True)
    """
    folder = require_artifact(path)
    if is_saved_copy(folder):
        return _verify_copy(folder, deep)
    manifest = read_manifest(folder)
    guarded = manifest.guarded()
    _check_files(folder, guarded, deep)
    record, plan, tensors = read_record_of(folder), read_plan(folder), read_tensors(folder)
    if manifest.model_sha256 != plan.model_sha256 or manifest.plan_sha256 != sha256_file(folder / PLAN_FILE):
        raise UserError(f"{folder / MANIFEST_FILE} belongs to another plan than {PLAN_FILE}; copy the artifact again")
    if set(manifest.tensors) != set(tensors):
        odd = sorted(set(manifest.tensors) ^ set(tensors))[0]
        raise UserError(
            f"{folder}: tensor {odd!r} is in the weights or in {MANIFEST_FILE}, but not in both; "
            "copy the artifact again"
        )
    _check_plan(folder, plan, record, tensors)
    if deep:
        _check_contents(manifest, plan, record, tensors)
    weights = {tensor.path for tensor in tensors.values()}
    return Report(
        path=str(folder),
        files=len(guarded) + 1,
        file_bytes=sum(file.stat().st_size for file in weights),
        tensors=len(tensors),
        matrices=len(plan.choices),
        deep=deep,
        adapters=check_adapters(folder, linear_shapes(plan, tensors), deep) if adapters else (),
        unchecked=free_files(folder),
    )


def _verify_copy(folder: Path, deep: bool) -> Report:
    tensors, matrices = check_copy(folder, deep)
    weights = {tensor.path for tensor in read_tensors(folder).values()}
    return Report(
        path=str(folder),
        files=0,
        file_bytes=sum(file.stat().st_size for file in weights),
        tensors=tensors,
        matrices=matrices,
        deep=deep,
        hashed=False,
    )


def _check_files(folder: Path, guarded: Mapping[str, FileEntry], deep: bool) -> None:
    """Check that the guarded files in `folder` are the listed ones, with their sizes and, if `deep`, their sha256."""
    paths = dict(artifact_files(folder))
    if missing := sorted(set(guarded) - set(paths)):
        raise UserError(f"{folder} lacks {missing[0]}, which {MANIFEST_FILE} lists; copy the artifact again")
    if unlisted := sorted(set(paths) - set(guarded)):
        raise UserError(
            f"{folder / unlisted[0]} is not listed in {MANIFEST_FILE}: only cards, licences and pictures may be added "
            "to an artifact; remove it"
        )
    for name, entry in guarded.items():
        size = paths[name].stat().st_size
        if size != entry.nbytes:
            raise UserError(f"{paths[name]} has {size} bytes, expected {entry.nbytes}; copy the artifact again")
    if not deep:
        return
    for name, entry in guarded.items():
        if sha256_file(paths[name]) != entry.sha256:
            raise UserError(
                f"{paths[name]} was changed after it was compiled (sha256 differs); copy the artifact again"
            )


def _check_plan(folder: Path, plan: Plan, record: QuantizationRecord, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that config.json names the plan's formats, and that the matrices take as many bytes as the plan says."""
    formats = {matrix: fmt.name for matrix, fmt in record.matrices()}
    for choice in plan.choices:
        fmt = Format.parse(choice.format)
        if choice.matrix not in formats:
            if choice.codes_sha256 and not isinstance(fmt.codec, DenseCodec):
                raise UserError(f"{folder}: config.json does not name {choice.matrix}, which the plan packs")
            continue
        if formats[choice.matrix] != fmt.name:
            raise UserError(
                f"{folder}: {choice.matrix} is {formats[choice.matrix]} in config.json, {fmt.name} in the plan"
            )
        fields = fmt.fields(choice.rows, choice.cols)
        check_fields(folder, choice.matrix, fields, tensors)
        nbytes = sum(field.nbytes for field in fields)
        if nbytes != choice.nbytes:
            raise UserError(f"{folder}: {choice.matrix} takes {nbytes} bytes, {choice.nbytes} in the plan")
    for key, nbytes in plan.shared.items():
        stored = tensors.get(shared_tensor(key, nbytes).name)
        if stored is None or stored.dtype != "U8" or stored.shape != (nbytes,):
            raise UserError(f"{folder}: the shared codebooks {key} are missing or do not have {nbytes} bytes")
    total = sum(path.stat().st_size for path in {tensor.path for tensor in tensors.values()})
    if total != plan.file_bytes:
        raise UserError(f"{folder}: the weights take {total} bytes, {plan.file_bytes} in the plan")


def _check_contents(
    manifest: Manifest, plan: Plan, record: QuantizationRecord, tensors: Mapping[str, StoredTensor]
) -> None:
    """Check that tensors match the manifest's digests and codes those of the plan, and that all values are valid."""
    for name, tensor in tensors.items():
        if hashlib.sha256(read_bytes(tensor).tobytes()).hexdigest() != manifest.tensors[name]:
            raise UserError(f"{tensor.path}: tensor {name!r} was changed (sha256 differs); copy the artifact again")
    packed = {matrix for matrix, _ in record.matrices()}
    for choice in plan.choices:
        if choice.matrix in packed:
            _check_codes(choice, tensors)
    for key, fmt in record.shared_formats().items():
        if (field := fmt.shared_field) is not None:
            tensor = tensors[shared_tensor(key, field.nbytes).name]
            check_values(key, [(field, read_bytes(tensor))], tensor.path)


def _check_codes(choice: Choice, tensors: Mapping[str, StoredTensor]) -> None:
    fields = list(_fields(choice, tensors))
    path = tensors[f"{choice.matrix}.{fields[0][0].name}"].path
    digest = hashlib.sha256(b"".join(raw.tobytes() for _, raw in fields)).hexdigest()
    if choice.codes_sha256 and digest != choice.codes_sha256:
        raise UserError(f"{path}: the codes of {choice.matrix} are not those of its plan; compile again")
    check_values(choice.matrix, fields, path)


def _fields(choice: Choice, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[Field, NDArray[np.uint8]]]:
    for field in Format.parse(choice.format).fields(choice.rows, choice.cols):
        yield field, read_bytes(tensors[f"{choice.matrix}.{field.name}"])
