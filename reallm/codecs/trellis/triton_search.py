"""The Viterbi search of `kernels/native/search/trellis.cpp` as a Triton kernel, for tensors on a GPU.

Its arithmetic is that of the native search: 16-bit squared distances, the smallest metric subtracted at each step, and
the same saturation. Of equally good predecessors the lowest state wins in both. So the codes are equal, not only
equally good. With feedback between tiles, products and sums are also rounded in the same order.

An instance of the kernel codes one tile at a time. Each thread keeps some of the 2^L metrics in registers. A metric and
its state share one integer, metric 2^L + state, whose minimum over the 2^k predecessors of a group of states is the
best metric and where it came from. Back pointers have k bits; those of a group at consecutive steps share a word, so
that they are packed without any exchange between threads. There are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

SEAM_STEPS = tl.constexpr(128)
"""As `viterbi.SEAM`."""
CAP = tl.constexpr(30000)
"""Largest metric; larger ones are saturated. With up to 16 bits of state it fits into a positive 32-bit integer."""
CLIP = tl.constexpr(255)
"""Largest distance in quantised units."""
ROUND = tl.constexpr(12582912.0)
"""1.5 2^23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even."""


@triton.jit
def _corrected(x, below, error, tile, tiles, row, column):
    # x - sum over the tiles before, and over their rows i, of below[before, row, i] error[before, i, column]
    weights = below + (tile * 16 + row) * 16
    for before in range(0, tile):
        for i in tl.static_range(16):
            weight = tl.load(weights + i)
            x -= weight[:, None] * tl.load(error + before * 256 + i * 16 + column)[None, :]
        weights += tiles * 256
    return x


@triton.jit
def search(
    target, code, decoded, below, error, goal, pointers, states, values, tiles, limit, factor,
    STATE_BITS: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, FEEDBACK: tl.constexpr,
):  # fmt: skip
    # target, error, goal, values [tiles, 256]; states [tiles, STEPS]; code, decoded [VALUES, 2^STATE_BITS];
    # pointers [instances, WORDS, GROUPS]: how a group was reached, for PER_WORD steps in each word
    STATES: tl.constexpr = 1 << STATE_BITS
    GROUPS: tl.constexpr = STATES >> BITS
    STEPS: tl.constexpr = 256 // VALUES
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (STEPS + PER_WORD - 1) // PER_WORD
    LAST: tl.constexpr = STATES - 1
    state = tl.arange(0, STATES)
    group = tl.arange(0, GROUPS)
    origin = state >> BITS
    row, column = tl.arange(0, 16), tl.arange(0, 16)
    inside = row[:, None] * 16 + column[None, :]
    step = tl.arange(0, STEPS)
    first_code = tl.load(code + state)
    second_code = tl.load(code + STATES + state) if VALUES == 2 else first_code
    pointers += tl.program_id(0).to(tl.int64) * WORDS * GROUPS
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x = tl.load(target + tile * 256 + inside)
        if FEEDBACK:
            x = _corrected(x, below, error, tile, tiles, row, column)
            tl.store(error + tile * 256 + inside, x)
        quantised = tl.minimum(tl.maximum(x, -limit), limit) * factor
        tl.store(goal + tile * 256 + inside, ((quantised + ROUND) - ROUND).to(tl.int32))
        tl.debug_barrier()
        shared = 0  # the bits that both ends of the walk have in common
        for closed in range(0, 2):  # first the walk around the seam, then the closed walk
            count = tl.where(closed == 1, STEPS, SEAM_STEPS)
            start = tl.where(closed == 1, 0, STEPS - SEAM_STEPS // 2)
            allowed = (group == shared) | (closed == 0)
            best = tl.where(allowed, 0, CAP)
            low = best
            for word in range(0, (count + PER_WORD - 1) // PER_WORD):
                packed = tl.zeros((GROUPS,), tl.int32)
                begin = word * PER_WORD
                for t in range(begin, tl.minimum(begin + PER_WORD, count)):
                    at = goal + tile * 256 + ((start + t) & (STEPS - 1)) * VALUES
                    gap = tl.minimum(tl.abs(tl.load(at) - first_code), CLIP)
                    metric = tl.gather(best, origin, 0) + ((gap * gap) >> 3)
                    if VALUES == 2:
                        gap = tl.minimum(tl.abs(tl.load(at + 1) - second_code), CLIP)
                        metric += (gap * gap) >> 3
                    key = (tl.minimum(metric, CAP) << STATE_BITS) | state
                    low = tl.min(tl.reshape(key, (1 << BITS, GROUPS)), 0)
                    best = low >> STATE_BITS
                    best -= tl.min(best, 0)
                    packed |= ((low & LAST) >> (STATE_BITS - BITS)) << ((t - begin) * BITS)
                tl.store(pointers + word * GROUPS + group, packed)
            tl.debug_barrier()
            now = tl.min(tl.where(allowed, low, 0x7FFFFFFF), 0) & LAST
            stop = tl.where(closed == 1, 0, SEAM_STEPS // 2)
            for back in range(0, count - 1 - stop):
                before = count - 2 - back
                tl.store(states + tile * STEPS + before + 1, now)
                reached = tl.load(pointers + (before // PER_WORD) * GROUPS + (now >> BITS))
                branch = (reached >> (before % PER_WORD * BITS)) & ((1 << BITS) - 1)
                now = branch * GROUPS + (now >> BITS)
            tl.store(states + tile * STEPS + stop, now)
            shared = now >> BITS
            tl.debug_barrier()
        walk = tl.load(states + tile * STEPS + step)
        for v in tl.static_range(VALUES):
            value = tl.load(decoded + v * STATES + walk)
            at = tile * 256 + step * VALUES + v
            tl.store(values + at, value)
            if FEEDBACK:
                tl.store(error + at, tl.load(error + at) - value)
        tl.debug_barrier()
