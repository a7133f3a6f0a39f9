"""Access to the packed fields of one matrix by name: the values of all rows or of selected rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reallm.kernels.formats.fields import Field

from .unpack import read_floats, read_words, unpack

Fields = Mapping[str, Tensor]
"""Packed fields of one matrix by name, each uint8 [nbytes]."""


def check_fields(stored: tuple[Field, ...], fields: Fields) -> None:
    """Raise ValueError unless every field of `stored` is in `fields` as uint8 with its exact size."""
    for field in stored:
        packed = fields.get(field.name)
        if packed is None:
            raise ValueError(f"field {field.name!r} is missing")
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (field.nbytes,):
            found = f"{packed.dtype} {tuple(packed.shape)}"
            raise ValueError(f"field {field.name!r} takes {field.nbytes} bytes, not {found}")


class FieldReader:
    """Reads the fields of one matrix: values of all rows, or only of the rows `select` (int64 [n])."""

    def __init__(
        self,
        stored: tuple[Field, ...],
        fields: Fields,
        rows: int,
        select: Tensor | None = None,
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make a reader; `overrides` maps names of float fields to values, float32 [count], to use in their place."""
        self.stored = {field.name: field for field in stored}
        self.fields, self.rows, self.select, self.overrides = fields, rows, select, overrides or {}

    def row_codes(self, name: str) -> Tensor:
        """The codes of a field that is stored row by row: [n, count / rows]."""
        field = self.stored[name]
        bits, width = int(field.dtype[1:]), field.count // self.rows
        if self.select is None:
            return unpack(self.fields[name], bits, field.count).view(self.rows, width)
        return unpack(self.fields[name], bits, field.count, self.positions(width))

    def row_floats(self, name: str) -> Tensor:
        """The values of a float field that is stored row by row: float32 [n, count / rows]."""
        values = self.all_floats(name).view(self.rows, -1)
        return values if self.select is None else values[self.select]

    def all_floats(self, name: str) -> Tensor:
        """All values of a float field, float32 [count]."""
        if name in self.overrides:
            return self.overrides[name]
        field = self.stored[name]
        return read_floats(self.fields[name], field.dtype, field.count)

    def all_codes(self, name: str) -> Tensor:
        """All codes of a field, int64 [count]."""
        field = self.stored[name]
        return unpack(self.fields[name], int(field.dtype[1:]), field.count).to(torch.int64)

    def all_words(self, name: str) -> Tensor:
        """All words of a "u32" field, int64 [count]."""
        return read_words(self.fields[name], self.stored[name].count)

    def positions(self, width: int) -> Tensor:
        """Positions [n, width] of the selected rows' values in a flat field with `width` values per row."""
        device = self.fields[next(iter(self.stored))].device
        rows = torch.arange(self.rows, device=device) if self.select is None else self.select
        positions: Tensor = rows[:, None] * width + torch.arange(width, device=device)
        return positions
