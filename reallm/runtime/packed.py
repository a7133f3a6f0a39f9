"""The packed matrix as a torch module: its fields are uint8 buffers, its weight is decoded when asked for.

On the CPU products need no decoded weight (`cpu`); whatever else asks for it decodes it.
Two ways to decode, with the same result to the bit: "load" keeps the decoded weight from its first use on (a buffer
that is never saved), "call" decodes at every call and keeps nothing. Casts and moves of the module cannot touch the
fields' bytes; they drop the kept weight, which is decoded anew in the new dtype and on the new device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from reallm.codegen.launch.derived_tensors import Derived
from reallm.decoding.decode import decode
from reallm.kernels.formats.codecs import Field
from reallm.kernels.formats.formats import Format

from .cpu import NativeMatrix, native_matrix
from .frozen_weight import REFUSAL, FrozenWeightError, frozen

if TYPE_CHECKING:
    from .input_groups import InputGroup

DecodeMode = Literal["load", "call"]


class Decoding(nn.Module):
    """A module that can produce a decoded weight, and keeps it if `mode` is "load"."""

    mode: DecodeMode
    decoded: Tensor

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """Set the mode and the compute dtype; call once, before the module gets fields.

        transformers must not initialise the weight; buffers of the class's own (Gemma's scale) it has to, still.
        """
        self._is_hf_initialized = not self._buffers
        self.mode = mode
        self.register_buffer("decoded", torch.empty(0, dtype=dtype), persistent=False)

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """The weight, decoded from the fields."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in the module's compute dtype, then in `dtype`; not to be written."""
        kept = self.decoded
        if self.mode == "call":
            kept = self.decode_now(kept.dtype)
        elif not kept.numel():
            with torch.inference_mode(False), torch.no_grad():
                kept = self.decoded = self.decode_now(kept.dtype)
        return kept if dtype is None else kept.to(dtype)

    def prepare(self) -> None:
        """Make now what the first use would make and keep."""
        if self.mode == "load":
            self.dense()

    def forget(self) -> None:
        """Drop the kept weight; the next use decodes it again."""
        if self.decoded.numel():
            self.decoded = torch.empty(0, dtype=self.decoded.dtype, device=self.decoded.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class SharedCodebooks(nn.Module):
    """The codebooks that several matrices share: child `key` with one buffer, `codebooks`. Sits at `reallm_shared`."""

    NAME = "reallm_shared"

    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__()
        for key, field in fields.items():
            holder = nn.Module()
            holder.register_buffer(field.name, torch.empty(field.nbytes, dtype=torch.uint8))
            self.add_module(shared_name(key), holder)

    def __getitem__(self, key: str) -> Tensor:
        """Codebooks of `key`, uint8 [nbytes]."""
        codebooks = self.get_submodule(shared_name(key)).codebooks
        assert isinstance(codebooks, Tensor)
        return codebooks


def shared_name(key: str) -> str:
    """The module name of a shared codebook's key."""
    return re.sub(r"[^A-Za-z0-9_]", "_", key)


Shared = tuple[SharedCodebooks, str] | None
"""The container of shared codebooks and a matrix's key in it; a tuple, so that it is no child of the matrix."""


class Packed(Decoding):
    """One matrix W[rows, cols] as the fields of `format`, each a uint8 buffer of the field's name."""

    format: Format
    rows: int
    cols: int
    _shared: Shared
    derived: Derived | None = None
    """What generated kernels read in place of some fields; made at their first use."""
    siblings: InputGroup | None = None
    """The linears that multiply the same x, this one among them; no children of this module."""
    _native: NativeMatrix | Literal[False] | None
    """Made at its first use; False where there is no kernel."""
    gain_bytes: Tensor | None
    """The bit pattern of `gain`, which a cast of the module must not touch."""

    def hold(
        self,
        fmt: Format,
        rows: int,
        cols: int,
        *,
        mode: DecodeMode,
        dtype: torch.dtype,
        shared: Shared = None,
    ) -> None:
        """Make the (still empty) buffers of a matrix [rows, cols]."""
        self.format, self.rows, self.cols, self._shared, self._native = fmt, rows, cols, shared, None
        self.start_decoding(mode, dtype)
        self.register_buffer("gain_bytes", None, persistent=False)
        for field in fmt.fields(rows, cols):
            self.register_buffer(field.name, torch.empty(field.nbytes, dtype=torch.uint8))

    @property
    def fields(self) -> dict[str, Tensor]:
        """Field name -> uint8 [nbytes], in file order."""
        return {field.name: getattr(self, field.name) for field in self.format.fields(self.rows, self.cols)}

    @property
    def shared_codebooks(self) -> Tensor | None:
        """The shared codebooks, uint8, where the format has them."""
        return None if self._shared is None else self._shared[0][self._shared[1]]

    @property
    def gain(self) -> Tensor | None:
        """What the rows of W_hat are multiplied by after all else, float32 [rows]; in memory only, of linears alone."""
        return None if self.gain_bytes is None else self.gain_bytes.view(torch.float32)

    @property
    def native(self) -> NativeMatrix | None:
        """The matrix for native kernels, without a bias; None off the CPU and where no kernel can be had.

        Raises ValueError for fields that contradict themselves.
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
        """Make now what the first use would make and keep: with a native kernel, no decoded weight."""
        if self.native is None:
            super().prepare()

    def forget(self) -> None:
        """Drop the kept weight and what was made of the fields; the next use makes them again."""
        super().forget()
        self._native, self.derived = None, None

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """W_hat [rows, cols]."""
        if self.gain is None:
            return self.decode_stored(dtype)
        return (self.decode_stored(torch.float32) * self.gain[:, None]).to(dtype)

    def decode_stored(self, dtype: torch.dtype) -> Tensor:
        """W_hat [rows, cols] without the gain."""
        return decode(self.format, self.fields, self.rows, self.cols, dtype=dtype, shared=self.shared_codebooks)

    @property
    def weight(self) -> Tensor:
        """W_hat [rows, cols] in the compute dtype; read-only."""
        return frozen(self.dense())

    def write(self, fields: Iterable[tuple[str, Tensor]]) -> None:
        """Replace fields by uint8 tensors of their exact sizes."""
        sizes = {field.name: field.nbytes for field in self.format.fields(self.rows, self.cols)}
        for name, raw in fields:
            if name not in sizes or raw.dtype != torch.uint8 or tuple(raw.shape) != (sizes[name],):
                raise ValueError(f"field {name!r} takes {sizes.get(name)} bytes, not {raw.dtype} {tuple(raw.shape)}")
            setattr(self, name, raw)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise FrozenWeightError(REFUSAL)
        super().__setattr__(name, value)
        if name in self._buffers and name != "decoded" and "decoded" in self._buffers:
            self.forget()

    def _load_from_state_dict(self, *args: Any) -> None:  # torch's own seven arguments
        super()._load_from_state_dict(*args)
        self.forget()

    def extra_repr(self) -> str:
        return f"rows={self.rows}, cols={self.cols}, format={self.format.name}, decode={self.mode}"
