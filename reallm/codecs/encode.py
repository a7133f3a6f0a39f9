"""Encoding: from a matrix and a format to the packed fields. `encode` is the entry point.

The encoder is nested in four layers, from the outside to the inside: the low-rank term, the sparse outliers, the
transforms, and the codes themselves. To add a codec, add a folder with its encoder (see `encoder`) and a row in
ENCODERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format
from reallm.system.device import CPU

from .additive.encode import encode_additive
from .encoder import CodedMatrix, Encoder, EncodingContext
from .lattice.encode import encode_lattice
from .metric import Workspace
from .neural.encode import encode_neural
from .packed_fields import PackedFields, store_all
from .rounding import RoundingCost
from .scalar.encode import encode_scalar
from .scalar.row_tables import encode_kmeans
from .terms.low_rank import Factors, factorise, strongest
from .terms.outliers import find_outliers
from .transforms.frame import transform
from .trellis.encode import encode_trellis

CODEC_VERSION = 2  # part of every cache key: raise it whenever an encoder's output may change
MAX_ALTERNATIONS = 4
_DENSE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def _encode_dense(W: Tensor, codec: DenseCodec, context: EncodingContext) -> CodedMatrix:
    return CodedMatrix({"values": W}, W.to(_DENSE_DTYPES[codec.dtype]).float())


ENCODERS: Mapping[type[AnyCodec], Encoder] = {
    DenseCodec: _encode_dense,
    ScalarCodec: encode_scalar,
    KMeansCodec: encode_kmeans,
    AdditiveCodec: encode_additive,
    LatticeCodec: encode_lattice,
    TrellisCodec: encode_trellis,
    NeuralCodec: encode_neural,
}


def encode(
    W: Tensor,
    fmt: Format,
    work: Workspace,
    *,
    shared: Tensor | None = None,
    seed: int = 0,
    device: torch.device = CPU,
) -> PackedFields:
    """Encode W[N, K] float32 in `fmt` and return its packed fields.

    The bytes are the same for the same inputs, seed and thread count. `work` holds the metric of the matrix. `shared`
    holds what the matrices of a family share in this format: codebooks [M, 2^B, d] or the bytes of a neural decoder.
    On a GPU as `device`, a trellis is searched there; sums are rounded in another order there, so the bytes can differ.
    Raises ValueError for weights that are not finite, for shared codebooks of a wrong shape, and for values that do not
    fit their field.
    """
    return store_all(fmt.fields(*W.shape), choose_codes(W, EncodingContext(fmt, work, shared, seed, device)).values)


def choose_codes(W: Tensor, context: EncodingContext) -> CodedMatrix:
    """Choose the values of all fields of W[N, K] float32, before packing; arguments and errors are those of `encode`.

    With a low-rank term, factors and codes are fitted in turn, factors first (LQ-LoRA, arXiv 2311.12023), until the
    cost stops falling; the codes and factors with the lowest cost are returned.
    """
    if not bool(torch.isfinite(W).all()):
        raise ValueError("a weight is not finite")
    _check_shared(context.fmt, context.shared)
    return _encode_with_outliers(W, context) if context.fmt.low_rank is None else _encode_with_factors(W, context)


def _check_shared(fmt: Format, shared: Tensor | None) -> None:
    codec = fmt.codec
    if fmt.shared_field is None or not isinstance(codec, AdditiveCodec | NeuralCodec):
        return
    shape = None if shared is None else tuple(shared.shape)
    if shape != codec.codebook_shape:
        raise ValueError(f"{fmt.name} needs its shared codebooks {codec.codebook_shape}, not {shape}")


def _encode_with_factors(W: Tensor, context: EncodingContext) -> CodedMatrix:
    fmt, work = context.fmt, context.work
    assert fmt.low_rank is not None
    two_sided = fmt.feedback == "ldl2"
    coded = CodedMatrix({}, torch.zeros_like(W))
    best: tuple[CodedMatrix, Factors] | None = None
    best_cost = float("inf")
    for turn in range(MAX_ALTERNATIONS):
        residual = W - coded.decoded
        if fmt.plain_svd or (fmt.feedback and not turn):
            factors = strongest(residual, fmt.low_rank, context.seed)
        else:
            factors = factorise(residual, fmt.low_rank, work, bool(fmt.feedback), context.seed, two_sided)
        if turn:  # compare the codes of the previous turn with the factors just fitted to them
            cost = work.cost(residual - factors.product, two_sided)
            if cost < best_cost:
                best, best_cost = (coded, factors), cost
        coded = _encode_with_outliers(W - factors.product, context)
        cost = work.cost(W - coded.decoded - factors.product, two_sided)
        if cost >= best_cost:
            break
        best, best_cost = (coded, factors), cost
    assert best is not None
    coded, factors = best
    return CodedMatrix({**coded.values, **factors.stored}, coded.decoded + factors.product)


def _encode_with_outliers(W: Tensor, context: EncodingContext) -> CodedMatrix:
    fmt, work = context.fmt, context.work
    if fmt.sparse is None:
        return _encode_transformed(W, context)
    weight = work.feedback_weight if fmt.feedback else work.column_weight
    outliers = find_outliers(W, fmt.sparse, weight, _trial_decoder(context))
    coded = _encode_transformed(outliers.rest, context)
    stored, added = outliers.fit(W, coded.decoded, work)
    return CodedMatrix({**coded.values, **stored}, coded.decoded + added)


def _trial_decoder(context: EncodingContext) -> Callable[[Tensor], Tensor] | None:
    """A function that encodes a matrix without feedback and returns it decoded; None if that would be too slow."""
    if not RoundingCost.supports(context.fmt):
        return None
    plain = replace(context, fmt=replace(context.fmt, feedback="", clipping=False))
    return lambda W: _encode_transformed(W, plain).decoded


def _encode_transformed(W: Tensor, context: EncodingContext) -> CodedMatrix:
    fmt = context.fmt
    encoder = ENCODERS[type(fmt.codec)]
    if not fmt.transformed:
        return encoder(W, fmt.codec, context)
    frame = transform(W, fmt, context.work)
    coded = encoder(frame.weight, fmt.codec, replace(context, work=frame.work))
    return CodedMatrix({**coded.values, **frame.stored}, frame.undo(coded.decoded))
