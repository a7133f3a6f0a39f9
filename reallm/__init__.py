"""reallm fits a language model into a memory budget with the least possible loss. See docs/architecture.md.

Importing it makes transformers understand reallm's model directories; nothing heavy is imported for that. The stages
are functions here, imported when they are first asked for: measure, plan, compile, load, evaluate, finetune.
`Requirements` is what a plan must keep beside its budget.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from reallm.runtime.registration import register_with_transformers

if TYPE_CHECKING:
    from reallm.compilation.compile import compile_plan as compile  # noqa: A004 - the stage's name; never imported with *
    from reallm.evaluation.evaluate import evaluate
    from reallm.finetuning.run import finetune
    from reallm.measurement.measure import measure
    from reallm.planner.tables.requirements import Requirements
    from reallm.planning.plan import plan, sweep
    from reallm.reporting.report import report
    from reallm.runtime.load import load

__all__ = ["Requirements", "compile", "evaluate", "finetune", "load", "measure", "plan", "report", "sweep"]

_STAGES = {
    "measure": ("measurement.measure", "measure"),
    "plan": ("planning.plan", "plan"),
    "sweep": ("planning.plan", "sweep"),
    "report": ("reporting.report", "report"),
    "Requirements": ("planner.tables.requirements", "Requirements"),
    "compile": ("compilation.compile", "compile_plan"),
    "load": ("runtime.load", "load"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "finetune": ("finetuning.run", "finetune"),
}


def __getattr__(name: str) -> object:
    """A stage's function, imported now (PEP 562)."""
    if name not in _STAGES:
        raise AttributeError(f"module 'reallm' has no attribute {name!r}")
    module, function = _STAGES[name]
    return getattr(import_module(f".{module}", __name__), function)


register_with_transformers()
