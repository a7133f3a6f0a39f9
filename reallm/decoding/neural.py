"""The neural decoder in torch: its output for every window of codes at once, then a look-up for every patch.

A patch depends on nothing but its window, the last `taps` codes of its column, of which there are at most 2^16, far
fewer than the patches of a family: formulas and layout as in `kernels/neural.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reallm.kernels.codes.neural import unpack_tensors
from reallm.kernels.formats.codecs import TILE, NeuralCodec


def window_values(codec: NeuralCodec, words: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """E + D(E) of every window, [2^(taps codebook_bits), dim]; the newest code is in a window's lowest bits."""
    bits = codec.codebook_bits
    windows = torch.arange(1 << codec.window_bits, device=words.device)
    latent = torch.cat([words[(windows >> (bits * back)) & ((1 << bits) - 1)] for back in range(codec.taps)], 1)
    hidden = torch.sin(torch.addmm(layers[1], latent, layers[0].T))
    for weight, bias in zip(layers[2:-2:2], layers[3:-2:2], strict=True):
        hidden = torch.nn.functional.gelu(torch.addmm(bias, hidden, weight.T), approximate="tanh")
    return latent[:, : codec.dim] + torch.addmm(layers[-1], hidden, layers[-2].T)


def stored_values(codec: NeuralCodec, raw: Tensor) -> Tensor:
    """`window_values` of a stored decoder, float32, from its bytes (any integer or float dtype)."""
    tensors = unpack_tensors(codec, raw.cpu().numpy().astype(np.uint8))
    words, *layers = (torch.from_numpy(values).to(raw.device, torch.float32) for values in tensors)
    return window_values(codec, words, layers)


def windows_of(codec: NeuralCodec, codes: Tensor) -> Tensor:
    """Window of every patch, for codes [patches, ...] in the order of a column."""
    result = torch.zeros_like(codes)
    for back in range(min(codec.taps, len(codes))):
        result[back:] |= codes[: len(codes) - back] << (codec.codebook_bits * back)
    return result


def decode_neural(codec: NeuralCodec, raw: Tensor, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """W_hat float32 [rows, cols] from codes int64 [patches down, cols], the decoder's bytes and a scale a block."""
    patches = stored_values(codec, raw)[windows_of(codec, codes)]  # [down, cols, dim]
    image = patches.transpose(1, 2).reshape(-1, codes.shape[1])[:rows]
    return image * scales.repeat_interleave(TILE)[: codes.shape[1]]
