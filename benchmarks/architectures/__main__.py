"""Run the sweep: python -m benchmarks.architectures [NAMES]; NAMES are patterns of case names, model types or classes.

Writes benchmarks/results/architectures.json and docs/reference/architectures.md. With NAMES, the results of the other
cases are kept. JOBS is the number of processes (default 2).
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from reallm.kernels.storage.atomic import write_text_atomic

from .cases import all_cases, select
from .outcome import Outcome
from .page import write_page
from .pipeline import MAX_KL
from .processes import run_cases

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".bench" / "architectures"
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "reference" / "architectures.md"


def main() -> None:
    """Run the cases that the command line names, or all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cases = select(sys.argv[1:])
    if not cases:
        sys.exit(f"no case matches {' '.join(sys.argv[1:])}; the first column of {PAGE} lists the names")
    results = _read() if sys.argv[1:] else {}
    for outcome in run_cases(cases, FOLDER, int(os.environ.get("JOBS") or 2)):
        results[outcome.name] = outcome
        print(
            f"{outcome.status:9} {outcome.name:32} {outcome.stage:9} {outcome.seconds:6.1f}s {outcome.error}",
            flush=True,
        )
    names = {case.name for case in all_cases()}
    kept = [outcome for name, outcome in sorted(results.items()) if name in names]
    write_text_atomic(RESULTS, json.dumps([asdict(outcome) for outcome in kept], indent=1) + "\n")
    write_text_atomic(PAGE, write_page(kept, MAX_KL))
    print(", ".join(f"{count} {status}" for status, count in Counter(outcome.status for outcome in kept).items()))


def _read() -> dict[str, Outcome]:
    if not RESULTS.is_file():
        return {}
    return {entry["name"]: Outcome(**entry) for entry in json.loads(RESULTS.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    main()
