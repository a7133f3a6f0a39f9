// The contract of one compressed matrix W[rows, cols] = [out_features, in_features] on the CPU: y = W_hat x + bias.
//
//   prepare   x [batch, cols]       -> xc [batch, prepared]   x in the domain of the codes: channel scales, permutation,
//                                                             rotation, zeros after the last column, and after them
//                                                             the values that the codec's products derive from x
//   dot       xc                    -> yc[:, first:last]      rows of the coded matrix, scales included, times xc
//   finish    x, yc [batch, rows]   -> yc, in place           rotation of the output, outliers, low-rank term, gain, bias
//   rows      index [count]         -> out [count, cols]      rows of W_hat, for lookups in an embedding
//
// All values are float32, accumulated in float32 (or exactly, in integers), row-major without gaps. Buffers need no
// alignment and no initial contents. Results do not depend on how the rows are divided, nor on the number of threads.
// Several threads may call each function at once; `dot` writes no row outside [first, last). Nothing here needs torch.
//
//   alignas(64) float xc[...]; // batch * op.prepared
//   op.kernels->prepare(op, x, xc, batch);
//   pool().parallel(chunks(op.rows, 4 * threads), threads, [&](int64_t i) { ... op.kernels->dot(op, xc, y, batch, a, b) });
//   op.kernels->finish(op, x, y, batch);
//
// An Operand is plain data, filled by reallm/runtime/operand.py (which mirrors it field by field; `abi_bytes` checks
// its size). It points into the fields as they are stored and into small tables beside them.
#pragma once

#include <cstdint>

namespace reallm {

constexpr int64_t kRowBlock = 16;
// `first` is a multiple of kRowBlock; so is `last`, unless it is op.rows.

struct Operand;

struct Kernels {
  void (*prepare)(const Operand& op, const float* x, float* xc, int64_t batch);
  void (*dot)(const Operand& op, const float* xc, float* yc, int64_t batch, int64_t first, int64_t last);
  void (*finish)(const Operand& op, const float* x, float* yc, int64_t batch);
  void (*rows)(const Operand& op, const int64_t* index, int64_t count, float* out);  // null: no single rows
};

// R = kron(base, Sylvester(power)) diag(signs); `signs` includes the factor 1 / sqrt(order). See
// kernels/codes/hadamard.py.
struct Rotation {
  int64_t order, power;  // order = m power
  const float* base;     // [m, m], row-major
  const float* signs;    // [order]; null: no rotation
};

struct Operand {
  const Kernels* kernels;
  int64_t rows, cols;
  int64_t prepared;    // floats of one row of xc
  uint64_t input_key;  // operands with equal keys (never 0) prepare the same xc from the same x: call `prepare` once
  const void *codes, *residuals, *zeros, *scales;  // as stored
  const void *scale_codes, *scale_ranges;          // for double quantisation, as stored
  const float* table;      // levels, codebooks or words, float32, in the layout of the codec
  const uint8_t* widths;   // trellis only: one byte per block of columns
  const int64_t* starts;   // trellis only: first word of each block of columns
  const float* channel_scales;   // [cols] or null
  const int32_t* permutation;    // [cols] or null: coded column j is column permutation[j]
  Rotation input, output;
  const int64_t* sparse_starts;  // [rows + 1] or null
  const uint16_t* sparse_cols;
  const void* sparse_values;     // fp16
  const void *left, *right;      // factors as stored; null without a low-rank term
  const float *left_scales, *right_scales;  // [rank] or null
  const float* gain;             // [rows] or null: factors of the rows of W_hat
  const float* bias;             // [rows] or null
  int64_t rank;
  float scale_min;
  int32_t factor_bits;  // 16 (fp16), 8 or 4
};

// The first row of part i when `rows` are divided into `parts` equal parts: a multiple of kRowBlock, or `rows`.
inline int64_t part_start(int64_t rows, int64_t parts, int64_t i) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, start = blocks * i / parts * kRowBlock;
  return start < rows ? start : rows;
}

}  // namespace reallm
