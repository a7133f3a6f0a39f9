"""reallm fits a language model into a memory budget with the least possible loss.

Importing reallm makes transformers understand reallm's model directories; torch and transformers are imported only when
they are needed. Every stage is a function of this package and a command with the same name:

    measure -> plan (sweep, refit, explain, report) -> compile -> load, generate, evaluate, finetune, inspect, verify,
    export

All errors that reallm raises on purpose are ReallmError.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from reallm.runtime.registration import register_with_transformers

if TYPE_CHECKING:
    from reallm.artifacts.inspect import Inspection, inspect
    from reallm.artifacts.verify import Report, verify
    from reallm.compilation.compile import compile_plan as compile  # noqa: A004 - the stage's name; never imported with *
    from reallm.compressing.compress import compress
    from reallm.compressing.result import Compressed
    from reallm.errors import ReallmError, UserError
    from reallm.evaluation.compare import Comparison
    from reallm.evaluation.evaluate import Evaluation, evaluate
    from reallm.finetuning.run import finetune
    from reallm.finetuning.settings import FinetuneSettings
    from reallm.kernels.formats.formats import Format
    from reallm.measurement.measure import measure
    from reallm.planner.problem.plan_options import PlanOptions
    from reallm.planner.tables.measured_table import MeasuredTable
    from reallm.planner.tables.plan import Plan
    from reallm.planner.tables.requirements import Requirements
    from reallm.planning.plan import explain, plan
    from reallm.planning.refit import refit
    from reallm.reporting.report import report
    from reallm.reporting.sweep import sweep
    from reallm.runtime.generate import generate
    from reallm.runtime.load import load
    from reallm.targets.export import export
    from reallm.targets.exported import Exported

_EXPORTS = {
    "compress": "compressing.compress",
    "measure": "measurement.measure",
    "plan": "planning.plan",
    "sweep": "reporting.sweep",
    "explain": "planning.plan",
    "refit": "planning.refit",
    "report": "reporting.report",
    "compile": "compilation.compile:compile_plan",
    "load": "runtime.load",
    "generate": "runtime.generate",
    "evaluate": "evaluation.evaluate",
    "finetune": "finetuning.run",
    "export": "targets.export",
    "inspect": "artifacts.inspect",
    "verify": "artifacts.verify",
    "Comparison": "evaluation.compare",
    "Compressed": "compressing.result",
    "Evaluation": "evaluation.evaluate",
    "Exported": "targets.exported",
    "FinetuneSettings": "finetuning.settings",
    "Format": "kernels.formats.formats",
    "Inspection": "artifacts.inspect",
    "MeasuredTable": "planner.tables.measured_table",
    "Plan": "planner.tables.plan",
    "PlanOptions": "planner.problem.plan_options",
    "ReallmError": "errors",
    "Report": "artifacts.verify",
    "Requirements": "planner.tables.requirements",
    "UserError": "errors",
}
"""Public name -> the module that defines the object, and the object's name in that module if it differs."""

__all__ = [
    "Comparison",
    "Compressed",
    "Evaluation",
    "Exported",
    "FinetuneSettings",
    "Format",
    "Inspection",
    "MeasuredTable",
    "Plan",
    "PlanOptions",
    "ReallmError",
    "Report",
    "Requirements",
    "UserError",
    "compile",
    "compress",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "generate",
    "inspect",
    "load",
    "measure",
    "plan",
    "refit",
    "report",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'reallm' has no attribute {name!r}")
    module, _, defined_as = _EXPORTS[name].partition(":")
    return getattr(import_module(f".{module}", __name__), defined_as or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
