"""What `reallm compress` made and what it took, as values, as JSON and as lines of a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from reallm.evaluation.evaluate import Evaluation
from reallm.kernels.storage.atomic import canonical_json
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.units import MIB


@dataclass(frozen=True)
class Compressed:
    """What `compress` made, and what it took.

    >>> made = reallm.compress(
    ...     "model", "5bpw", "small", text="train.txt", space="space.yaml", windows=0, nsamples=8, seqlen=32
    ... )
    >>> made.work
    PosixPath('small-work')
    """

    output: Path
    """The artifact."""
    work: Path
    """The work folder, from which other budgets can be planned."""
    table: MeasuredTable
    plan: Plan
    evaluation: Evaluation | None
    """The artifact compared with the original; None if no windows were to be evaluated."""
    seconds: dict[str, float]
    """Stage -> wall-clock seconds of this run."""
    encoding_seconds: float
    """Thread seconds of encoding everything that the table holds, also in earlier runs."""
    peak_rss_bytes: dict[str, int]
    """Stage -> peak memory of this process in bytes, and "worker" -> that of its largest encoder process.

    Where the system cannot reset the peak, a stage has the peak since the start.
    """

    def to_json(self) -> str:
        """Canonical JSON of sizes, losses, seconds and memory, with the whole evaluation; the plan is in `work`."""
        plan, evaluation = self.plan, self.evaluation
        return canonical_json(
            {
                "output": str(self.output),
                "work": str(self.work),
                "budget": plan.budget,
                "file_bytes": plan.file_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "predicted_loss": plan.predicted_loss,
                "unmeasured": plan.unmeasured and plan.unmeasured.model_dump(mode="json"),
                "text": self.table.text,
                "evaluation": evaluation and asdict(evaluation),
                "seconds": self.seconds,
                "encoding_seconds": self.encoding_seconds,
                "encodings": len(self.table.measurements),
                "peak_rss_bytes": self.peak_rss_bytes,
            }
        )


def facts(made: Compressed) -> list[tuple[str, str]]:
    """Name and value of what `made` is, for a table."""
    plan, evaluation = made.plan, made.evaluation
    result = [
        ("weights file", f"{plan.file_bytes} bytes ({plan.file_bytes / MIB:.2f} MiB)"),
        ("matrices", f"{plan.bits_per_weight:.4f} bits per weight"),
        ("predicted loss", f"{plan.predicted_loss:.4f} nats per token, on {made.table.text}"),
    ]
    if plan.unmeasured is not None:
        result.append(("not measured", f"{plan.unmeasured.candidates} candidates; gap {plan.unmeasured.gap:.1%}"))
    if evaluation is not None and evaluation.comparison.divergence is not None:
        kl = evaluation.comparison.divergence
        result.append(("measured loss", f"{kl.mean:.4f} nats per token (KL to the original), on {evaluation.text}"))
        result.append(("same first token", f"{kl.same_top1:.1%}"))
    if evaluation is not None and evaluation.comparison.cosine is not None:
        result.append(("cosine to the original", f"{evaluation.comparison.cosine:.5f}"))
    result.append(("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in made.seconds.items())))
    peaks = ", ".join(f"{name} {peak / MIB:.0f}" for name, peak in made.peak_rss_bytes.items() if peak)
    result.append(("peak memory, MiB", peaks))
    result.append(("encoding", f"{made.encoding_seconds:.0f} thread seconds, {len(made.table.measurements)} encodings"))
    return result
