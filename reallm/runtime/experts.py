"""Packed expert stacks: the 3-D expert parameter of a mixture-of-experts block, with one packed matrix per expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reallm.artifacts.quantization_config import DecodeMode

from .frozen_weight import frozen
from .packed import Decoding, Packed

_TENSOR_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "T", "mT", "is_cuda", "dim", "size", "stride", "numel", "data_ptr"}
    | {"transpose", "permute", "unbind", "unsqueeze", "contiguous", "is_contiguous", "detach", "reshape", "view"}
)
"""Attributes of a tensor that the stack answers from its decoded weight."""


class PackedExpert(Packed):
    """One expert's matrix in a stack."""

    def forward(self) -> Tensor:
        """The decoded matrix W_hat [rows, cols]."""
        return self.dense()


class ExpertStack(Decoding):
    """The matrices of all experts (children 0, 1, ...), in place of the model's 3-D parameter.

    In decode mode "call", `stack[e]` with a single index decodes one expert. Every other use decodes all of them into
    [experts, rows, cols], or [experts, cols, rows] if the model stores them transposed. The stack is a module, so that
    the fields get tensor names in the model, but behaves like a tensor in model code that expects the parameter.
    """

    def __init__(self, experts: Sequence[Packed], *, transposed: bool, mode: DecodeMode, dtype: torch.dtype) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.count, self.transposed = len(experts), transposed
        self.start_decoding(mode, dtype)

    def expert(self, index: int, dtype: torch.dtype) -> Tensor:
        """The decoded matrix of one expert, transposed if the model stores it so. Raises IndexError."""
        packed = self.get_submodule(str(range(self.count)[index]))
        assert isinstance(packed, Packed)
        weight = packed.decode_now(dtype)
        return weight.T if self.transposed else weight

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """Decode all experts into one tensor [experts, rows, cols], or [experts, cols, rows] if `transposed`."""
        return torch.stack([self.expert(index, dtype) for index in range(self.count)])

    def __getitem__(self, index: Any) -> Tensor:
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if single and self.mode == "call":
            return self.expert(int(index), self.decoded.dtype)
        return frozen(self.dense())[index]

    def __getattr__(self, name: str) -> Any:
        if name in _TENSOR_ATTRIBUTES:
            return getattr(frozen(self.dense()), name)
        return super().__getattr__(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return frozen(value.dense()) if isinstance(value, ExpertStack) else value

        return func(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})
