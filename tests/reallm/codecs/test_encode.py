"""Encoding in every format: exact sizes, bytes that decode to what the encoder expected, determinism, hard input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from weights import correlated

from reallm.codecs import encode as encode_module
from reallm.codecs.encode import choose_codes, encode
from reallm.codecs.encoder import EncodingContext
from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.neural import fit as neural_fit
from reallm.codecs.packed_fields import PackedFields, store, store_all
from reallm.codecs.shared_codebooks import fit_shared_codebooks
from reallm.codecs.terms.low_rank import factorise, store_factors, strongest
from reallm.decoding.decode import decode
from reallm.kernels.formats.codecs import SCALAR_BITS, AdditiveCodec, DenseCodec
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank
from reallm.kernels.reference import decode_reference
from reallm.measurement.encoding import codebook_bytes, codebook_values
from reallm.measurement.search_space import PRESETS
from reallm.planner.tables.tensor_layout import shared_key

pytestmark = pytest.mark.usefixtures("one_thread")

SCALAR = [
    f"{table}{bits}-g{group}"
    for table in ("int", "uint", "nf", "lm")
    for bits, group in zip(SCALAR_BITS, (0, 8, 48, 16, 32, 48), strict=True)
]
DOUBLE = ["nf4-g8-dq8x8", "int3-g16-dq6x64", "uint4-g48-dq4x16", "lm3-g48-dq6x64+ldl"]
FEEDBACK = ["int4-g48+ldl", "uint2-g0+ldl", "nf3-g16+ldl", "lm2-g8+ldl"]
ADDITIVE = ["aq1x4-d4", "aq2x3-d8", "aq3x2-d2", "aq4x2-d4", "aq1x4-d4-shared"]
LOW_RANK = ["nf3-g16+r4", "int2-g48+ldl+r4i8", "aq1x3-d4+r4", "lm2-g32-dq6x64+ldl+r4i8", "aq2x2-d4-shared+r4i8"]
LOW_RANK += ["int2-g48+ldl+r4i4", "lm3-g16+ldl2+r3i4", "km2+ldl+r2i4"]
LATTICE = ["e8p2", "e8p2+ldl+rot", "e8p3+ldl+perm", "e8p4+rot+o5", "e8p2+ldl+rot+r4i4"]
NEURAL = ["nd1x4-d2-c8x1-t2-w8+ldl", "nd1x3-d4-c6x2-t2-w4", "nd1x3-d2-c8x1-t2-w8+ldl+r4i8"]
SEARCHED = ["km2", "km3+ldl", "uint3-g16+lwc", "nf3-g48-dq6x64+lwc", "int3-g16+ldl+lwc", "uint3-g16+cs", "km2+cs+o20"]
SEARCHED += ["int3-g16+perm", "lm3-g16+ldl+perm", "uint2-g16+ldl+o50", "nf2-g16+svd+r4", "aq1x4-d4+perm+cs+o20"]
NAMES = [*SCALAR, *DOUBLE, *FEEDBACK, *ADDITIVE, *LOW_RANK, *LATTICE, *NEURAL, *SEARCHED, "bf16", "fp16", "fp32"]
HARD_FORMATS = ["int4-g16", "uint3-g48+ldl", "nf4-g8-dq8x8", "lm2-g32-dq6x64+ldl+r4i8", "nf3-g16+r4", "aq2x2-d4"]
HARD_FORMATS += [*NEURAL[:1], *SEARCHED, "e8p2+ldl+rot", "e8p3+ldl+rot", "e8p4+rot"]


@pytest.fixture(autouse=True)
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short fits of neural decoders; test_neural checks what a full fit gains."""
    monkeypatch.setattr(neural_fit, "ROUNDS", 2)


def books_of(fmt: Format, W: Tensor, metric: Metric) -> Tensor | None:
    return codebook_values(fmt, fit_shared_codebooks(fmt, [(W, metric)], 0)) if fmt.shared_field else None


def packed(name: str, W: Tensor, metric: Metric) -> tuple[PackedFields, Tensor]:
    """The packed fields of W, and the weight that they decode to."""
    fmt = Format.parse(name)
    books = books_of(fmt, W, metric)
    fields = encode(W, fmt, Workspace(metric), shared=books)
    return fields, decoded(fmt, fields, W, books)


def decoded(fmt: Format, fields: PackedFields, W: Tensor, books: Tensor | None) -> Tensor:
    """The weight that the runtime decodes from the bytes, checked against the reference decode."""
    shared = codebook_bytes(fmt, books)
    weight = decode(fmt, {k: torch.from_numpy(v) for k, v in fields.items()}, *W.shape, shared=shared)
    all_fields = fields if shared is None else {**fields, "codebooks": shared.numpy()}
    reference = decode_reference(fmt, all_fields, *W.shape)
    size = np.abs(reference).max() + float(W.abs().max())
    # float32 against float64: under 16 roundings of 2^-24 on the way, of values that may cancel down from that size
    np.testing.assert_allclose(weight.numpy(), reference, rtol=0, atol=16 * 2.0**-24 * 4 * size)
    return weight


def cost_of(name: str, W: Tensor, metric: Metric) -> float:
    return metric.guided(W - packed(name, W, metric)[1])


@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_decode_to_what_the_encoder_expected(name: str) -> None:
    W, metric = correlated(9, 77, seed=1)
    fmt = Format.parse(name)
    books = books_of(fmt, W, metric)
    coded = choose_codes(W, EncodingContext(fmt, Workspace(metric), books))
    fields = store_all(fmt.fields(9, 77), coded.values)
    weight = decoded(fmt, fields, W, books)
    assert [*fields] == [field.name for field in fmt.fields(9, 77)]
    assert {k: v.nbytes for k, v in fields.items()} == {f.name: f.nbytes for f in fmt.fields(9, 77)}
    assert sum(v.nbytes for v in fields.values()) == fmt.nbytes(9, 77)
    atol = 32 * 2.0**-24 * float(W.abs().max() + weight.abs().max())  # float32 sums in another order
    torch.testing.assert_close(coded.decoded, weight, rtol=0, atol=atol)
    if isinstance(fmt.codec, DenseCodec):
        rounding = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 0.0}[name]
        assert torch.allclose(weight, W, rtol=rounding, atol=2.0**-25)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_deterministic_and_leaves_its_input_alone(name: str) -> None:
    W, metric = correlated(8, 48, seed=2)
    before, state = W.clone(), torch.get_rng_state()
    first, _ = packed(name, W, metric)
    second, _ = packed(name, W.clone(), metric)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert torch.equal(W, before) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("plain", ["int3-g16", "uint3-g16", "nf3-g48", "lm3-g32-dq6x64"])
def test_feedback_lowers_the_cost_on_correlated_inputs(plain: str) -> None:
    W, metric = correlated(24, 96, seed=3)
    assert cost_of(f"{plain}+ldl", W, metric) < 0.8 * cost_of(plain, W, metric)


@pytest.mark.parametrize(
    "names",
    [
        [f"{table}{bits}-g16{end}" for bits in SCALAR_BITS]
        for table in ("int", "uint", "nf", "lm")
        for end in ("", "+ldl")
    ]
    + [["aq1x2-d4", "aq1x4-d4", "aq2x4-d4", "aq3x4-d4", "aq4x4-d4"], ["int2-g16", "int2-g16+r4", "int2-g16+r16"]],
)
def test_more_bits_cost_less(names: list[str]) -> None:
    W, metric = correlated(24, 96, seed=4)
    costs = [cost_of(name, W, metric) for name in names]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def hard(kind: str) -> tuple[Tensor, Metric]:
    small = {"one": (1, 1), "narrow": (1, 3), "short": (5, 7)}
    W, metric = correlated(*small.get(kind, (10, 48)), seed=5)
    H = metric.hessian
    if kind == "zero rows":
        W[2:4] = 0
    elif kind == "all zero":
        W.zero_()
    elif kind == "constant rows":
        W[:] = torch.linspace(-2, 3, 10)[:, None]
    elif kind == "huge and tiny rows":
        W[0], W[1] = 1e4 * W[0], 1e-7 * W[1]
    elif kind == "zero Hessian":
        metric = Metric(torch.zeros_like(H), torch.zeros_like(metric.fisher))
    elif kind == "singular Hessian":
        x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
        metric = Metric(x.T @ x, metric.fisher)
    elif kind == "dead columns":
        keep = (torch.arange(48) % 3 > 0).float()
        metric = Metric(H * keep * keep[:, None], metric.fisher * keep)
    elif kind == "dead rows":
        metric = Metric(H, metric.fisher * (torch.arange(10) > 3)[:, None])
    elif kind == "minute Hessian":
        metric = Metric(H * 2.0**-90, metric.fisher * 2.0**-90)
    elif kind == "steep Hessian":
        steep = torch.logspace(0, 7, 48)
        metric = Metric(H * steep * steep[:, None], metric.fisher * steep.square())
    return W, metric


HARD = ["zero rows", "all zero", "constant rows", "huge and tiny rows", "zero Hessian", "singular Hessian"]
HARD += ["dead columns", "dead rows", "minute Hessian", "steep Hessian", "one", "narrow", "short"]


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", HARD_FORMATS)
def test_hard_input_is_encoded(name: str, kind: str) -> None:
    W, metric = hard(kind)
    _, weight = packed(name, W, metric)
    assert bool(torch.isfinite(weight).all())
    error, cost = W - weight, metric.guided(W - weight)
    assert np.isfinite(cost)
    assert cost <= metric.guided(W) * (1 + 1e-6)  # never worse than storing zeros
    if "-dq" not in name and "+r" not in name and not name.startswith("nd"):  # rows do not share scales or factors
        # then no row, however small, is worse than zeros either
        assert not weight[(W == 0).all(1)].any()
        H, step = metric.hessian, 2.0**-24  # the smallest positive fp16
        per_row, nothing = ((error @ H) * error).sum(1), ((W @ H) * W).sum(1)
        assert bool((per_row <= nothing * (1 + 1e-4) + step**2 * H.trace()).all())


def test_a_minute_hessian_changes_no_code() -> None:
    W, metric = correlated(10, 48, seed=5)
    minute = Metric(metric.hessian * 2.0**-90, metric.fisher * 2.0**-90)
    for name in ("int3-g16+ldl", "aq2x3-d4", "nf3-g16+r4", "lm2-g32-dq6x64+ldl+r4i8"):
        first, second = packed(name, W, metric)[0], packed(name, W, minute)[0]
        assert all(np.array_equal(first[key], second[key]) for key in first), name


def test_dead_rows_of_the_fisher_do_not_spoil_the_factors() -> None:
    W, metric = correlated(64, 96, seed=6)
    fisher = metric.fisher * (torch.arange(64) > 7)[:, None]
    product = factorise(W, LowRank(8), Workspace(Metric(metric.hessian, fisher)), False, 0).product
    assert float((W - product)[:8].norm()) < 1.5 * float(W[:8].norm())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int4-g16", "aq1x4-d4", "bf16"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    W, metric = correlated(4, 16, seed=0)
    W[1, 2] = value
    with pytest.raises(ValueError, match="a weight is not finite"):
        encode(W, Format.parse(name), Workspace(metric))


def test_weights_too_large_for_their_float_are_refused() -> None:
    W, metric = correlated(4, 16, seed=0)
    W[1, 2] = 1e5
    with pytest.raises(ValueError, match=r"'values': a value is not finite in f16"):
        encode(W, Format.parse("fp16"), Workspace(metric))
    assert np.isfinite(cost_of("bf16", W, metric))


def test_shared_codebooks_must_be_given_and_fit() -> None:
    W, metric = correlated(4, 16, seed=0)
    fmt = Format.parse("aq1x4-d4-shared")
    for books in (None, torch.zeros(1, 16, 8)):
        with pytest.raises(ValueError, match=r"aq1x4-d4-shared needs its shared codebooks \(1, 16, 4\), not"):
            encode(W, fmt, Workspace(metric), shared=books)


def test_shared_codebooks_serve_every_member() -> None:
    """Fitted on two matrices of different spread, they cost the wider one less than codebooks of the other alone."""
    fmt = Format.parse("aq1x4-d4-shared")
    wide, narrow = correlated(24, 48, seed=1), correlated(24, 48, seed=2)
    narrow = (narrow[0].clamp(-0.3, 0.3), narrow[1])
    books = codebook_values(fmt, fit_shared_codebooks(fmt, [wide, narrow], 0))
    other = codebook_values(fmt, fit_shared_codebooks(fmt, [narrow], 0))

    def cost(W: Tensor, metric: Metric, books: Tensor) -> float:
        fields = {k: torch.from_numpy(v) for k, v in encode(W, fmt, Workspace(metric), shared=books).items()}
        return metric.guided(W - decode(fmt, fields, *W.shape, shared=codebook_bytes(fmt, books)))

    assert cost(*wide, books) < cost(*wide, other)
    assert fit_shared_codebooks(fmt, [wide, narrow], 0)["codebooks"].nbytes == fmt.shared_field.nbytes


@pytest.mark.parametrize("name", ["nf2-g48+r4", "int2-g48+ldl+r4i8", "aq1x3-d4+r4", "int2-g48+ldl+r4i4"])
def test_alternation_never_returns_a_worse_iterate_than_its_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W, metric = correlated(24, 96, seed=7)
    best = cost_of(name, W, metric)
    for rounds in (1, 2):
        monkeypatch.setattr(encode_module, "MAX_ALTERNATIONS", rounds)
        assert best <= cost_of(name, W, metric) * (1 + 1e-5)  # the encoder sums its cost in float32


@pytest.mark.parametrize("in_hessian", [False, True])
def test_factors_are_the_best_of_their_rank_in_their_metric(in_hessian: bool) -> None:
    """Eckart-Young: the error of the weighted problem is the tail of its singular values."""
    W, metric = correlated(20, 40, seed=8)
    work = Workspace(metric)
    product = factorise(W, LowRank(6), work, in_hessian, 0).product.double()
    if in_hessian:
        H = work.hessian
        left, right = torch.eye(20).double(), torch.linalg.cholesky(H)
    else:
        left = torch.diag(metric.fisher.double().mean(1).sqrt())
        right = torch.diag(metric.fisher.double().mean(0).sqrt())
    tail = torch.linalg.svdvals(left @ W.double() @ right)[6:].square().sum()
    error = (left @ (W.double() - product) @ right).square().sum()
    assert float(tail) <= float(error) * (1 + 1e-9) and float(error) <= float(tail) * 1.001  # fp16 factors: 2^-11 each


def test_int8_factors_are_within_their_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 3, generator=generator), torch.randn(3, 20, generator=generator)
    right[1] *= 1e3
    factors = store_factors(left, right, LowRank(5, "i8"))
    assert factors.product.shape == (12, 20) and not factors.stored["left"][:, 3:].any()
    steps = sum(
        (left[:, c].abs().max() * right[c].abs().max() / 127) for c in range(3)
    )  # half a step of each factor times the other's largest value, twice; and fp16 scales
    assert float((factors.product - left @ right).abs().max()) <= 1.01 * float(steps)


def test_int4_factors_are_no_further_off_than_half_steps_of_their_peaks() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 3, generator=generator), torch.randn(3, 20, generator=generator)
    factors = store_factors(left, right, LowRank(5, "i4"))
    stored = factors.stored["left"]
    assert float(stored.min()) >= 1 and float(stored.max()) <= 15 and bool((stored[:, 3:] == 8).all())
    for c in range(3):  # a component is the product of two vectors, each within half a step in the mean square
        exact, rounded = left[:, c].outer(right[c]), factors.left[:, c].outer(factors.right[c])
        off = [0.5 / 7 * float(v.abs().max()) * len(v) ** 0.5 / float(v.norm()) for v in (left[:, c], right[c])]
        bound = (1 + off[0]) * (1 + off[1]) - 1 + 2.0**-9  # the last for fp16 scales
        assert float((exact - rounded).norm() / exact.norm()) <= bound


@pytest.mark.parametrize("dtype", ["f16", "i8", "i4"])
def test_two_sided_factors_are_the_best_of_their_rank(dtype: str) -> None:
    """Eckart-Young again, with the output Hessian on the left; rounded factors are only compared with each other."""
    W, metric = correlated(20, 40, seed=8)
    outputs = torch.randn(60, 20, generator=torch.Generator().manual_seed(3)) * torch.logspace(-1, 1, 20)
    work = Workspace(Metric(metric.hessian, metric.fisher, gram=outputs.T @ outputs / 60))
    one, both = (factorise(W, LowRank(6, dtype), work, True, 0, two_sided=t).product for t in (False, True))  # type: ignore[arg-type]
    assert work.output_hessian is not None
    left, root = torch.linalg.cholesky(work.output_hessian).T, torch.linalg.cholesky(work.hessian)
    tail = float(torch.linalg.svdvals(left @ W.double() @ root)[6:].square().sum())
    two_sided, one_sided = (float((left @ (W - part).double() @ root).square().sum()) for part in (both, one))
    assert tail <= two_sided * (1 + 1e-6)
    assert dtype == "i4" or two_sided < one_sided
    # the cost is this without the damping of H, over the mean diagonal of G
    assert dtype == "i4" or work.two_sided(W - both) < work.two_sided(W - one)
    if dtype == "f16":
        assert two_sided <= tail * 1.001  # 2^-11 of each factor


def test_the_strongest_factors_leave_the_least_power() -> None:
    W, _ = correlated(20, 40, seed=8)
    left = float((W - strongest(W, LowRank(6), 0).product).square().sum())
    tail = float(torch.linalg.svdvals(W.double())[6:].square().sum())
    assert tail * (1 - 1e-6) <= left <= tail * 1.001  # fp16 factors


def test_codes_out_of_range_and_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="outside 0 to 7"):
        store(Field("codes", "u3", 2), torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="outside 0 to 7"):
        store(Field("codes", "u3", 2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="holds 3 values, not 2"):
        store(Field("codes", "u3", 3), torch.tensor([0, 1]))


def test_every_format_of_every_preset_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix has fewer rows than the ranks and fewer vectors than the codebooks have words."""
    monkeypatch.setattr(neural_fit, "ROUNDS", 0)
    monkeypatch.setattr(neural_fit, "STEPS", 1)
    W, metric = correlated(6, 40, seed=9)
    for name in sorted({name for lists in PRESETS.values() for names in lists for name in names}):
        fmt = Format.parse(name)
        words = fmt.codec.codebook_bits if isinstance(fmt.codec, AdditiveCodec) else 0
        relative = float((W - packed(name, W, metric)[1]).square().sum() / W.square().sum())
        assert relative < 0.6 and (not words or shared_key(fmt, "q") is None or fmt.shared_field is not None), name
