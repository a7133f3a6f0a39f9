"""Assembling the measured table from the records of this run and of earlier runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reallm.codecs.encode import CODEC_VERSION
from reallm.models.kv_cache import experts_per_token, kv_cache
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable, MeasurementRecord, SharedRecord
from reallm.planner.tables.records import RecordError, read_record, write_record
from reallm.system.lock import exclusive_lock
from reallm.system.torch_dtypes import FLOAT_NAMES
from reallm.text.corpus import Text

from .search_space import Space

Settings = Mapping[str, int | float | str | bool | None]


def assemble_table(
    loaded: LoadedModel,
    text: Text,
    records: Sequence[MeasurementRecord],
    shared: Sequence[SharedRecord],
    settings: Settings,
    tokens: int,
    base: Mapping[str, float],
) -> MeasuredTable:
    """Make the table of one run.

    `tokens` is the number of calibration tokens; `base` holds the model's perplexity, timings and memory use.
    """
    order = {m.name: i for i, m in enumerate(loaded.matrices)}
    return MeasuredTable.model_validate(
        {
            "model": loaded.source,
            "model_sha256": loaded.digest,
            "text": text.description,
            "text_sha256": text.sha256,
            "settings": {**settings, "codec": CODEC_VERSION, "tokens": tokens},
            "dtype": FLOAT_NAMES[loaded.dtype],
            "other_tensors": loaded.other_tensors(),
            "matrices": tuple(m.record() for m in loaded.matrices),
            "measurements": tuple(sorted(records, key=lambda r: (order[r.matrix], r.format))),
            "shared": tuple(shared),
            "kv_cache": kv_cache(loaded.model),
            "experts_per_token": experts_per_token(loaded.model),
            "base": dict(base),
        }
    )


def write_table(table: MeasuredTable, space: Space, output: Path) -> MeasuredTable:
    """Add the measurements of earlier runs to `table`, count those that are missing, and write it to folder `output`.

    The folder is locked during this, because another process or machine may be adding its measurements too.
    """
    with exclusive_lock(output):
        table = _with_earlier(table, output)
        table = table.model_copy(update={"bounded": _count_unmeasured(table, space)})
        write_record(output / TABLE_FILE, table)
    return table


def _with_earlier(table: MeasuredTable, output: Path) -> MeasuredTable:
    """Add to `table` what earlier runs measured in other formats on the same model, text and settings."""
    try:
        earlier = read_record(output / TABLE_FILE, MeasuredTable, "measure")
    except RecordError:  # no table yet, or one of another version
        return table
    if any(earlier.settings.get(key) != table.settings[key] for key in ("identity", "codec")):
        return table
    known = {(r.matrix, r.format) for r in table.measurements}
    added = [r for r in earlier.measurements if (r.matrix, r.format) not in known]
    shared_keys = {record.key for record in table.shared}
    order = {m.name: i for i, m in enumerate(table.matrices)}
    return table.model_copy(
        update={
            "measurements": tuple(sorted([*table.measurements, *added], key=lambda r: (order[r.matrix], r.format))),
            "shared": (*table.shared, *(record for record in earlier.shared if record.key not in shared_keys)),
        }
    )


def _count_unmeasured(table: MeasuredTable, space: Space) -> dict[str, int]:
    """Format name -> number of matrices that were not measured in it, for formats of the space where it is not zero."""
    known = {(record.matrix, record.format) for record in table.measurements}
    counts: dict[str, int] = {}
    for matrix in table.matrices:
        for fmt in space.formats[matrix.kind]:
            if (matrix.name, fmt.name) not in known:
                counts[fmt.name] = counts.get(fmt.name, 0) + 1
    return counts
