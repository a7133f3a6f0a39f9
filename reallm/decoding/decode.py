"""Packed fields to a torch weight, vectorised, on any device. Formulas: see `reallm.kernels.formats.formats`.

Arithmetic is float32 and rounded once to the dtype asked for, so that a weight does not depend on when it is decoded.
Written apart from `kernels/reference.py`, which it is tested against.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reallm.kernels.codes.lattice import RESIDUAL_SCALE, SHIFT, absolute_vectors, odd_minuses, root_words
from reallm.kernels.codes.packing import plane_widths, plane_words
from reallm.kernels.codes.tables import table
from reallm.kernels.codes.trellis import CODE_UNIT, WORDS_PER_WIDTH, code_table, step_shape
from reallm.kernels.formats.codecs import (
    FLOAT_NBYTES,
    TILE,
    AdditiveCodec,
    DenseCodec,
    Field,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank

from .neural import decode_neural
from .rotation import unrotate_both

Fields = Mapping[str, Tensor]

_FLOAT_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "i8": torch.int8}


def unpack(packed: Tensor, bits: int, count: int, index: Tensor | None = None) -> Tensor:
    """The first `count` codes of `packed` (uint8), or those at `index` (int64, any shape): uint8, or int32 over 8 bits.

    A plane of width w <= 8 holds code i in byte i w / 8, so bytes serve as well as the words of `kernels.packing`.
    """
    kind = torch.uint8 if bits <= 8 else torch.int32
    shape = (count,) if index is None else tuple(index.shape)
    result = torch.zeros(shape, dtype=kind, device=packed.device)
    start = shift = 0
    for width in plane_widths(bits) if count else ():
        nbytes = 4 * plane_words(count, width)
        plane = packed[start : start + nbytes]
        part = _whole_plane(plane, width, count) if index is None else _gathered(plane, width, index)
        result |= part.to(kind) << shift
        start, shift = start + nbytes, shift + width
    return result


def _whole_plane(plane: Tensor, width: int, count: int) -> Tensor:
    if width >= 8:
        return _bytes_as_codes(plane, width)[:count]
    lanes = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    return ((plane[:, None] >> lanes) & ((1 << width) - 1)).reshape(-1)[:count]


def _gathered(plane: Tensor, width: int, index: Tensor) -> Tensor:
    if width >= 8:
        return _bytes_as_codes(plane, width)[index]
    bit = index * width
    return (plane[bit >> 3] >> (bit & 7).to(torch.uint8)) & ((1 << width) - 1)


def _bytes_as_codes(plane: Tensor, width: int) -> Tensor:
    return plane if width == 8 else plane.view(torch.int16).to(torch.int32) & 0xFFFF


def read_floats(packed: Tensor, dtype: str, count: int) -> Tensor:
    """The first `count` values of a field of float (or int8) `dtype`, as float32 [count]."""
    body = packed[: count * FLOAT_NBYTES[dtype]]
    if body.storage_offset() % 4:
        body = body.clone()
    return body.view(_FLOAT_TYPES[dtype]).to(torch.float32)


class _Reader:
    """The fields of one matrix, read by rows: all of them, or those named in `select` (int64 [n])."""

    def __init__(
        self,
        stored: tuple[Field, ...],
        fields: Fields,
        rows: int,
        select: Tensor | None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`given` holds the values of some fields of floats, float32 [count], in place of what is stored."""
        self.stored = {field.name: field for field in stored}
        self.fields, self.rows, self.select, self.given = fields, rows, select, given or {}

    def codes(self, name: str) -> Tensor:
        """Codes [n, count / rows]."""
        field = self.stored[name]
        bits, width = int(field.dtype[1:]), field.count // self.rows
        if self.select is None:
            return unpack(self.fields[name], bits, field.count).view(self.rows, width)
        return unpack(self.fields[name], bits, field.count, self.index(width))

    def floats(self, name: str) -> Tensor:
        """Floats [n, count / rows]."""
        values = self.flat(name).view(self.rows, -1)
        return values if self.select is None else values[self.select]

    def flat(self, name: str) -> Tensor:
        """All values of a field that has no rows, float32 [count]."""
        if name in self.given:
            return self.given[name]
        field = self.stored[name]
        return read_floats(self.fields[name], field.dtype, field.count)

    def counts(self, name: str) -> Tensor:
        """All codes of a field that has no rows, int64 [count]."""
        field = self.stored[name]
        return unpack(self.fields[name], int(field.dtype[1:]), field.count).to(torch.int64)

    def words(self, name: str) -> Tensor:
        """All words of a "u32" field, int64 [count]."""
        body = self.fields[name][: 4 * self.stored[name].count]
        body = body.clone() if body.storage_offset() % 4 else body
        return body.view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    def index(self, width: int) -> Tensor:
        """Flat positions [n, width] of the rows read, in a field of `width` values a row."""
        device = self.fields[next(iter(self.stored))].device
        rows = torch.arange(self.rows, device=device) if self.select is None else self.select
        positions: Tensor = rows[:, None] * width + torch.arange(width, device=device)
        return positions


def _scales(codec: ScalarCodec, read: _Reader, groups: int) -> Tensor:
    """Scales [n, groups]."""
    double = codec.double_quant
    if double is None:
        return read.floats("scales")
    ranges = read.flat("scale_ranges")[read.index(groups) // double.block]
    scales: Tensor = read.codes("scale_codes").to(torch.float32) / (2**double.bits - 1) * ranges
    return read.flat("scale_min") + scales


def _spread(values: Tensor, width: int, cols: int) -> Tensor:
    """One value a group [n, groups] to one a weight [n, cols]."""
    return values.repeat_interleave(width, dim=1)[:, :cols]


def _scalar(codec: ScalarCodec, read: _Reader, cols: int) -> Tensor:
    groups, width = codec.group_count(cols), codec.group_width(cols)
    scales = _spread(_scales(codec, read, groups), width, cols)
    codes = read.codes("codes")
    if codec.table == "uint":
        return (codes.to(torch.float32) - _spread(read.codes("zeros"), width, cols)) * scales
    levels = torch.tensor(table(codec.table, codec.bits), device=codes.device)
    return levels[codes.to(torch.int32)] * scales


def _additive(codec: AdditiveCodec, read: _Reader, cols: int) -> Tensor:
    codes = read.codes("codes").to(torch.int32)
    codes = codes.view(codes.shape[0], codec.group_count(cols), codec.num_codebooks)
    books = read.flat("codebooks").view(codec.num_codebooks, 1 << codec.codebook_bits, codec.dim)
    words = books[0][codes[:, :, 0]]
    for m in range(1, codec.num_codebooks):
        words += books[m][codes[:, :, m]]
    return words.reshape(codes.shape[0], -1)[:, :cols] * read.floats("scales")


def _kmeans(codec: KMeansCodec, read: _Reader, cols: int) -> Tensor:
    return read.floats("levels").gather(1, read.codes("codes").to(torch.int64))


def _e8p_words(codes: Tensor) -> Tensor:
    """Words [..., 8] of E8P codes."""
    codes = codes.to(torch.int32)
    magnitudes = torch.from_numpy(absolute_vectors().copy()).to(codes.device, torch.float32)
    odd = torch.from_numpy(odd_minuses().copy()).to(codes.device)
    index = codes >> 8
    minus = (codes[..., None] >> torch.arange(1, 9, device=codes.device, dtype=torch.int32)) & 1
    minus[..., 7] = (minus[..., :7].sum(-1) + odd[index]) & 1
    return magnitudes[index] * (1 - 2 * minus) + ((codes & 1) * (2 * SHIFT) - SHIFT)[..., None]


def _lattice(codec: LatticeCodec, read: _Reader, cols: int) -> Tensor:
    words = _e8p_words(read.codes("codes"))
    if codec.bits > 2:
        codes = read.codes("residuals")
        if codec.bits == 4:
            second = _e8p_words(codes)
        else:
            second = torch.from_numpy(root_words().copy()).to(words)[codes.to(torch.int32)]
        words += RESIDUAL_SCALE[codec.bits] * second
    return words.flatten(1)[:, :cols] * read.flat("scales").repeat_interleave(TILE)[:cols]


def _trellis(codec: TrellisCodec, read: _Reader, rows: int, cols: int) -> Tensor:
    """All rows: tiles reach over 16 of them."""
    down, across = codec.grid(rows, cols)
    widths = read.counts("widths")
    wide = any(step_shape(width)[1] > codec.state_bits for width in widths.tolist())
    if wide or int(widths.sum()) > codec.total_width(cols):
        raise ValueError(f"field 'widths' does not fit {codec.name} with {cols} columns")
    words = read.words("words")
    starts = (widths.cumsum(0) - widths) * (down * WORDS_PER_WIDTH)
    result = torch.zeros(across, down, TILE * TILE, device=words.device)
    for width in sorted(set(widths.tolist()) - {0}):
        values, bits, steps = step_shape(width)
        blocks = torch.nonzero(widths == width).flatten()
        size = width * WORDS_PER_WIDTH
        rings = words[starts[blocks][:, None] + torch.arange(down * size, device=words.device)].view(-1, size)
        position = bits * torch.arange(steps - 1, -1, -1, device=words.device)
        low, high = rings[:, position >> 5], rings[:, ((position >> 5) + 1) % size]
        states = ((low | high << 32) >> (position & 31)) & ((1 << codec.state_bits) - 1)
        table = torch.from_numpy(code_table(codec.state_bits, values).copy()).to(words.device, torch.float32)
        result[blocks] = table[states].view(len(blocks), down, TILE * TILE)
    result *= CODE_UNIT * read.flat("scales")[:, None, None]
    tiles = result.view(across, down * TILE, TILE).transpose(0, 1).reshape(down * TILE, across * TILE)
    return tiles[:rows, :cols]


def _codes(fmt: Format, read: _Reader, rows: int, cols: int) -> Tensor:
    codec = fmt.codec
    if isinstance(codec, ScalarCodec):
        return _scalar(codec, read, cols)
    if isinstance(codec, AdditiveCodec):
        return _additive(codec, read, cols)
    if isinstance(codec, KMeansCodec):
        return _kmeans(codec, read, cols)
    if isinstance(codec, LatticeCodec):
        return _lattice(codec, read, cols)
    if isinstance(codec, NeuralCodec):
        codes = read.counts("codes").view(-1, cols)
        return decode_neural(codec, read.counts("codebooks"), codes, read.flat("scales"), rows)
    assert isinstance(codec, TrellisCodec)
    return _trellis(codec, read, rows, cols)


def _untransform(fmt: Format, read: _Reader, weight: Tensor) -> Tensor:
    """Rotation, permutation and column scales undone."""
    if fmt.rotated:
        weight = unrotate_both(weight)
    if fmt.permuted:
        order = read.counts("permutation")
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError("field 'permutation' is not a permutation of the columns")
        weight = weight[:, order.argsort()]
    return weight * read.flat("channel_scales") if fmt.channel_scales else weight


def _add_sparse(read: _Reader, weight: Tensor) -> Tensor:
    counts, where = read.counts("sparse_counts"), read.counts("sparse_cols")
    if int(counts.sum()) != len(where) or (where.numel() and int(where.max()) >= weight.shape[1]):
        raise ValueError("the sparse fields contradict each other")
    rows = torch.arange(len(counts), device=where.device).repeat_interleave(counts)
    return weight.index_put((rows, where), read.flat("sparse_values"), accumulate=True)


def _factors(term: LowRank, read: _Reader) -> tuple[Tensor, Tensor]:
    if term.dtype == "i4":
        left, right = read.codes("left").float() - 8, (read.counts("right").float() - 8).view(term.rank, -1)
    else:
        left, right = read.floats("left"), read.flat("right").view(term.rank, -1)
    if term.dtype != "f16":
        return left * read.flat("left_scales"), right * read.flat("right_scales")[:, None]
    return left, right


def check_fields(stored: tuple[Field, ...], fields: Fields) -> None:
    """Raise ValueError unless every stored field is there as uint8 with its exact size."""
    for field in stored:
        raw = fields.get(field.name)
        if raw is None:
            raise ValueError(f"field {field.name!r} is missing")
        if raw.dtype != torch.uint8 or tuple(raw.shape) != (field.nbytes,):
            raise ValueError(f"field {field.name!r} takes {field.nbytes} bytes, not {raw.dtype} {tuple(raw.shape)}")


def _with_shared(fmt: Format, fields: Fields, rows: int, cols: int, shared: Tensor | None) -> tuple[Field, ...]:
    stored = fmt.fields(rows, cols)
    if field := fmt.shared_field:
        if shared is None:
            raise ValueError(f"format {fmt.name} needs its shared codebooks")
        check_fields((field,), {field.name: shared})
        stored = (*stored, field)
    check_fields(fmt.fields(rows, cols), fields)
    return stored


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
    """W_hat [rows, cols], or its rows `select` (int64 [n]) as [n, cols], on the device of the fields.

    `shared` holds the shared codebooks (uint8) where the format has them. `low_rank=False` leaves out L R.
    Raises ValueError on a missing field or one of a wrong size.
    """
    stored = _with_shared(fmt, fields, rows, cols, shared)
    if fmt.shared_field and shared is not None:
        fields = {**fields, fmt.shared_field.name: shared}
    whole = fmt.rotated or fmt.sparse or isinstance(fmt.codec, TrellisCodec | NeuralCodec)  # a row cannot be had alone
    read = _Reader(stored, fields, rows, None if whole else select)
    if isinstance(fmt.codec, DenseCodec):
        return read.floats("values").to(dtype)
    weight = _untransform(fmt, read, _codes(fmt, read, rows, cols))
    if fmt.sparse:
        weight = _add_sparse(read, weight)
    if fmt.low_rank and low_rank:
        weight = torch.addmm(weight, *_factors(fmt.low_rank, read))
    if whole and select is not None:
        weight = weight[select]
    return weight.to(dtype)


def decode_coded(
    fmt: Format,
    fields: Fields,
    rows: int,
    cols: int,
    *,
    shared: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """The codes as if every scale stored by itself were one, before any transform is undone: float32 [rows, cols].

    `codebook` holds other values for `codebook_field`, float32 [count], and the result is differentiable in them.
    Raises ValueError on a missing field or one of a wrong size.
    """
    stored = _with_shared(fmt, fields, rows, cols, shared)
    count, device = scale_count(fmt, rows, cols), next(iter(fields.values())).device
    given = {"scales": torch.ones(count, device=device)} if count else {}
    field = codebook_field(fmt, rows, cols)
    if codebook is not None and field is not None:
        given[field.name] = codebook
    books = {} if shared is None or not fmt.shared_field else {fmt.shared_field.name: shared}
    read = _Reader(stored, {**fields, **books}, rows, None, given)
    return _codes(fmt, read, rows, cols)


def codebook_field(fmt: Format, rows: int, cols: int) -> Field | None:
    """The field of the fp16 values that codes choose among, in the matrix or shared; None where there is none."""
    if isinstance(fmt.codec, AdditiveCodec):
        return fmt.codec.codebook_field()
    if isinstance(fmt.codec, KMeansCodec):
        return next(field for field in fmt.fields(rows, cols) if field.name == "levels")
    return None


def decode_scales(fmt: Format, fields: Fields, rows: int, cols: int) -> Tensor:
    """The scales as they are stored, float32 [count]."""
    return read_floats(fields["scales"], "f16", scale_count(fmt, rows, cols))


def scale_count(fmt: Format, rows: int, cols: int) -> int:
    """How many fp16 scales the format stores by themselves; 0 where it has none, or quantises them again."""
    return next((field.count for field in fmt.fields(rows, cols) if field.name == "scales"), 0)


def spread_scales(fmt: Format, scales: Tensor, rows: int, cols: int) -> Tensor:
    """Scales [count] as they multiply the codes: [rows, cols], [rows, 1], or [cols] where all rows have the same."""
    if isinstance(fmt.codec, ScalarCodec):
        return _spread(scales.view(rows, -1), fmt.codec.group_width(cols), cols)
    return scales[:, None] if isinstance(fmt.codec, AdditiveCodec) else scales.repeat_interleave(TILE)[:cols]


def decode_transform(fmt: Format, fields: Fields, rows: int, cols: int, weight: Tensor) -> Tensor:
    """The transform undone, and the sparse outliers added, of scaled codes [rows, cols]; differentiable in `weight`."""
    read = _Reader(fmt.fields(rows, cols), fields, rows, None)
    weight = _untransform(fmt, read, weight)
    return _add_sparse(read, weight) if fmt.sparse else weight


def decode_factors(fmt: Format, fields: Fields, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """L [rows, rank] and R [rank, cols] in float32; both have rank 0 where the format has no low-rank term."""
    if fmt.low_rank is None:
        device = next(iter(fields.values())).device
        return torch.zeros(rows, 0, device=device), torch.zeros(0, cols, device=device)
    check_fields(fmt.fields(rows, cols), fields)
    return _factors(fmt.low_rank, _Reader(fmt.fields(rows, cols), fields, rows, None))
