"""Additive codebooks that all matrices of a family share, fitted on a sample of the vectors of each matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reallm.codecs.metric import Metric
from reallm.kernels.formats.codecs import AdditiveCodec

from .encode import KMEANS_SAMPLES, fit_codebooks, normalised_vectors

SAMPLES_PER_MATRIX = 4096


def fit_additive_codebooks(codec: AdditiveCodec, members: Iterable[tuple[Tensor, Metric]], seed: int) -> Tensor:
    """Fit codebooks [M, 2^B, d], rounded to fp16, to the matrices of a family.

    `members` are (W[N, K], metric) of every matrix. Each matrix has the same total weight: its vectors are weighted by
    the diagonal of its Hessian, divided by the mean of that diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    samples, weights = [], []
    for W, metric in members:
        _, vectors = normalised_vectors(W, codec.dim)
        diagonal = metric.hessian.diagonal()
        diagonal = diagonal / diagonal.mean() if float(diagonal.mean()) > 0 else torch.ones_like(diagonal)
        group_weight = torch.nn.functional.pad(diagonal, (0, -W.shape[1] % codec.dim)).reshape(-1, codec.dim).mean(1)
        chosen = torch.randint(vectors.shape[0] * vectors.shape[1], (SAMPLES_PER_MATRIX,), generator=generator)
        samples.append(vectors.flatten(0, 1)[chosen])
        weights.append(group_weight[chosen % vectors.shape[1]])
    stacked, weight = torch.cat(samples), torch.cat(weights)
    if len(stacked) > KMEANS_SAMPLES:
        subset = torch.randperm(len(stacked), generator=generator)[:KMEANS_SAMPLES]
        stacked, weight = stacked[subset], weight[subset]
    return fit_codebooks(stacked, weight, codec, seed)
