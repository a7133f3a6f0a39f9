"""The content-addressed cache of encoded matrices: two files an entry, named by the hash of what decides it.

`<xx>/<key>.json` holds the measurement, `<xx>/<key>.safetensors` the packed fields (which may be left out to save
disk and are then made again when a plan is compiled). Files appear whole or not at all, so kill -9 and two processes
at once, on one machine or on two that share the folder, cost nothing but work done twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from reallm.codecs.packed_fields import PackedFields
from reallm.kernels.storage.atomic import canonical_json, partial_path
from reallm.planner.tables.measured_table import MeasurementRecord
from reallm.planner.tables.records import write_record


def content_key(parts: Mapping[str, object]) -> str:
    """sha256 of the canonical JSON of `parts`."""
    return hashlib.sha256(canonical_json(dict(parts)).encode()).hexdigest()


def fields_sha256(fields: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> str:
    """Digest of packed fields, their bytes one after another in the order of the mapping."""
    digest = hashlib.sha256()
    for value in fields.values():
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of entries."""

    folder: Path

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}.{suffix}"

    def measurement(self, key: str) -> MeasurementRecord | None:
        """The measurement stored under `key`; a damaged entry counts as none."""
        try:
            return MeasurementRecord.model_validate_json(self._path(key, "json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError, json.JSONDecodeError, UnicodeDecodeError):
            return None

    def fields(self, key: str) -> PackedFields | None:
        """The packed fields stored under `key`; a damaged entry counts as none."""
        path = self._path(key, "safetensors")
        try:
            return dict(load_file(path))
        except (FileNotFoundError, SafetensorError):
            return None

    def put_fields(self, key: str, fields: PackedFields) -> None:
        """Store packed fields, atomically."""
        path = self._path(key, "safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        try:
            save_file(fields, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def put_measurement(self, key: str, record: MeasurementRecord) -> None:
        """Store a measurement, atomically; its fields, if kept, are stored before it."""
        write_record(self._path(key, "json"), record)
