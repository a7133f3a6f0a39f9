"""Where a plan is written: a new file, or in place of an earlier plan, and nothing else."""

from __future__ import annotations

from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import RecordError, read_record


def replaced_plan(output: str | Path) -> Plan | None:
    """The plan that writing to `output` would replace; None if there is no such file.

    Raises UserError if `output` is a folder, a file that is not a plan, or the plan inside an artifact.
    """
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; expected the name of a file, such as plan.json")
    if not path.exists():
        return None
    if (path.parent / CONFIG_FILE).exists():
        raise UserError(f"--output {path} lies in the folder of a model, which must not change; give another name")
    try:
        return read_record(path, Plan, "plan")
    except RecordError:
        raise UserError(
            f"--output {path} exists and is not a plan that this version can read; give another name or remove it"
        ) from None
