"""A model's q, k and v, and its gate and up, are one launch each; everything else is as without input groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy
import sys
from collections import Counter
from pathlib import Path

import artifacts
import torch
import reallm
from reallm.codegen.launch import launch
from reallm.runtime import input_groups
from reallm.runtime.training.finish import revert
from reallm.runtime.training.start import train_low_rank

launched = []
load_kernel = launch.load_kernel
launch.load_kernel = lambda spec: (launched.append(spec), load_kernel(spec))[1]


def counted(call):
    launched.clear()
    result = call()
    return result, Counter((spec.function, spec.members) for spec in launched)


FORMATS = {"q": "tq2.25-l12+ldl2+rot", "k": "tq3-l12+rot+r2i4", "v": "tq2-l12+rot", "o": "tq2-l12+rot"}
FORMATS |= {"gate": "int4-g16", "up": "int4-g16+ldl", "down": "lm3-g16+r2"}
made = artifacts.make("llama", Path(sys.argv[1]), lambda m: FORMATS.get(m.name.rpartition(".")[2].split("_")[0]))
model, _ = reallm.load(made.folder)
attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
assert q.input_group is k.input_group is v.input_group is not attention.o_proj.input_group is None
assert mlp.gate_proj.input_group is mlp.up_proj.input_group is not q.input_group
assert not list(q.children()) and not any("input_group" in name for name in model.state_dict())

ids = torch.arange(5, 8)[None]
with torch.no_grad():
    q(torch.ones(1, 48)), mlp.gate_proj(torch.ones(1, 48))  # the first uses try the kernels out
    logits, counts = counted(lambda: model(ids, use_cache=False).logits)
    decoded = made.replaced()(ids, use_cache=False).logits
    # float32 sums of 80 terms in another order and two rotations, through two blocks and the head
    torch.testing.assert_close(logits, decoded, rtol=1e-4, atol=1e-4)
    # of each of two blocks: q, k, v; gate, up; o and down by themselves
    products = {key: n for key, n in counts.items() if key[0] in ("gemv", "gemm")}
    assert products == {("gemv", 3): 2, ("gemv", 2): 2, ("gemv", 1): 4}, counts
    assert counts["prepare", 1] == 4, counts

    x = torch.randn(1, 2, 48)
    expected = [m.decode_now(torch.float32) for m in (q, k, v)]
    product = lambda i, x: torch.nn.functional.linear(x, expected[i])
    close = lambda y, i, x: torch.testing.assert_close(y, product(i, x), rtol=1e-4, atol=1e-4)
    for i, m in ((2, v), (1, k)):  # a follower alone
        y, counts = counted(lambda: m(x))
        close(y, i, x)
        assert counts["gemv", 1] == 1 and sum(counts[key] for key in counts if key[0] == "gemv") == 1
    y, counts = counted(lambda: q(x))
    assert counts["gemv", 3] == 1 and counts["prepare", 1] == 0  # k has prepared x
    close(y, 0, x)
    other = x.clone()  # equal, but another tensor
    y, counts = counted(lambda: k(other))
    assert counts["gemv", 1] == 1
    y, counts = counted(lambda: k(x))
    assert not counts
    close(y, 1, x)
    y.zero_()  # the caller's own
    y, counts = counted(lambda: k(x))
    assert counts["gemv", 1] == 1
    close(y, 1, x)
    x += 1  # v's product was of other values
    y, counts = counted(lambda: v(x))
    assert counts["gemv", 1] == 1
    close(y, 2, x)

    q(x)
    k.write([("words", k.words.flip(0).clone())])  # the product stored for k is of its old fields
    expected[1] = k.decode_now(torch.float32)
    close(k(x), 1, x)
    close(v(x), 2, x)

    many = torch.randn(33, 48)  # a product of this many rows is computed by each matrix alone
    _, counts = counted(lambda: q(many))
    assert counts["dense", 1] == 1 and not any(members > 1 for _, members in counts)
    some = torch.randn(7, 48)
    for i, m in enumerate((q, k, v)):
        y, counts = counted(lambda: m(some))
        assert counts["gemm", 3] == (i == 0)
        torch.testing.assert_close(y, product(i, some), rtol=2e-3, atol=2e-2)

    twin = copy.deepcopy(model).model.layers[0].self_attn
    assert twin.q_proj.input_group is twin.v_proj.input_group is not q.input_group
    assert twin.q_proj.input_group.modules["k_proj"] is twin.k_proj
    replica = copy.copy(q)  # as data parallel makes one: it is not in its own group
    y, counts = counted(lambda: replica(torch.randn(1, 48)))
    assert counts["gemv", 1] == 1

    fmt, fields = k.format, k.fields
    train_low_rank(k)
    x = torch.randn(1, 48)
    y, counts = counted(lambda: q(x))
    assert counts["gemv", 1] == 1  # no product of weights in training
    revert(k, fmt, fields)

    gain = torch.linspace(0.5, 1.5, k.rows)
    k.set_gain(gain)  # of a DoRA adapter: q and v still share a launch, k has its own
    x = torch.randn(1, 48)
    y, counts = counted(lambda: (q(x), k(x), v(x)))
    assert (counts["gemv", 2], counts["gemv", 1], counts["gemv", 3]) == (1, 1, 0), counts
    close(y[0], 0, x)
    close(y[1] / gain, 1, x)
    close(y[2], 2, x)
    k.set_gain(None)

    for turn in range(input_groups.PATIENCE + 2):
        y, counts = counted(lambda: q(torch.ones(1, 48)))
        assert counts["gemv", 3] == (turn < input_groups.PATIENCE), turn
        close(y, 0, torch.ones(1, 48))

with torch.inference_mode():
    x = torch.randn(1, 80)
    y, counts = counted(lambda: mlp.gate_proj(x[:, :48].clone()))
    assert counts["gemv", 1] == 1  # nothing can be stored with such a tensor
x = torch.randn(1, 48, requires_grad=True)
y, counts = counted(lambda: mlp.gate_proj(x))
y.sum().backward()
assert not counts and x.grad is not None
"""


@pytest.mark.long
def test_input_groups_of_a_model_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",  # arrays this small gain nothing from more threads
        "REALLM_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2] / "support"),
    }
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
