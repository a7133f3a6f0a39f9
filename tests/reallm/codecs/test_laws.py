"""The parts of the encoders match their formulas: each is compared with another way of computing the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from weights import correlated

from reallm.codecs.additive.encode import BEAM, AdditiveFit, beam_codes, fit_additive_codes, fit_codebooks
from reallm.codecs.feedback import BLOCK_COLUMNS, descend, feed_back
from reallm.codecs.metric import DAMPING, Metric, Workspace
from reallm.codecs.packed_fields import to_half
from reallm.codecs.scalar import encode as scalar
from reallm.codecs.scalar.encode import refit_scales
from reallm.kernels.formats.codecs import AdditiveCodec

STEP = 0.25


def rounded(target: Tensor) -> Tensor:
    return (target / STEP).round() * STEP


def naive_gptq(W: np.ndarray, H: np.ndarray) -> np.ndarray:
    """GPTQ as derived in the paper, in float64 and without a Cholesky factor.

    After each column, the others move by the optimal update, and the column is eliminated from the inverse Hessian
    (optimal brain surgeon).
    """
    W, inverse, result = W.copy(), np.linalg.inv(H), np.zeros_like(W)
    for column in range(W.shape[1]):
        result[:, column] = np.round(W[:, column] / STEP) * STEP
        error = (W[:, column] - result[:, column]) / inverse[column, column]
        W -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize("cols", [1, 2, 40, BLOCK_COLUMNS, BLOCK_COLUMNS + 13])
def test_error_feedback_is_gptq(cols: int) -> None:
    W, metric = correlated(6, cols, seed=cols)
    work, found = Workspace(metric), torch.empty(cols, 6)

    def quantise(position: int, target: Tensor) -> Tensor:
        found[position] = rounded(target)
        return found[position]

    feed_back(W.T.contiguous(), work.inverse_factor(torch.arange(cols)), quantise)
    expected = naive_gptq(W.double().numpy(), work.hessian.numpy())
    # A target within float32's error of the middle between two levels may be rounded to the other one, and everything
    # after it would differ: none of these seeds has such a target.
    np.testing.assert_array_equal(found.T.numpy(), expected)


@pytest.mark.parametrize("cols", [3, BLOCK_COLUMNS + 5])
def test_coordinate_descent_equals_its_naive_form_and_never_costs_more(cols: int) -> None:
    W, metric = correlated(5, cols, seed=3)
    H, values = Workspace(metric).hessian, rounded(W).double()
    expected = values.clone()
    for j in range(cols):  # the minimiser over column j with all others fixed
        rest = ((W - expected) @ H)[:, j] / H[j, j]
        expected[:, j] = rounded(expected[:, j] + rest)
    found = rounded(W).T.contiguous()

    def quantise(position: int, target: Tensor) -> Tensor:
        found[position] = rounded(target)
        return found[position].clone()

    descend(W.T.contiguous(), rounded(W).T.contiguous(), H.float(), quantise)
    assert torch.equal(found.T.double(), expected)  # no target of this seed is that close to a middle
    assert cost(W - expected, H) <= cost(W - values, H)


def cost(error: Tensor, H: Tensor) -> float:
    return float(((error.double() @ H.double()) * error).sum())


@pytest.mark.parametrize("limit", [1 << 28, 1])
def test_refitted_scales_solve_the_normal_equations(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar, "REFIT_BYTES", limit)
    monkeypatch.setattr(scalar, "REFIT_RIDGE", 0.0)
    W, metric = correlated(7, 77, seed=1)
    H, width = Workspace(metric).hessian, 16
    levels = (W * 2).round().clamp(-2, 1) + 0.5
    found = refit_scales(W, levels, torch.ones(7, 5), width, H.float())
    root = torch.linalg.cholesky(H)
    for row in range(7):
        design = torch.zeros(77, 5, dtype=torch.float64)  # each column: the levels of one group
        for group in range(5):
            span = slice(group * width, (group + 1) * width)
            design[span, group] = levels[row, span].double()
        exact = torch.linalg.lstsq(root.T @ design, (root.T @ W[row].double())[:, None]).solution[:, 0]
        # float32 sums of 77 terms: 77 x 2^-24 = 5e-6 of the system, times its condition, under 20 here
        torch.testing.assert_close(found[row].double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_scales_without_weight_stay() -> None:
    """A row of zeros and a group whose levels are all zero have no equation."""
    W, metric = correlated(3, 32, seed=2)
    H = Workspace(metric).hessian32
    levels = W.round()
    levels[0], levels[1, 16:] = 0, 0
    scales = torch.full((3, 2), 0.5)
    found = refit_scales(W, levels, scales, 16, H)
    torch.testing.assert_close(found[0], scales[0])
    torch.testing.assert_close(found[1, 1], scales[1, 1])


@pytest.mark.parametrize(("books", "words"), [(1, 16), (2, BEAM), (3, 2)])
def test_a_beam_as_wide_as_its_choices_finds_the_nearest_sum(books: int, words: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(books, words, 4, generator=generator)
    target, scales = torch.randn(50, 4, generator=generator), 0.5 + torch.rand(50, generator=generator)
    codes = beam_codes(target, codebooks, scales)
    sums = torch.stack(
        [sum(codebooks[m][c] for m, c in enumerate(choice)) for choice in itertools.product(range(words), repeat=books)]
    )
    distances = (target[:, None] - sums * scales[:, None, None]).square().sum(2)
    found = sum(codebooks[m][codes[:, m]] for m in range(books)) * scales[:, None]
    # the search compares half squared distances up to a constant: float32 rounding of terms of size 10
    assert torch.allclose((target - found).square().sum(1), distances.amin(1), rtol=0, atol=1e-5)


def fitter(seed: int, codec: AdditiveCodec, cols: int = 37) -> AdditiveFit:
    W, metric = correlated(20, cols, seed=seed)
    result = AdditiveFit(W, codec, Workspace(metric), None, seed)
    result.feed_back()
    return result


@pytest.mark.parametrize("codec", [AdditiveCodec(1, 4, 4), AdditiveCodec(2, 3, 8), AdditiveCodec(3, 2, 2)])
def test_every_step_of_the_additive_fit_lowers_its_cost(codec: AdditiveCodec) -> None:
    fit = fitter(4, codec)
    for step in (fit.refit_scales, fit.refit_codebooks, fit.search_codes, fit.refit_scales, fit.refit_codebooks):
        before = fit.cost(fit.state)
        step()
        # words and scales are rounded to fp16 afterwards, which adds at most 2^-11 of the cost of W itself
        assert fit.cost(fit.state) <= before + 2.0**-11 * cost(fit.W, fit.H)


def test_refitted_words_approach_the_least_squares_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reallm.codecs.additive.encode.CG_ITERATIONS", 200)
    fit = fitter(5, AdditiveCodec(1, 3, 4), cols=22)
    fit.refit_codebooks()
    root = torch.linalg.cholesky(fit.H.double())
    design = torch.zeros(20, 22, 8 * 4, dtype=torch.float64)  # weight [n, k] is linear in the words
    for n, k in itertools.product(range(20), range(22)):
        design[n, k, int(fit.state.codes[n, k // 4, 0]) * 4 + k % 4] = float(fit.state.scales[n])
    system = (root.T @ design).reshape(-1, 32)
    target = (fit.W.double() @ root).reshape(-1, 1)
    least = float((target - system @ torch.linalg.lstsq(system, target, driver="gelsd").solution).square().sum())
    assert least <= fit.cost(fit.state) <= least + 1e-5 * cost(fit.W, fit.H)  # fp16 words: (2^-11)^2; CG's rest


def test_the_best_round_is_kept() -> None:
    W, metric = correlated(16, 40, seed=6)
    work, codec = Workspace(metric), AdditiveCodec(2, 3, 4)
    costs = [
        cost(W - fit_additive_codes(W, codec, work, None, 0, rounds).decode(40), work.hessian) for rounds in range(4)
    ]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_kmeans_finds_separated_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(8, 4, generator=generator)
    vectors = centres.repeat(50, 1) + 0.01 * torch.randn(400, 4, generator=generator)
    books = fit_codebooks(vectors, torch.ones(400), AdditiveCodec(1, 4, 4), 0)
    nearest = torch.cdist(centres, books[0]).amin(1)
    assert float(nearest.max()) < 0.02  # the mean of 50 points of spread 0.01, or of part of them


def test_fewer_vectors_than_words_become_words_themselves() -> None:
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    books = fit_codebooks(vectors, torch.ones(5), AdditiveCodec(1, 4, 4), 0)
    assert float(torch.cdist(to_half(vectors), books[0]).amin(1).max()) == 0


def test_the_damped_hessian_is_the_papers() -> None:
    _, metric = correlated(4, 24, seed=1)
    work, H = Workspace(metric), metric.hessian.double()
    expected = (H + H.T) / 2 + DAMPING * H.diagonal().mean() * torch.eye(24).double()
    ratio = expected.trace() / work.hessian.trace()
    assert float(ratio.log2()) == pytest.approx(round(float(ratio.log2())), abs=1e-12)  # up to float64 summation
    torch.testing.assert_close(work.hessian * ratio, expected, rtol=1e-12, atol=0)
    factor = work.ordered_factor.double()
    inverse = torch.linalg.inv(work.hessian[work.order][:, work.order])
    assert torch.equal(factor, factor.triu()) and not work.notes
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=0, atol=1e-5 * float(inverse.max()))
    diagonal = work.hessian.diagonal()[work.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())


def test_defects_of_a_hessian_are_noted() -> None:
    _, metric = correlated(4, 24, seed=1)
    keep = (torch.arange(24) > 2).float()
    dead, none = (
        Workspace(Metric(H, metric.fisher)) for H in (metric.hessian * keep * keep[:, None], torch.zeros(24, 24))
    )
    assert dead.hessian.diagonal().min() > 0 and dead.notes == ["3 dead columns"]
    assert torch.equal(none.hessian, torch.eye(24).double()) and "plain squared error" in none.notes[0]


def test_the_cost_is_the_formula() -> None:
    W, metric = correlated(5, 12, seed=1)
    rows, extra = torch.rand(5) + 0.5, torch.rand(5, 12)
    whole = Metric(metric.hessian, metric.fisher, rows, extra)
    E, H = W.double().numpy(), metric.hessian.double().numpy()
    expected = 0.5 * sum(float(rows[n]) * E[n] @ H @ E[n] for n in range(5)) + 0.5 * (extra.numpy() * E**2).sum()
    assert whole.guided(W) == pytest.approx(expected, rel=24 * 2.0**-24 * 4)  # float32 sums of 12 terms, twice
    assert whole.diagonal(W) == pytest.approx(0.5 * (metric.fisher.numpy() * E**2).sum(), rel=1e-6)
    assert whole.guided(torch.zeros(5, 12)) == 0


@pytest.mark.parametrize("given", [False, True])
def test_a_large_metric_is_rotated_in_place_and_computed_again_when_it_is_needed(given, monkeypatch) -> None:
    _, metric = correlated(150, 200, seed=4)
    metric = Metric(metric.hessian, metric.fisher, gram=correlated(3, 150, seed=5)[1].hessian)
    small = Workspace(metric)
    monkeypatch.setattr("reallm.codecs.metric.LARGE", 100)
    monkeypatch.setattr("reallm.decoding.rotation.PANEL", 64)
    shared = (small.hessian.clone(), small.output_hessian.clone()) if given else (None, None)
    large = Workspace(metric, *shared)
    for name in ("hessian", "output_hessian", "natural_factor", "output_factor"):
        assert torch.allclose(getattr(large.rotated, name), getattr(small.rotated, name), rtol=1e-5, atol=1e-6), name
    assert ("hessian" in vars(large)) == given
    assert torch.equal(large.hessian, small.hessian) and torch.equal(large.output_hessian, small.output_hessian)
    assert torch.equal(large.cost_weight, small.cost_weight)
