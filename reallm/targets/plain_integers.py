"""Which formats are integers with a scale for each group and nothing else, which is what every engine holds."""

from __future__ import annotations

from reallm.kernels.formats.codecs import ScalarCodec
from reallm.kernels.formats.formats import Format


def plain_integers(fmt: Format, cols: int) -> ScalarCodec | None:
    """The codec of `fmt` if it is plain integers whose groups divide `cols`; else None.

    >>> plain_integers(reallm.Format.parse("int4-g32+ldl"), 64).bits
    4
    """
    codec = fmt.codec
    if not isinstance(codec, ScalarCodec) or codec.table not in ("int", "uint") or codec.double_quant is not None:
        return None
    if fmt.transformed or fmt.sparse or fmt.low_rank or cols % (codec.group_size or cols):
        return None
    return codec
