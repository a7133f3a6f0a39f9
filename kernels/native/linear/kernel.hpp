// The parts common to all codecs: preparing x, products with many rows of x, and the steps after the codes.
//
// A codec is a struct of static functions on the coded matrix C, scales included:
//   behind(width), append(xc, width, to)    floats that gemv needs after the `width` columns of xc: count, writer
//   kLayout                                 kind of these floats: codecs with equal kLayout can read each other's
//   gemv(op, xc, yc, first, last)           yc[first:last] = C[first:last] xc for one row of x
//   decode(op, first, last, panel, stride)  rows of C, with zeros after the last column up to a multiple of kPad
// For many rows of x, panels of C that fit the L2 cache are decoded once and multiplied by all rows.
#pragma once

#include "gemm.hpp"
#include "linear.hpp"
#include "rotation.hpp"
#include "simd.hpp"

namespace reallm {

constexpr int64_t kPad = 32;
constexpr int64_t kPanelFloats = 48 << 10;  // 192 KiB

inline int64_t padded(int64_t cols) { return (cols + kPad - 1) / kPad * kPad; }

// Base of codecs that need nothing after xc.
struct Bare {
  static constexpr int64_t kLayout = 0;
  static int64_t behind(int64_t) { return 0; }
  static void append(const float*, int64_t, float*) {}
};

// Reads `count` unscaled values of a low-rank factor from index `first`: fp16, or integers of 8 or 4 bits.
inline void factor(const void* from, int bits, int64_t first, int64_t count, float* to) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  if (bits == 16) return halves(from, first, count, to);
  for (int64_t i = 0; i < count; i++)
    to[i] = bits == 8 ? float(int8_t(bytes[first + i]))
                      : float(int(bytes[(first + i) / 2] >> ((first + i) % 2 * 4) & 15) - 8);
}

template <class Codec>
struct Linear {
  static void prepare(const Operand& op, const float* x, float* xc, int64_t batch) {
    for (int64_t m = 0; m < batch; m++, x += op.cols, xc += op.prepared) {
      const float* scales = op.channel_scales;
      for (int64_t j = 0; j < op.cols; j++) {
        const int64_t from = op.permutation ? op.permutation[j] : j;
        xc[j] = scales ? x[from] * scales[from] : x[from];
      }
      if (op.input.signs) rotate(op.input, xc);
      const int64_t width = padded(op.cols);
      for (int64_t j = op.cols; j < width; j++) xc[j] = 0;
      Codec::append(xc, width, xc + width);
    }
  }

  static void dot(const Operand& op, const float* xc, float* yc, int64_t batch, int64_t first, int64_t last) {
    if (batch == 1) return Codec::gemv(op, xc, yc, first, last);
    const int64_t width = padded(op.cols);
    int64_t step = kPanelFloats / width / kRowBlock * kRowBlock;
    step = step < kRowBlock ? kRowBlock : step;
    float* panel = scratch<1>((step < last - first ? step : last - first) * width);
    for (int64_t row = first; row < last; row += step) {
      const int64_t end = row + step < last ? row + step : last;
      Codec::decode(op, row, end, panel, width);
      product(xc, op.prepared, batch, panel, width, end - row, width, yc + row, op.rows);
    }
  }

  static void finish(const Operand& op, const float* x, float* yc, int64_t batch) {
    if (op.output.signs)
      for (int64_t m = 0; m < batch; m++) unrotate(op.output, yc + m * op.rows);
    if (op.sparse_starts) outliers(op, x, yc, batch);
    if (op.rank) low_rank(op, x, yc, batch);
    if (op.gain)
      for (int64_t m = 0; m < batch; m++)
        for (int64_t n = 0; n < op.rows; n++) yc[m * op.rows + n] *= op.gain[n];
    if (op.bias)
      for (int64_t m = 0; m < batch; m++)
        for (int64_t n = 0; n < op.rows; n++) yc[m * op.rows + n] += op.bias[n];
  }

  static void outliers(const Operand& op, const float* x, float* y, int64_t batch) {
    for (int64_t n = 0; n < op.rows; n++)
      for (int64_t i = op.sparse_starts[n]; i < op.sparse_starts[n + 1]; i++) {
        const float value = half_at(op.sparse_values, i);
        for (int64_t m = 0; m < batch; m++) y[m * op.rows + n] += value * x[m * op.cols + op.sparse_cols[i]];
      }
  }

  // y += (x R^T) L^T, a few rows of the factors at a time.
  static void low_rank(const Operand& op, const float* x, float* y, int64_t batch) {
    constexpr int64_t kRows = 12;
    float* t = scratch<2>(batch * op.rank);
    float* part = scratch<1>(kRows * (op.rank > op.cols ? op.rank : op.cols));
    for (int64_t r = 0; r < op.rank; r += kRows) {
      const int64_t count = r + kRows < op.rank ? kRows : op.rank - r;
      factor(op.right, op.factor_bits, r * op.cols, count * op.cols, part);
      product(x, op.cols, batch, part, op.cols, count, op.cols, t + r, op.rank);
    }
    if (op.left_scales)
      for (int64_t m = 0; m < batch; m++)
        for (int64_t r = 0; r < op.rank; r++) t[m * op.rank + r] *= op.left_scales[r] * op.right_scales[r];
    for (int64_t n = 0; n < op.rows; n += kRows) {
      const int64_t count = n + kRows < op.rows ? kRows : op.rows - n;
      factor(op.left, op.factor_bits, n * op.rank, count * op.rank, part);
      product(t, op.rank, batch, part, op.rank, count, op.rank, y + n, op.rows, true);
    }
  }

  // Rows of W_hat, for a matrix without rotation.
  static void rows(const Operand& op, const int64_t* index, int64_t count, float* out) {
    float* panel = scratch<1>(padded(op.cols));
    float* left = scratch<2>(op.rank + op.cols);
    for (int64_t i = 0; i < count; i++, out += op.cols) {
      const int64_t n = index[i];
      Codec::decode(op, n, n + 1, panel, padded(op.cols));
      for (int64_t j = 0; j < op.cols; j++) out[op.permutation ? op.permutation[j] : j] = panel[j];
      for (int64_t j = 0; op.channel_scales && j < op.cols; j++) out[j] *= op.channel_scales[j];
      for (int64_t s = op.sparse_starts ? op.sparse_starts[n] : 0; op.sparse_starts && s < op.sparse_starts[n + 1]; s++)
        out[op.sparse_cols[s]] += half_at(op.sparse_values, s);
      if (op.rank) factor(op.left, op.factor_bits, n * op.rank, op.rank, left);
      for (int64_t r = 0; r < op.rank; r++) {
        factor(op.right, op.factor_bits, r * op.cols, op.cols, left + op.rank);
        const float by = left[r] * (op.left_scales ? op.left_scales[r] * op.right_scales[r] : 1.0f);
        for (int64_t j = 0; j < op.cols; j++) out[j] += by * left[op.rank + j];
      }
      for (int64_t j = 0; op.gain && j < op.cols; j++) out[j] *= op.gain[n];
    }
  }

  static constexpr Kernels kKernels = {prepare, dot, finish, rows};
  static constexpr Kernels kRotated = {prepare, dot, finish, nullptr};
};

}  // namespace reallm
