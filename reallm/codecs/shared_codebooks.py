"""Codebooks and neural decoders that all matrices of a family share: fitted on a sample of each matrix, stored once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import AdditiveCodec, NeuralCodec
from reallm.kernels.formats.formats import Format

from .additive.shared_codebooks import fit_additive_codebooks
from .metric import Metric
from .neural.fit import fit_decoder
from .packed_fields import PackedFields, store


def fit_shared_codebooks(fmt: Format, members: Iterable[tuple[Tensor, Metric]], seed: int) -> PackedFields:
    """Fit the shared codebooks or shared decoder of `fmt` to a family of matrices; returns its packed field by name.

    `members` are (weight [N, K] float32, metric) of every matrix of the family. Raises ValueError for a format whose
    matrices share nothing.
    """
    codec, field = fmt.codec, fmt.shared_field
    if field is not None and isinstance(codec, NeuralCodec):
        return {field.name: store(field, torch.from_numpy(fit_decoder(fmt, codec, members, seed)))}
    if field is not None and isinstance(codec, AdditiveCodec):
        return {field.name: store(field, fit_additive_codebooks(codec, members, seed))}
    raise ValueError(f"{fmt.name} has no shared codebooks")
