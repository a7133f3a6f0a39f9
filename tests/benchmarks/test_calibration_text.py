"""The benchmark of calibration texts: no part of a text is calibrated on and evaluated, and differences are paired."""

from __future__ import annotations

import pytest

from benchmarks.calibration_text import PYTHON, mean_and_error, rows_of, split_text
from reallm.text.corpus import Text


@pytest.mark.parametrize("documents", [tuple(f"document {i}" for i in range(100)), ("\n".join(map(str, range(500))),)])
def test_the_parts_of_a_text_share_no_piece(documents: tuple[str, ...]) -> None:
    separator = "\n\n" if len(documents) > 1 else "\n"
    first, second = (part.split(separator) for part in split_text(Text(documents, "a test", "0")))
    pieces = list(documents) if len(documents) > 1 else documents[0].split("\n")
    assert pieces[: len(first)] == first and pieces[-len(second) :] == second
    assert 0.55 < len("".join(first)) / len("".join(pieces)) <= 0.6
    assert 0.3 < len("".join(second)) / len("".join(pieces)) <= 0.35


def test_changes_are_paired_by_window() -> None:
    windows = [0.1, 0.9, 0.2, 0.8]  # they differ much more than the texts do
    known = {(PYTHON, 3): {"C4": windows}, ("C4", 3): {"C4": [w - 0.05 for w in windows]}, ("C4", 2): {"C4": windows}}
    rows = list(rows_of(known, 3))
    assert [row["calibrated_on"] for row in rows] == [PYTHON, "C4"]
    assert rows[1]["kl"] == pytest.approx(0.45)
    assert rows[1]["change_from"] == {PYTHON: pytest.approx((-0.1, 0.0), abs=1e-12)}
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert not next(rows_of(known, 2))["change_from"]  # without another text
