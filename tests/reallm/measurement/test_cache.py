"""The cache: entries are complete or absent, and keys differ in everything that matters."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import partial_path
from reallm.measurement.cache import Cache, content_key
from reallm.measurement.encoding import Job
from reallm.planner.tables.measured_table import MeasurementRecord

KEY = content_key({"a": 1})
FIELDS = {"codes": np.arange(64, dtype=np.uint8), "scales": np.zeros(128, dtype=np.uint8)}
RECORD = MeasurementRecord(
    matrix="m",
    format="int4-g8",
    nbytes=192,
    guided=0.1,
    two_sided=0.1,
    fisher=0.3,
    relative=1e-30,
    seconds=0.5,
    codes_sha256="0" * 64,
)


def filled(folder: Path) -> Cache:
    cache = Cache(folder)
    cache.put_fields(KEY, FIELDS)
    cache.put_measurement(KEY, RECORD)
    return cache


def test_stored_entries_are_read_back(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert cache.measurement(KEY) == RECORD
    fields = cache.fields(KEY)
    assert fields is not None and set(fields) == set(FIELDS)
    assert all(np.array_equal(fields[name], FIELDS[name]) for name in FIELDS)
    other = content_key({"a": 2})
    assert cache.measurement(other) is None and cache.fields(other) is None


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_entry_counts_as_none(suffix: str, share: float, tmp_path: Path) -> None:
    cache = filled(tmp_path)
    (path,) = tmp_path.rglob(f"*.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert (cache.measurement(KEY) if suffix == "json" else cache.fields(KEY)) is None
    assert (cache.fields(KEY) if suffix == "json" else cache.measurement(KEY)) is not None


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"null", b"[]", b'{"matrix": "m"}'])
def test_an_entry_of_another_form_counts_as_none(content: bytes, tmp_path: Path) -> None:
    cache = filled(tmp_path)
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(content)
    assert cache.measurement(KEY) is None


@pytest.mark.parametrize("what", ["fields", "measurement"])
def test_a_full_disk_leaves_the_old_entry_and_no_litter(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.put_fields(KEY, {}) if what == "fields" else cache.put_measurement(KEY, RECORD)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_keys_tell_everything_apart(tmp_path: Path) -> None:
    int4, int5 = Format.parse("int4-g8"), Format.parse("int5-g8")
    jobs = [Job.at(tmp_path, identity, seed) for identity in ("a" * 64, "b" * 64) for seed in (0, 1)]
    keys = [job.key(name, fmt) for job in jobs for name in ("q", "k") for fmt in (int4, int5)]
    keys += [job.codebook_key(name) for job in jobs for name in ("q", "k")]
    assert len(set(keys)) == len(keys) == 24
    assert jobs[0].key("q", int4) == Job.at(tmp_path / "elsewhere", "a" * 64, 0).key("q", int4)


def test_processes_with_the_same_number_on_two_machines_use_different_files() -> None:
    names = {partial_path(Path("/folder/entry.json")) for _ in range(100)}
    assert len(names) == 100 and all(path.parent == Path("/folder") and path.suffix == ".partial" for path in names)
