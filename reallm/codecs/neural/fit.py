"""Fitting the codebook and decoder that a family of matrices shares, on crops (sampled columns) of each matrix.

The cost of a matrix is a sum over columns: with H^-1 = U^T U it is sum_j |e_j|^2 / U_jj^2, where e_j is the error of
column j relative to its target under feedback. Crops are divided by the scale of their block, as in the encoder; the
weight of a crop of column j is therefore its squared scale / U_jj^2, in nats.

Codes and decoder are fitted in turn. Each round chooses the codes of all crops (see `viterbi`), then takes Adam steps
on the decoder. The output f(s) of the decoder depends only on the window s of codes, so the loss over all patches x,
sum_x w_x |f(s_x) - x|^2, equals sum_s n_s |f(s) - m_s|^2 up to a constant, with n_s the total weight and m_s the mean
of the patches in window s. So the time of a step does not depend on the number of crops. The forward pass rounds the
decoder's weights to their stored precision; gradients pass straight through the rounding. One crop in HELD_OUT is held
out to compare the rounds. The decoder of the best round is returned, or the codebook without a decoder (plain
quantisation) if no round is better than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.codecs.additive.encode import fit_codebooks
from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.transforms.frame import transform
from reallm.decoding.neural import stored_values, window_values, windows_of
from reallm.kernels.codes.neural import EXPONENT_STEPS, EXPONENT_ZERO, pack_tensors, step_exponent
from reallm.kernels.formats.codecs import AdditiveCodec, NeuralCodec
from reallm.kernels.formats.formats import Format

from .encode import block_scales, patches
from .viterbi import cheapest_codes

CROP_ROWS = 256
CROP_COLS = 64  # columns taken from every matrix
HELD_OUT = 8
MAX_VISITS = 1 << 28  # upper bound of windows times patches, to which the time of one round's search is proportional
ROUNDS, STEPS = 30, 10
LEARNING_RATE = 3e-3
FREQUENCY = 6.0
"""Standard deviation of the first layer's output for unit latents: large enough to make windows independent."""
LATENT_SHARE = 0.5
"""Share of the standard deviation that the words supply before training; the decoder supplies the other variance."""


def fit_decoder(
    fmt: Format, codec: NeuralCodec, members: Iterable[tuple[Tensor, Metric]], seed: int
) -> NDArray[np.uint8]:
    """Fit the shared codebook and decoder of `fmt` to a family of matrices; returns their bytes.

    `members` are (W[N, K], metric) of every matrix of the family.
    """
    generator = torch.Generator().manual_seed(seed)
    sampled = [_crops(*member, fmt, codec, generator) for member in members]
    longest = max(crop.shape[1] for crop, _ in sampled)
    crops = torch.cat([torch.nn.functional.pad(crop, (0, 0, 0, longest - crop.shape[1])) for crop, _ in sampled])
    length = torch.cat([torch.full((len(crop),), crop.shape[1]) for crop, _ in sampled])
    weight = torch.cat([weight for _, weight in sampled])[:, None] * (torch.arange(longest) < length[:, None])
    subset = torch.randperm(len(crops), generator=generator)
    subset = subset[: max(1, MAX_VISITS // (longest << codec.window_bits))]
    return _Trainer(codec, crops[subset], weight[subset], seed).train()


def _crops(
    W: Tensor, metric: Metric, fmt: Format, codec: NeuralCodec, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample columns of one matrix as crops: (patches [n, steps, dim], weight of each crop [n])."""
    work = Workspace(metric)
    frame = transform(W, fmt, work) if fmt.transformed else None
    if frame is not None:
        W, work = frame.weight, frame.work
    scales = block_scales(W).repeat_interleave(16)[: W.shape[1]]
    nats = float(metric.hessian.diagonal().mean()) or 1.0
    cost = (scales / work.natural_factor.diagonal()).square() * nats
    columns = torch.randperm(W.shape[1], generator=generator)[:CROP_COLS]
    last_start = max(len(W) - CROP_ROWS, 0)
    first = int(torch.randint(last_start + 1, (1,), generator=generator)) // codec.dim * codec.dim
    crop = (W / scales)[first : first + CROP_ROWS, columns].T.contiguous()
    return patches(crop, codec.dim), cost[columns] * (W.numel() / crop.numel())


def _fit_words(codec: NeuralCodec, crops: Tensor, weight: Tensor, seed: int) -> Tensor:
    """Fit the words [2^B, dim] by k-means on the patches of all crops."""
    vectors = torch.nn.functional.pad(crops.flatten(0, 1), (0, max(0, 2 - codec.dim)))
    kmeans = AdditiveCodec(1, codec.codebook_bits, max(codec.dim, 2))
    return fit_codebooks(vectors, weight.reshape(-1), kmeans, seed)[0][:, : codec.dim]


def _initial_tensors(codec: NeuralCodec, words: Tensor, seed: int) -> list[Tensor]:
    """The tensors before training: the words, scaled down, and random layers that supply the rest of the variance.

    The outputs of random layers are nearly independent between windows.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = [LATENT_SHARE * words]
    for index, (shape, _) in enumerate(codec.tensors[1:]):
        if len(shape) == 1:
            tensors.append(pi * (2 * torch.rand(shape, generator=generator) - 1) if index == 1 else torch.zeros(shape))
            continue
        deviation = FREQUENCY / LATENT_SHARE if index == 0 else 1.5
        tensors.append(deviation * torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    zeros = [torch.zeros_like(values) for values in tensors[1:]]
    output = window_values(codec, tensors[0], tensors[1:]) - window_values(codec, tensors[0], zeros)
    gain = (1 - LATENT_SHARE**2) ** 0.5 / output.std(0, correction=0).clamp_min(1e-6)
    tensors[-2], tensors[-1] = tensors[-2] * gain[:, None], -output.mean(0) * gain
    return tensors


def _rounded(codec: NeuralCodec, tensors: list[Tensor]) -> list[Tensor]:
    """Round the tensors to their stored precision; gradients pass straight through to the unrounded tensors."""
    result = []
    for (_, bits), values in zip(codec.tensors, tensors, strict=True):
        exponent = step_exponent(float(values.detach().abs().max()), bits)
        step, largest = 2.0 ** ((exponent - EXPONENT_ZERO) / EXPONENT_STEPS), (1 << (bits - 1)) - 1
        stored = (values.detach() / step).round().clamp(-largest, largest) * step
        result.append(values + (stored - values).detach())
    return result


class _Trainer:
    """Trains the decoder of a family on its crops [n, steps, dim], with a weight for every patch [n, steps]."""

    def __init__(self, codec: NeuralCodec, crops: Tensor, weight: Tensor, seed: int) -> None:
        self.codec, self.seed, self.crops = codec, seed, crops
        self.mass = weight / weight.sum().clamp_min(1e-30)
        self.held_out = torch.arange(len(crops)) % HELD_OUT == HELD_OUT - 1
        if len(crops) < HELD_OUT:
            self.held_out = torch.ones(len(crops), dtype=torch.bool)

    def windows(self, raw: NDArray[np.uint8]) -> tuple[Tensor, float]:
        """Choose the best codes for the decoder `raw`: (their windows [n, steps], the error on the held-out crops)."""
        values = stored_values(self.codec, torch.from_numpy(raw))
        codes = cheapest_codes(self.codec, self.crops, values)
        windows = windows_of(self.codec, codes.T).T
        error = (self.mass * (self.crops - values[windows]).square().sum(2))[self.held_out]
        return windows, float(error.sum(dtype=torch.float64))

    def targets(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(total weight [2^L], mean [2^L, dim]) of the patches that fall into each window, over the training crops."""
        training = ~self.held_out if not bool(self.held_out.all()) else self.held_out
        index, mass = windows[training].reshape(-1), self.mass[training].reshape(-1)
        count = torch.zeros(1 << self.codec.window_bits).index_add_(0, index, mass)
        total = torch.zeros(len(count), self.codec.dim)
        total.index_add_(0, index, mass[:, None] * self.crops[training].flatten(0, 1))
        return count, total / count.clamp_min(1e-30)[:, None]

    def train(self) -> NDArray[np.uint8]:
        """Train and return the bytes of the best decoder."""
        words = _fit_words(self.codec, self.crops, self.mass, self.seed)
        best = _pack(self.codec, [words, *(torch.zeros(shape) for shape, _ in self.codec.tensors[1:])])
        best_error = self.windows(best)[1]
        tensors = [values.requires_grad_() for values in _initial_tensors(self.codec, words, self.seed)]
        adam = torch.optim.Adam(tensors, LEARNING_RATE)
        for turn in range(ROUNDS + 1):
            raw = _pack(self.codec, tensors)
            windows, error = self.windows(raw)
            if error < best_error:
                best, best_error = raw, error
            adam.param_groups[0]["lr"] = LEARNING_RATE * (0.5 + 0.5 * cos(pi * turn / (ROUNDS + 1)))
            self.step(adam, tensors, windows)
        return best

    def step(self, adam: torch.optim.Optimizer, tensors: list[Tensor], windows: Tensor) -> None:
        """Take STEPS optimiser steps on the decoder, with the codes fixed."""
        count, mean = self.targets(windows)
        for _ in range(STEPS):
            adam.zero_grad()
            words, *layers = _rounded(self.codec, tensors)
            loss = ((window_values(self.codec, words, layers) - mean).square().sum(1) * count).sum()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            adam.step()


def _pack(codec: NeuralCodec, tensors: list[Tensor]) -> NDArray[np.uint8]:
    return pack_tensors(codec, [values.detach().double().numpy() for values in tensors])
