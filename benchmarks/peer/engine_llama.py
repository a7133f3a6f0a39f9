"""Logits of every token of a text by a GGUF file in ik_llama.cpp, for benchmarks/targets.py.

    python engine_llama.py MODEL.gguf TOKENS.npy LOGITS.npy

TOKENS is int32 [n]; LOGITS becomes float32 [n, vocabulary]. The text is fed 16 tokens at a time: with 32 and more, this
engine's repacked products were wrong on a CPU without AVX-VNNI.
"""

from __future__ import annotations

import sys

import numpy as np
from ik_llama_cpp import IkLlama
from ik_llama_cpp._internals import make_batch_range

STEP = 16


def main() -> None:
    path, tokens_path, output = sys.argv[1:]
    tokens = np.load(tokens_path).tolist()
    engine = IkLlama(path, n_ctx=-(-len(tokens) // 256) * 256, n_threads=2, verbose=False, flash_attn=False)
    context, rows = engine._context, []
    for start in range(0, len(tokens), STEP):
        part = tokens[start : start + STEP]
        batch = make_batch_range(part, pos_start=start)
        for index in range(len(part)):
            batch.logits[index] = 1
        if context.decode(batch):
            raise SystemExit("the engine could not decode")
        for index in range(len(part)):
            logits = np.ctypeslib.as_array(context.get_logits(index), (engine._model.n_vocab,))
            rows.append(logits.astype(np.float32, copy=True))
    np.save(output, np.stack(rows))


if __name__ == "__main__":
    main()
