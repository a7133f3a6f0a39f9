"""The neural codec: the search is exact, the fit lowers the cost, and both are deterministic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from consistent import random_decoder
from torch import Tensor
from weights import correlated

from reallm.codecs.encode import encode
from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.neural import fit as neural_fit
from reallm.codecs.neural import viterbi
from reallm.codecs.neural.encode import _Encoder, patches
from reallm.codecs.shared_codebooks import fit_shared_codebooks
from reallm.decoding.decode import decode
from reallm.decoding.neural import stored_values, windows_of
from reallm.kernels.codes.neural import pack_tensors
from reallm.kernels.formats.codecs import NeuralCodec
from reallm.kernels.formats.formats import Format
from reallm.measurement.encoding import codebook_bytes, codebook_values
from reallm.planner.tables.tensor_layout import shared_key

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "nd1x4-d2-c8x1-t2-w8"


def values_of(codec: NeuralCodec, seed: int = 0) -> Tensor:
    return stored_values(codec, torch.from_numpy(random_decoder(codec, np.random.default_rng(seed))))


def cost(W: Tensor, metric: Metric, fmt: Format, books: Tensor) -> float:
    fields = {k: torch.from_numpy(v) for k, v in encode(W, fmt, Workspace(metric), shared=books).items()}
    return metric.guided(W - decode(fmt, fields, *W.shape, shared=codebook_bytes(fmt, books)))


@pytest.mark.parametrize(("bits", "taps", "dim"), [(2, 2, 2), (1, 4, 4), (2, 3, 1), (3, 1, 8)])
def test_the_search_finds_the_cheapest_of_all_codes(bits: int, taps: int, dim: int) -> None:
    codec = NeuralCodec(bits, dim, 5, 1, taps, 8)
    values = values_of(codec)
    target = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(1))
    choices = torch.tensor(list(itertools.product(range(1 << bits), repeat=5)))
    tried = values[windows_of(codec, choices.T).T]
    best = (target[:, None] - tried).square().sum((2, 3)).amin(1)
    found = values[windows_of(codec, viterbi.cheapest_codes(codec, target, values).T).T]
    # float32 metrics of at most 5 steps of 8 values near one
    torch.testing.assert_close((target - found).square().sum((1, 2)), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "taps", "dim"), [(4, 3, 2), (3, 4, 2), (2, 5, 1), (8, 2, 4)])
def test_native_and_portable_searches_agree(bits: int, taps: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = NeuralCodec(bits, dim, 9, 2, taps, 8)
    values, target = values_of(codec), torch.randn(2, 40, dim, generator=torch.Generator().manual_seed(2))

    def error() -> Tensor:
        codes = viterbi.cheapest_codes(codec, target, values)
        return (target - values[windows_of(codec, codes.T).T]).square().sum((1, 2))

    native = error()
    monkeypatch.setattr(viterbi, "library", lambda name: None)
    torch.testing.assert_close(
        error(), native, rtol=1e-5, atol=0
    )  # sums of 40 steps in float32; ties may be broken differently


def test_a_decoder_never_costs_more_than_its_words_alone() -> None:
    """The fitted decoder against plain vector quantisation, which is a decoder of zeros under the same search.

    The fit returns the words alone if the held-out crops favour them; a matrix of 64 rows has too few crops for that.
    """
    W, metric = correlated(256, 48, seed=1)
    fmt = Format.parse(NAME + "+ldl")
    assert isinstance(fmt.codec, NeuralCodec)
    fitted = codebook_values(fmt, fit_shared_codebooks(fmt, [(W, metric)], 0))
    plain = Format.parse("aq1x4-d2-shared")
    books = codebook_values(plain, fit_shared_codebooks(plain, [(W, metric)], 0))
    words = [books[0].double().numpy(), *(np.zeros(shape) for shape, _ in fmt.codec.tensors[1:])]
    silent = torch.from_numpy(pack_tensors(fmt.codec, words)).float()
    assert cost(W, metric, fmt, fitted) < cost(W, metric, fmt, silent)


def test_error_feedback_and_each_later_step_lower_the_cost() -> None:
    W, metric = correlated(40, 48, seed=2)
    fmt = Format.parse(NAME)
    books = codebook_values(fmt, fit_shared_codebooks(fmt, [(W, metric)], 0))
    assert cost(W, metric, Format.parse(NAME + "+ldl"), books) < cost(W, metric, fmt, books)
    assert isinstance(fmt.codec, NeuralCodec)
    state = _Encoder(W, fmt.codec, Workspace(metric), stored_values(fmt.codec, books))
    state.quantise(torch.arange(48), W.T.contiguous())
    before = state.cost()
    state.refit_scales()
    assert state.cost() <= before * (1 + 2.0**-10)  # scales are rounded to fp16


def test_a_fit_gives_the_same_bytes_again_and_improves_on_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [correlated(33, 40, seed=3), correlated(20, 40, seed=4)]
    fmt = Format.parse(NAME + "+rot")
    first, second = (fit_shared_codebooks(fmt, members, 0)["codebooks"] for _ in range(2))
    assert np.array_equal(first, second) and first.nbytes == fmt.shared_field.nbytes
    books = codebook_values(fmt, {"codebooks": first})
    monkeypatch.setattr(neural_fit, "ROUNDS", 0)
    start = codebook_values(fmt, fit_shared_codebooks(fmt, members, 0))
    assert sum(cost(*m, fmt, books) for m in members) < sum(cost(*m, fmt, start) for m in members)
    fields = [encode(members[0][0], fmt, Workspace(members[0][1]), shared=books) for _ in range(2)]
    assert all(np.array_equal(fields[0][name], fields[1][name]) for name in fields[0])
    assert shared_key(fmt, "q") != shared_key(Format.parse(NAME), "q")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 40), (9, 17)])
@pytest.mark.parametrize("name", ["nd1x3-d8-c4x1-t2-w4+ldl", "nd1x2-d4-c4x2-t3-w8"])
def test_matrices_smaller_than_a_patch_are_encoded(shape: tuple[int, int], name: str) -> None:
    W, metric = correlated(*shape, seed=5)
    fmt = Format.parse(name)
    books = codebook_values(fmt, fit_shared_codebooks(fmt, [(W, metric)], 0))
    assert cost(W, metric, fmt, books) <= metric.guided(W)


def test_zeros_stay_zeros() -> None:
    _, metric = correlated(6, 40, seed=6)
    fmt, W = Format.parse(NAME + "+ldl"), torch.zeros(6, 40)
    books = codebook_values(fmt, fit_shared_codebooks(fmt, [(W, metric)], 0))
    assert cost(W, metric, fmt, books) == 0


def test_the_decoder_must_be_given_and_fit() -> None:
    W, metric = correlated(4, 16, seed=0)
    for books in (None, torch.zeros(3)):
        with pytest.raises(ValueError, match="needs its shared codebooks"):
            encode(W, Format.parse(NAME), Workspace(metric), shared=books)


def test_patches_are_cut_down_the_columns() -> None:
    columns = torch.arange(6.0).view(2, 3)
    assert patches(columns, 2).tolist() == [[[0, 1], [2, 0]], [[3, 4], [5, 0]]]
