"""The scalar encoder: it chooses the scales, then the codes, then refits the scales.

1. The scale of each group is the one with the smallest weighted squared error over a list of clipping ratios, improved
   by least squares with the codes fixed. With `+lwc` the scales are then learned (OmniQuant; see `clipping`).
2. Each code is the nearest level, or is chosen with error feedback in the metric of H (GPTQ). Feedback visits the
   columns by falling diagonal of H, but groups consist of neighbours in storage order (static groups), so the order of
   feedback need not be stored.
3. The scales of each row are refitted jointly: with the codes fixed, 1/2 e H e^T is quadratic in the row's scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.encoder import CodedMatrix, EncodingContext
from reallm.codecs.feedback import descend, feed_back
from reallm.codecs.grid import Grid, inverse
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.codecs import DoubleQuant, ScalarCodec

from .clipping import learn_clipping

CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
LEAST_SQUARES_STEPS = 2
DESCENTS = 2
REFIT_BYTES = 1 << 28  # memory for the linear systems that are solved together, one per row
REFIT_RIDGE = 1e-4  # strength of the pull towards the previous scale, in units of the mean curvature


@dataclass
class ScalarCodes:
    """Codes and scales of W[N, K]."""

    codes: Tensor
    """int64 [N, K]"""
    scales: Tensor
    """The scales as decoding reads them, float32 [N, G]."""
    zeros: Tensor | None
    """Zero points, float32 [N, G]; for `uint` only."""
    stored: dict[str, Tensor]
    """The values of the scale fields, by field name."""

    def decode(self, codec: ScalarCodec) -> Tensor:
        """The decoded matrix W_hat [N, K]."""
        owner = torch.arange(self.codes.shape[1]) // codec.group_width(self.codes.shape[1])
        zero = None if self.zeros is None else self.zeros[:, owner]
        return Grid(codec).value(self.codes, zero) * self.scales[:, owner]


def _grouped(values: Tensor, width: int) -> Tensor:
    """Cut the last dimension into groups, [..., K] -> [..., G, width]; the last group is padded with zeros."""
    missing = -values.shape[-1] % width
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*values.shape[:-1], -1, width)


class _ScaleSearch:
    """The search for the scale of each group of W that gives the smallest weighted squared error."""

    def __init__(self, codec: ScalarCodec, W: Tensor, weight: Tensor) -> None:
        self.codec, self.grid, self.cols = codec, Grid(codec), W.shape[1]
        self.width = codec.group_width(self.cols)
        self.W, self.h = _grouped(W, self.width), _grouped(weight, self.width)

    def candidates(self, ratio: float) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points, both [N, G], of grids that cover the share `ratio` of each group's range."""
        if self.codec.table == "uint":
            low = self.W.amin(-1).clamp_max(0) * ratio
            high = self.W.amax(-1).clamp_min(0) * ratio
            scale = to_half((high - low) / self.grid.top)
            return scale, (-low * inverse(scale)).round().clamp(0, self.grid.top)
        peak = self.W.gather(-1, self.W.abs().argmax(-1, keepdim=True)).squeeze(-1)
        if self.codec.table == "lm" or self.codec.double_quant is not None:
            peak = peak.abs()  # the table is symmetric, or scales are stored as offsets from their minimum
        elif self.codec.table == "int":
            peak = -peak  # puts the extra level of two's complement on the side of the peak
        return to_half(peak * ratio), None

    def quantise(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Round to the nearest codes: (their levels [N, G, width], weighted squared error [N, G])."""
        shift = None if zero is None else zero.unsqueeze(-1)
        code = self.grid.code(self.W * inverse(scale).unsqueeze(-1), shift)
        level = self.grid.value(code, shift)
        error = (level * scale.unsqueeze(-1)).sub_(self.W).square_().mul_(self.h).sum(-1)
        return level, error

    def search(self) -> tuple[Tensor, Tensor | None]:
        """Find the scales and zero points [N, G]: take each group's best clipping ratio, then fit by least squares."""
        best_scale, best_zero = self.candidates(1.0)
        best_level, best_error = self.quantise(best_scale, best_zero)
        for ratio in CLIP_RATIOS[1:]:
            scale, zero = self.candidates(ratio)
            level, error = self.quantise(scale, zero)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_level = torch.where(better.unsqueeze(-1), level, best_level)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)
        for _ in range(LEAST_SQUARES_STEPS):
            weighted = best_level * self.h
            norm = (weighted * best_level).sum(-1)
            scale = to_half(torch.where(norm > 0, (weighted * self.W).sum(-1) / norm.clamp_min(1e-30), best_scale))
            level, error = self.quantise(scale, best_zero)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_level = torch.where(better.unsqueeze(-1), level, best_level)
        return best_scale, best_zero


def store_scales(scales: Tensor, double: DoubleQuant | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Round scales [N, G] to fp16 or, if `double` is given, quantise them to codes.

    Returns the scales as decoding reads them, [N, G], and the values of the scale fields by field name.
    """
    if double is None:
        rounded = to_half(scales)
        return rounded, {"scales": rounded}
    flat = scales.reshape(-1)
    low = flat.min()
    padded = torch.nn.functional.pad(flat - low, (0, -flat.numel() % double.block)).reshape(-1, double.block)
    ranges, steps = to_half(padded.amax(1)), 2**double.bits - 1
    codes = (padded * inverse(ranges).unsqueeze(1) * steps).round().clamp(0, steps)
    decoded = (low + codes / steps * ranges.unsqueeze(1)).reshape(-1)[: flat.numel()].reshape(scales.shape)
    fields = {"scale_codes": codes.reshape(-1)[: flat.numel()], "scale_ranges": ranges, "scale_min": low.reshape(1)}
    return decoded, fields


def refit_scales(W: Tensor, levels: Tensor, scales: Tensor, width: int, hessian: Tensor) -> Tensor:
    """Fit scales [N, G] that minimise e H e^T for each row, where e = w - sum_g s_g levels_g.

    `levels` [N, K] are the levels of the codes, in groups of `width` columns. A small ridge pulls towards `scales`, the
    previous scales.
    """
    rows, cols = W.shape
    starts = range(0, cols, width)
    if rows > 1 and 8 * rows * len(starts) ** 2 > REFIT_BYTES:
        halves = (slice(0, rows // 2), slice(rows // 2, rows))
        return torch.cat([refit_scales(W[half], levels[half], scales[half], width, hessian) for half in halves])
    rhs = _grouped(levels * (W @ hessian), width).sum(-1).double()
    gram = torch.empty(rows, len(starts), len(starts), dtype=torch.float64)
    for g, start in enumerate(starts):
        part = slice(start, min(start + width, cols))
        gram[:, g] = _grouped((levels[:, part] @ hessian[part]).mul_(levels), width).sum(-1)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = REFIT_RIDGE * diagonal.mean(1, keepdim=True).clamp_min(1e-30).expand_as(diagonal)
    system = gram + torch.diag_embed(ridge)
    solved, failed = torch.linalg.solve_ex(system, (rhs + ridge * scales).unsqueeze(-1))
    usable = (failed == 0).reshape(-1, 1) & torch.isfinite(solved.squeeze(-1))
    return torch.where(usable, solved.squeeze(-1).float(), scales)


class _FeedbackFit:
    """The codes and scales of one matrix during fitting with error feedback, which updates them in turn.

    `codes` and `scale_rows` are transposed: their rows are columns of the matrix in `codes`, in the order of feedback,
    and groups of columns in `scale_rows`.
    """

    def __init__(self, W: Tensor, codec: ScalarCodec, scales: Tensor, zeros: Tensor | None, work: Workspace) -> None:
        self.W, self.codec, self.grid, self.work, self.zeros = W, codec, Grid(codec), work, zeros
        self.width = codec.group_width(W.shape[1])
        self.owner = torch.arange(W.shape[1]) // self.width
        self.groups = self.owner[work.order].tolist()
        self.zero_rows = None if self.zeros is None else self.zeros.T.contiguous()
        self.codes = torch.empty(W.shape[1], W.shape[0], dtype=torch.uint8)
        self.set_scales(scales)

    def set_scales(self, scales: Tensor) -> None:
        self.scales, self.fields = store_scales(scales, self.codec.double_quant)
        self.scale_rows = self.scales.T.contiguous()
        self.inverse_rows = inverse(self.scale_rows)

    def quantise(self, position: int, target: Tensor) -> Tensor:
        """Choose the codes of the column at `position` for `target` [N]; returns the decoded values [N]."""
        group = self.groups[position]
        zero = None if self.zero_rows is None else self.zero_rows[group]
        code = self.grid.code(target * self.inverse_rows[group], zero)
        self.codes[position] = code
        return self.grid.value(code, zero).mul_(self.scale_rows[group])

    def feed_back(self) -> None:
        feed_back(self.W.T[self.work.order].contiguous(), self.work.ordered_factor, self.quantise)

    def descend(self) -> None:
        columns, values = self.W.T[self.work.order].contiguous(), self.result().decode(self.codec)
        descend(columns, values.T[self.work.order].contiguous(), self.work.ordered_hessian, self.quantise)

    def refit(self) -> None:
        codes = self.result().codes
        levels = self.grid.value(codes, None if self.zeros is None else self.zeros[:, self.owner])
        self.set_scales(refit_scales(self.W, levels, self.scales, self.width, self.work.hessian32))

    def result(self) -> ScalarCodes:
        stored = torch.empty_like(self.codes)
        stored[self.work.order] = self.codes
        fields = self.fields if self.zeros is None else {**self.fields, "zeros": self.zeros}
        return ScalarCodes(stored.T.long().contiguous(), self.scales, self.zeros, fields)


def encode_scalar(W: Tensor, codec: ScalarCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 in scalar codes; see `encoder` for the interface."""
    fmt = context.fmt
    chosen = choose_scalar_codes(W, codec, context.work, feedback=bool(fmt.feedback), clipping=fmt.clipping)
    return CodedMatrix({"codes": chosen.codes, **chosen.stored}, chosen.decode(codec))


def choose_scalar_codes(
    W: Tensor, codec: ScalarCodec, work: Workspace, *, feedback: bool, clipping: bool
) -> ScalarCodes:
    """Choose codes and scales of W[N, K] float32, optionally with error feedback and learned clipping (OmniQuant)."""
    if not feedback:
        rounded = round_scalar(W, codec, work.column_weight)
        if not clipping:
            return rounded
        grid_ends = learn_clipping(W, codec, rounded.scales, rounded.zeros, lambda error: error @ work.hessian32)
        learned = _nearest_codes(W, codec, *grid_ends)
        return min(rounded, learned, key=lambda codes: _cost(W, codes, codec, work))
    scales, zeros = _ScaleSearch(codec, W, work.feedback_weight).search()
    if clipping:
        scales, zeros = learn_clipping(W, codec, scales, zeros, lambda error: error * work.feedback_weight)
    fit = _FeedbackFit(W, codec, scales, zeros, work)
    fit.feed_back()
    best = fit.result()
    best_cost = _cost(W, best, codec, work)
    for _ in range(DESCENTS):
        fit.refit()
        fit.descend()
        candidate = fit.result()
        cost = _cost(W, candidate, codec, work)
        if cost < best_cost:
            best, best_cost = candidate, cost
    return best


def _cost(W: Tensor, codes: ScalarCodes, codec: ScalarCodec, work: Workspace) -> float:
    error = W - codes.decode(codec)
    return float(((error @ work.hessian32) * error).sum(dtype=torch.float64))


def round_scalar(W: Tensor, codec: ScalarCodec, weight: Tensor) -> ScalarCodes:
    """Round W[N, K] to the nearest codes, without feedback; `weight` [K] weights the squared errors by column."""
    return _nearest_codes(W, codec, *_ScaleSearch(codec, W, weight).search())


def _nearest_codes(W: Tensor, codec: ScalarCodec, scales: Tensor, zeros: Tensor | None) -> ScalarCodes:
    scales, fields = store_scales(scales, codec.double_quant)
    owner = torch.arange(W.shape[1]) // codec.group_width(W.shape[1])
    codes = Grid(codec).code(W * inverse(scales)[:, owner], None if zeros is None else zeros[:, owner])
    return ScalarCodes(codes, scales, zeros, fields if zeros is None else {**fields, "zeros": zeros})
