"""The neural decoder in torch: it is evaluated once for every possible window, then patches are looked up by window.

A patch depends only on its window: its own code and the codes before it in its column, `taps` codes in all. There are
at most 2^16 different windows, far fewer than the patches of a family of matrices. Formulas and layout are those of
`kernels/codes/neural.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reallm.kernels.codes.neural import unpack_tensors
from reallm.kernels.formats.codecs import TILE, NeuralCodec


def window_values(codec: NeuralCodec, words: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Evaluate E + D(E), codebook words plus decoder network, for every window: [2^(taps codebook_bits), dim].

    `words` is the codebook [2^codebook_bits, dim]; `layers` alternates the weights and biases of the network. The
    lowest bits of a window's number are its newest code. The result is differentiable in `words` and `layers`.
    """
    bits = codec.codebook_bits
    windows = torch.arange(1 << codec.window_bits, device=words.device)
    latent = torch.cat([words[(windows >> (bits * back)) & ((1 << bits) - 1)] for back in range(codec.taps)], 1)
    hidden = torch.sin(torch.addmm(layers[1], latent, layers[0].T))
    for weight, bias in zip(layers[2:-2:2], layers[3:-2:2], strict=True):
        hidden = torch.nn.functional.gelu(torch.addmm(bias, hidden, weight.T), approximate="tanh")
    return latent[:, : codec.dim] + torch.addmm(layers[-1], hidden, layers[-2].T)


def stored_values(codec: NeuralCodec, raw: Tensor) -> Tensor:
    """Evaluate a stored decoder for every window: float32 [2^(taps codebook_bits), dim].

    `raw` holds the decoder's bytes, as a tensor of any integer or float dtype.
    """
    tensors = unpack_tensors(codec, raw.cpu().numpy().astype(np.uint8))
    words, *layers = (torch.from_numpy(values).to(raw.device, torch.float32) for values in tensors)
    return window_values(codec, words, layers)


def windows_of(codec: NeuralCodec, codes: Tensor) -> Tensor:
    """The number of each patch's window, [patches, ...]; `codes` has the same shape, in the order of the patches."""
    result = torch.zeros_like(codes)
    for back in range(min(codec.taps, len(codes))):
        result[back:] |= codes[: len(codes) - back] << (codec.codebook_bits * back)
    return result


def decode_neural(codec: NeuralCodec, raw: Tensor, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Decode W_hat [rows, cols], float32.

    `raw` holds the bytes of the shared decoder, `codes` is int64 [patches per column, cols], and `scales` has one
    value per block of TILE columns.
    """
    patches = stored_values(codec, raw)[windows_of(codec, codes)]  # [patches per column, cols, dim]
    image = patches.transpose(1, 2).reshape(-1, codes.shape[1])[:rows]
    return image * scales.repeat_interleave(TILE)[: codes.shape[1]]
