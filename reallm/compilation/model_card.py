"""The model card (README.md) of an artifact: what it is, its size, its predicted loss and how to load it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from reallm.planner.tables.plan import Plan

_TEMPLATE = """---
library_name: transformers
tags: [reallm]
{base_model}---
# {name} in {budget}

Packed with reallm. Load it with `import reallm` before transformers' `from_pretrained`, or with `reallm.load`.

| | |
|---|---|
| budget | {budget} ({scope}) |
| weights file | {file_bytes:,} bytes |
| packed matrices | {matrices_bytes:,} bytes, {bits:.4f} bits per weight |
| predicted loss | {loss:.5f} nats per token above the original |
{calibration}| solver | {solver} {solver_version}, {status}, gap {gap:.2e} |
| original | sha256 {digest} |

| format | matrices | bytes |
|---|---|---|
{formats}
{uniform}{notes}"""


def hub_name(source: str) -> str | None:
    """The Hugging Face hub name (org/name) of the model that the user named `source`; None if it has none.

    A local folder has a hub name if it is in the hub's cache; a .gguf file has none.

    >>> hub_name("Qwen/Qwen3-8B"), hub_name("/models/mine"), hub_name("/c/hub/models--Qwen--Qwen3-8B/snapshots/1ab")
    ('Qwen/Qwen3-8B', None, 'Qwen/Qwen3-8B')
    """
    if source.lower().endswith(".gguf"):
        return None
    if cached := re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots(?:/|$)", Path(source).as_posix()):
        return f"{cached[1]}/{cached[2]}"
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    return source if named and not Path(source).exists() else None


def model_card(plan: Plan, base_model: str | None = None) -> str:
    """The model card, in Markdown, of the artifact of `plan`; `base_model` is the original model's name on the hub."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for choice in plan.choices:
        counts[choice.format][0] += 1
        counts[choice.format][1] += choice.nbytes
    rows = [f"| {name} | {count} | {nbytes:,} |" for name, (count, nbytes) in sorted(counts.items())]
    rows += [f"| shared codebooks {key} | | {nbytes:,} |" for key, nbytes in sorted(plan.shared.items())]
    uniform = plan.uniform
    return _TEMPLATE.format(
        base_model=f"base_model: {base_model}\n" if base_model else "",
        name=plan.model.rstrip("/").rpartition("/")[2],
        budget=plan.budget,
        scope="the whole weights file" if plan.scope == "file" else "the packed matrices",
        file_bytes=plan.file_bytes,
        matrices_bytes=plan.matrices_bytes,
        bits=plan.bits_per_weight,
        loss=plan.predicted_loss,
        calibration=f"| calibrated on | {plan.calibration} |\n" if plan.calibration else "",
        solver=plan.bound.solver,
        solver_version=plan.bound.solver_version,
        status=plan.bound.status,
        gap=plan.bound.mip_gap,
        digest=plan.model_sha256,
        formats="\n".join(rows),
        uniform=f"\nThe best single format of that size, {uniform.format}, is predicted to cost {uniform.cost:.5f}.\n"
        if uniform
        else "",
        notes="".join(f"\nNote: {note}.\n" for note in plan.notes),
    )
