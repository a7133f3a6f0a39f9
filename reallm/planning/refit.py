"""Refit: what the predicted losses are worth, found by measuring plans in memory, and the plan solved again with that.

Predicted losses add up; measured ones need not. Around a plan P the loss that the matrices of one family f cause is
measured by making them dense again, and the family's costs are corrected by

    c_f = (KL(P) - KL(P with f dense)) / predicted loss of f in P

(a first-order fit at the plan itself, where interactions between families are counted once). The programme is solved
again with the corrected costs, its plan measured, and so on while that helps. The best plan measured is returned, the
best single format within the budget included, so a refit plan is never worse than either on that text.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from math import fsum
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reallm.decoding.decode import decode
from reallm.errors import UserError
from reallm.evaluation.compare import CachedLogits, compare_models
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.measurement.encoding import Encoded, codebook_bytes, codebook_values
from reallm.models.loaded import LoadedModel, Matrix, load_model
from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.problem.tensor_layout import shared_key
from reallm.planner.results.allocate import best_plans
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.budget import budget_of
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice, Measured, Plan
from reallm.planner.tables.records import read_record
from reallm.text.corpus import load_text, shortage
from reallm.text.corpus import windows as cut_windows

LOG = logging.getLogger(__name__)
LEAST, MOST = 0.25, 8.0
"""Corrections are kept within, so that noise on a family of little loss moves no plan far."""


class PlanEvaluator:
    """A float32 model that takes on the decoded weights of one plan after the other, beside its dense original."""

    def __init__(self, loaded: LoadedModel, work: Path, windows: Tensor, progress: bool = True) -> None:
        """`windows` int64 [n, seqlen] is what plans are measured on."""
        self.loaded, self.codes, self.windows, self.progress = loaded, Encoded(work, loaded), windows, progress
        self.model = load_model(loaded.source, dtype=torch.float32).model
        self.dense = CachedLogits(load_model(loaded.source, dtype=torch.float32).model)
        self.matrices = {matrix.name: matrix for matrix in loaded.matrices}
        self.now: dict[str, str] = {}
        """Matrix -> format, of those that are not dense."""

    def loss(self, plan: Plan, dense: Collection[str] = ()) -> float:
        """KL of `plan` to the dense model, nats per token; matrices of the families `dense` left as they are."""
        wanted = {c.matrix: c for c in plan.choices if c.family not in dense and not _is_dense(c)}
        changed = [n for n in {*wanted, *self.now} if self.now.get(n) != (wanted[n].format if n in wanted else None)]
        for name in tqdm(changed, desc="decode", unit="matrix", disable=not self.progress, leave=False):
            matrix = self.matrices[name]
            weight = self._decoded(matrix, wanted[name]) if name in wanted else self.loaded.weight(matrix)
            self._set(matrix, weight)
            self.now.pop(name, None)
            if name in wanted:
                self.now[name] = wanted[name].format
        found = compare_models(self.dense, self.model, self.windows, progress=self.progress).divergence
        assert found is not None
        return found.mean

    def _decoded(self, matrix: Matrix, choice: Choice) -> Tensor:
        fmt = Format.parse(choice.format)
        key = shared_key(fmt, matrix.family)
        books = codebook_values(fmt, {"codebooks": self.codes.shared(key)}) if key else None
        fields = {name: torch.from_numpy(data.copy()) for name, data in self.codes.fields(choice).items()}
        return decode(fmt, fields, matrix.rows, matrix.cols, shared=codebook_bytes(fmt, books))

    @torch.no_grad()
    def _set(self, matrix: Matrix, weight: Tensor) -> None:
        target = self.model.get_parameter(matrix.parameter)
        target = target if matrix.expert is None else target[matrix.expert]
        target.copy_(weight.T if matrix.transposed else weight)


def _is_dense(choice: Choice) -> bool:
    return isinstance(Format.parse(choice.format).codec, DenseCodec)


def refit(
    plan: Plan,
    *,
    text: str,
    rounds: int = 2,
    windows: int = 8,
    seqlen: int = 1024,
    model: str | Path | LoadedModel | None = None,
    work: str | Path | None = None,
    time_limit_s: float = 60.0,
    progress: bool = True,
) -> Plan:
    """The best of `plan`, its best uniform rival and the plans of at most `rounds` rounds of corrections, measured.

    `text` must be one that `measure` has not calibrated on; `windows` of `seqlen` tokens from its start are used. The
    model is loaded twice in float32. Raises UserError for the same text, a model that does not generate and one that
    was not measured.
    """
    folder = Path(work or plan.work)
    table = read_record(folder / TABLE_FILE, MeasuredTable, "measure")
    source = load_text(text, split="test")
    if source.sha256 == table.text_sha256:
        raise UserError(f"--text {text} is what was calibrated on; refit needs a text that measure has not seen")
    loaded = model if isinstance(model, LoadedModel) else load_model(model or plan.model)
    if loaded.is_encoder or loaded.tokenizer is None:
        raise UserError(f"{loaded.source}: refit measures causal language models with a tokenizer")
    tokens = cut_windows(source, loaded.tokenizer, None, seqlen, max_positions=loaded.max_positions)[:windows]
    if note := shortage(tokens, windows):
        LOG.warning("%s", note)
    memory, tried = PlanEvaluator(loaded, folder, tokens, progress), list[tuple[Plan, str, float]]()

    def measured(one: Plan, name: str) -> float:
        kl = memory.loss(one)
        tried.append((one, name, kl))
        LOG.info("%s: predicted %.5f, measured %.5f nats per token", name, uncorrected(one), kl)
        return kl

    uniform_kl = None
    if plan.uniform is not None:
        rival = uniform_plan(
            table,
            plan.uniform.format,
            scope=plan.scope,
            pins=plan.pins,
            exclude=plan.exclude,
            formats=plan.formats,
            cost=plan.cost,
            work=plan.work,
        )
        asked = {"budget": plan.budget, "budget_bytes": plan.budget_bytes, "ties": plan.ties}
        rival = Plan.model_validate(rival.model_dump() | asked)
        uniform_kl = measured(rival, f"uniform {plan.uniform.format}")
    current, kl = plan, measured(plan, "plan")
    for number in range(1, rounds + 1):
        corrections = _corrections(current, kl, memory)
        plan_options = replace(PlanOptions.of(plan), corrections=corrections)
        following = best_plans(table, budget_of(plan), plan_options, 1, time_limit_s, plan.work)[0]
        LOG.info("corrections: %s", ", ".join(f"{family} {c:.2f}" for family, c in corrections.items()))
        if _formats(following) in [_formats(one) for one, _, _ in tried]:
            break
        before, (current, kl) = kl, (following, measured(following, f"refit {number}"))
        if kl >= before:
            break
    best, _, least = min(tried, key=lambda each: each[2])
    record = Measured(
        text=source.description,
        text_sha256=source.sha256,
        windows=len(tokens),
        seqlen=seqlen,
        kl=least,
        uniform_kl=uniform_kl,
        tried=tuple((name, uncorrected(one), kl) for one, name, kl in tried),
    )
    return best.model_copy(update={"measured": record})


def uncorrected(plan: Plan) -> float:
    """The predicted loss of `plan` as measured, without corrections, nats per token."""
    return fsum(choice.cost / plan.corrections.get(choice.family, 1.0) for choice in plan.choices)


def _corrections(plan: Plan, kl: float, memory: PlanEvaluator) -> dict[str, float]:
    result = {}
    for family in sorted({choice.family for choice in plan.choices}):
        mine = [c for c in plan.choices if c.family == family]
        predicted = fsum(c.cost for c in mine) / plan.corrections.get(family, 1.0)
        if predicted > 0:
            result[family] = min(max((kl - memory.loss(plan, {family})) / predicted, LEAST), MOST)
    return result


def _formats(plan: Plan) -> list[tuple[str, str]]:
    return [(choice.matrix, choice.format) for choice in plan.choices]
