"""Codecs: how the codes of a matrix are chosen for a format, given what errors cost.

`encode` is the one entry. A new codec is a module like `scalar` and a branch in `_encode_codes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format

from .additive.encode import encode_additive
from .lattice.encode import encode_lattice
from .metric import Metric, Workspace
from .neural.encode import encode_neural
from .packed_fields import PackedFields, store, store_all
from .rounding import RoundingCost
from .scalar.encode import encode_scalar
from .scalar.row_tables import encode_kmeans
from .terms.low_rank import Factors, factorise, strongest
from .terms.outliers import find_outliers
from .transforms.frame import transform
from .trellis.encode import encode_trellis

CODEC_VERSION = 2  # part of every cache key: raise it whenever an encoder's output may change
MAX_ALTERNATIONS = 4

__all__ = ["CODEC_VERSION", "Metric", "PackedFields", "Workspace", "encode"]


def encode(W: Tensor, fmt: Format, work: Workspace, *, shared: Tensor | None = None, seed: int = 0) -> PackedFields:
    """The packed fields of W[N, K] float32 in `fmt`: the same bytes for the same inputs, seed and thread count.

    `shared` holds what a format shares: codebooks [M, 2^B, d] or a decoder's bytes. With a low-rank term the two parts
    are fitted in turn, low rank first (LQ-LoRA, arXiv 2311.12023), until the cost stops falling; the best pair is kept.
    """
    if not bool(torch.isfinite(W).all()):
        raise ValueError("a weight is not finite")
    _check_shared(fmt, shared)
    fields = fmt.fields(*W.shape)
    if isinstance(fmt.codec, DenseCodec):
        return {fields[0].name: store(fields[0], W)}
    if fmt.low_rank is None:
        values, _ = _encode_rest(W, fmt, work, shared, seed)
        return store_all(fields, values)
    values, factors = _alternate(W, fmt, work, shared, seed)
    return store_all(fields, {**values, **factors.stored})


def _check_shared(fmt: Format, shared: Tensor | None) -> None:
    codec = fmt.codec
    if fmt.shared_field is None or not isinstance(codec, AdditiveCodec | NeuralCodec):
        return
    expected = codec.codebook_shape
    found = None if shared is None else tuple(shared.shape)
    if found != expected:
        raise ValueError(f"{fmt.name} needs its shared codebooks {expected}, not {found}")


def _alternate(
    W: Tensor, fmt: Format, work: Workspace, shared: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], Factors]:
    assert fmt.low_rank is not None
    two_sided = fmt.feedback == "ldl2"
    best: tuple[dict[str, Tensor], Factors] | None = None
    values: dict[str, Tensor] = {}
    best_cost, quantised = float("inf"), torch.zeros_like(W)
    for turn in range(MAX_ALTERNATIONS):
        if fmt.plain_svd or (fmt.feedback and not turn):
            factors = strongest(W - quantised, fmt.low_rank, seed)
        else:
            factors = factorise(W - quantised, fmt.low_rank, work, bool(fmt.feedback), seed, two_sided)
        if turn and (kept := work.cost(W - quantised - factors.product, two_sided)) < best_cost:
            best, best_cost = (values, factors), kept  # the codes of before with factors fitted to them
        values, quantised = _encode_rest(W - factors.product, fmt, work, shared, seed)
        cost = work.cost(W - quantised - factors.product, two_sided)
        if cost >= best_cost:
            break
        best, best_cost = (values, factors), cost
    assert best is not None
    return best


def _encode_rest(
    W: Tensor, fmt: Format, work: Workspace, shared: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Everything but the low-rank term: (stored values by field name, what they decode to)."""
    if fmt.sparse is None:
        return _encode_transformed(W, fmt, work, shared, seed)
    weight = work.feedback_weight if fmt.feedback else work.column_weight
    outliers = find_outliers(W, fmt.sparse, weight, _trial(fmt, work))
    values, decoded = _encode_transformed(outliers.rest, fmt, work, shared, seed)
    stored, added = outliers.fit(W, decoded, work)
    return {**values, **stored}, decoded + added


def _trial(fmt: Format, work: Workspace) -> Callable[[Tensor], Tensor] | None:
    """What matrices would decode to without feedback, where trying is cheap and errors stay in their place."""
    if not RoundingCost.knows(fmt):
        return None
    plain = replace(fmt, feedback="", clipping=False)
    return lambda W: _encode_transformed(W, plain, work, None, 0)[1]


def _encode_transformed(
    W: Tensor, fmt: Format, work: Workspace, shared: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    if not fmt.transformed:
        return _encode_codes(W, fmt, work, shared, seed)
    frame = transform(W, fmt, work)
    values, decoded = _encode_codes(frame.weight, fmt, frame.work, shared, seed)
    return {**values, **frame.stored}, frame.undo(decoded)


def _encode_codes(
    W: Tensor, fmt: Format, work: Workspace, shared: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """(stored values by field name, what they decode to)."""
    codec = fmt.codec
    if isinstance(codec, ScalarCodec):
        scalar = encode_scalar(W, codec, bool(fmt.feedback), work, fmt.clipping)
        return {"codes": scalar.codes, **scalar.stored}, scalar.values(codec)
    if isinstance(codec, KMeansCodec):
        return encode_kmeans(W, codec, bool(fmt.feedback), work)
    if isinstance(codec, TrellisCodec):
        return encode_trellis(W, codec, fmt.feedback, work)
    if isinstance(codec, LatticeCodec):
        return encode_lattice(W, codec, fmt.feedback, work)
    if isinstance(codec, NeuralCodec):
        assert shared is not None
        return encode_neural(W, codec, bool(fmt.feedback), work, shared)
    assert isinstance(codec, AdditiveCodec)
    additive = encode_additive(W, codec, work, shared, seed)
    values = {"codes": additive.codes, "scales": additive.scales}
    if not codec.shared:
        values["codebooks"] = additive.codebooks
    return values, additive.values(W.shape[1])
