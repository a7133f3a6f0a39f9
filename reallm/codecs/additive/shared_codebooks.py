"""Codebooks and decoders shared by all matrices of one role: fitted on a sample of each, stored once in the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reallm.codecs.metric import Metric
from reallm.codecs.neural.fit import fit_decoder
from reallm.codecs.packed_fields import PackedFields, store
from reallm.kernels.formats.codecs import AdditiveCodec, NeuralCodec
from reallm.kernels.formats.formats import Format

from .encode import KMEANS_SAMPLES, fit_codebooks, normalised_vectors

SAMPLES_PER_MATRIX = 4096


def fit_shared_codebooks(fmt: Format, members: Iterable[tuple[Tensor, Metric]], seed: int) -> PackedFields:
    """The bytes of the codebooks of `fmt`, fitted on every member's (weight [N, K], metric).

    Each matrix counts alike: its vectors weigh by the diagonal of its Hessian over that diagonal's mean.
    """
    codec, field = fmt.codec, fmt.shared_field
    if isinstance(codec, NeuralCodec) and field is not None:
        return {field.name: store(field, torch.from_numpy(fit_decoder(fmt, codec, members, seed)))}
    if not isinstance(codec, AdditiveCodec) or field is None:
        raise ValueError(f"{fmt.name} shares no codebooks")
    generator = torch.Generator().manual_seed(seed)
    vectors, weights = [], []
    for W, metric in members:
        _, cut = normalised_vectors(W, codec.dim)
        diagonal = metric.hessian.diagonal()
        diagonal = diagonal / diagonal.mean() if float(diagonal.mean()) > 0 else torch.ones_like(diagonal)
        weight = torch.nn.functional.pad(diagonal, (0, -W.shape[1] % codec.dim)).reshape(-1, codec.dim).mean(1)
        chosen = torch.randint(cut.shape[0] * cut.shape[1], (SAMPLES_PER_MATRIX,), generator=generator)
        vectors.append(cut.flatten(0, 1)[chosen])
        weights.append(weight[chosen % cut.shape[1]])
    stacked = torch.cat(vectors)
    if len(stacked) > KMEANS_SAMPLES:
        kept = torch.randperm(len(stacked), generator=generator)[:KMEANS_SAMPLES]
        return {field.name: store(field, fit_codebooks(stacked[kept], torch.cat(weights)[kept], codec, seed))}
    return {field.name: store(field, fit_codebooks(stacked, torch.cat(weights), codec, seed))}
