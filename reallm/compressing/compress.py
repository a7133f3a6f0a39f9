"""`reallm compress`: measure, plan, compile and a short evaluation, in one call.

Nothing is done twice. The work folder keeps the statistics, and the codes and costs of everything that was encoded, so
that an interrupted run continues, and the next budget costs only what it needs beyond that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, Unpack

from reallm.artifacts.directory import check_output
from reallm.artifacts.find import plan_of
from reallm.compilation.compile import compile_plan
from reallm.errors import ReallmError, UserError
from reallm.evaluation.evaluate import evaluate
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.measurement.measure import measure
from reallm.measurement.needed import DEFAULT_GAP
from reallm.measurement.search_space import Space, load_space
from reallm.planner.problem.plan_options import PlanKeywords, PlanOptions, merged_options
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.plan import Plan
from reallm.planning.allowed_formats import required_ties, supported_formats
from reallm.planning.plan import plan as make_plan
from reallm.runtime.generate_loaded import prepare_first_text
from reallm.system.job_progress import Job
from reallm.system.memory import peak_rss_bytes, reset_peak_rss
from reallm.targets.engines import ENGINES
from reallm.text.corpus import load_text

from .result import Compressed

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")
PLAN_NAME = "plan.json"
"""The plan's name in the work folder."""
STAGES = ("measure", "plan", "compile", "evaluate")


@dataclass
class _Stages:
    """Announces the stages, and records their seconds and peak memory."""

    job: Job
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, what: str, action: Callable[[], Result]) -> Result:
        """Run one stage and return its result."""
        self.job.begin_stage(name)
        LOG.info("[%d/%d] %s: %s", STAGES.index(name) + 1, len(STAGES), name, what)
        reset_peak_rss()
        began = time.monotonic()
        with self.job.active():
            result = action()
        self.seconds[name] = time.monotonic() - began
        self.peaks[name] = peak_rss_bytes()
        return result


def _job(nsamples: int, windows: int, seqlen: int, full: bool) -> Job:
    """The parts of a job, with their seconds on SmolLM2-135M and two cores; all grow alike with the model."""
    calibration, evaluation = nsamples * seqlen / 1024, windows * seqlen / 1024
    measuring = {
        "calibrate: forward": 2 * calibration,
        "calibrate: head": 3.5 * calibration,
        "calibrate: blocks": 13 * calibration,
        "encode candidates": 1100.0 if full else 170.0,
        "check predictions": 10.0,
    }
    stages = {"measure": measuring, "plan": {}, "compile": {"pack": 20.0}, "evaluate": {"evaluate": 9 * evaluation}}
    return Job(stages, repeated=frozenset() if full else frozenset({"encode candidates"}))


def compress(
    model: str | Path,
    budget: str,
    output: str | Path,
    *,
    work: str | Path | None = None,
    text: str | Path | None = None,
    test: str | None = None,
    windows: int = 4,
    space: str | Path | None = None,
    nsamples: int = 64,
    seqlen: int = 1024,
    seed: int = 0,
    jobs: int = -1,
    chat_template: bool = False,
    images: str | Path | None = None,
    gap: float = DEFAULT_GAP,
    full: bool = False,
    force: bool = False,
    device: str = "cpu",
    options: PlanOptions | None = None,
    **keywords: Unpack[PlanKeywords],
) -> Compressed:
    """Compress a model into a budget: measure what the best plan needs, plan, compile, and evaluate briefly.

    Repeat the call after an interruption: it continues where it stopped. With another budget and the same work folder
    it encodes only what the new plan needs beyond what is there.

    Parameters
    ----------
    model
        A folder, a GGUF file or a name on the Hugging Face hub.
    budget
        "3.0bpw" (bits per weight of the matrices that take part), or "48MiB", "4GiB" (the whole weights file).
    output
        The artifact's folder to create.
    work
        The work folder; None for a folder beside `output`, with "-work" after its name.
    text, space, nsamples, seqlen, seed, jobs, chat_template, images
        As in `measure`.
    test
        The text to evaluate on; None for the held-out part of the English text that comes with Python.
    windows
        How many windows of `test` to evaluate; 0 for no evaluation.
    gap
        Continue measuring until the candidates that were not measured can lower the predicted loss by no more than this
        share of it; see `reallm.measurement.needed`.
    full
        Measure every candidate instead: slower, and then the gap is 0 at every budget.
    force
        Replace an artifact at `output`. The artifact of the same plan is left as it is, also without `force`.
    device
        Where to calibrate, encode trellises and evaluate: "cpu", "cuda", "cuda:1" or "auto".
    options, keywords
        What else to ask of the plan, as in `plan`. `preset` takes the place of `space`, `target` limits its formats.
        For an engine as `target`, the default space is the preset of that name; `export` writes the engine's file.

    Returns
    -------
    Compressed

    Raises
    ------
    UserError, PlanError
        For arguments that cannot be used, before anything is measured, and for what the stages raise.

    Examples
    --------
    >>> made = reallm.compress(
    ...     "model", "5bpw", "small", text="train.txt", test="test.txt", space="space.yaml", nsamples=8, seqlen=32
    ... )
    >>> made.plan.bits_per_weight <= 5, made.evaluation.comparison.divergence.mean > 0
    (True, True)
    """
    output = Path(output)
    work = Path(work) if work is not None else output.with_name(f"{output.name}-work")
    merged = merged_options(options, keywords)
    _check(output, work, budget, test if windows else None, force)
    target = merged.target
    candidates, merged = _candidates(space, merged)
    planned = replace(merged, target=target)
    stages = _Stages(_job(nsamples, windows, seqlen, full))
    table = stages.run(
        "measure",
        f"{model} into {work}",
        lambda: measure(
            model,
            text=text,
            output=work,
            space=candidates,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            jobs=jobs,
            chat_template=chat_template,
            images=images,
            pins=merged.pins,
            budget=None if full else budget,
            options=merged,
            gap=gap,
            device=device,
        ),
    )
    path = work / PLAN_NAME
    plan = stages.run("plan", f"{path}", lambda: make_plan(work, budget=budget, output=path, options=planned))
    stages.run("compile", f"{output}", lambda: _compile(path, plan, output, model, work, force, device))
    evaluation = None
    if windows:
        evaluation = stages.run(
            "evaluate",
            f"{windows} windows of {seqlen} tokens against {model}",
            lambda: evaluate(output, against=model, text=test, seqlen=seqlen, windows=windows, device=device),
        )
    return Compressed(
        output=output,
        work=work,
        table=table,
        plan=plan,
        evaluation=evaluation,
        seconds=stages.seconds,
        encoding_seconds=sum(record.seconds for record in table.measurements),
        peak_rss_bytes=stages.peaks | {"worker": int(table.base["worker_peak_rss_bytes"])},
    )


def _check(output: Path, work: Path, budget: str, test: str | None, force: bool) -> None:
    """Raise an error for what can be found wrong before anything is measured."""
    parse_budget(budget)
    if not _artifact_plan(output):
        check_output(output, force)
    if work.resolve() == output.resolve():
        raise UserError(f"--work {work} is the output; expected another folder")
    if (work / CONFIG_FILE).exists():
        raise UserError(f"--work {work} is the folder of a model; expected a work folder, which may be a new one")
    if test is not None:
        load_text(test)


def _candidates(space: str | Path | None, options: PlanOptions) -> tuple[Space, PlanOptions]:
    """The candidate formats that preset and target leave, and the options without these two."""
    if options.preset is not None and space is not None:
        raise UserError("--preset and --space both name the candidate formats; give one of them")
    engine = options.target if options.target in ENGINES else None
    candidates = load_space(options.preset or space or engine)
    if options.formats is not None:
        raise UserError("--format is an option of `plan`; name the candidate formats with --space")
    if options.target is not None:
        formats = {kind: supported_formats(fmts, options.target) for kind, fmts in candidates.formats.items()}
        if not formats["linear"]:
            raise UserError(f"--target {options.target} can run none of the formats of --space {candidates.name}")
        if candidates.name != options.target:
            candidates = Space(f"{candidates.name} for {options.target}", formats)
        options = replace(options, ties=required_ties(options))
    return candidates, merged_options(options, {"preset": None, "target": None})


def _artifact_plan(output: Path) -> Plan | None:
    """The plan of the artifact in `output`; None if there is none, or one without its plan."""
    try:
        return plan_of(output) if (output / CONFIG_FILE).is_file() else None
    except ReallmError:
        return None


def _compile(path: Path, plan: Plan, output: Path, model: str | Path, work: Path, force: bool, device: str) -> None:
    """Compile `plan` into `output`, unless its artifact is already there."""
    earlier = _artifact_plan(output)
    if earlier is not None and earlier.choices == plan.choices and earlier.model_sha256 == plan.model_sha256:
        LOG.info("%s already holds this plan", output)
        return
    compile_plan(path, output, model=model, work=work, force=force, device=device)
    prepare_first_text(output)
