// Products of a few rows with a matrix, vectorised along its columns: C[R, cols] (+)= A[R, depth] B[depth, cols].
#pragma once

#include "step_vector.hpp"

namespace reallm {
namespace step {

constexpr int kRows = 6;   // rows of A at once: 6 x 2 sums, 2 loads and a broadcast fill the 16 registers of AVX2
constexpr int kWide = 16;  // columns per step; B must have a multiple of it

template <int R, int V, class T>
inline void product_tile(const float* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                         bool add) {
  F8 total[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) total[r][v] = add ? load(c + r * ldc + v * kEight) : all(0.0f);
  for (int64_t k = 0; k < depth; k++) {
    F8 column[V];
    for (int v = 0; v < V; v++) column[v] = load(b + k * ldb + v * kEight);
    for (int r = 0; r < R; r++) {
      const F8 x = all(a[r * lda + k]);
      for (int v = 0; v < V; v++) total[r][v] = fma(x, column[v], total[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * ldc + v * kEight, total[r][v]);
}

// `cols` is a multiple of kWide. A single row of A takes 64 columns at a time, to keep enough sums in flight.
template <int R, class T>
inline void product(const float* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                    int64_t cols, bool add) {
  int64_t j = 0;
  if (R == 1)
    for (; j + 4 * kWide <= cols; j += 4 * kWide) product_tile<R, 8>(a, lda, b + j, ldb, depth, c + j, ldc, add);
  for (; j < cols; j += kWide) product_tile<R, 2>(a, lda, b + j, ldb, depth, c + j, ldc, add);
}

}  // namespace step
}  // namespace reallm
