"""The artifact that the user names: a folder, or a name on the Hugging Face hub, fetched whole into the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.planner.tables.plan import PLAN_FILE, Plan, read_plan
from reallm.planner.tables.work_folder import table_path

from .directory import is_artifact
from .manifest import MANIFEST_FILE

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.gguf)(?<!\.html)(?<!\.safetensors)")


def find_artifact(name: Path | str) -> Path | None:
    """The folder of the artifact `name`; None if that is not an artifact, or is neither here nor on the hub.

    Raises UserError for a damaged config.json, and if the files of an artifact on the hub cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.exists() or not _HUB_NAME.fullmatch(str(name)):
        return path if is_artifact(path) else None
    return _fetch(str(name))


def _fetch(name: str) -> Path | None:
    """The folder of the artifact `name` of the hub, in the hub's cache; None if there is none. Raises UserError."""
    from huggingface_hub import hf_hub_download, snapshot_download  # takes longer than everything else in this module
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        config = Path(hf_hub_download(name, CONFIG_FILE))
    except (OSError, HFValidationError, HfHubHTTPError):
        return None
    if not is_artifact(config.parent):
        return None
    try:
        return Path(snapshot_download(name))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name} cannot be fetched from the hub ({reason}); check the connection") from error


def require_artifact(name: Path | str) -> Path:
    """The folder of the artifact `name`. Raises UserError, which says what `name` is, if it is not an artifact."""
    folder = find_artifact(name)
    if folder is not None:
        return folder
    path, way_out = Path(name).expanduser(), "expected an artifact, which `reallm compile` writes"
    if not path.exists():
        raise UserError(f"{name} does not exist here or on the hub; {way_out}")
    if path.is_file():
        raise UserError(f"{name} is a file; {way_out} as a folder")
    if table_path(path).exists():
        raise UserError(f"{name} is a work folder of `reallm measure`; {way_out} from a plan.json")
    if not (path / CONFIG_FILE).exists():
        raise UserError(f"{name} has no {CONFIG_FILE}; {way_out}")
    raise UserError(f"{name} is an ordinary model, not a reallm artifact; {way_out}")


def plan_of(name: Path | str) -> Plan:
    """The plan in the file `name`, or the one inside the artifact `name`.

    Raises UserError for anything else, and RecordError for a damaged plan.
    """
    if Path(name).expanduser().is_file() or Path(name).suffix == ".json":
        return read_plan(Path(name).expanduser())
    folder = require_artifact(name)
    if is_saved_copy(folder):
        raise UserError(
            f"{name} has no {PLAN_FILE}: transformers saved it, and keeps only what it needs to load the model; give "
            "the artifact that `reallm compile` wrote"
        )
    return read_plan(folder)


def is_saved_copy(folder: Path) -> bool:
    """Whether an artifact is one that transformers loaded and saved again, without plan and manifest."""
    return not (folder / PLAN_FILE).exists() and not (folder / MANIFEST_FILE).exists()
