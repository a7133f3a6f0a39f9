"""Times llama.cpp, through llama-cpp-python, for benchmarks/decode.py: one request per line on standard input.

    python peer_llama.py MODEL.gguf

It first prints its version. Each line `prefill THREADS TOKENS` or `decode THREADS PROMPT TOKENS` is answered with the
seconds of wall and of processor time: of reading TOKENS tokens, or of decoding TOKENS tokens greedily after a prompt.
It calls llama.cpp's own functions directly: no sampling, no conversion to text, no copies of logits.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np

POSITIONS = 1024


class Peer:
    """One loaded model and its context."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = POSITIONS
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def start(self, threads: int) -> None:
        """Set the number of threads and clear the context."""
        llama_cpp.llama_set_n_threads(self.context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Append `tokens` to the context; returns a view of the logits after them."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # must outlive the batch, which only points to it
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocabulary,))


def now() -> tuple[float, float]:
    """Wall and processor time."""
    return time.perf_counter(), time.process_time()


def seconds(peer: Peer, what: str, threads: int, *counts: int) -> list[float]:
    """[wall, processor] seconds of one request."""
    peer.start(threads)
    prompt = [10 + index % 1000 for index in range(counts[0])]
    began = now()
    logits = peer.read(prompt)
    if what == "decode":
        began = now()
        for _ in range(counts[1]):
            logits = peer.read([int(logits.argmax())])
    return [end - start for start, end in zip(began, now(), strict=True)]


def main() -> None:
    peer = Peer(sys.argv[1])
    print(json.dumps({"llama-cpp-python": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(*seconds(peer, what, *map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
