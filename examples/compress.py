"""From a model to compressed models of several sizes: measure once, then plan, compile and evaluate per budget.

python examples/compress.py MODEL TEXT TEST
"""

from __future__ import annotations

import sys
from pathlib import Path

import reallm

BUDGETS = ("3.0bpw", "4.0bpw")


def main() -> None:
    model, text, test = sys.argv[1:4]
    work = Path("work")
    reallm.measure(model, text=text, output=work, space="quick")
    for budget in BUDGETS:
        plan = reallm.plan(work, budget=budget, output=f"plan-{budget}.json")
        print(f"{budget}: {plan.predicted_loss:.4f} nats per token predicted, {plan.bound.status}")
        out = reallm.compile(f"plan-{budget}.json", f"out-{budget}", force=True)
        result = reallm.evaluate(out, against=model, text=test, windows=8)
        assert result.comparison.divergence is not None
        print(f"{budget}: {result.comparison.divergence.mean:.4f} measured, {result.sizes.file_bytes} bytes")
    loaded, tokenizer = reallm.load(f"out-{BUDGETS[0]}")
    assert tokenizer is not None
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(loaded.generate(**inputs, max_new_tokens=20)[0]))


if __name__ == "__main__":
    main()
