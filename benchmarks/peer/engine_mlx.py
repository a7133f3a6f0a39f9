"""Logits of every token of a text by a model folder in MLX, on its CPU backend.

    python engine_mlx.py FOLDER TOKENS.npy LOGITS.npy

TOKENS is int32 [n]; LOGITS becomes float32 [n, vocabulary]. Computed in float32, to compare with the decoded weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main() -> None:
    folder, tokens_path, output = sys.argv[1:]
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)  # scales are fp16 numbers and stay exact
    logits = model(mx.array(np.load(tokens_path))[None])[0].astype(mx.float32)
    np.save(output, np.array(logits))


if __name__ == "__main__":
    main()
