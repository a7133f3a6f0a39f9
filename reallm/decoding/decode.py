"""From the packed fields of a matrix to its weight, on any device.

    W_hat = T^-1(decode(codes)) + S + L R

T^-1 undoes the transforms, S holds the sparse outliers, L R is the low-rank term; for the formulas see
`reallm.kernels.formats.formats`. Arithmetic is in float32 and the result is rounded once, to the requested dtype, so
that a matrix decodes to the same weight whenever it is decoded. The tests compare this module with
`kernels/reference.py`, which is an independent implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank

from .codec_decoders import DECODERS, WHOLE_MATRIX_CODECS
from .field_reader import FieldReader, Fields, check_fields
from .rotation import unrotate_both


def decode(
    fmt: Format,
    fields: Fields,
    rows: int,
    cols: int,
    *,
    dtype: torch.dtype = torch.float32,
    shared: Tensor | None = None,
    select: Tensor | None = None,
    low_rank: bool = True,
) -> Tensor:
    """Decode W_hat [rows, cols], or only its rows `select` (int64 [n]) as [n, cols], on the device of the fields.

    `fields` maps field names to bytes (uint8). `shared` holds the bytes of the shared codebooks, if the format has any.
    `low_rank=False` leaves out the term L R. Raises ValueError for a missing field or a field of a wrong size.
    """
    stored, fields = fields_with_shared(fmt, fields, rows, cols, shared)
    needs_all_rows = fmt.rotated or bool(fmt.sparse) or isinstance(fmt.codec, WHOLE_MATRIX_CODECS)
    read = FieldReader(stored, fields, rows, None if needs_all_rows else select)
    weight = _undo_transforms(fmt, read, decode_codes(fmt, read, rows, cols))
    if fmt.sparse:
        weight = _add_sparse(read, weight)
    if fmt.low_rank and low_rank:
        weight = torch.addmm(weight, *_factors(fmt.low_rank, read))
    if needs_all_rows and select is not None:
        weight = weight[select]
    return weight.to(dtype)


def decode_codes(fmt: Format, read: FieldReader, rows: int, cols: int) -> Tensor:
    """Decode the codes alone, float32 [n, cols]: transforms are not undone, sparse and low-rank terms are left out."""
    return DECODERS[type(fmt.codec)](fmt.codec, read, rows, cols)


def decode_transform(fmt: Format, fields: Fields, rows: int, cols: int, weight: Tensor) -> Tensor:
    """Undo the transforms of decoded codes `weight` [rows, cols] and add the sparse outliers.

    The result is float32 [rows, cols], without the low-rank term, and differentiable in `weight`.
    """
    read = FieldReader(fmt.fields(rows, cols), fields, rows)
    weight = _undo_transforms(fmt, read, weight)
    return _add_sparse(read, weight) if fmt.sparse else weight


def decode_factors(fmt: Format, fields: Fields, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Decode the low-rank factors L [rows, rank] and R [rank, cols], float32; rank 0 if the format has none.

    Raises ValueError for a missing field or a field of a wrong size.
    """
    if fmt.low_rank is None:
        device = next(iter(fields.values())).device
        return torch.zeros(rows, 0, device=device), torch.zeros(0, cols, device=device)
    check_fields(fmt.fields(rows, cols), fields)
    return _factors(fmt.low_rank, FieldReader(fmt.fields(rows, cols), fields, rows))


def fields_with_shared(
    fmt: Format, fields: Fields, rows: int, cols: int, shared: Tensor | None
) -> tuple[tuple[Field, ...], Fields]:
    """Join the fields of a matrix with its shared codebooks: (all fields that decoding reads, their bytes by name).

    Raises ValueError for a missing field or a field of a wrong size.
    """
    stored = fmt.fields(rows, cols)
    check_fields(stored, fields)
    if fmt.shared_field is None:
        return stored, fields
    if shared is None:
        raise ValueError(f"format {fmt.name} needs its shared codebooks")
    fields = {**fields, fmt.shared_field.name: shared}
    check_fields((fmt.shared_field,), fields)
    return (*stored, fmt.shared_field), fields


def _undo_transforms(fmt: Format, read: FieldReader, weight: Tensor) -> Tensor:
    """Undo rotation, permutation and column scales, in this order."""
    if fmt.rotated:
        weight = unrotate_both(weight)
    if fmt.permuted:
        order = read.all_codes("permutation")
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError("field 'permutation' is not a permutation of the columns")
        weight = weight[:, order.argsort()]
    return weight * read.all_floats("channel_scales") if fmt.channel_scales else weight


def _add_sparse(read: FieldReader, weight: Tensor) -> Tensor:
    counts, cols = read.all_codes("sparse_counts"), read.all_codes("sparse_cols")
    if int(counts.sum()) != len(cols) or (cols.numel() and int(cols.max()) >= weight.shape[1]):
        raise ValueError("the sparse fields contradict each other")
    rows = torch.arange(len(counts), device=cols.device).repeat_interleave(counts)
    return weight.index_put((rows, cols), read.all_floats("sparse_values"), accumulate=True)


def _factors(term: LowRank, read: FieldReader) -> tuple[Tensor, Tensor]:
    if term.dtype == "i4":
        offset = term.offset
        left = read.row_codes("left").float() - offset
        right = (read.all_codes("right").float() - offset).view(term.rank, -1)
    else:
        left, right = read.row_floats("left"), read.all_floats("right").view(term.rank, -1)
    if term.dtype != "f16":
        return left * read.all_floats("left_scales"), right * read.all_floats("right_scales")[:, None]
    return left, right
