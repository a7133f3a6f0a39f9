"""The trellis encoder: walks close, native and portable search agree, feedback gains, bad input is coded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reallm.codecs.encode import encode
from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.trellis.encode import CLIPS, SCALES, error_table, feedback_below, share_widths
from reallm.codecs.trellis.viterbi import closed_walks
from reallm.codegen.cpu.compiler import library
from reallm.kernels.codes.trellis import code_table, pack_states, step_shape, unpack_states
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference

NATIVE = library("trellis") is not None


def correlated(rows: int, seed: int = 0) -> Tensor:
    """A well-conditioned second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rows, rows, generator=generator) / rows**0.5
    x = torch.randn(8 * rows, rows, generator=generator) @ (torch.eye(rows) + mixing)
    return x.T @ x / len(x)


def cost(name: str, W: Tensor, metric: Metric) -> float:
    fmt = Format.parse(name)
    fields = encode(W, fmt, Workspace(metric))
    error = W.double() - torch.from_numpy(decode_reference(fmt, fields, *W.shape))
    G = torch.eye(len(W), dtype=torch.float64) if metric.gram is None else metric.gram.double()
    return float((G @ error @ metric.hessian.double() * error).sum())


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reallm.codecs.trellis.viterbi.library", lambda _name: None)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler here")
@pytest.mark.parametrize("width", sorted(SCALES))
def test_native_and_portable_search_find_equally_good_walks(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(width)) / SCALES[width]
    native, states = closed_walks(x, 10, width, CLIPS[width], None)
    monkeypatch.setattr("reallm.codecs.trellis.viterbi.library", lambda _name: None)
    exact, _ = closed_walks(x, 10, width, CLIPS[width], None)
    _, bits, _ = step_shape(width)
    assert np.array_equal(unpack_states(pack_states(states, bits), bits, 10), states)  # the walks close
    found, best = float((x - native).square().mean()), float((x - exact).square().mean())
    # 16-bit metrics round each distance to 8 / F^2 (under 0.004) and seams may differ: a few per cent either way
    assert found == pytest.approx(best, rel=0.03, abs=2e-4)


def test_the_portable_search_is_optimal_for_an_open_walk(portable: None) -> None:
    """Against every closed walk of a trellis small enough to enumerate: 2 bits per step, 8 state bits, 5 steps."""
    from reallm.codecs.trellis.viterbi import search

    code = torch.from_numpy(code_table(8, 1).copy()).float() / 147.8
    x = torch.randn(1, 5, 1, generator=torch.Generator().manual_seed(3))
    every = torch.cartesian_prod(*[torch.arange(4)] * 5)
    state, walks = torch.zeros(len(every), dtype=torch.long), []
    for t in [*range(5), *range(5)]:
        state = (state << 2 | every[:, t]) & 255
        walks.append(state)
    errors = (code[torch.stack(walks[5:], 1), 0] - x[0, :, 0]).square().sum(1)
    found = search(x, code, 2)
    assert ((found << 2 & 255) >> 2 == (found.roll(-1, 1) >> 2)).all()  # a closed walk
    error = float((code[found[0], 0] - x[0, :, 0]).square().sum())
    assert error <= float(errors.kthvalue(max(1, len(errors) // 50)).values)  # among the best of 1024, two passes only


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_normal_source_is_coded_as_well_as_tabled(bits: int) -> None:
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    metric = Metric(torch.eye(256), torch.zeros_like(W))
    relative = cost(f"tq{bits}-l10", W, metric) / float(W.square().sum())
    assert relative == pytest.approx(error_table(10)[2 * bits], rel=0.05)


@pytest.mark.parametrize("name", ["tq2-l8", "tq2.5-l10"])
def test_feedback_lowers_the_cost_on_correlated_inputs(name: str) -> None:
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    one_sided = Metric(correlated(96), torch.zeros_like(W))
    two_sided = Metric(correlated(96), torch.zeros_like(W), gram=correlated(64, seed=5))
    assert cost(f"{name}+ldl+rot", W, one_sided) < 0.9 * cost(f"{name}+rot", W, one_sided)
    assert cost(f"{name}+ldl2+rot", W, two_sided) < 0.95 * cost(f"{name}+ldl+rot", W, two_sided)


def test_two_sided_feedback_without_gradients_is_one_sided() -> None:
    W = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    metric = Metric(correlated(48), torch.zeros_like(W))
    one, two = (encode(W, Format.parse(f"tq2-l8+{ldl}"), Workspace(metric)) for ldl in ("ldl", "ldl2"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_errors_spread_downwards_as_elimination_does() -> None:
    """Coding rows in turn with `feedback_below` minimises tr(E^T G E) greedily: only D of G = L D L^T is left."""
    G = correlated(48).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(G), upper=True)
    below = feedback_below(factor.float())
    error, rest = torch.randn(48, 16, dtype=torch.float64), torch.zeros(48, 16, dtype=torch.float64)
    for tile in range(3):  # the error of each tile is arbitrary; its target includes the feedback of the tiles above
        span = slice(16 * tile, 16 * (tile + 1))
        rest[48 - (48 - span.stop) :] += 0
        rest[span.stop :] -= below[tile, span.stop :].double() @ error[span]
    total = error - rest  # what W - W_hat becomes
    blocks = [torch.linalg.inv(factor[s, s].T @ factor[s, s]) for s in (slice(0, 16), slice(16, 32), slice(32, 48))]
    expected = sum(
        float((D @ error[16 * i : 16 * i + 16] * error[16 * i : 16 * i + 16]).sum()) for i, D in enumerate(blocks)
    )
    assert float((G @ total * total).sum()) == pytest.approx(expected, rel=1e-4)  # `below` is float32


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(8, 48), st.sampled_from((8, 10, 12)))
def test_widths_are_affordable_and_favour_what_matters(importance: list[float], eighths: int, state_bits: int) -> None:
    total = eighths * len(importance) // 4
    widths = share_widths(importance, total, state_bits)
    assert sum(widths) <= total and set(widths) <= set(error_table(state_bits))
    by_importance = [w for _, w in sorted(zip(importance, widths, strict=True))]
    steps = 2  # the last steps may not be affordable for the block that is next in turn
    assert all(a <= b + steps for a, b in itertools.pairwise(by_importance))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(("tq1-l8", "tq2.125-l8+ldl2+rot", "tq4-l10+ldl+rot")))
@settings(max_examples=25, deadline=None)
def test_any_shape_is_coded_better_than_not_at_all(rows: int, cols: int, name: str) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    W = torch.randn(rows, cols, generator=generator)
    metric = Metric(correlated(cols), torch.zeros_like(W), gram=correlated(rows, seed=1))
    work = Workspace(metric)
    fields = encode(W, Format.parse(name), work)
    error = W - torch.from_numpy(decode_reference(Format.parse(name), fields, rows, cols)).float()
    assert work.two_sided(error) <= work.two_sided(W) * (1 + 1e-3)  # scales by least squares, rounded to fp16


@pytest.mark.parametrize(("rows", "cols"), [(3, 4), (1, 20), (17, 16)])
def test_padding_does_not_drown_a_small_matrix(rows: int, cols: int) -> None:
    W = torch.randn(rows, cols, generator=torch.Generator().manual_seed(8))
    metric = Metric(torch.eye(cols), torch.zeros_like(W))
    assert cost("tq4-l10", W, metric) < 0.02 * float(W.square().sum())  # 0.0055 for a full tile


BAD = ("zero", "constant", "huge", "tiny", "singular", "indefinite", "nan", "no tokens")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["tq2-l8", "tq2-l8+ldl2+rot"])
def test_bad_matrices_and_metrics_are_coded(bad: str, name: str) -> None:
    W = torch.randn(32, 48, generator=torch.Generator().manual_seed(4))
    H, G = correlated(48), correlated(32)
    if bad in ("zero", "constant", "huge", "tiny"):
        W[::3] = {"zero": 0.0, "constant": 1.0, "huge": 3e4, "tiny": 1e-20}[bad]
    if bad == "singular":
        H, G = torch.outer(H[0], H[0]), torch.zeros(32, 32)
    if bad == "indefinite":
        H, G = H - 2 * torch.eye(48), -G
    if bad == "nan":
        H[3, 4], G[1, 1] = torch.nan, torch.inf
    if bad == "no tokens":
        H, G = torch.zeros(48, 48), torch.zeros(32, 32)
    work = Workspace(Metric(H, torch.zeros_like(W), gram=G))
    decoded = decode_reference(Format.parse(name), encode(W, Format.parse(name), work), 32, 48)
    assert np.isfinite(decoded).all()
    assert float(np.square(decoded - W.numpy()).sum()) < 1.5 * float(W.square().sum())
    if bad in ("nan", "no tokens"):
        assert work.notes


def test_the_portable_encoder_codes_well(portable: None) -> None:
    W = torch.randn(32, 32, generator=torch.Generator().manual_seed(6))
    metric = Metric(correlated(32), torch.zeros_like(W), gram=correlated(32, seed=7))
    assert cost("tq3-l8+ldl2+rot", W, metric) < 0.1 * float((metric.gram @ W @ metric.hessian * W).sum())
