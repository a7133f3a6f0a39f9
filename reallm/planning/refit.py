"""Refit: measure the loss of plans in memory, correct the predicted costs, and plan again.

The predicted losses of matrices add up; measured losses need not. Around a plan P, the loss that the matrices of one
family f cause is measured by making them dense again, and the costs of the family are multiplied by

    c_f = (KL(P) - KL(P with f dense)) / predicted loss of f in P

(a first-order fit at the plan itself, which counts interactions between families once). The allocation problem is
solved again with the corrected costs and the new plan is measured, as long as that helps. The best measured plan is
returned. The first plan and the best single format within the budget are measured too, so on this text the result is
never worse than either.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import fsum
from pathlib import Path

from torch import Tensor

from reallm.artifacts.find import plan_of
from reallm.compilation.plan_model import load_plan_model
from reallm.errors import UserError
from reallm.models.loaded import LoadedModel
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import best_plans
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.budget import budget_of
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Measured, Plan
from reallm.planner.tables.records import write_record
from reallm.planner.tables.work_folder import find_table, table_of
from reallm.system.device import parse_device
from reallm.text.corpus import Text, load_text
from reallm.text.windows import cut_windows, shortage

from .plan_evaluator import PlanEvaluator
from .plan_file import replaced_plan

LOG = logging.getLogger(__name__)
MIN_CORRECTION, MAX_CORRECTION = 0.25, 8.0
"""Corrections are clipped to this range, so that noise in a family with little loss cannot change a plan much."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """A plan that was measured."""

    plan: Plan
    name: str
    kl: float
    """KL divergence from the original model, nats per token."""


def refit(
    plan: Plan | str | Path,
    *,
    text: str,
    rounds: int = 2,
    windows: int = 8,
    seqlen: int = 1024,
    model: str | Path | LoadedModel | None = None,
    work: str | Path | None = None,
    output: str | Path | None = None,
    time_limit_s: float = 60.0,
    progress: bool = True,
    device: str = "cpu",
) -> Plan:
    """Measure a plan and its rivals on the model, correct the predicted costs, and return the best measured plan.

    This loads the model twice in float32. The rivals are the best single format within the budget, and the plans of at
    most `rounds` rounds of corrections.

    Parameters
    ----------
    plan
        A plan, a plan.json, or an artifact.
    text
        What to measure on: a text that `measure` has not calibrated on. See `reallm.text.corpus.load_text`.
    rounds
        Maximum number of rounds.
    windows, seqlen
        Number of windows from the start of the text, and tokens in each.
    model
        The original model, if it has moved since measuring, or is loaded already.
    work
        The work folder, if it has moved since planning.
    output
        Where to write the best plan as JSON, if given. An earlier plan there is replaced; any other file is not.
    time_limit_s
        Seconds that the solver may take in each round.
    progress
        Whether to show progress bars.
    device
        Where both models run: "cpu", "cuda", "cuda:1" or "auto".

    Raises
    ------
    UserError
        When `text` is the calibration text, and for a model that is not a causal language model or has no tokenizer.
    RecordError, PlanError
        When the plan or the table cannot be read, or no corrected plan can be made.

    Examples
    --------
    >>> better = reallm.refit("plan.json", text="test.txt", rounds=1, windows=2, seqlen=32)
    >>> better.measured.kl <= max(kl for name, predicted, kl in better.measured.tried)
    True
    """
    place = parse_device(device)
    if output is not None:
        replaced_plan(output)
    plan_path = None if isinstance(plan, Plan) else plan
    plan = plan if isinstance(plan, Plan) else plan_of(plan)
    table_file = find_table(plan, plan_path, work)
    table = table_of(plan, plan_path, work)
    source = load_text(text, split="test")
    if source.sha256 == table.text_sha256:
        raise UserError(
            f"--refit-text {text} is the text that `reallm measure` calibrated on; name one that it has not seen"
        )
    loaded = model if isinstance(model, LoadedModel) else load_plan_model(plan, plan_path or table_file, model)
    tokens = _windows_of(source, loaded, windows, seqlen)
    evaluator = PlanEvaluator(loaded, table_file, tokens, progress, place)
    rival = None if plan.uniform is None else _trial(evaluator, *_uniform_rival(table, plan))
    trials = [*([rival] if rival else []), *_rounds(evaluator, table, plan, rounds, time_limit_s, rival)]
    best = min(trials, key=lambda trial: trial.kl)
    measured = Measured(
        text=source.description,
        text_sha256=source.sha256,
        windows=len(tokens),
        seqlen=seqlen,
        kl=best.kl,
        uniform_kl=None if rival is None else rival.kl,
        tried=tuple((trial.name, uncorrected(trial.plan), trial.kl) for trial in trials),
    )
    result = best.plan.model_copy(update={"measured": measured})
    if output is not None:
        write_record(Path(output), result)
    return result


def uncorrected(plan: Plan) -> float:
    """The predicted loss of `plan` without corrections, nats per token."""
    return fsum(choice.cost / plan.corrections.get(choice.family, 1.0) for choice in plan.choices)


def _windows_of(source: Text, loaded: LoadedModel, count: int, seqlen: int) -> Tensor:
    """The first `count` windows of the text, int64 [count, seqlen]; fewer (and a warning) where it is too short."""
    if loaded.is_encoder or loaded.tokenizer is None:
        raise UserError(f"{loaded.source}: refit measures causal language models with a tokenizer")
    positions, vocabulary = loaded.max_positions, loaded.vocabulary
    tokens = cut_windows(source, loaded.tokenizer, None, seqlen, max_positions=positions, vocabulary=vocabulary)[:count]
    if note := shortage(tokens, count):
        LOG.warning("%s", note)
    return tokens


def _uniform_rival(table: MeasuredTable, plan: Plan) -> tuple[Plan, str]:
    """(plan, name): the plan with the best single format within the budget of `plan`, which it records as its own."""
    assert plan.uniform is not None
    rival = uniform_plan(table, plan.uniform.format, scope=plan.scope, options=PlanOptions.of(plan), work=plan.work)
    recorded = {"budget": plan.budget, "budget_bytes": plan.budget_bytes, "ties": plan.ties}
    return Plan.model_validate(rival.model_dump() | recorded), f"uniform {plan.uniform.format}"


def _rounds(
    evaluator: PlanEvaluator,
    table: MeasuredTable,
    plan: Plan,
    rounds: int,
    time_limit_s: float,
    rival: _Trial | None,
) -> list[_Trial]:
    """`plan` and the plan of each round, measured; stops early if a plan repeats or does not improve."""
    current = _trial(evaluator, plan, "plan")
    trials = [current]
    for number in range(1, rounds + 1):
        options = replace(
            PlanOptions.of(current.plan), corrections=_corrections(current, evaluator), time_limit_s=time_limit_s
        )
        following = best_plans(table, budget_of(plan), options, 1, plan.work)[0]
        LOG.info("corrections: %s", ", ".join(f"{family} {c:.2f}" for family, c in options.corrections.items()))
        known = [*trials, *([rival] if rival else [])]
        if _formats(following) in [_formats(trial.plan) for trial in known]:
            break
        previous, current = current, _trial(evaluator, following, f"refit {number}")
        trials.append(current)
        if current.kl >= previous.kl:
            break
    return trials


def _trial(evaluator: PlanEvaluator, plan: Plan, name: str) -> _Trial:
    kl = evaluator.loss(plan)
    LOG.info("%s: predicted %.5f, measured %.5f nats per token", name, uncorrected(plan), kl)
    return _Trial(plan, name, kl)


def _corrections(trial: _Trial, evaluator: PlanEvaluator) -> dict[str, float]:
    """Family -> factor for its measured costs, from the loss of the trial's plan with that family made dense."""
    plan, corrections = trial.plan, {}
    for family in sorted({choice.family for choice in plan.choices}):
        choices = [choice for choice in plan.choices if choice.family == family]
        predicted = fsum(choice.cost for choice in choices) / plan.corrections.get(family, 1.0)
        if predicted > 0:
            caused = trial.kl - evaluator.loss(plan, {family})
            corrections[family] = min(max(caused / predicted, MIN_CORRECTION), MAX_CORRECTION)
    return corrections


def _formats(plan: Plan) -> list[tuple[str, str]]:
    return [(choice.matrix, choice.format) for choice in plan.choices]
