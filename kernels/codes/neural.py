"""The neural decoder (ReALLM, arXiv 2405.13155): its stored tensors, and the weights it computes from a latent image.

    W_hat = scale * (E + D(E)),   D(E) = A_n g(.. g(A_1 sin(A_0 * E + b_0) + b_1) ..) + b_n

E [patches down, cols, dim] holds the words of the codes, and A_0 * E convolves the last `taps` patches of a column; the
codes above the first patch are taken as 0. Later layers are pointwise, and g is the GELU (tanh form). The last layer
gives `dim` values per pixel, which a pixel shuffle lays out as the rows of the patch, as in HNeRV. The sine (SIREN,
arXiv 2006.09661) makes the values of neighbouring windows nearly independent, as a good trellis code needs.

A tensor is stored as one byte e and its entries in `bits` bits, two 4-bit entries per byte, lowest first:

    entry = (code - 2^(bits - 1)) * 2^((e - 192) / 8)

so every run of bytes is a decoder with finite weights. Other decoders are tested against this one.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.codecs import TILE, NeuralCodec

EXPONENT_ZERO, EXPONENT_STEPS = 192, 8
Array = NDArray[np.float64]


def unpack_tensors(codec: NeuralCodec, raw: NDArray[np.uint8]) -> list[Array]:
    """The tensors of `codec.tensors`, float64, from the bytes of the shared field without padding.

    Raises ValueError for a wrong number of bytes.
    """
    if raw.shape != codec.codebook_shape:
        raise ValueError(f"the decoder of {codec.name} takes {codec.codebook_shape[0]} bytes, not {raw.shape}")
    tensors, start = [], 0
    for shape, bits in codec.tensors:
        count = prod(shape)
        stop = start + 1 + -(-count * bits // 8)
        codes = raw[start + 1 : stop].astype(np.int64)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], 1).reshape(-1)[:count]
        step = 2.0 ** ((int(raw[start]) - EXPONENT_ZERO) / EXPONENT_STEPS)
        tensors.append((codes - (1 << (bits - 1))).reshape(shape) * step)
        start = stop
    return tensors


def pack_tensors(codec: NeuralCodec, tensors: list[Array]) -> NDArray[np.uint8]:
    """The bytes of the shared field for `tensors`, rounded to what can be stored; the inverse of `unpack_tensors`.

    Raises ValueError for a tensor of a wrong shape.
    """
    parts = []
    for (shape, bits), values in zip(codec.tensors, tensors, strict=True):
        if values.shape != shape:
            raise ValueError(f"a tensor of {codec.name} is {shape}, not {values.shape}")
        exponent = step_exponent(float(np.abs(values).max()), bits)
        half = 1 << (bits - 1)
        codes = np.rint(values.reshape(-1) / 2.0 ** ((exponent - EXPONENT_ZERO) / EXPONENT_STEPS))
        stored = (codes.clip(1 - half, half - 1) + half).astype(np.uint8)
        if bits == 4:
            pairs = np.append(stored, np.zeros(len(stored) % 2, np.uint8)).reshape(-1, 2)
            stored = pairs[:, 0] | pairs[:, 1] << 4
        parts += [np.array([exponent], np.uint8), stored]
    return np.concatenate(parts)


def step_exponent(largest: float, bits: int) -> int:
    """The smallest exponent byte with which `bits`-bit entries can represent the magnitude `largest`."""
    if largest <= 0:
        return 0
    exact = EXPONENT_STEPS * np.log2(largest / ((1 << (bits - 1)) - 1)) + EXPONENT_ZERO
    return int(np.ceil(exact - 1e-6).clip(0, 255))


def decode_neural(
    codec: NeuralCodec, raw: NDArray[np.uint8], codes: NDArray[np.int64], scales: Array, rows: int
) -> Array:
    """W_hat [rows, cols] from the bytes `raw` of the decoder, codes [patches down, cols] and scales [blocks]."""
    words, *layers = unpack_tensors(codec, raw)
    latent = words[np.pad(codes, ((codec.taps - 1, 0), (0, 0)))]
    down, cols = codes.shape
    hidden = np.zeros((down, cols, layers[0].shape[0]))
    for back in range(codec.taps):
        tap = layers[0][:, back * codec.dim : (back + 1) * codec.dim]
        first = codec.taps - 1 - back
        hidden += latent[first : first + down] @ tap.T
    hidden = np.sin(hidden + layers[1])
    for index in range(2, len(layers) - 2, 2):
        hidden = _gelu(hidden @ layers[index].T + layers[index + 1])
    patches = latent[codec.taps - 1 :] + hidden @ layers[-2].T + layers[-1]
    image: Array = patches.transpose(0, 2, 1).reshape(down * codec.dim, cols)[:rows]
    weights: Array = image * scales.repeat(TILE)[:cols]
    return weights


def _gelu(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return result
