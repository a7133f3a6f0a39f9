"""The lattice encoder: exact search, gains of feedback, and hard input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import correlated

from reallm.codecs.block_scales import refit_block_scales
from reallm.codecs.encode import encode
from reallm.codecs.lattice.encode import SCALES, nearest_words
from reallm.codecs.lattice.nearest import nearest_e8p, nearest_root
from reallm.codecs.metric import Metric, Workspace
from reallm.decoding.decode import decode
from reallm.kernels.codes.lattice import e8p_words, root_words
from reallm.kernels.formats.formats import Format

WORDS = torch.from_numpy(e8p_words(np.arange(1 << 16))).float()
ROOTS = torch.from_numpy(root_words().copy()).float()


def cost_of(name: str, W: Tensor, metric: Metric) -> float:
    fmt = Format.parse(name)
    fields = {key: torch.from_numpy(raw) for key, raw in encode(W, fmt, Workspace(metric)).items()}
    return metric.guided(W - decode(fmt, fields, *W.shape))


def distances(x: Tensor, book: Tensor) -> Tensor:
    return (x.double()[:, None] - book.double()).square().sum(2).amin(1)


@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 2.0, 10.0])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=6, deadline=None)
def test_the_search_finds_the_nearest_of_all_words(size: float, seed: int) -> None:
    x = size * torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
    codes, words = nearest_e8p(x)
    assert torch.equal(words, WORDS[codes])
    # magnitudes are compared up to 2^-21 of themselves; eight entries of at most 3, for both shifts; float32 scores
    bound = 64 * 2.0**-21 * (1 + float(x.abs().max()) * 3)
    assert bool(((x - words).double().square().sum(1) <= distances(x, WORDS) + bound).all())
    codes, words = nearest_root(x)
    assert torch.equal(words, ROOTS[codes])
    assert bool(((x - words).double().square().sum(1) <= distances(x, ROOTS) + bound).all())


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
@settings(max_examples=30, deadline=None)
def test_a_word_is_its_own_nearest(codes: list[int]) -> None:
    wanted = torch.tensor(codes)
    assert torch.equal(nearest_e8p(WORDS[wanted])[0], wanted)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.0912), (3, 0.0293), (4, 0.0084)])
def test_a_normal_source_costs_what_it_should(bits: int, expected: float) -> None:
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    scale = SCALES[bits]
    error = (x - scale * nearest_words(x / scale, bits)[1]).square()
    # the mean over 20,000 words, whose errors have a standard deviation of 0.6 of their mean (measured)
    assert float(error.mean()) == pytest.approx(expected, rel=4 * 0.6 / 20_000**0.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_and_rotation_lower_the_cost(bits: int) -> None:
    W, metric = correlated(48, 96, seed=3)
    plain = cost_of(f"e8p{bits}+rot", W, metric)
    assert cost_of(f"e8p{bits}+ldl+rot", W, metric) < 0.8 * plain


def test_more_bits_cost_less() -> None:
    W, metric = correlated(24, 96, seed=4)
    costs = [cost_of(f"e8p{bits}+ldl+rot", W, metric) for bits in (2, 3, 4)]
    assert costs[0] > 2 * costs[1] > 4 * costs[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_set_aside(value: float) -> None:
    W, metric = correlated(8, 24, seed=1)
    H = metric.hessian.clone()
    H[3, 4] = value
    fmt, work = Format.parse("e8p2+ldl+rot"), Workspace(Metric(H, metric.fisher))
    fields = {key: torch.from_numpy(raw) for key, raw in encode(W, fmt, work).items()}
    assert float((W - decode(fmt, fields, 8, 24)).square().sum()) < 0.3 * float(W.square().sum())
    assert work.notes == ["Hessian is zero or not finite: plain squared error is used"]


def test_refitted_block_scales_are_the_least_squares_ones() -> None:
    W, metric = correlated(12, 48, seed=2)
    H, plain = metric.hessian.double(), torch.randn(12, 48, generator=torch.Generator().manual_seed(1))
    G = torch.cov(torch.randn(12, 40, generator=torch.Generator().manual_seed(2)))
    for gram in (None, G):
        fitted = refit_block_scales(W, plain, torch.ones(3), H.float(), gram).double()
        left = torch.eye(12, dtype=torch.float64) if gram is None else torch.linalg.cholesky(gram.double()).T
        root = torch.linalg.cholesky(H)
        design = torch.stack([(left @ (plain.double() * _block(b)) @ root).reshape(-1) for b in range(3)], 1)
        exact = torch.linalg.lstsq(design, (left @ W.double() @ root).reshape(-1, 1)).solution[:, 0]
        # a ridge of 1e-6, and float32 sums of 48 terms, 3e-6, times the condition of the system, under 100
        torch.testing.assert_close(fitted, exact, rtol=0, atol=1e-3 * float(exact.abs().max()))


def _block(index: int) -> Tensor:
    return (torch.arange(48) // 16 == index).double()
