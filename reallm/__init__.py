"""reallm fits a language model into a memory budget with the least possible loss. See docs/architecture.md.

Importing it makes transformers understand reallm's model directories; nothing heavy is imported for that. The stages
are functions here, imported when they are first asked for: measure, plan, compile, load, evaluate, finetune.
`Requirements` is what a plan must keep beside its budget.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register_with_transformers

if TYPE_CHECKING:
    from .compiler import compile_plan as compile  # noqa: A004 - the stage's name; never imported with *
    from .evaluation import evaluate
    from .finetuning import finetune
    from .loading import load
    from .measurement import measure
    from .planner.requirements import Requirements
    from .planning import plan, sweep
    from .reporting import report

__all__ = ["Requirements", "compile", "evaluate", "finetune", "load", "measure", "plan", "report", "sweep"]

_STAGES = {
    "measure": ("measurement", "measure"),
    "plan": ("planning", "plan"),
    "sweep": ("planning", "sweep"),
    "report": ("reporting", "report"),
    "Requirements": ("planner.requirements", "Requirements"),
    "compile": ("compiler", "compile_plan"),
    "load": ("loading", "load"),
    "evaluate": ("evaluation", "evaluate"),
    "finetune": ("finetuning", "finetune"),
}


def __getattr__(name: str) -> object:
    """A stage's function, imported now (PEP 562)."""
    if name not in _STAGES:
        raise AttributeError(f"module 'reallm' has no attribute {name!r}")
    module, function = _STAGES[name]
    return getattr(import_module(f".{module}", __name__), function)


register_with_transformers()
