"""`quantization_config` of config.json: the format of every packed matrix, checked before a model is built from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import ValidationError, field_validator

from reallm.errors import UserError
from reallm.kernels.formats.fields import FormatError
from reallm.kernels.formats.formats import Format
from reallm.planner.tables.records import Record

METHOD = "reallm"
MAX_MATRICES = 1_000_000
DecodeMode = Literal["load", "call"]
"""Whether a packed module keeps its decoded weight ("load") or decodes at every call ("call")."""


def shared_name(key: str) -> str:
    """The module name of the shared codebook `key`."""
    return re.sub(r"[^A-Za-z0-9_]", "_", key)


class QuantizationRecord(Record):
    """The format of every packed matrix. Sizes are not stored: they follow from the shapes of the model."""

    quant_method: Literal["reallm"] = "reallm"
    version: Literal[1] = 1
    decode: DecodeMode = "load"
    formats: Mapping[str, tuple[str, ...]]
    """Canonical format name -> the matrices stored in it."""
    shared: Mapping[str, tuple[str, ...]] = {}
    """Key of a shared codebook -> the matrices that use it."""
    tied: Mapping[str, str] = {}
    """Head module -> the packed embedding module whose weight it uses."""
    aliases: Mapping[str, str] = {}
    """Tensor that is not stored -> the stored tensor that it equals (such as a head's second bias)."""
    transposed: tuple[str, ...] = ()
    """Stacked expert parameters that the model keeps as [experts, in_features, out_features]."""

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, formats: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
        for name in formats:
            try:
                canonical = Format.parse(name).name
            except FormatError as error:
                raise ValueError(str(error)) from None
            if canonical != name:
                raise ValueError(f"format {name!r} is not written canonically; expected {canonical!r}")
        names = [matrix for matrices in formats.values() for matrix in matrices]
        if len(names) > MAX_MATRICES or len(set(names)) != len(names):
            raise ValueError("too many matrices, or a matrix that is listed twice")
        return formats

    def matrices(self) -> Iterator[tuple[str, Format]]:
        """Every packed matrix and its format, in the order of the record."""
        for name, matrices in self.formats.items():
            for matrix in matrices:
                yield matrix, Format.parse(name)

    def shared_formats(self) -> dict[str, Format]:
        """Key of each shared codebook -> a format that uses it. Raises UserError if the record is inconsistent."""
        formats = dict(self.matrices())
        result: dict[str, Format] = {}
        for key, users in self.shared.items():
            for matrix in users:
                fmt = formats.get(matrix)
                if fmt is None or fmt.shared_field is None or fmt.shared_name != key.partition("@")[0]:
                    raise UserError(f"config.json: {matrix!r} cannot use the shared codebooks {key!r}")
                result[key] = fmt
        needing = {matrix for matrix, fmt in formats.items() if fmt.shared_field}
        listed = [matrix for users in self.shared.values() for matrix in users]
        if needing != set(listed) or len(listed) != len(needing):
            raise UserError(
                "config.json: `shared` does not list exactly the matrices whose formats use shared codebooks"
            )
        if len({shared_name(key) for key in result}) != len(result):
            raise UserError("config.json: two keys of shared codebooks lead to the same module name")
        return result


def read_quantization(value: Mapping[str, object]) -> QuantizationRecord:
    """Check the value of `quantization_config`. Raises UserError that names the first wrong field."""
    try:
        record = QuantizationRecord.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "the record"
        raise UserError(
            f"config.json: quantization_config is not what `reallm compile` writes: {where}: {first['msg'][:300]}"
        ) from None
    record.shared_formats()
    return record
