"""Start training parts of a packed linear module, by attaching a TrainingPart or extending the attached one."""

from __future__ import annotations

import torch
from torch import nn

from reallm.decoding.decode import decode_factors
from reallm.decoding.scales import codebook_field, decode_scales, scale_count
from reallm.decoding.unpack import read_floats
from reallm.kernels.formats.codecs import DenseCodec, KMeansCodec
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.row_magnitudes import magnitudes

from .codebook import TrainedCodebook
from .part import TrainingPart


def _attached(linear: CompressedLinear) -> TrainingPart:
    """The training part of `linear`, attached now if there is none."""
    if linear.training_part is None:
        linear.training_part = TrainingPart().train(linear.training)
    return linear.training_part


def train_low_rank(
    linear: CompressedLinear, rank: int | None = None, seed: int = 0
) -> tuple[nn.Parameter, nn.Parameter]:
    """Make L [rows, rank] and R [rank, cols] trainable float32 parameters, starting from the stored term.

    `rank` may exceed the stored rank (the default). New components start with L = 0 and R ~ N(0, 1 / cols), drawn
    with `seed`, so the weight does not change. Raises ValueError for a dense format, or a rank below the stored one.
    """
    stored_rank = linear.format.low_rank.rank if linear.format.low_rank else 0
    rank = stored_rank if rank is None else rank
    if isinstance(linear.format.codec, DenseCodec) or rank < max(stored_rank, 1):
        raise ValueError(f"format {linear.format.name} cannot train a low-rank term of rank {rank}")
    left, right = decode_factors(linear.format, linear.fields, linear.rows, linear.cols)
    added, generator = rank - stored_rank, torch.Generator().manual_seed(seed)
    new_right = torch.randn(added, linear.cols, generator=generator).to(right.device) / linear.cols**0.5
    part = _attached(linear)
    part.left_factor = nn.Parameter(torch.cat([left, left.new_zeros(linear.rows, added)], dim=1))
    part.right_factor = nn.Parameter(torch.cat([right, new_right]))
    linear.drop_cache()
    return part.left_factor, part.right_factor


def train_magnitude(linear: CompressedLinear) -> nn.Parameter:
    """Make the magnitudes m, float32 [rows], trainable; they start from the row norms with the signs of the gains.

    Raises ValueError unless the low-rank factors, and nothing else, are being trained.
    """
    part = linear.training_part
    if part is None or part.left_factor is None or part.trains_values:
        raise ValueError(
            "magnitudes are trained only with low-rank factors, and nothing else; call train_low_rank() first"
        )
    part.magnitude = nn.Parameter(current_magnitudes(linear))
    linear.set_gain(None)
    return part.magnitude


@torch.no_grad()
def current_magnitudes(linear: CompressedLinear) -> torch.Tensor:
    """The magnitudes m, float32 [rows]: those in training, or else the row norms with the signs of the gains."""
    part = linear.training_part
    if part is None or part.left_factor is None:
        return magnitudes(linear)
    if part.magnitude is not None:
        return part.magnitude.detach().clone()
    norms = part.row_norms(linear)
    return norms if linear.gain is None else norms * linear.gain


def has_scales(linear: CompressedLinear) -> bool:
    """Whether the format stores fp16 scales that can be trained."""
    return scale_count(linear.format, linear.rows, linear.cols) > 0


def train_scales(linear: CompressedLinear) -> nn.Parameter:
    """Make a gain for each stored scale trainable, float32 [count], initially 1. Raises ValueError without scales."""
    if not has_scales(linear):
        raise ValueError(f"format {linear.format.name} stores no scales that can be trained")
    scales = decode_scales(linear.format, linear.fields, linear.rows, linear.cols)
    part = _attached(linear)
    part.stored_scales = scales
    part.scale_gain = nn.Parameter(torch.ones_like(scales))
    linear.drop_cache()
    return part.scale_gain


def has_codebook(linear: CompressedLinear) -> bool:
    """Whether the codes index a table of fp16 values that can be trained, the matrix's own or a shared one."""
    return codebook_field(linear.format, linear.rows, linear.cols) is not None


def train_codebook(linear: CompressedLinear, shared: TrainedCodebook | None = None) -> TrainedCodebook:
    """Make the codebook trainable. If matrices share it, pass the first one's TrainedCodebook to the others (`shared`).

    Raises ValueError for a format without a codebook.
    """
    field = codebook_field(linear.format, linear.rows, linear.cols)
    if field is None:
        raise ValueError(f"format {linear.format.name} has no codebook that can be trained")
    fields, codebook = linear.fields, shared
    if codebook is None:
        raw = fields.get(field.name, linear.shared_codebooks)
        assert raw is not None
        tables = linear.rows if isinstance(linear.format.codec, KMeansCodec) else 1
        codebook = TrainedCodebook(read_floats(raw, field.dtype, field.count), tables)
    _attached(linear).set_codebook(codebook, shared=field.name not in fields)
    linear.drop_cache()
    return codebook
