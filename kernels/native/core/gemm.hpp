// C[m, n] = A[m, k] B[n, k]^T in float32: products of rows with rows, the order in which decoders produce them.
#pragma once

#include "simd.hpp"

namespace reallm {

// `m` rows of A times `n` rows of B. Rows of A, B and C are `sa`, `sb` and `sc` floats apart. Adds to C if `add`.
template <int m, int n>
inline void product_tile(const float* A, int64_t sa, const float* B, int64_t sb, int64_t k, float* C, int64_t sc,
                         bool add) {
  F total[m][n];
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) total[i][j] = F{};
  int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes) {
    F b[n];
    for (int j = 0; j < n; j++) b[j] = load<F>(B + j * sb + at);
    for (int i = 0; i < m; i++) {
      const F a = load<F>(A + i * sa + at);
      for (int j = 0; j < n; j++) total[i][j] = fma(a, b[j], total[i][j]);
    }
  }
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      float value = sum(total[i][j]);
      for (int64_t rest = at; rest < k; rest++) value += A[i * sa + rest] * B[j * sb + rest];
      C[i * sc + j] = add ? C[i * sc + j] + value : value;
    }
}

template <int m>
inline void product_rows(const float* A, int64_t sa, const float* B, int64_t sb, int64_t n, int64_t k, float* C,
                         int64_t sc, bool add) {
  int64_t j = 0;
  for (; j + 3 <= n; j += 3) product_tile<m, 3>(A, sa, B + j * sb, sb, k, C + j, sc, add);
  for (; j < n; j++) product_tile<m, 1>(A, sa, B + j * sb, sb, k, C + j, sc, add);
}

// The order of the additions for an entry depends on k alone, so results do not depend on how m and n are divided.
inline void product(const float* A, int64_t sa, int64_t m, const float* B, int64_t sb, int64_t n, int64_t k, float* C,
                    int64_t sc, bool add = false) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) product_rows<4>(A + i * sa, sa, B, sb, n, k, C + i * sc, sc, add);
  for (; i < m; i++) product_rows<1>(A + i * sa, sa, B, sb, n, k, C + i * sc, sc, add);
}

}  // namespace reallm
