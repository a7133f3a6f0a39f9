"""A packed matrix as a torch module: its fields are uint8 buffers, and its weight is decoded on demand.

Where there is a kernel (`cpu`, `triton_linear`), products do not need a decoded weight; every other use decodes it.
There are two decode modes with bit-identical results: "load" keeps the decoded weight from its first use on (in a
buffer that is never saved), "call" decodes at every call and keeps nothing. Casting or moving the module never changes
the bytes of the fields; it drops the kept weight, which is then decoded again in the new dtype and on the new device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from reallm.artifacts.quantization_config import DecodeMode, shared_name
from reallm.codegen.launch.derived_tensors import Derived
from reallm.decoding.decode import decode
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format

from .cpu import NativeMatrix, native_matrix
from .frozen_weight import REFUSAL, FrozenWeightError, frozen


class Decoding(nn.Module):
    """A module that can produce a decoded weight, and keeps it if `mode` is "load"."""

    mode: DecodeMode
    decoded: Tensor
    """The kept weight in the compute dtype; empty until it is first needed, and always empty in mode "call"."""

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """Set the mode and the compute dtype. Call this once, before the module gets its fields."""
        # transformers must not initialise the weight, but must fill buffers of the model's class (Gemma's embed_scale).
        self._is_hf_initialized = not self._buffers
        self.mode = mode
        self.register_buffer("decoded", torch.empty(0, dtype=dtype), persistent=False)

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight from the fields, in `dtype`."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, decoded in the module's compute dtype and then cast to `dtype`. Do not write to it."""
        weight = self.decoded
        if self.mode == "call":
            weight = self.decode_now(weight.dtype)
        elif not weight.numel():
            with torch.inference_mode(False), torch.no_grad():
                weight = self.decoded = self.decode_now(weight.dtype)
        return weight if dtype is None else weight.to(dtype)

    def prepare(self) -> None:
        """Decode the weight now, in mode "load", rather than at its first use."""
        if self.mode == "load":
            self.dense()

    def drop_cache(self) -> None:
        """Drop the kept weight; the next use decodes it again."""
        if self.decoded.numel():
            self.decoded = torch.empty(0, dtype=self.decoded.dtype, device=self.decoded.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_cache()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class SharedCodebooks(nn.Module):
    """The module `reallm_shared` of a model: the codebooks that several matrices share.

    It has one child module per key, each with one uint8 buffer `codebooks`.
    """

    NAME = "reallm_shared"

    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__()
        for key, field in fields.items():
            holder = nn.Module()
            holder.register_buffer(field.name, torch.empty(field.nbytes, dtype=torch.uint8))
            self.add_module(shared_name(key), holder)

    def __getitem__(self, key: str) -> Tensor:
        """The codebooks stored under `key`, uint8 [nbytes]."""
        codebooks = self.get_submodule(shared_name(key)).codebooks
        assert isinstance(codebooks, Tensor)
        return codebooks


Shared = tuple[SharedCodebooks, str] | None
"""The shared codebooks and the key of those that a matrix uses; None for a matrix that uses none.

They are in a tuple, so that torch does not make them a child of the matrix.
"""


class Original(NamedTuple):
    """The module that a packed module replaced."""

    kind: type[nn.Module]
    attributes: frozenset[str]
    """Names of the module's attributes, in `vars`."""
    buffers: frozenset[str]
    """Names of its buffers."""


class Packed(Decoding):
    """A matrix W[rows, cols] stored as the fields of `format`, each a uint8 buffer with the field's name.

    The decoded matrix, which approximates W, is called W_hat.
    """

    format: Format
    rows: int
    cols: int
    shared: Shared
    original: Original
    derived: Derived | None = None
    """Tensors that generated kernels read in place of some fields; computed at their first use."""
    _native: NativeMatrix | Literal[False] | None
    """The value of `native`: None until it is first needed, False if there is no native kernel."""

    def allocate_fields(
        self,
        fmt: Format,
        rows: int,
        cols: int,
        *,
        mode: DecodeMode,
        dtype: torch.dtype,
        shared: Shared = None,
    ) -> None:
        """Register the uninitialised buffers of a matrix [rows, cols] that computes in `dtype`."""
        self.format, self.rows, self.cols, self.shared, self._native = fmt, rows, cols, shared, None
        self.start_decoding(mode, dtype)
        for field in fmt.fields(rows, cols):
            self.register_buffer(field.name, torch.empty(field.nbytes, dtype=torch.uint8))

    @property
    def fields(self) -> dict[str, Tensor]:
        """Field name -> uint8 [nbytes], in file order."""
        return {field.name: getattr(self, field.name) for field in self.format.fields(self.rows, self.cols)}

    @property
    def shared_codebooks(self) -> Tensor | None:
        """The shared codebooks of the matrix, uint8 [nbytes]; None if it uses none."""
        return None if self.shared is None else self.shared[0][self.shared[1]]

    @property
    def gain(self) -> Tensor | None:
        """Factors that multiply the decoded rows, float32 [rows], or None. Never saved; only for linear modules."""
        raw = self._buffers.get("gain_bytes")  # uint8, so that casting the module to another dtype does not change it
        return None if raw is None else raw.view(torch.float32)

    def set_gain(self, gain: Tensor | None) -> None:
        """Multiply the rows of W_hat by a copy of `gain` [rows] from now on; None removes the gain."""
        values = None if gain is None else gain.detach().to(torch.float32, copy=True).contiguous()
        self._buffers.pop("gain_bytes", None)
        if values is not None:
            self.register_buffer("gain_bytes", values.view(torch.uint8), persistent=False)
        self.drop_cache()

    @property
    def native(self) -> NativeMatrix | None:
        """The matrix for native kernels, without a bias; None if it is not on the CPU, or there is no kernel for it.

        Raises ValueError for fields that contradict each other.
        """
        if self._native is None:
            fields, shared = self.fields, self.shared_codebooks
            if any(raw.device.type != "cpu" for raw in fields.values()):
                return None
            self._native = native_matrix(self.format, fields, self.rows, self.cols, shared) or False
            if self._native and self.gain is not None:
                self._native.add_gain(self.gain)
        return self._native or None

    def prepare(self) -> None:
        """Build the native matrix, or decode the weight where there is no native kernel."""
        if self.native is None:
            super().prepare()

    def drop_cache(self) -> None:
        """Drop the kept weight and everything derived from the fields; the next use computes them again."""
        super().drop_cache()
        self._native, self.derived = None, None

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """Decode W_hat [rows, cols] in `dtype`, with its rows multiplied by the gain."""
        if self.gain is None:
            return self.decode_stored(dtype)
        return (self.decode_stored(torch.float32) * self.gain[:, None]).to(dtype)

    def decode_stored(self, dtype: torch.dtype, low_rank: bool = True) -> Tensor:
        """Decode W_hat [rows, cols] without the gain and, with `low_rank=False`, without the low-rank term."""
        fields, shared = self.fields, self.shared_codebooks
        return decode(self.format, fields, self.rows, self.cols, dtype=dtype, shared=shared, low_rank=low_rank)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix W_hat [rows, cols] in the compute dtype; read-only."""
        return frozen(self.dense())

    def write(self, fields: Iterable[tuple[str, Tensor]]) -> None:
        """Replace some fields by uint8 tensors of their exact sizes. Raises ValueError for any other tensor."""
        sizes = {field.name: field.nbytes for field in self.format.fields(self.rows, self.cols)}
        for name, raw in fields:
            if name not in sizes or raw.dtype != torch.uint8 or tuple(raw.shape) != (sizes[name],):
                raise ValueError(f"field {name!r} takes {sizes.get(name)} bytes, not {raw.dtype} {tuple(raw.shape)}")
            setattr(self, name, raw)

    def replace_fields(self, fmt: Format, fields: Mapping[str, Tensor]) -> None:
        """Replace the format and all fields, for the same shape. Raises ValueError if a field does not fit."""
        for name in self.fields:
            del self._buffers[name]
        self.format = fmt
        for field in fmt.fields(self.rows, self.cols):
            self.register_buffer(field.name, torch.empty(0, dtype=torch.uint8))
        self.write(fields.items())
        self.drop_cache()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise FrozenWeightError(REFUSAL)
        super().__setattr__(name, value)
        if name in self._buffers and name != "decoded" and "decoded" in self._buffers:
            self.drop_cache()

    def _load_from_state_dict(self, *args: Any) -> None:  # the seven arguments that torch passes
        super()._load_from_state_dict(*args)
        self.drop_cache()

    def extra_repr(self) -> str:
        return f"rows={self.rows}, cols={self.cols}, format={self.format.name}, decode={self.mode}"
