"""Whole jobs: `reallm compress` as a user runs it, in a process of its own whose processor seconds are counted.

The work folder of a job begins with the calibration statistics of the full measurement, which are the same, so that
calibration is not paid for once per budget; its processor seconds are those of the full measurement.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.bench import SEQLEN, Bench
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.tables.measured_table import MeasuredTable, MeasurementRecord
from reallm.planner.tables.work_folder import read_table

RESULT, OUTPUT = "job.json", "out"


@dataclass(frozen=True)
class Job:
    """What one whole job took."""

    bits: float
    processor_seconds: float
    """Processor seconds of encoding, planning and packing, with start-up and workers, without calibration."""
    peak_rss_bytes: int
    """Peak memory of its largest process."""
    encoding_seconds: float
    encodings: int


def run_job(bench: Bench, full: Path, folder: Path, bits: float, gap: float) -> Job:
    """Run `compress` in `folder`, or read the result of an earlier run.

    Raises CalledProcessError if the command fails.
    """
    path = folder / RESULT
    if path.exists():
        return Job(**json.loads(path.read_text(encoding="utf-8")))
    work = folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "statistics").symlink_to(full / "statistics")
    command = [sys.executable, "-m", "reallm", "compress", str(bench.base_folder), "--budget", f"{bits:g}bpw"]
    text = ["--text", bench.text] if bench.text else []
    settings = [*text, "--nsamples", str(bench.nsamples), "--seqlen", str(SEQLEN), "--windows", "0"]
    settings += ["--space", os.environ.get("SPACE") or "default"]
    places = ["--work", str(work), "--output", str(folder / OUTPUT), "--gap", f"{gap:g}"]
    arguments = [*command, *settings, *places, "--jobs", os.environ.get("JOBS") or "-1"]
    process = subprocess.Popen(arguments)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    table = read_table(work)
    job = Job(
        bits=bits,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * 1024,
        encoding_seconds=sum(record.seconds for record in table.measurements),
        encodings=len(table.measurements),
    )
    write_text_atomic(path, canonical_json(asdict(job)))
    return job


def differing(measured: MeasuredTable, full: MeasuredTable) -> list[str]:
    """The candidates of `measured` whose codes, bytes or costs are not those of `full`; seconds may differ."""
    known = {(r.matrix, r.format): _without_seconds(r) for r in full.measurements}
    return [
        f"{r.matrix} {r.format}"
        for r in measured.measurements
        if _without_seconds(r) != known.get((r.matrix, r.format))
    ]


def _without_seconds(record: MeasurementRecord) -> MeasurementRecord:
    return record.model_copy(update={"seconds": 0.0})
