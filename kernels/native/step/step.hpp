// The functions that a generated decode step (codegen/decode_step) calls, except those of the matrices (linear.hpp).
//
// `tokens` tokens at the positions from `run.position` are processed at once. With one token, the caller computes what
// is small, and the pool shares out rows of matrices and heads. With many (the prompt), all work is divided by tokens.
// Values are row-major [tokens, width]. Results do not depend on the number of threads.
//
// The cache of a layer holds, for each key-value head, keys as columns [head_stride, capacity] and values as rows
// [capacity, head_stride]; head_stride is head_dim rounded up to kWide, and capacity is a multiple of kWide. The cache
// must be zero at first.
#pragma once

#include <initializer_list>

#include "linear.hpp"
#include "step_product.hpp"
#include "threads.hpp"

namespace reallm {
namespace step {

// Filled by reallm/runtime/step/cpu.py, field by field.
struct Run {
  const Operand* operands;
  const float* const* vectors;   // the weights of norms
  const int32_t* const* orders;  // per operand: the place of each value of its input; null: values stay in place. An
                                 // operand with an order has no outliers or low-rank factors: they need x as it was
  const float* const* angles;    // per rotation: its cosines, then its sines, [capacity, head_dim / 2]
  void *keys, *values;           // the caches described above, layer after layer
  float* scratch;
  int64_t capacity, position, tokens, threads;
};

constexpr int64_t kSpan = 256;     // positions of the cache that attention processes at once
constexpr int64_t kChunk = 8;      // tokens of a chunk in loops over tokens
constexpr int64_t kSmall = 16384;  // fewer multiplications than this run in the caller: waking the pool costs more

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Calls fn(first, count) for the tokens of the run, in parallel when there are many.
template <class F>
inline void over_tokens(const Run& run, const F& fn) {
  const int64_t chunks = (run.tokens + kChunk - 1) / kChunk;
  pool().parallel(chunks, int(run.threads), [&](int64_t i) {
    const int64_t first = i * kChunk, rest = run.tokens - first;
    fn(first, rest < kChunk ? rest : kChunk);
  });
}

inline void embed(const Run& run, int op, const int64_t* tokens, float scale, float* x) {
  const Operand& table = run.operands[op];
  over_tokens(run, [&](int64_t first, int64_t count) {
    float* rows = x + first * table.cols;
    table.kernels->rows(table, tokens + first, count, rows);
    if (scale != 1.0f) map(rows, rows, count * table.cols, [&](F8 v) { return v * all(scale); });
  });
}

template <int W, bool PLUS>
inline void norm_row(const float* x, const float* weight, float eps, float* y) {
  F8 squares = all(0.0f);
  int i = 0;
  for (; i + kEight <= W; i += kEight) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < W; i++) total += x[i] * x[i];
  const float factor = 1.0f / sqrtf(total / W + eps);
  for (i = 0; i + kEight <= W; i += kEight) {
    const F8 w = load(weight + i);
    store(y + i, load(x + i) * all(factor) * (PLUS ? w + all(1.0f) : w));
  }
  for (; i < W; i++) y[i] = x[i] * factor * (PLUS ? weight[i] + 1.0f : weight[i]);
}

template <int W, bool PLUS>
inline void norm(const Run& run, int vector, float eps, const float* x, float* y) {
  over_tokens(run, [&](int64_t first, int64_t count) {
    for (int64_t m = first; m < first + count; m++) norm_row<W, PLUS>(x + m * W, run.vectors[vector], eps, y + m * W);
  });
}

// total = h + y (or h + post(y)), then normed = norm(total); `total` may be h. POST: 0 none, 1 a norm, 2 a norm with
// weight + 1.
template <int W, bool PLUS, int POST>
inline void residual(const Run& run, int vector, float eps, int post, float post_eps, const float* h, const float* y,
                     float* total, float* normed) {
  over_tokens(run, [&](int64_t first, int64_t count) {
    float between[W];
    for (int64_t m = first; m < first + count; m++) {
      const float* add = y + m * W;
      if (POST) {
        norm_row<W, POST == 2>(add, run.vectors[post], post_eps, between);
        add = between;
      }
      for (int i = 0; i < W; i++) total[m * W + i] = h[m * W + i] + add[i];
      norm_row<W, PLUS>(total + m * W, run.vectors[vector], eps, normed + m * W);
    }
  });
}

template <int W>
inline void add(const Run& run, const float* a, const float* b, float* y) {
  over_tokens(run, [&](int64_t first, int64_t count) {
    for (int64_t i = first * W; i < (first + count) * W; i++) y[i] = a[i] + b[i];
  });
}

template <int W, class F>
inline void gate(const Run& run, const float* a, const float* b, float* y, const F& activation) {
  over_tokens(run, [&](int64_t first, int64_t count) {
    const int64_t start = first * W, n = count * W;
    int64_t i = 0;
    for (; i + kEight <= n; i += kEight)
      store(y + start + i, activation(load(a + start + i)) * load(b + start + i));
    for (; i < n; i++) y[start + i] = activation(all(a[start + i]))[0] * b[start + i];
  });
}

// The same, with value i of a token written to place order[i]; y may be a or b.
template <int W, class F>
inline void gate_in_order(const Run& run, const float* a, const float* b, float* y, const F& activation,
                          const int32_t* order) {
  over_tokens(run, [&](int64_t first, int64_t count) {
    for (int64_t m = first; m < first + count; m++) {
      float row[W];
      int i = 0;
      for (; i + kEight <= W; i += kEight) store(row + i, activation(load(a + m * W + i)) * load(b + m * W + i));
      for (; i < W; i++) row[i] = activation(all(a[m * W + i]))[0] * b[m * W + i];
      for (i = 0; i < W; i++) y[m * W + order[i]] = row[i];
    }
  });
}

inline bool finishes(const Operand& op) {
  return op.gain || op.bias || op.output.signs || op.sparse_starts || op.left;
}

// y[i] = W_i x for `count` operands from `ops` that share the prepared xc. `xc` is scratch memory.
inline void alike(const Run& run, const Operand* ops, int count, const float* x, float* xc, float* const* y) {
  const int threads = int(run.threads);
  over_tokens(run, [&](int64_t m, int64_t some) {
    ops[0].kernels->prepare(ops[0], x + m * ops[0].cols, xc + m * ops[0].prepared, some);
  });
  int64_t blocks = 0;
  for (int i = 0; i < count; i++) blocks += (ops[i].rows + kRowBlock - 1) / kRowBlock;
  const int64_t work = blocks * kRowBlock * ops[0].cols * run.tokens, most = threads > 1 ? 2 * threads : 1;
  const int64_t parts = work < kSmall ? 1 : blocks < most ? blocks : most;
  pool().parallel(parts, threads, [&](int64_t part) {
    int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
    for (int i = 0; i < count && end > 0; i++) {
      const int64_t own = (ops[i].rows + kRowBlock - 1) / kRowBlock, stop = end < own ? end : own;
      if (begin < stop) {
        const int64_t last = stop * kRowBlock < ops[i].rows ? stop * kRowBlock : ops[i].rows;
        ops[i].kernels->dot(ops[i], xc, y[i], run.tokens, begin * kRowBlock, last);
      }
      begin = begin > own ? begin - own : 0, end -= own;
    }
  });
  int last = -1, finishing = 0;
  for (int i = 0; i < count; i++)
    if (finishes(ops[i])) last = i, finishing++;
  if (!finishing) return;
  const auto finish = [&](int i, int64_t m, int64_t some) {
    if (finishes(ops[i])) ops[i].kernels->finish(ops[i], x + m * ops[i].cols, y[i] + m * ops[i].rows, some);
  };
  if (run.tokens == 1 && finishing > 1)
    pool().parallel(count, threads, [&](int64_t i) { finish(int(i), 0, 1); });
  else if (run.tokens == 1)
    finish(last, 0, 1);
  else
    over_tokens(run, [&](int64_t m, int64_t some) { for (int i = 0; i < count; i++) finish(i, m, some); });
}

// outputs[i] = W_i x for the operands from `first`, one per output. Neighbours with equal input_key share the prepared
// xc.
inline void linear(const Run& run, int first, const float* x, float* xc, std::initializer_list<float*> outputs) {
  const Operand* ops = run.operands + first;
  const int all = int(outputs.size());
  for (int i = 0, next; i < all; i = next) {
    for (next = i + 1; next < all && ops[next].input_key == ops[i].input_key;) next++;
    alike(run, ops + i, next - i, x, xc, outputs.begin() + i);
  }
}

// Rotates the pairs (i, i + D / 2) of a head by the angles of `position`.
template <int D>
inline void rotate(float* head, const float* cosines, const float* sines, int64_t position) {
  const float *c = cosines + position * (D / 2), *s = sines + position * (D / 2);
  for (int i = 0; i < D / 2; i++) {
    const float a = head[i], b = head[i + D / 2];
    head[i] = a * c[i] - b * s[i];
    head[i + D / 2] = b * c[i] + a * s[i];
  }
}

// The attention of one layer. *_NORM: 0 none, 1 norm with weight, 2 norm with 1 + weight. ORDERED: value i of the
// output of a token is written to place order[i].
template <int HEADS, int KV_HEADS, int D, int QUERY_NORM, int KEY_NORM, class T, bool ORDERED = false>
struct Attend {
  static constexpr int kStride = (D + kWide - 1) / kWide * kWide, kGroup = HEADS / KV_HEADS;
  const Run& run;
  const float *q, *k, *v;
  const float *cosines, *sines;
  const float *query_norm, *key_norm;
  float query_eps, key_eps, scale;
  int64_t layer, window;  // 0: none
  float softcap;          // 0: none
  float* out;
  const int32_t* order = nullptr;

  T* keys(int64_t head) const { return static_cast<T*>(run.keys) + (layer * KV_HEADS + head) * kStride * run.capacity; }
  T* values(int64_t head) const {
    return static_cast<T*>(run.values) + (layer * KV_HEADS + head) * kStride * run.capacity;
  }

  void append(int64_t head) const {
    T *into_keys = keys(head), *into_values = values(head);
    for (int64_t m = 0; m < run.tokens; m++) {
      const int64_t position = run.position + m;
      const float* value = v + (m * KV_HEADS + head) * D;
      float key[D];
      take<KEY_NORM>(k + (m * KV_HEADS + head) * D, key_norm, key_eps, position, key);
      for (int i = 0; i < D; i++) narrow(key[i], into_keys[i * run.capacity + position]);
      for (int i = 0; i < D; i++) narrow(value[i], into_values[position * kStride + i]);
    }
  }

  template <int NORM>
  void take(const float* from, const float* weight, float eps, int64_t position, float* head) const {
    if (NORM) norm_row<D, NORM == 2>(from, weight, eps, head);
    else memcpy(head, from, D * sizeof(float));
    rotate<D>(head, cosines, sines, position);
  }

  // Queries [first, first + R) of a head in one pass over the cache, with a running maximum m and sum of e^(s - m)
  // (Milakov and Gimelshein, arXiv 1805.02867).
  template <int R>
  void queries(int64_t head, int64_t first) const {
    float query[R][D], scores[R][kSpan], total[R][kStride], highest[R], weight[R];
    const T *k_head = keys(head / kGroup), *v_head = values(head / kGroup);
    const int64_t p0 = run.position + first, end = p0 + R;
    for (int r = 0; r < R; r++) {
      take<QUERY_NORM>(q + ((first + r) * HEADS + head) * D, query_norm, query_eps, p0 + r, query[r]);
      map(query[r], query[r], D, [&](F8 x) { return x * all(scale); });
      highest[r] = -INFINITY, weight[r] = 0.0f;
      for (int i = 0; i < kStride; i++) total[r][i] = 0.0f;
    }
    int64_t start = window && p0 >= window ? (p0 - window + 1) / kWide * kWide : 0;
    for (; start < end; start += kSpan) {
      const int64_t some = end - start < kSpan ? end - start : kSpan, columns = round_up(some, kWide);
      product<R>(query[0], D, k_head + start, run.capacity, D, scores[0], kSpan, columns, false);
      for (int r = 0; r < R; r++) soften(scores[r], start, p0 + r, columns, total[r], highest[r], weight[r]);
      product<R>(scores[0], kSpan, v_head + start * kStride, kStride, some, total[0], kStride, kStride, true);
    }
    for (int r = 0; r < R; r++) {
      const float inverse = 1.0f / weight[r];
      float* to = out + (first + r) * HEADS * D;
      map(total[r], ORDERED ? total[r] : to + head * D, D, [&](F8 x) { return x * all(inverse); });
      for (int i = 0; ORDERED && i < D; i++) to[order[head * D + i]] = total[r][i];
    }
  }

  // Replaces the scores s of the positions from `start` by e^(s - m), and rescales earlier sums to the new maximum m.
  void soften(float* s, int64_t start, int64_t position, int64_t columns, float* total, float& high, float& sums) const {
    if (softcap > 0)
      map(s, s, columns, [&](F8 x) { return all(softcap) * hyperbolic_tangent(x * all(1.0f / softcap)); });
    const int64_t from = window && position >= window ? position - window + 1 : 0;
    for (int64_t i = 0; i < from - start && i < columns; i++) s[i] = -INFINITY;
    for (int64_t i = position + 1 - start > 0 ? position + 1 - start : 0; i < columns; i++) s[i] = -INFINITY;
    F8 top = all(-INFINITY);
    for (int64_t i = 0; i < columns; i += kEight) top = pick(load(s + i) > top, load(s + i), top);
    const float peak = largest(top) > high ? largest(top) : high;
    if (peak == -INFINITY) {
      for (int64_t i = 0; i < columns; i++) s[i] = 0.0f;
      return;
    }
    F8 added = all(0.0f);
    for (int64_t i = 0; i < columns; i += kEight) {
      const F8 e = exponential(load(s + i) - all(peak));
      store(s + i, e);
      added += e;
    }
    if (peak > high) {
      const float shrink = exponential(all(high - peak))[0];
      sums *= shrink;
      map(total, total, kStride, [&](F8 x) { return x * all(shrink); });
    }
    sums += sum(added);
    high = peak;
  }

  void some_queries(int64_t head, int64_t first, int64_t count) const {
    for (; count >= kRows; first += kRows, count -= kRows) queries<kRows>(head, first);
    for (; count > 0; first++, count--) queries<1>(head, first);
  }

  void operator()() const {
    constexpr int64_t kQueries = 4 * kRows;
    const int64_t blocks = (run.tokens + kQueries - 1) / kQueries, seen = run.position + run.tokens;
    const int threads = seen * HEADS * D * 2 * run.tokens < kSmall ? 1 : int(run.threads);
    pool().parallel(KV_HEADS, run.tokens > 1 ? threads : 1, [&](int64_t head) { append(head); });
    pool().parallel(HEADS * blocks, threads, [&](int64_t i) {
      const int64_t first = i / HEADS * kQueries, rest = run.tokens - first;
      some_queries(i % HEADS, first, rest < kQueries ? rest : kQueries);
    });
  }
};

inline void softcap(float* x, int64_t n, float cap) {
  map(x, x, n, [&](F8 v) { return all(cap) * hyperbolic_tangent(v * all(1.0f / cap)); });
}

}  // namespace step
}  // namespace reallm
