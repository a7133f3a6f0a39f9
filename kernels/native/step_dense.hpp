// The kernels of an uncompressed matrix W[rows, cols] in float32, bfloat16 or float16, by the contract of linear.hpp.
// Of an Operand they use rows, cols, codes (the weights as stored) and bias; prepared == cols.
#pragma once

#include "linear.hpp"
#include "step_product.hpp"

namespace reallm {
namespace step {

constexpr int kPanel = 16, kPanels = 4, kDepth = 512;
// For many rows of x: kPanels panels of kPanel rows of W and kDepth columns are laid out in float32, 128 KiB.

inline void dense_prepare(const Operand& op, const float* x, float* xc, int64_t batch) {
  memcpy(xc, x, size_t(batch) * op.cols * sizeof(float));
}

// y[R] = W[R, cols] x, two sums a row.
template <int R, class T>
inline void dense_rows(const T* w, const float* x, int64_t cols, float* y) {
  F8 total[R][2];
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = all(0.0f);
  int64_t k = 0;
  for (; k + 2 * kLanes <= cols; k += 2 * kLanes)
    for (int half = 0; half < 2; half++) {
      const F8 v = load(x + k + half * kLanes);
      for (int r = 0; r < R; r++) total[r][half] = fma(load(w + r * cols + k + half * kLanes), v, total[r][half]);
    }
  for (int r = 0; r < R; r++) {
    float rest = 0.0f;
    for (int64_t i = k; i < cols; i++) rest += widen(w[r * cols + i]) * x[i];
    y[r] = sum(total[r][0] + total[r][1]) + rest;
  }
}

template <class T>
void dense_one(const T* w, const float* x, float* y, int64_t cols, int64_t first, int64_t last) {
  int64_t n = first;
  for (; n + 4 <= last; n += 4) dense_rows<4>(w + n * cols, x, cols, y + n);
  for (; n < last; n++) dense_rows<1>(w + n * cols, x, cols, y + n);
}

// panel[k][i] = W[first + i, start + k], zeros behind the last row.
template <class T>
void lay_out(const T* w, int64_t cols, int64_t rows, int64_t start, int64_t depth, float* panel) {
  for (int64_t i = 0; i < kPanel; i++)
    for (int64_t k = 0; k < depth; k++) panel[k * kPanel + i] = i < rows ? widen(w[i * cols + start + k]) : 0.0f;
}

template <class T>
void dense_many(const Operand& op, const float* x, float* y, int64_t batch, int64_t first, int64_t last) {
  const T* w = static_cast<const T*>(op.codes);
  const int64_t K = op.cols, N = op.rows;
  alignas(64) float panels[kPanels][kDepth * kPanel];
  float sums[kRows * kPanel];
  for (int64_t n = first; n < last; n += kPanels * kPanel)
    for (int64_t start = 0; start < K; start += kDepth) {
      const int64_t depth = K - start < kDepth ? K - start : kDepth, stop = last - n < kPanels * kPanel ? last - n : kPanels * kPanel;
      for (int64_t p = 0; p * kPanel < stop; p++)
        lay_out(w + (n + p * kPanel) * K, K, stop - p * kPanel, start, depth, panels[p]);
      for (int64_t m = 0; m < batch; m += kRows) {
        const int64_t some = batch - m < kRows ? batch - m : kRows;
        for (int64_t p = 0; p * kPanel < stop; p++) {
          const int64_t at = n + p * kPanel, width = stop - p * kPanel;
          const float* a = x + m * K + start;
          if (width >= kPanel) {
            product_rows(some, a, K, panels[p], kPanel, depth, y + m * N + at, N, kPanel, start > 0);
          } else {
            product_rows(some, a, K, panels[p], kPanel, depth, sums, kPanel, kPanel, false);
            for (int64_t r = 0; r < some; r++)
              for (int64_t i = 0; i < width; i++)
                y[(m + r) * N + at + i] = sums[r * kPanel + i] + (start ? y[(m + r) * N + at + i] : 0.0f);
          }
        }
      }
    }
}

template <class T>
void dense_dot(const Operand& op, const float* xc, float* yc, int64_t batch, int64_t first, int64_t last) {
  if (batch >= kRows) return dense_many<T>(op, xc, yc, batch, first, last);
  for (int64_t m = 0; m < batch; m++)
    dense_one(static_cast<const T*>(op.codes), xc + m * op.cols, yc + m * op.rows, op.cols, first, last);
}

inline void dense_finish(const Operand& op, const float*, float* yc, int64_t batch) {
  if (!op.bias) return;
  for (int64_t m = 0; m < batch; m++)
    for (int64_t n = 0; n < op.rows; n++) yc[m * op.rows + n] += op.bias[n];
}

template <class T>
void dense_rows_of(const Operand& op, const int64_t* index, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const T* row = static_cast<const T*>(op.codes) + index[i] * op.cols;
    for (int64_t k = 0; k < op.cols; k++) out[i * op.cols + k] = widen(row[k]);
  }
}

template <class T>
inline const Kernels* dense_kernels() {
  static const Kernels kernels = {dense_prepare, dense_dot<T>, dense_finish, dense_rows_of<T>};
  return &kernels;
}

}  // namespace step
}  // namespace reallm
