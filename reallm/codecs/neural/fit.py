"""Fitting the shared codebook and decoder of a family: codes and decoder in turn, on crops of every member.

The cost of a matrix separates over columns: with H^-1 = U^T U it is sum_j |e_j|^2 / U_jj^2, e_j the error against the
target of feedback, so a crop of a column weighs by its scale squared over U_jj^2, in nats: every matrix counts by what
its errors cost. Crops are divided by their block's scale, as the encoder does.

Each round chooses the codes of all crops (Viterbi over windows, see `walks`), then takes Adam steps on the decoder. Its
output depends on the window alone, so the loss sum_x w_x |f(s_x) - x|^2 is, up to a constant, sum_s n_s |f(s) - m_s|^2
with n_s the weight and m_s the mean of what fell to window s: a step costs the windows, however many crops there are.
Weights are rounded as they will be stored on the way forward, and the gradient passes straight through. One crop in
HELD_OUT judges: the best round is kept, or the words without a decoder, should none be better (plain quantisation).
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
from .viterbi import cheapest_walks

CROP_ROWS = 256
CROP_COLS = 64  # of every member
HELD_OUT = 8
MAX_VISITS = 1 << 28  # windows times patches of all crops: what a round's search costs
ROUNDS, STEPS = 30, 10
LEARNING_RATE = 3e-3
FREQUENCY = 6.0
"""Deviation of the first layer's output on unit latents: high enough to make windows independent."""
LATENT_SHARE = 0.5
"""Share of the deviation that the words start with; the decoder starts with the rest of the power."""


def fit_decoder(
    fmt: Format, codec: NeuralCodec, members: Iterable[tuple[Tensor, Metric]], seed: int
) -> NDArray[np.uint8]:
    """The bytes of the codebook and the decoder that `fmt` shares, fitted on every member's (weight, metric)."""
    generator = torch.Generator().manual_seed(seed)
    found = [_crops(*member, fmt, codec, generator) for member in members]
    longest = max(crop.shape[1] for crop, _ in found)
    walks = torch.cat([torch.nn.functional.pad(crop, (0, 0, 0, longest - crop.shape[1])) for crop, _ in found])
    length = torch.cat([torch.full((len(crop),), crop.shape[1]) for crop, _ in found])
    weight = torch.cat([weight for _, weight in found])[:, None] * (torch.arange(longest) < length[:, None])
    kept = torch.randperm(len(walks), generator=generator)
    kept = kept[: max(1, MAX_VISITS // (longest << codec.window_bits))]
    return _Trainer(codec, walks[kept], weight[kept], seed).train()


def _crops(
    W: Tensor, metric: Metric, fmt: Format, codec: NeuralCodec, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(columns' patches [n, steps, dim], their weight [n]) of one member."""
    work = Workspace(metric)
    frame = transform(W, fmt, work) if fmt.transformed else None
    if frame is not None:
        W, work = frame.weight, frame.work
    scales = block_scales(W).repeat_interleave(16)[: W.shape[1]]
    nats = float(metric.hessian.diagonal().mean()) or 1.0
    cost = (scales / work.natural_factor.diagonal()).square() * nats
    columns = torch.randperm(W.shape[1], generator=generator)[:CROP_COLS]
    top = max(len(W) - CROP_ROWS, 0)
    first = int(torch.randint(top + 1, (1,), generator=generator)) // codec.dim * codec.dim
    crop = (W / scales)[first : first + CROP_ROWS, columns].T.contiguous()
    return patches(crop, codec.dim), cost[columns] * (W.numel() / crop.numel())


def _words(codec: NeuralCodec, walks: Tensor, weight: Tensor, seed: int) -> Tensor:
    """Words [2^B, dim] by k-means of all patches."""
    vectors = torch.nn.functional.pad(walks.flatten(0, 1), (0, max(0, 2 - codec.dim)))
    kmeans = AdditiveCodec(1, codec.codebook_bits, max(codec.dim, 2))
    return fit_codebooks(vectors, weight.reshape(-1), kmeans, seed)[0][:, : codec.dim]


def _start(codec: NeuralCodec, words: Tensor, seed: int) -> list[Tensor]:
    """Words of part of the power, layers at random for the rest: a code whose windows are independent."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [LATENT_SHARE * words]
    for index, (shape, _) in enumerate(codec.tensors[1:]):
        if len(shape) == 1:
            tensors.append(pi * (2 * torch.rand(shape, generator=generator) - 1) if index == 1 else torch.zeros(shape))
            continue
        gain = FREQUENCY / LATENT_SHARE if index == 0 else 1.5
        tensors.append(gain * torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    silent = [torch.zeros_like(values) for values in tensors[1:]]
    made = window_values(codec, tensors[0], tensors[1:]) - window_values(codec, tensors[0], silent)
    wanted = (1 - LATENT_SHARE**2) ** 0.5 / made.std(0, correction=0).clamp_min(1e-6)
    tensors[-2], tensors[-1] = tensors[-2] * wanted[:, None], -made.mean(0) * wanted
    return tensors


def _rounded(codec: NeuralCodec, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as they will be stored, with the gradient of the unrounded ones."""
    result = []
    for (_, bits), values in zip(codec.tensors, tensors, strict=True):
        exponent = step_exponent(float(values.detach().abs().max()), bits)
        step, most = 2.0 ** ((exponent - EXPONENT_ZERO) / EXPONENT_STEPS), (1 << (bits - 1)) - 1
        stored = (values.detach() / step).round().clamp(-most, most) * step
        result.append(values + (stored - values).detach())
    return result


class _Trainer:
    """The crops [n, steps, dim] of a family and their weight [n, steps]."""

    def __init__(self, codec: NeuralCodec, walks: Tensor, weight: Tensor, seed: int) -> None:
        self.codec, self.seed, self.walks = codec, seed, walks
        self.mass = weight / weight.sum().clamp_min(1e-30)
        self.judges = torch.arange(len(walks)) % HELD_OUT == HELD_OUT - 1
        if len(walks) < HELD_OUT:
            self.judges = torch.ones(len(walks), dtype=torch.bool)

    def windows(self, raw: NDArray[np.uint8]) -> tuple[Tensor, float]:
        """Windows [n, steps] of the best codes under a stored decoder, and its error on the judges."""
        values = stored_values(self.codec, torch.from_numpy(raw))
        codes = cheapest_walks(self.codec, self.walks, values)
        windows = windows_of(self.codec, codes.T).T
        error = (self.mass * (self.walks - values[windows]).square().sum(2))[self.judges]
        return windows, float(error.sum(dtype=torch.float64))

    def targets(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(weight [2^L], mean [2^L, dim]) of what the other crops put into every window."""
        learning = ~self.judges if not bool(self.judges.all()) else self.judges
        index, mass = windows[learning].reshape(-1), self.mass[learning].reshape(-1)
        count = torch.zeros(1 << self.codec.window_bits).index_add_(0, index, mass)
        total = torch.zeros(len(count), self.codec.dim)
        total.index_add_(0, index, mass[:, None] * self.walks[learning].flatten(0, 1))
        return count, total / count.clamp_min(1e-30)[:, None]

    def train(self) -> NDArray[np.uint8]:
        """The bytes of the best decoder."""
        words = _words(self.codec, self.walks, self.mass, self.seed)
        best = _stored(self.codec, [words, *(torch.zeros(shape) for shape, _ in self.codec.tensors[1:])])
        best_error = self.windows(best)[1]
        tensors = [values.requires_grad_() for values in _start(self.codec, words, self.seed)]
        adam = torch.optim.Adam(tensors, LEARNING_RATE)
        for turn in range(ROUNDS + 1):
            raw = _stored(self.codec, tensors)
            windows, error = self.windows(raw)
            if error < best_error:
                best, best_error = raw, error
            adam.param_groups[0]["lr"] = LEARNING_RATE * (0.5 + 0.5 * cos(pi * turn / (ROUNDS + 1)))
            self.step(adam, tensors, windows)
        return best

    def step(self, adam: torch.optim.Optimizer, tensors: list[Tensor], windows: Tensor) -> None:
        """STEPS steps of the decoder with the codes held."""
        count, mean = self.targets(windows)
        for _ in range(STEPS):
            adam.zero_grad()
            words, *layers = _rounded(self.codec, tensors)
            loss = ((window_values(self.codec, words, layers) - mean).square().sum(1) * count).sum()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            adam.step()


def _stored(codec: NeuralCodec, tensors: list[Tensor]) -> NDArray[np.uint8]:
    return pack_tensors(codec, [values.detach().double().numpy() for values in tensors])
