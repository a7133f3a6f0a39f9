"""The page of the documentation that lists which architectures work, written from the outcomes of the sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import transformers

from .outcome import Outcome

KIND_TITLES = {
    "text": "Text models",
    "image": "Vision-language models",
    "encoder": "Encoders",
    "seq2seq": "Encoder-decoder models",
}
HEAD = """\
# Architectures

% Written by `make sweep`; do not edit.

Every architecture of transformers {transformers} was tried (torch {torch}): a tiny random model of each class for
causal, masked, image-and-text and sequence-to-sequence language modelling, and {variants} variants. Each is saved as
releases are: in bfloat16, and those tensors in float32 that releases keep in float32. It then goes through every
stage: measure, plan, compile, load, logits, generate, evaluate, save and load again, verify.

A model passes if every stage does, and

- the logits of the packed model equal those of the original with the decoded weights in it, up to rounding in float32;
- 8 bits per weight cost at most {kl} nats per token;
- no packed matrix has a predicted loss of zero: what calibration could not measure keeps its dtype, and the plan
  lists it;
- a vision-language model predicts the same after a random picture as before, once with its vision tower as it was and
  once with the tower pinned to 8 bits. The column *picture* says where this was tried.

*Packed* is the share of all weights that is stored packed, and *kept* the share of matrices that calibration could not
measure: they keep their dtype. `make sweep NAMES="qwen3* llama"` runs a part of the list.

"""


def write_page(outcomes: Iterable[Outcome], max_kl: float) -> str:
    """The page as Markdown."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.name)
    variants = sum("+" in outcome.name for outcome in outcomes)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    parts = [HEAD.format(**versions, variants=variants, kl=max_kl), *_summary(outcomes)]
    passed = [outcome for outcome in outcomes if outcome.status == "passes"]
    for kind, title in KIND_TITLES.items():
        if rows := [outcome for outcome in passed if outcome.kind == kind]:
            parts += [f"## {title}\n\n", *_passed(rows, kind == "image"), "\n"]
    parts += _others(outcomes, "refused", "Refused", "These end before any work, with an error that names the reason.")
    parts += _others(outcomes, "fails", "Not working", "These end with an error in the stage that is named.")
    parts += _others(outcomes, "not built", "Not tried", "No tiny model of these could be made here.")
    return "".join(parts)


def _summary(outcomes: Sequence[Outcome]) -> list[str]:
    counts = Counter((outcome.kind, outcome.status) for outcome in outcomes)
    states = ("passes", "refused", "fails", "not built")
    lines = ["| | pass | refused | do not work | not tried |\n", "|---|---|---|---|---|\n"]
    for kind, title in KIND_TITLES.items():
        lines.append(f"| {title} | {' | '.join(str(counts[kind, state]) for state in states)} |\n")
    totals = [sum(counts[kind, state] for kind in KIND_TITLES) for state in states]
    return [*lines, f"| all | {' | '.join(map(str, totals))} |\n\n"]


def _passed(rows: Sequence[Outcome], pictures: bool) -> list[str]:
    lines = ["| name | class | matrices | packed | kept |" + (" picture |\n" if pictures else "\n")]
    lines.append("|---|---|---|---|---|" + ("---|\n" if pictures else "\n"))
    for row in rows:
        picture = f" {'yes' if 'kl_int8_picture' in row.figures else 'no'} |" if pictures else ""
        shares = f"{row.packed_share:.0%} | {sum(row.kept.values()):.0%}"
        lines.append(f"| `{row.name}` | `{row.class_name}` | {row.matrices} | {shares} |{picture}\n")
    return lines


def _others(outcomes: Iterable[Outcome], status: str, title: str, text: str) -> list[str]:
    rows = [outcome for outcome in outcomes if outcome.status == status]
    if not rows:
        return []
    lines = [f"## {title}\n\n{text}\n\n", "| name | class | stage | reason |\n", "|---|---|---|---|\n"]
    for row in rows:
        reason = row.error.removeprefix("UserError: ").replace("|", "\\|").replace("`", "'")
        lines.append(f"| `{row.name}` | `{row.class_name}` | {row.stage} | `{reason}` |\n")
    return [*lines, "\n"]
