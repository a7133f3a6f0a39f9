"""What a user may ask of a plan besides the budget: one record for the Python functions, the command line and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from reallm.planner.tables.plan import Cost, Plan, Ties
from reallm.planner.tables.requirements import Requirements


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What to ask of a plan besides its budget. By default every measured format may be used anywhere.

    >>> options = reallm.PlanOptions(exclude=("layers.0.mlp",), formats=("int*",))
    >>> choices = reallm.plan("work", budget="8.6bpw", options=options).choices
    >>> {choice.format for choice in choices} <= {"int4-g16", "int8-g16"}
    True
    """

    pins: tuple[str, ...] = ()
    """"REGEX=FORMAT": every matrix whose name the regex matches (`re.search`) gets exactly this format.

    A pin also makes an embedding or a head take part in a budget in bits per weight, which otherwise leaves them out.
    """
    exclude: tuple[str, ...] = ()
    """Regexes of the matrices that take no part: they stay as they are in the model."""
    formats: tuple[str, ...] | None = None
    """Names of the allowed formats, or patterns with * and ? such as "int4-*"; None allows every measured format."""
    preset: str | None = None
    """A published method ("gptq", "qtip", ...): allow its formats besides `formats`, or alone if `formats` is None.

    The names are the keys of `reallm.measurement.search_space.PRESETS`.
    """
    target: str | None = None
    """Use only allowed formats that this target can run: "triton" or "cpu" (kernels of our own), "gguf" (llama.cpp),
    "vllm", "sglang" or "mlx", whose files `export` writes. For vllm and sglang, matrices with one input are tied."""
    ties: Ties = "none"
    """Which matrices must share a format: "inputs" (those that multiply the same input, as q, k and v do), "experts"
    (all experts of a layer in the same role), "family" (the same role in all blocks), or "none".
    """
    cost: Cost = "two_sided"
    """The measured error to minimise; `MeasurementRecord` defines them. The default predicts the loss best."""
    requirements: Requirements = field(default_factory=Requirements)
    """What the deployment needs: room for the KV cache and adapters, limits per device, latency, number of formats."""
    corrections: Mapping[str, float] = field(default_factory=dict)
    """Family -> factor on the measured costs of its matrices, 1 for families that are not named. Set by `refit`."""
    time_limit_s: float = 60.0
    """Seconds that the solver may take. A plan that it cut short is marked "feasible" instead of "optimal"."""

    @classmethod
    def of(cls, plan: Plan) -> PlanOptions:
        """The options that `plan` was made with; preset and target are already resolved into its list of formats."""
        return cls(
            pins=plan.pins,
            exclude=plan.exclude,
            formats=plan.formats,
            ties=plan.ties,
            cost=plan.cost,
            requirements=plan.requirements,
            corrections=plan.corrections,
        )


class PlanKeywords(TypedDict, total=False):
    """The fields of `PlanOptions` as keyword arguments, with any sequence in place of a tuple."""

    pins: Sequence[str]
    exclude: Sequence[str]
    formats: Sequence[str] | None
    preset: str | None
    target: str | None
    ties: Ties
    cost: Cost
    requirements: Requirements | None
    corrections: Mapping[str, float]
    time_limit_s: float


def merged_options(options: PlanOptions | None, keywords: PlanKeywords) -> PlanOptions:
    """`options` (None for the defaults) with the given keywords in place of its fields.

    Raises TypeError for a keyword that is not a field of PlanOptions.
    """
    changes: dict[str, Any] = dict(keywords)
    for name in ("pins", "exclude", "formats"):
        if changes.get(name) is not None:
            changes[name] = tuple(changes[name])
    if keywords.get("requirements", Requirements()) is None:
        changes["requirements"] = Requirements()
    return replace(options or PlanOptions(), **changes)
