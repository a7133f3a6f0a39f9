"""Triton kernels of a decode step on a GPU, except the matrix products: norms, gates and attention over a static cache.

Compile-time arguments specialise the kernels to the shapes of the nodes of a `graph.StepGraph`. All arithmetic is
float32. Results do not depend on the timing of kernel instances: there are no atomics, and sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scaled(x, weight, k, inside, eps, WIDTH: tl.constexpr, PLUS_ONE: tl.constexpr):
    # x / sqrt(mean(x^2) + eps) * (weight [+ 1])
    w = tl.load(weight + k, mask=inside, other=0).to(tl.float32)
    w = w + 1 if PLUS_ONE else w
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * w


@triton.jit
def norm_rows(
    h, y, post, weight, total, normed, eps, post_eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr, ADDS: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    # total = h [+ y]; normed = norm(total); each instance computes one row. POST: y is normed before it is added,
    # with its weights (1) or its weights plus one (2).
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + k
    x = tl.load(h + at, mask=inside, other=0).to(tl.float32)
    if ADDS:
        added = tl.load(y + at, mask=inside, other=0).to(tl.float32)
        if POST:
            added = _scaled(added, post, k, inside, post_eps, WIDTH, POST == 2)
        x += added
        tl.store(total + at, x, mask=inside)
    tl.store(normed + at, _scaled(x, weight, k, inside, eps, WIDTH, PLUS_ONE).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def gate(a, b, y, count, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    # y = act(a) b, entry by entry
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < count
    x = tl.load(a + k, mask=inside, other=0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    else:
        x = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    x *= tl.load(b + k, mask=inside, other=0).to(tl.float32)
    tl.store(y + k, x.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _turned(
    x, weight, cosines, sines, eps, lane, inside, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    # Both halves of a head, rotated; NORM: normed before, with the weights (1) or the weights plus one (2).
    first = tl.load(x + lane, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + HALF + lane, mask=inside, other=0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * HALF) + eps)
        one = 1.0 if NORM == 2 else 0.0
        first *= scale * (tl.load(weight + lane, mask=inside, other=0).to(tl.float32) + one)
        second *= scale * (tl.load(weight + HALF + lane, mask=inside, other=0).to(tl.float32) + one)
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def attend(
    q, k, v, q_weight, k_weight, cosines, sines, keys, values, position, part, ends, y, q_eps, k_eps, capacity,
    GROUP: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    # An instance computes one query head over one share of the positions that the head sees. The first share appends
    # the new key and value to the cache, and reads them from registers. keys, values: [kv_heads, capacity, 2 HALF].
    # part [heads, SPLITS, 2 HALF] gets the result of each share, ends its largest score and its sum of exponentials.
    # If SPLITS is 1, y is written directly.
    head, split = tl.program_id(0), tl.program_id(1)
    kv = head // GROUP
    now = tl.load(position)
    lane = tl.arange(0, LANES)
    inside = lane < HALF
    cos = tl.load(cosines + now * HALF + lane, mask=inside, other=0)
    sin = tl.load(sines + now * HALF + lane, mask=inside, other=0)
    q_0, q_1 = _turned(q + head * 2 * HALF, q_weight, cos, sin, q_eps, lane, inside, HALF, Q_NORM)
    q_0 *= SCALE
    q_1 *= SCALE
    cache = kv.to(tl.int64) * capacity * (2 * HALF)
    # the new position, which only the first share includes
    k_0, k_1 = _turned(k + kv * 2 * HALF, k_weight, cos, sin, k_eps, lane, inside, HALF, K_NORM)
    k_0, k_1 = k_0.to(keys.dtype.element_ty), k_1.to(keys.dtype.element_ty)
    counted = inside & (lane * 0 + split == 0)
    mix_0 = tl.load(v + kv * 2 * HALF + lane, mask=counted, other=0).to(tl.float32)
    mix_1 = tl.load(v + kv * 2 * HALF + HALF + lane, mask=counted, other=0).to(tl.float32)
    there = cache + now * (2 * HALF) + lane
    own = counted & (lane * 0 + head % GROUP == 0)
    tl.store(keys + there, k_0, mask=own)
    tl.store(keys + there + HALF, k_1, mask=own)
    tl.store(values + there, mix_0.to(values.dtype.element_ty), mask=own)
    tl.store(values + there + HALF, mix_1.to(values.dtype.element_ty), mask=own)
    largest = tl.sum(q_0 * k_0.to(tl.float32) + q_1 * k_1.to(tl.float32), 0)
    largest = CAP * _tanh(largest / CAP) if CAP != 0.0 else largest
    largest = tl.where(split == 0, largest, float("-inf"))
    total = tl.where(split == 0, 1.0, 0.0)
    begin = tl.maximum(now - WINDOW + 1, 0) if WINDOW else now * 0
    share = (now - begin + SPLITS - 1) // SPLITS
    begin += split * share
    end = tl.minimum(begin + share, now)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        seen = t < end
        mask = seen[:, None] & inside[None, :]
        at = cache + t[:, None] * (2 * HALF) + lane[None, :]
        score = tl.sum(tl.load(keys + at, mask=mask, other=0).to(tl.float32) * q_0[None, :], 1)
        score += tl.sum(tl.load(keys + at + HALF, mask=mask, other=0).to(tl.float32) * q_1[None, :], 1)
        score = CAP * _tanh(score / CAP) if CAP != 0.0 else score
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 0))
        weight, keep = tl.exp(score - new), tl.exp(largest - new)
        total = total * keep + tl.sum(weight, 0)
        first = tl.load(values + at, mask=mask, other=0).to(tl.float32)
        second = tl.load(values + at + HALF, mask=mask, other=0).to(tl.float32)
        mix_0 = mix_0 * keep + tl.sum(first * weight[:, None], 0)
        mix_1 = mix_1 * keep + tl.sum(second * weight[:, None], 0)
        largest = new
    if SPLITS == 1:
        goal = y + head * 2 * HALF + lane
        tl.store(goal, (mix_0 / total).to(y.dtype.element_ty), mask=inside)
        tl.store(goal + HALF, (mix_1 / total).to(y.dtype.element_ty), mask=inside)
    else:
        share_at = head * SPLITS + split
        tl.store(part + share_at * 2 * HALF + lane, mix_0, mask=inside)
        tl.store(part + share_at * 2 * HALF + HALF + lane, mix_1, mask=inside)
        tl.store(ends + share_at * 2, largest)
        tl.store(ends + share_at * 2 + 1, total)


@triton.jit
def join_shares(part, ends, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    # y of one head, combined from the shares that `attend` has written
    head = tl.program_id(0)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    inside = lane < WIDTH
    own = head * SPLITS + split
    largest, total = tl.load(ends + own * 2), tl.load(ends + own * 2 + 1)
    weight = tl.exp(largest - tl.max(largest, 0))  # no position: exp(-inf)
    mix = tl.load(part + own[:, None] * WIDTH + lane[None, :], mask=inside[None, :], other=0)
    mix = tl.sum(mix * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(y + head * WIDTH + lane, mix.to(y.dtype.element_ty), mask=inside)
