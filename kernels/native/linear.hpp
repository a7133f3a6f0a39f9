// The contract of one compressed matrix W[rows, cols] = [out_features, in_features] on the CPU: y = W_hat x + bias.
//
//   prepare   x [batch, cols]       -> xc [batch, prepared]   x in the domain of the codes: channel scales, permutation,
//                                                             rotation, zeros behind the last column, and behind them
//                                                             what the codec's products want of x
//   dot       xc                    -> yc[:, first:last]      rows of the codes, their scales included, times xc
//   finish    x, yc [batch, rows]   -> yc, in place           rotation of the output, outliers, low-rank term, gain, bias
//   rows      index [count]         -> out [count, cols]      rows of W_hat, as an embedding looks them up
//
// Everything is float32, accumulated in float32 (or exactly, in whole numbers), row-major without gaps. Buffers need no
// alignment and may hold anything before they are written. Results do not depend on how rows are cut up, nor on the
// number of threads. Every function may be called by several threads at once; `dot` writes no row outside
// [first, last). Nothing here needs torch.
//
//   alignas(64) float xc[...]; // batch * op.prepared
//   op.kernels->prepare(op, x, xc, batch);
//   pool().parallel(chunks(op.rows, 4 * threads), threads, [&](int64_t i) { ... op.kernels->dot(op, xc, y, batch, a, b) });
//   op.kernels->finish(op, x, y, batch);
//
// An Operand is plain data, filled by reallm/runtime/cpu.py (mirrored there field by field, checked by `abi_bytes`); it
// points into the fields as they are stored (docs/format.md) and into little tables beside them.
#pragma once

#include <cstdint>

namespace reallm {

constexpr int64_t kRowBlock = 16;
// `first` is a multiple of it; `last` too, unless it is op.rows.

struct Operand;

struct Kernels {
  void (*prepare)(const Operand& op, const float* x, float* xc, int64_t batch);
  void (*dot)(const Operand& op, const float* xc, float* yc, int64_t batch, int64_t first, int64_t last);
  void (*finish)(const Operand& op, const float* x, float* yc, int64_t batch);
  void (*rows)(const Operand& op, const int64_t* index, int64_t count, float* out);  // null: a row cannot be had alone
};

// R = kron(base, Sylvester(power)) diag(signs), signs holding 1 / sqrt(order) too: see kernels/hadamard.py.
struct Rotation {
  int64_t order, power;  // order = m power
  const float* base;     // [m, m] row by row
  const float* signs;    // [order]; null: no rotation
};

struct Operand {
  const Kernels* kernels;
  int64_t rows, cols;
  int64_t prepared;    // floats of one row of xc
  uint64_t input_key;  // operands with equal keys (never 0) make the same xc of the same x: call `prepare` once
  const void *codes, *residuals, *zeros, *scales;  // as stored
  const void *scale_codes, *scale_ranges;          // of double quantisation, as stored
  const float* table;      // levels, codebooks or words, float32; their layout is the codec's
  const uint8_t* widths;   // of the trellis, one byte a block of columns
  const int64_t* starts;   // of the trellis, first word of a block of columns
  const float* channel_scales;   // [cols] or null
  const int32_t* permutation;    // [cols] or null: coded column j is column permutation[j]
  Rotation input, output;
  const int64_t* sparse_starts;  // [rows + 1] or null
  const uint16_t* sparse_cols;
  const void* sparse_values;     // fp16
  const void *left, *right;      // factors as stored; null without a low-rank term
  const float *left_scales, *right_scales;  // [rank] or null
  const float* gain;             // [rows] or null: rows of W_hat are multiplied by it
  const float* bias;             // [rows] or null
  int64_t rank;
  float scale_min;
  int32_t factor_bits;  // 16 (fp16), 8 or 4
};

// The first row of part i of `parts` equal parts of `rows`, a multiple of kRowBlock or `rows` itself.
inline int64_t part_start(int64_t rows, int64_t parts, int64_t i) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, start = blocks * i / parts * kRowBlock;
  return start < rows ? start : rows;
}

}  // namespace reallm
