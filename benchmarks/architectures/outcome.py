"""What the sweep found out about one architecture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STAGES = (
    *("build", "measure", "plan", "compile", "load", "logits", "generate", "eval", "save", "verify", "picture"),
    "done",
)
"""The stages in order."""


@dataclass
class Outcome:
    """The result of one case, as kept in benchmarks/results/architectures.json."""

    name: str
    class_name: str
    kind: str
    stage: str = "build"
    """The last stage that was begun; "done" when all passed."""
    error: str = ""
    """One line: the exception, or empty."""
    refused: bool = False
    """Whether a UserError ended the run before anything was encoded."""
    seconds: float = 0.0
    parameters: int = 0
    """Number of values in all tensors of the model."""
    matrices: int = 0
    packed_share: float = 0.0
    """Share of `parameters` that is stored in packed matrices."""
    kept: dict[str, float] = field(default_factory=dict)
    """Reason -> share of `parameters` in matrices that keep their dtype for it."""
    other_share: float = 0.0
    """Share of `parameters` in tensors with several dimensions that are not matrices, such as convolutions."""
    figures: dict[str, float] = field(default_factory=dict)
    """Names that begin with "kl": divergence of the 8-bit model from the original, nats per token. Those that begin
    with "error": largest difference of the logits from the reference, relative to their range.
    """
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """ "passes", "refused", "fails", or "not built" for a case whose tiny model could not be made."""
        if self.stage == "done" and not self.error:
            return "passes"
        if self.stage == "build":
            return "not built"
        return "refused" if self.refused else "fails"

    def write(self, path: Path) -> None:
        """Write the outcome as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_outcome(path: Path) -> Outcome:
    """Read what `Outcome.write` wrote."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(**values)
