"""Modules that take the place of a model's own: linear, embedding, tied head and expert stack.

A module keeps its class as a base (Gemma's scaled embedding stays one), so whatever the model's code asks of it still
holds; only the weight parameter gives way to the packed fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from reallm.decoding.decode import decode
from reallm.kernels.formats.formats import Format

from .cpu import can_look_up, can_multiply
from .frozen_weight import REFUSAL, FrozenWeightError, frozen
from .packed import DecodeMode, Decoding, Packed, Shared
from .training.magnitude import MagnitudeTraining
from .triton_linear import packed_linear, takes_kernel


class CompressedLinear(MagnitudeTraining, nn.Linear):  # type: ignore[override]  # weight: a property, not a Parameter
    """y = x W_hat^T + b, in the dtype of x."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """x [..., in_features] to y [..., out_features]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.in_training:
            result = self.training_output(input)
            return result if bias is None else result + bias
        if takes_kernel(self, input):
            if self.gain is None:
                return packed_linear(self, input, bias)
            product = (packed_linear(self, input, None).float() * self.gain).to(input.dtype)
            return product if bias is None else product + bias
        if can_multiply(input) and (native := self.native):
            product = native.linear(input)
            return product if bias is None else product + bias
        return linear(input, self.dense(input.dtype), bias)


class CompressedEmbedding(Packed, nn.Embedding):  # type: ignore[override]  # weight: a property, not a Parameter
    """Rows of W_hat; natively, and with decode "call", only the rows asked for are decoded."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Token ids [...] to [..., embedding_dim]."""
        dtype = self.decoded.dtype
        if can_look_up(input, dtype) and (native := self.native) and native.looks_up:
            return native.lookup(input, dtype)
        if self.mode == "load":
            return embedding(input, self.dense(), self.padding_idx)
        select = input.reshape(-1)
        rows = decode(
            self.format, self.fields, self.rows, self.cols, dtype=dtype, shared=self.shared_codebooks, select=select
        )
        return rows.view(*input.shape, self.cols)

    def prepare(self) -> None:
        """As for every packed matrix; rows of a rotated one come out of its decoded weight."""
        if self.native is None or not self.native.looks_up:
            super(Packed, self).prepare()


class TiedHead(nn.Linear):
    """A head without a weight of its own: it uses that of the packed embedding."""

    _source: tuple[CompressedEmbedding]  # in a tuple, so that it is no child of this module
    _is_hf_initialized: bool  # transformers must not draw its weight at random

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear annotates a Parameter
        """W_hat of the embedding, [out_features, in_features]; read-only."""
        return self._source[0].weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """x [..., in_features] to logits [..., out_features]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if can_multiply(input) and (native := self._source[0].native):
            product = native.linear(input)
            return product if bias is None else product + bias
        return linear(input, self._source[0].dense(input.dtype), bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise FrozenWeightError(REFUSAL)
        super().__setattr__(name, value)


_TENSOR_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "T", "mT", "is_cuda", "dim", "size", "stride", "numel", "data_ptr"}
    | {"transpose", "permute", "unbind", "unsqueeze", "contiguous", "is_contiguous", "detach", "reshape", "view"}
)


class ExpertStack(Decoding):
    """A 3-D expert parameter as one packed matrix per expert (children 0, 1, ...), which stands in for the tensor.

    `stack[e]` with one index decodes one expert; every other use decodes all, [experts, rows, cols], or with its last
    two axes swapped if the model keeps them so. It is a module, so that its fields have their names in the model, and
    answers as a tensor where the model's code expects the parameter.
    """

    def __init__(self, experts: Sequence[Packed], *, transposed: bool, mode: DecodeMode, dtype: torch.dtype) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.count, self.transposed = len(experts), transposed
        self.start_decoding(mode, dtype)

    def expert(self, index: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix as the model keeps it. Raises IndexError."""
        packed = self.get_submodule(str(range(self.count)[index]))
        assert isinstance(packed, Packed)
        weight = packed.decode_now(dtype)
        return weight.T if self.transposed else weight

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """All experts, [experts, ...]."""
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


class PackedExpert(Packed):
    """One expert's matrix in a stack."""

    def forward(self) -> Tensor:
        """W_hat [rows, cols]."""
        return self.dense()


@cache
def _joined(own: Any, packed: Any) -> Any:
    return type(f"Compressed{own.__name__}", (own, packed), {})


def _become(module: nn.Module, packed: Any, plain: type[nn.Module]) -> None:
    """Give `module` the class `packed`, and keep its own as the first base unless that is the `plain` torch class."""
    del module._parameters["weight"]
    own: Any = type(module)
    module.__class__ = packed if own is plain else _joined(own, packed)


def pack_linear(
    module: nn.Linear, fmt: Format, mode: DecodeMode, dtype: torch.dtype, shared: Shared
) -> CompressedLinear:
    """Turn `module` into a CompressedLinear with empty fields, in place; it is returned."""
    _become(module, CompressedLinear, nn.Linear)
    assert isinstance(module, CompressedLinear)
    module.hold(fmt, module.out_features, module.in_features, mode=mode, dtype=dtype, shared=shared)
    return module


def pack_embedding(module: nn.Embedding, fmt: Format, mode: DecodeMode, dtype: torch.dtype, shared: Shared) -> None:
    """Turn `module` into a CompressedEmbedding with empty fields, in place."""
    _become(module, CompressedEmbedding, nn.Embedding)
    assert isinstance(module, CompressedEmbedding)
    module.hold(fmt, module.num_embeddings, module.embedding_dim, mode=mode, dtype=dtype, shared=shared)


def tie_head(head: nn.Linear, source: CompressedEmbedding) -> None:
    """Make `head` use the weight of `source`, in place."""
    _become(head, TiedHead, nn.Linear)
    assert isinstance(head, TiedHead)
    head._source = (source,)
    head._is_hf_initialized = True
