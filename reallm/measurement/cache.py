"""The content-addressed cache of encoded matrices: the key of an entry is a hash of everything its content depends on.

An entry has two files: `<xx>/<key>.json` holds the measurement, `<xx>/<key>.safetensors` the packed fields. The fields
may be left out to save disk space; `compile` then encodes the chosen matrices again. Files are written atomically, so
kill -9 loses only the work in progress. Two processes, on one machine or on two that share the folder, at worst do the
same work twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from reallm.codecs.packed_fields import PackedFields
from reallm.kernels.storage.atomic import canonical_json, partial_path
from reallm.planner.tables.measured_table import MeasurementRecord
from reallm.planner.tables.records import write_record


def content_key(parts: Mapping[str, object]) -> str:
    """Hex sha256 of the canonical JSON of `parts`."""
    return hashlib.sha256(canonical_json(dict(parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """The cache in one folder."""

    folder: Path

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}.{suffix}"

    def measurement(self, key: str) -> MeasurementRecord | None:
        """Read the measurement stored under `key`; None if it is missing or damaged."""
        try:
            return MeasurementRecord.model_validate_json(self._path(key, "json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError, json.JSONDecodeError, UnicodeDecodeError):
            return None

    def fields(self, key: str) -> PackedFields | None:
        """Read the packed fields stored under `key`; None if their file is missing or damaged."""
        path = self._path(key, "safetensors")
        try:
            return dict(load_file(path))
        except (FileNotFoundError, SafetensorError):
            return None

    def has_fields(self, key: str) -> bool:
        """Whether packed fields are stored under `key`, without reading them."""
        return self._path(key, "safetensors").is_file()

    def put_fields(self, key: str, fields: PackedFields) -> None:
        """Store packed fields atomically."""
        path = self._path(key, "safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        try:
            save_file(fields, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def put_measurement(self, key: str, record: MeasurementRecord) -> None:
        """Store a measurement atomically. Packed fields that are to be kept must be stored before their measurement."""
        write_record(self._path(key, "json"), record)
