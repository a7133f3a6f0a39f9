"""A plan read from disk is checked: bytes, costs and names must add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from strategies import make_table

from reallm.planner.results.allocate import solve
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import RecordError, read_record, write_record


def damaged(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A plan.json to which `change` was applied."""
    table = make_table(
        ("l.0.q", 16, 64, "linear", {"int2-g8": 8.0, "int4-g8": 0.5}),
        ("l.0.k", 16, 64, "linear", {"int2-g8": 2.0, "aq1x4-d4-shared": 1.0}),
    )
    path = folder / "plan.json"
    write_record(path, solve(table, "5bpw"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_a_valid_plan_is_read(tmp_path: Path) -> None:
    assert len(read_record(damaged(tmp_path, lambda plan: None), Plan, "plan").choices) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p.update(matrices_bytes=p["matrices_bytes"] + 64), "bytes do not add up"),
        (lambda p: p.update(counted_bytes=p["budget_bytes"] + 1), "bytes do not add up"),
        (lambda p: p.update(predicted_loss=p["predicted_loss"] + 1), "costs do not add up"),
        (lambda p: p["choices"][0].update(nbytes=1), "takes [0-9]+ bytes, not 1"),
        (lambda p: p["choices"][0].update(format="int3"), "unknown format 'int3'"),
        (lambda p: p["choices"][0].update(rows=10**15), "takes [0-9]+ bytes"),
        (lambda p: p["choices"].append(p["choices"][0]), "twice"),
        (lambda p: p.update(dense=[p["choices"][0]["matrix"]]), "twice"),
        (lambda p: p.update(version=2), "version"),
        (lambda p: p.update(extra=1), "extra"),
    ],
)
def test_a_plan_that_does_not_add_up_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(RecordError, match=expected) as caught:
        read_record(path, Plan, "plan")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
