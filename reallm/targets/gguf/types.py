"""Types of tensors in GGUF files, and the reallm formats that they hold without loss."""

from __future__ import annotations

from collections.abc import Mapping

from reallm.kernels.formats.codecs import ScalarCodec
from reallm.kernels.formats.formats import Format

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""Type id -> its name, elements of a block, bytes of a block."""
TYPE_IDS = {name: type_id for type_id, (name, _, _) in BLOCKS.items()}
BLOCK = 32
"""Weights of a block of the types in TYPE_OF_BITS; a format's groups have the same size."""
TYPE_OF_BITS = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""Bits of a symmetric integer format -> the type that holds it."""
ACCEPTED = ", ".join(f"int{bits}-g{BLOCK} ({name})" for bits, name in TYPE_OF_BITS.items())


def gguf_type(fmt: Format, rows: int, cols: int) -> str | None:
    """The GGUF type of a matrix [rows, cols] in `fmt`, or None if no type holds it without loss.

    Error feedback and clipping only affect how codes are chosen, so formats with them are held as well.

    >>> gguf_type(Format.parse("int4-g32+ldl"), 576, 576), gguf_type(Format.parse("nf4-g32"), 576, 576)
    ('Q4_0', None)
    """
    codec = fmt.codec
    if not isinstance(codec, ScalarCodec) or codec.table != "int" or codec.double_quant is not None:
        return None
    if codec.group_size != BLOCK or cols % BLOCK or fmt.transformed or fmt.sparse or fmt.low_rank:
        return None
    return TYPE_OF_BITS.get(codec.bits)
