"""The header of a GGUF file made from another one."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from .file_header import MAGIC, GgufHeader, GgufTensor


def new_header(header: GgufHeader, types: Mapping[str, int]) -> tuple[bytes, tuple[GgufTensor, ...]]:
    """The header of a file like that of `header`, with padding, and where its tensors are.

    `types` maps the names of tensors to new type ids; all other tensors keep theirs. The data are in header order.
    """
    alignment, offset, entries, offsets = header.alignment, 0, [], []
    for tensor in header.tensors:
        new = GgufTensor(tensor.name, tensor.shape, types.get(tensor.name, tensor.type_id), offset)
        raw, columns_first = new.name.encode(), new.shape[::-1]
        entries.append(struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(columns_first)))
        entries.append(struct.pack(f"<{len(columns_first)}QIQ", *columns_first, new.type_id, offset))
        offsets.append(new)
        offset += -(-new.nbytes // alignment) * alignment
    start = MAGIC + struct.pack("<IQQ", header.version, len(offsets), header.pair_count)
    text = start + header.pairs + b"".join(entries)
    text += bytes(-len(text) % alignment)
    return text, tuple(GgufTensor(t.name, t.shape, t.type_id, t.start + len(text)) for t in offsets)
