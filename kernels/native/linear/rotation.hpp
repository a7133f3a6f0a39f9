// Rotations by their Kronecker factors (kernels/codes/hadamard.py): R = kron(B, S) diag(signs), B [m, m], S of order
// 2^a. A vector is viewed as [m, 2^a]: S is a Walsh-Hadamard transform of every row, B a product with the m rows.
#pragma once

#include "linear.hpp"
#include "simd.hpp"

namespace reallm {

// S v in place; v [power].
inline void walsh(float* v, int64_t power) {
  int64_t half = 1;
  if (power >= 8) {
    const I8 one = {1, 0, 3, 2, 5, 4, 7, 6}, two = {2, 3, 0, 1, 6, 7, 4, 5}, four = {4, 5, 6, 7, 0, 1, 2, 3};
    const F8 sign_one = {1, -1, 1, -1, 1, -1, 1, -1}, sign_two = {1, 1, -1, -1, 1, 1, -1, -1};
    const F8 sign_four = {1, 1, 1, 1, -1, -1, -1, -1};
    for (int64_t i = 0; i < power; i += 8) {
      F8 x = load<F8>(v + i);
      x = fma(x, sign_one, F8(__builtin_shuffle(x, one)));
      x = fma(x, sign_two, F8(__builtin_shuffle(x, two)));
      x = fma(x, sign_four, F8(__builtin_shuffle(x, four)));
      store(v + i, x);
    }
    for (half = 8; half < power; half *= 2)
      for (int64_t start = 0; start < power; start += 2 * half)
        for (int64_t i = start; i < start + half; i += 8) {
          const F8 a = load<F8>(v + i), b = load<F8>(v + i + half);
          store(v + i, a + b);
          store(v + i + half, a - b);
        }
    return;
  }
  for (; half < power; half *= 2)
    for (int64_t start = 0; start < power; start += 2 * half)
      for (int64_t i = start; i < start + half; i++) {
        const float a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
}

// Rows [i, i + count) of B v, or of B^T v, for v [m, power], written to `to` [m, power].
template <bool transposed, int count>
REALLM_INLINE void base_rows(const float* base, int64_t m, int64_t power, int64_t i, const float* v, float* to) {
  const int64_t row = transposed ? 1 : m, col = transposed ? m : 1;
  int64_t j = 0;
  for (; j + 16 <= power; j += 16) {
    F8 low[count], high[count];
    for (int r = 0; r < count; r++) low[r] = high[r] = F8{};
    for (int64_t a = 0; a < m; a++) {
      const F8 x = load<F8>(v + a * power + j), y = load<F8>(v + a * power + j + 8);
      for (int r = 0; r < count; r++) {
        const F8 factor = all8(base[(i + r) * row + a * col]);
        low[r] = fma(factor, x, low[r]);
        high[r] = fma(factor, y, high[r]);
      }
    }
    for (int r = 0; r < count; r++) {
      store(to + (i + r) * power + j, low[r]);
      store(to + (i + r) * power + j + 8, high[r]);
    }
  }
  for (; j < power; j++)
    for (int r = 0; r < count; r++) {
      float total = 0;
      for (int64_t a = 0; a < m; a++) total += base[(i + r) * row + a * col] * v[a * power + j];
      to[(i + r) * power + j] = total;
    }
}

// kron(B, S) v, or kron(B^T, S) v, in place; v [order].
template <bool transposed>
inline void kronecker(const Rotation& r, float* v) {
  const int64_t m = r.order / r.power;
  for (int64_t i = 0; i < m && r.power > 1; i++) walsh(v + i * r.power, r.power);
  if (m == 1) return;
  float* to = scratch<0>(r.order);
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) base_rows<transposed, 4>(r.base, m, r.power, i, v, to);
  for (; i < m; i++) base_rows<transposed, 1>(r.base, m, r.power, i, v, to);
  memcpy(v, to, sizeof(float) * r.order);
}

// R v in place.
inline void rotate(const Rotation& r, float* v) {
  for (int64_t i = 0; i < r.order; i++) v[i] *= r.signs[i];
  kronecker<false>(r, v);
}

// R^T v in place.
inline void unrotate(const Rotation& r, float* v) {
  kronecker<true>(r, v);
  for (int64_t i = 0; i < r.order; i++) v[i] *= r.signs[i];
}

}  // namespace reallm
