"""Choices around the codes: row tables, outliers, channel scales, clipping and column order; and bad statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from weights import correlated

from reallm.codecs.encode import encode
from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.packed_fields import to_half
from reallm.codecs.scalar.clipping import learn_clipping
from reallm.codecs.scalar.encode import choose_scalar_codes, round_scalar
from reallm.codecs.scalar.row_tables import fit_levels, refit_levels, round_kmeans
from reallm.codecs.terms.low_rank import strongest
from reallm.codecs.terms.outliers import find_outliers
from reallm.codecs.transforms.channel_scales import find_channel_scales
from reallm.codecs.transforms.permutation import column_chain, similar_columns
from reallm.decoding.decode import decode
from reallm.kernels.formats.codecs import KMeansCodec, ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank, Sparse

HALF = 2.0**-11  # relative rounding of fp16


def cost_of(name: str, W: Tensor, metric: Metric, work: Workspace | None = None) -> float:
    fmt = Format.parse(name)
    fields = encode(W, fmt, work or Workspace(metric))
    weight = decode(fmt, {k: torch.from_numpy(v) for k, v in fields.items()}, *W.shape)
    assert bool(torch.isfinite(weight).all())
    return Metric(torch.nan_to_num(metric.hessian), metric.fisher).guided(W - weight)


def weighted_error(W: Tensor, levels: Tensor, weight: Tensor) -> Tensor:
    nearest = (W[:, :, None] - levels[:, None, :]).square().amin(2)
    return (nearest.double() * weight).sum(1)


def test_four_levels_are_near_the_best_partition_of_a_row() -> None:
    """The optimum is found by trying every cut of the sorted row into runs, whose means are their best levels."""
    generator = torch.Generator().manual_seed(0)
    W, weight = torch.randn(20, 14, generator=generator), torch.rand(14, generator=generator) + 0.1
    found = weighted_error(W, fit_levels(W, weight, 4), weight)
    best = []
    for row in range(20):
        order = W[row].argsort()
        values, mass = W[row][order].double(), weight[order].double()
        best.append(
            min(
                sum(
                    float((mass[s] * (values[s] - (mass[s] * values[s]).sum() / mass[s].sum()).square()).sum())
                    for s in map(slice, (0, *cuts), (*cuts, 14))
                )
                for cuts in itertools.combinations(range(1, 14), 3)
            )
        )
    exact = torch.tensor(best)
    assert bool((found >= exact * (1 - 1e-5)).all())
    # Lloyd's iterations end in local optima: half of these rows are exact up to fp16, the total is within 15%
    assert float((found <= exact * 1.001 + 14 * (HALF * W.abs().max()) ** 2).float().mean()) >= 0.5
    assert float(found.sum()) <= 1.15 * float(exact.sum())


@pytest.mark.parametrize("values", [[0.0], [1.5], [-2.0, 0.0, 3.0], [0.25, 0.5, 0.75, 1.0]])
def test_rows_of_few_values_are_exact(values: list[float]) -> None:
    W = torch.tensor(values).repeat(12)[None].repeat(3, 1)
    tables = round_kmeans(W, KMeansCodec(2), torch.ones(W.shape[1]))
    assert torch.equal(tables.decoded, W)


def test_levels_follow_the_weights() -> None:
    """A column of far greater weight than the others is represented exactly."""
    W, _ = correlated(8, 64, seed=1)
    weight = torch.ones(64)
    weight[5] = 1e5
    error = W - round_kmeans(W, KMeansCodec(2), weight).decoded
    assert float(error[:, 5].abs().max()) < 0.01 < float(error.abs().mean())


def test_refitted_levels_solve_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reallm.codecs.scalar.row_tables.REFIT_RIDGE", 0.0)
    W, metric = correlated(5, 40, seed=2)
    H = Workspace(metric).hessian
    tables = round_kmeans(W, KMeansCodec(2), torch.ones(40))
    found = refit_levels(W, tables, H.float())
    root = torch.linalg.cholesky(H)
    for row in range(5):
        one_hot = torch.nn.functional.one_hot(tables.codes[row], 4).double()
        exact = torch.linalg.lstsq(root.T @ one_hot, (root.T @ W[row].double())[:, None]).solution[:, 0]
        # fp16 rounding, and float32 sums of 40 terms times the condition of the system, under 20 here
        torch.testing.assert_close(found[row].double(), exact, rtol=HALF, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_on_row_tables_never_costs_more_than_its_start(bits: int) -> None:
    W, metric = correlated(24, 96, seed=3)
    assert cost_of(f"km{bits}+ldl", W, metric) < 0.8 * cost_of(f"km{bits}", W, metric)
    free = Metric(torch.eye(96), metric.fisher)  # feedback gains nothing, so each row keeps its start
    assert cost_of(f"km{bits}+ldl", W, free) <= cost_of(f"km{bits}", W, free) * (1 + 1e-6)


def test_outliers_are_the_largest_and_the_worst_coded() -> None:
    W = torch.zeros(4, 50) + 0.1
    W[1, 7], W[2, 9], W[3, 3], W[0, 0] = 9.0, -8.0, 0.14, 0.13
    outliers = find_outliers(W, Sparse(20), torch.ones(50), lambda rest: torch.where(rest != 0, 0.1, 0.0))
    assert set(map(tuple, outliers.mask.nonzero().tolist())) == {(1, 7), (2, 9), (3, 3), (0, 0)}
    assert torch.equal(outliers.rest, W.masked_fill(outliers.mask, 0.0))
    by_size = find_outliers(W, Sparse(20), torch.ones(50), None).mask
    assert bool(by_size[3, 3]) and int(by_size.sum()) == 4


def test_outliers_compensate_for_the_codes_around_them() -> None:
    """Their fitted values cost less than exact outliers, and less than the error of the codes alone."""
    W, metric = correlated(12, 60, seed=4)
    work = Workspace(metric)
    outliers = find_outliers(W, Sparse(50), work.column_weight, None)
    decoded = to_half(outliers.rest * 2).round() / 2
    _, added = outliers.fit(W, decoded, work)
    assert not added[~outliers.mask].any()
    cost = metric.guided(W - decoded - added)
    assert cost < metric.guided((W - decoded).masked_fill(outliers.mask, 0.0))
    assert cost < metric.guided(outliers.rest - decoded)


@pytest.mark.parametrize("name", ["uint3-g16", "km3", "uint3-g16+ldl", "km3+ldl", "lm3-g16-dq6x64+ldl"])
def test_outliers_lower_the_cost(name: str) -> None:
    W, metric = correlated(24, 96, seed=5)
    W[3, 5], W[9, 40] = 12.0, -15.0
    assert cost_of(f"{name}+o5", W, metric) < cost_of(name, W, metric)


@pytest.mark.parametrize("name", ["uint3-g16", "int2-g48", "km2", "nf4-g16"])
def test_channel_scales_never_cost_more_than_none(name: str) -> None:
    for seed in range(3):
        W, metric = correlated(16, 96, seed=seed)
        # the search compares damped costs, with fp16 scales: the damping is 1% of the mean diagonal
        assert cost_of(f"{name}+cs", W, metric) <= cost_of(name, W, metric) * 1.02


def test_channel_scales_find_the_loud_input() -> None:
    W, metric = correlated(24, 64, seed=6)
    loud = torch.ones(64)
    loud[11] = 100.0
    metric = Metric(metric.hessian * loud * loud[:, None], metric.fisher)
    scales = find_channel_scales(W, Format.parse("uint3-g16+cs"), Workspace(metric))
    assert bool((scales > 0).all()) and int(scales.argmin()) == 11  # coded most finely
    assert cost_of("uint3-g16+cs", W, metric) < 0.5 * cost_of("uint3-g16", W, metric)


@pytest.mark.parametrize("codec", [ScalarCodec("uint", 3, 16), ScalarCodec("int", 2, 0), ScalarCodec("nf", 3, 48)])
def test_learned_clipping_never_costs_more_than_its_start(codec: ScalarCodec) -> None:
    W, metric = correlated(16, 96, seed=7)
    work = Workspace(metric)
    start = metric.guided(W - round_scalar(W, codec, work.column_weight).decode(codec))
    learned = metric.guided(W - choose_scalar_codes(W, codec, work, feedback=False, clipping=True).decode(codec))
    assert learned < 0.95 * start


def test_learned_clipping_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: the grid ends are the same in one chunk and row by row."""
    W, metric = correlated(6, 48, seed=8)
    codec, work = ScalarCodec("uint", 3, 16), Workspace(metric)
    start = round_scalar(W, codec, work.column_weight)

    def pull(error: Tensor) -> Tensor:
        return error * work.column_weight  # without a sum over columns, whose order depends on the number of rows

    together = learn_clipping(W, codec, start.scales, start.zeros, pull)
    monkeypatch.setattr("reallm.codecs.scalar.clipping.CHUNK_NUMEL", 1)
    apart = learn_clipping(W, codec, start.scales, start.zeros, pull)
    torch.testing.assert_close(together[0], apart[0], rtol=2 * HALF, atol=0)


def test_a_chain_puts_similar_columns_next_to_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(60) % 3
    W = 5 * torch.randn(100, 3, generator=generator)[:, kinds] + 0.1 * torch.randn(100, 60, generator=generator)
    order = column_chain(W)
    assert torch.equal(order.sort().values, torch.arange(60))
    assert int((kinds[order][1:] != kinds[order][:-1]).sum()) == 2  # every kind in one run
    assert torch.equal(order, column_chain(W.clone()))


def test_columns_move_only_where_that_rounds_better() -> None:
    W, metric = correlated(16, 64, seed=9)
    work, natural = Workspace(metric), torch.arange(64)
    assert torch.equal(similar_columns(W, Format.parse("km3+perm"), work), natural)
    assert torch.equal(similar_columns(W, Format.parse("tq2-l8+perm"), work), work.order)
    loud = torch.where(natural % 4 == 0, 20.0, 1.0)  # some columns have large weights and small inputs
    quiet = Metric(metric.hessian / loud / loud[:, None], metric.fisher)
    for name in ("int3-g16", "uint3-g16"):
        assert cost_of(f"{name}+perm", W * loud, quiet) < 0.7 * cost_of(name, W * loud, quiet)
        assert (
            cost_of(f"{name}+perm", W, metric) <= cost_of(name, W, metric) * 1.02
        )  # orders are compared with 1% damping


def test_the_plain_term_is_the_truncated_svd() -> None:
    W, metric = correlated(20, 40, seed=10)
    left = strongest(W, LowRank(4), 0).product.double()
    tail = torch.linalg.svdvals(W.double())[4:].square().sum()
    assert float((W - left).square().sum()) == pytest.approx(float(tail), rel=1e-3)  # fp16 factors, HALF each
    fmt, other = (Format.parse(f"nf2-g16{svd}+r4") for svd in ("+svd", ""))
    assert fmt.nbytes(20, 40) == other.nbytes(20, 40)
    first, second = (encode(W, f, Workspace(metric)) for f in (fmt, other))
    assert any(not np.array_equal(first[key], second[key]) for key in first)


FORMATS = ["uint3-g16", "lm3-g16+ldl", "uint3-g16+cs", "int3-g16+ldl+perm", "uint3-g16+lwc", "km3+ldl", "km2"]
FORMATS += ["km3+o20", "uint3-g16-dq4x16+ldl+o50", "nf4-g16+r4", "nf2-g16+svd+r4", "aq1x4-d4", "aq1x4-d4+r2"]


def statistics(kind: str, metric: Metric) -> Metric:
    H, fisher, K = metric.hessian, metric.fisher, len(metric.hessian)
    if kind == "NaN Hessian":
        H = H.clone()
        H[3, 3] = float("nan")
    elif kind == "indefinite Hessian":
        H = H - 0.5 * H.diagonal().mean() * torch.eye(K)
    elif kind == "negative definite Hessian":
        H = -H
    elif kind == "Fisher of NaN":
        fisher = torch.full_like(fisher, float("nan"))
    elif kind == "one token":
        x = torch.randn(1, K, generator=torch.Generator().manual_seed(0))
        H = x.T @ x
    return Metric(H, fisher)


@pytest.mark.parametrize("kind", ["NaN Hessian", "indefinite Hessian", "negative definite Hessian"])
@pytest.mark.parametrize("name", FORMATS)
def test_bad_hessians_fall_back_with_a_note(name: str, kind: str) -> None:
    W, metric = correlated(10, 48, seed=11)
    work = Workspace(statistics(kind, metric))
    cost = cost_of(name, W, metric, work)
    assert cost <= 0.6 * metric.guided(W)  # plain rounding to 2 bits does better than that
    assert any("Hessian" in note for note in work.notes)


@pytest.mark.parametrize("kind", ["Fisher of NaN", "one token"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_bad_fisher_and_few_tokens_do_not_fail(name: str, kind: str) -> None:
    W, metric = correlated(10, 48, seed=12)
    work = Workspace(statistics(kind, metric))
    assert np.isfinite(cost_of(name, W, metric, work))
    if kind == "Fisher of NaN" and "+r" in name and "+svd" not in name:
        assert any("Fisher is not finite" in note for note in work.notes)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 17), (33, 1)])
@pytest.mark.parametrize("name", FORMATS)
def test_small_matrices_are_encoded(name: str, shape: tuple[int, int]) -> None:
    W, metric = correlated(*shape, seed=13)
    assert cost_of(name, W, metric) <= metric.guided(W) * (1 + 1e-6)
