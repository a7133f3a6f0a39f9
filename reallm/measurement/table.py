"""Assembling the measured table from the records of this run and of earlier runs.

Runs with the same model, text and settings add to one table. A run with others starts a new one, and the table that it
replaces is kept (`planner.tables.work_folder`), so that plans made from it stay usable.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from reallm.calibration.calibrate import CalibrationReport
from reallm.codecs.encode import CODEC_VERSION
from reallm.models.kv_cache import experts_per_token
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.measured_table import TABLE_FILE, CacheLayer, MeasuredTable, SharedRecord
from reallm.planner.tables.records import write_record
from reallm.planner.tables.work_folder import described, keep_earlier, tables_in
from reallm.system.lock import exclusive_lock
from reallm.system.torch_dtypes import FLOAT_NAMES
from reallm.text.corpus import Text

from .search_space import Space

LOG = logging.getLogger(__name__)
Settings = Mapping[str, int | float | str | bool | None]


def assemble_table(
    loaded: LoadedModel,
    text: Text,
    shared: Sequence[SharedRecord],
    settings: Settings,
    report: CalibrationReport,
    cache: Sequence[CacheLayer],
) -> MeasuredTable:
    """Make the table of one run, still without measurements and facts about the run; `cache` is its KV cache."""
    kept: dict[str, list[str]] = {}
    for name, reason in report.kept.items():
        kept.setdefault(reason, []).append(name)
    return MeasuredTable.model_validate(
        {
            "model": loaded.source,
            "model_sha256": loaded.digest,
            "text": text.description,
            "text_sha256": text.sha256,
            "settings": {**settings, "codec": CODEC_VERSION, "tokens": report.tokens},
            "dtype": FLOAT_NAMES[loaded.dtype],
            "other_tensors": loaded.other_tensors(),
            "other_dtypes": loaded.other_dtypes(),
            "matrices": tuple(m.record() for m in loaded.matrices),
            "measurements": (),
            "shared": tuple(shared),
            "kv_cache": cache,
            "experts_per_token": experts_per_token(loaded.model),
            "kept": kept,
        }
    )


def write_table(table: MeasuredTable, space: Space, output: Path) -> MeasuredTable:
    """Add the measurements of earlier runs to `table`, count those that are missing, and write it to folder `output`.

    A table of other settings that it replaces is kept, and a log line names its file. The folder is locked during this,
    because another process or machine may be adding its measurements too.
    """
    with exclusive_lock(output):
        table = _with_earlier(table, output)
        table = table.model_copy(update={"bounded": _count_unmeasured(table, space)})
        kept = keep_earlier(output, table)
        write_record(output / TABLE_FILE, table)
    if kept is not None:
        _log_kept(output, table, *kept)
    return table


def _log_kept(output: Path, table: MeasuredTable, path: Path, earlier: MeasuredTable | None) -> None:
    """Log where the table that `table` replaces is kept, unless `table` holds everything that it holds."""
    if earlier is None:
        LOG.warning("%s cannot be read (damaged, or of another version): it is kept as %s", output / TABLE_FILE, path)
    elif not _same_settings(earlier, table):
        LOG.info(
            "%s held measurements of other settings (%s): they are kept in %s, and plans made from them can still be "
            "compiled",
            output,
            described(earlier),
            path,
        )


def _same_settings(one: MeasuredTable, other: MeasuredTable) -> bool:
    """Whether two tables measured the same model with the same encoders, text and settings."""
    return all(one.settings.get(key) == other.settings.get(key) for key in ("identity", "codec"))


def _with_earlier(table: MeasuredTable, output: Path) -> MeasuredTable:
    """Add to `table` what earlier runs measured in other formats on the same model, text and settings."""
    measurements = {(r.matrix, r.format): r for r in table.measurements}
    shared = {record.key: record for record in table.shared}
    doubts = table.doubts
    for _, earlier in tables_in(output):
        if _same_settings(earlier, table):
            doubts = doubts or earlier.doubts
            measurements = {(r.matrix, r.format): r for r in earlier.measurements} | measurements
            shared |= {record.key: record for record in earlier.shared if record.key not in shared}
    order = {m.name: i for i, m in enumerate(table.matrices)}
    ordered = sorted(measurements.values(), key=lambda r: (order[r.matrix], r.format))
    added: dict[str, object] = {"measurements": tuple(ordered), "shared": tuple(shared.values()), "doubts": doubts}
    added["predictions"] = tuple(p for p in table.predictions if (p.matrix, p.format) not in measurements)
    return table.model_copy(update=added)


def _count_unmeasured(table: MeasuredTable, space: Space) -> dict[str, int]:
    """Format name -> number of matrices neither measured nor predicted in it, where that is not zero."""
    known = {(record.matrix, record.format) for record in table.measurements}
    known |= {(prediction.matrix, prediction.format) for prediction in table.predictions}
    kept = {name for names in table.kept.values() for name in names}
    counts: dict[str, int] = {}
    for matrix in table.matrices:
        for fmt in space.formats[matrix.kind]:
            if matrix.name not in kept and (matrix.name, fmt.name) not in known:
                counts[fmt.name] = counts.get(fmt.name, 0) + 1
    return counts
