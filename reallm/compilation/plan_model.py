"""The model that a plan was made for, found again when the plan is compiled, measured or fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.models.loaded import LoadedModel, load_model
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.work_folder import recorded_places


def load_plan_model(
    plan: Plan, beside: str | Path | None, given: str | Path | None = None, option: str = "--model"
) -> LoadedModel:
    """Load the model that `plan` was made for.

    `given` names the model if it has moved; without it, a relative path in the plan is tried from the current folder
    and from the folders above `beside`, the path of the plan or artifact. Raises UserError, which names `option`, if
    the model is not there, cannot be loaded or is another one.
    """
    source = given or next(_places(plan.model, beside), plan.model)
    try:
        loaded = load_model(source)
    except UserError as error:
        if given:
            raise
        line = f"the plan was made for the model {plan.model}: if it has moved, name it with {option}. Found: {error}"
        raise UserError(line) from None
    if loaded.digest != plan.model_sha256:
        raise UserError(
            f"{beside or 'this'} was made for another model than {loaded.source}; name the right one with {option}, or "
            "plan again"
        )
    return loaded


def _places(recorded: str, beside: str | Path | None) -> Iterator[str]:
    """The local models that the name in a plan may mean, the most likely first; empty for a name on the hub."""
    for path in recorded_places(recorded, beside):
        if path.is_file() or (path / CONFIG_FILE).is_file():
            yield str(path)
