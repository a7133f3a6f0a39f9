"""A product with two additive codebooks of 2^8 words of 8 weights, by tables of partial dots, in numba.

    python peer_numba.py      reads "ROWS COLS" lines, answers each with the processor seconds of one product

Run by kernels.py. As in AQLM's CPU kernel (arXiv 2401.06118, section 4.3), for every codebook and group of 8 inputs a
table holds the dot products of all 256 words with those inputs, and a row of the product is the sum of the entries that
its codes select. Written from the description; building the tables is part of each product.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import numba
import numpy as np

BOOKS, WORDS, DIM, ROUND_SECONDS = 2, 256, 8, 0.01


@numba.njit(fastmath=True)
def multiply(x, books, codes, scales, table, y):
    """y [rows] for x [groups, DIM], books [BOOKS, DIM, WORDS] and codes [rows, groups BOOKS].

    `table` [groups BOOKS, WORDS] is scratch.
    """
    groups = x.shape[0]
    for group in range(groups):
        for book in range(BOOKS):
            line = table[group * BOOKS + book]
            line[:] = 0
            for d in range(DIM):
                factor = x[group, d]
                for word in range(WORDS):
                    line[word] += factor * books[book, d, word]
    for row in range(codes.shape[0]):
        total = np.float32(0)
        for index in range(codes.shape[1]):
            total += table[index, codes[row, index]]
        y[row] = total * scales[row]


def main() -> None:
    rng = np.random.default_rng(0)
    books = rng.standard_normal((BOOKS, DIM, WORDS)).astype(np.float32)
    print(json.dumps(version("numba")), flush=True)
    counts: dict[str, int] = {}
    for line in sys.stdin:
        rows, cols = map(int, line.split())
        groups = cols // DIM
        codes = np.random.default_rng(1).integers(0, WORDS, (rows, groups * BOOKS)).astype(np.uint8)
        x = rng.standard_normal((groups, DIM)).astype(np.float32)
        table = np.empty((groups * BOOKS, WORDS), np.float32)
        scales, y = np.ones(rows, np.float32), np.empty(rows, np.float32)
        if line not in counts:
            multiply(x, books, codes, scales, table, y)
            began = time.thread_time()
            multiply(x, books, codes, scales, table, y)
            counts[line] = max(1, int(ROUND_SECONDS / (time.thread_time() - began)))
        began = time.thread_time()
        for _ in range(counts[line]):
            multiply(x, books, codes, scales, table, y)
        print(json.dumps((time.thread_time() - began) / counts[line]), flush=True)


if __name__ == "__main__":
    main()
