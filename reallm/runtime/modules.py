"""The packed modules that replace a model's own: linear modules, embeddings and tied heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from reallm.decoding.decode import decode

from .cpu import can_look_up, can_multiply
from .frozen_weight import REFUSAL, FrozenWeightError
from .input_groups import GroupedLinear
from .packed import Original, Packed
from .triton_linear import packed_linear, takes_kernel


class CompressedLinear(GroupedLinear):
    """A packed linear module: y = x W_hat^T + b, in the dtype of x."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """y [..., out_features] for x [..., in_features]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.training_part is not None:
            result = self.training_part.output(self, input)
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

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """Decode W_hat [rows, cols] in `dtype`.

        While the low-rank term is being trained, the result has neither that term nor the gain:
        `TrainingPart.output` applies their current values.
        """
        if self.training_part is not None and self.training_part.left_factor is not None:
            return self.decode_stored(dtype, low_rank=False)
        return super().decode_now(dtype)


class CompressedEmbedding(Packed, nn.Embedding):  # type: ignore[override]  # weight: a property, not a Parameter
    """A packed embedding. With native kernels, or in decode mode "call", only the requested rows are decoded."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The rows of W_hat, [..., embedding_dim], for token ids [...]."""
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
        """Build the native matrix; also decode the weight unless native kernels can look up its rows."""
        if self.native is None or not self.native.looks_up:
            super(Packed, self).prepare()


class TiedHead(nn.Linear):
    """A head that multiplies by the weight of a packed embedding, its source."""

    original: Original
    _source: tuple[CompressedEmbedding]  # a tuple, so that torch does not make it a child of this module
    _is_hf_initialized: bool  # tells transformers not to initialise the weight

    @property
    def source(self) -> CompressedEmbedding:
        """The embedding whose weight the head uses."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear annotates a Parameter
        """W_hat of the embedding, [out_features, in_features]; read-only."""
        return self.source.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Logits [..., out_features] for x [..., in_features]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if can_multiply(input) and (native := self.source.native):
            product = native.linear(input)
            return product if bias is None else product + bias
        return linear(input, self.source.dense(input.dtype), bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise FrozenWeightError(REFUSAL)
        super().__setattr__(name, value)
