"""README.md of an artifact: what it is, how large, at what cost, and how to run it. The same for the same plan."""

from __future__ import annotations

from collections import defaultdict

from reallm.planner.tables.plan import Plan

_TEMPLATE = """---
library_name: transformers
tags: [reallm]
base_model: {base}
---
# {base} in {budget}

Packed with reallm. Load it with `import reallm` before transformers' `from_pretrained`, or with `reallm.load`.

| | |
|---|---|
| budget | {budget} ({scope}) |
| weights file | {file_bytes:,} bytes |
| packed matrices | {matrices_bytes:,} bytes, {bits:.4f} bits per weight |
| predicted loss | {loss:.5f} nats per token above the original |
| solver | {solver} {solver_version}, {status}, gap {gap:.2e} |
| original | sha256 {digest} |

| format | matrices | bytes |
|---|---|---|
{formats}
{uniform}{notes}"""


def model_card(plan: Plan) -> str:
    """The model card of the artifact of `plan`, Markdown."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for choice in plan.choices:
        counts[choice.format][0] += 1
        counts[choice.format][1] += choice.nbytes
    rows = [f"| {name} | {count} | {nbytes:,} |" for name, (count, nbytes) in sorted(counts.items())]
    rows += [f"| shared codebooks {key} | | {nbytes:,} |" for key, nbytes in sorted(plan.shared.items())]
    uniform = plan.uniform
    return _TEMPLATE.format(
        base=plan.model.rstrip("/").rpartition("/")[2],
        budget=plan.budget,
        scope="the whole weights file" if plan.scope == "file" else "the packed matrices",
        file_bytes=plan.file_bytes,
        matrices_bytes=plan.matrices_bytes,
        bits=plan.bits_per_weight,
        loss=plan.predicted_loss,
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
