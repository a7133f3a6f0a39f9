// The entry points of one generated file: the table of kernel functions, and complete products for calls from Python.
#pragma once

#include "kernel.hpp"
#include "threads.hpp"

namespace reallm {

constexpr int kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2;

inline float read_float(const void* from, int kind, int64_t i) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  if (kind == kFloat32) return load<float>(bytes + 4 * i);
  if (kind == kFloat16) return half_at(from, i);
  const uint32_t pattern = uint32_t(load<uint16_t>(bytes + 2 * i)) << 16;
  return load<float>(&pattern);
}

inline void write_float(void* to, int kind, int64_t i, float value) {
  uint8_t* bytes = static_cast<uint8_t*>(to);
  if (kind == kFloat32) return store(bytes + 4 * i, value);
  if (kind == kFloat16) return store(bytes + 2 * i, to_half(value));
  uint32_t pattern;
  memcpy(&pattern, &value, 4);
  const uint32_t rounded = pattern + 0x7FFF + (pattern >> 16 & 1);  // to nearest, ties to even
  store(bytes + 2 * i, uint16_t(value == value ? rounded >> 16 : pattern >> 16 | 0x40));
}

constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kBatch = 512;           // rows of x at once, which bounds scratch memory
constexpr int64_t kSmallProduct = 1 << 17;  // below this many multiplications one thread is faster

inline int64_t float_bytes(int kind) { return kind == kFloat32 ? 4 : 2; }

inline void some_rows(const Operand& op, const void* x, void* y, int kind, int64_t batch, int threads) {
  const bool plain = kind == kFloat32;
  float* xc = scratch<5>(batch * op.prepared);
  float* xf = plain ? nullptr : scratch<6>(batch * (op.cols + op.rows));
  float* yf = plain ? static_cast<float*>(y) : xf + batch * op.cols;
  const float* in = plain ? static_cast<const float*>(x) : xf;
  const int64_t parts = threads > 1 ? threads * kPartsPerThread : 1, cuts = batch < parts ? batch : parts;
  pool().parallel(cuts, threads, [&](int64_t i) {
    const int64_t a = batch * i / cuts, b = batch * (i + 1) / cuts;
    for (int64_t j = a * op.cols; !plain && j < b * op.cols; j++) xf[j] = read_float(x, kind, j);
    op.kernels->prepare(op, in + a * op.cols, xc + a * op.prepared, b - a);
  });
  pool().parallel(parts, threads, [&](int64_t i) {
    const int64_t a = part_start(op.rows, parts, i), b = part_start(op.rows, parts, i + 1);
    if (a < b) op.kernels->dot(op, xc, yf, batch, a, b);
  });
  pool().parallel(cuts, threads, [&](int64_t i) {
    const int64_t a = batch * i / cuts, b = batch * (i + 1) / cuts;
    op.kernels->finish(op, in + a * op.cols, yf + a * op.rows, b - a);
    for (int64_t j = a * op.rows; !plain && j < b * op.rows; j++) write_float(y, kind, j, yf[j]);
  });
}

// y [batch, rows] = x [batch, cols] W_hat^T + bias; x and y have type `kind`. Returns 0, or 1 when out of memory.
inline int linear(const Operand& op, const void* x, void* y, int kind, int64_t batch, int threads) {
  try {
    if (op.rows * op.cols * batch < kSmallProduct) threads = 1;
    for (int64_t first = 0; first < batch; first += kBatch) {
      const int64_t count = first + kBatch < batch ? kBatch : batch - first;
      some_rows(op, static_cast<const uint8_t*>(x) + first * op.cols * float_bytes(kind),
                static_cast<uint8_t*>(y) + first * op.rows * float_bytes(kind), kind, count, threads);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// out [count, cols] of type `kind`: rows `index` of W_hat, for a matrix without rotation. Returns as `linear` does.
inline int lookup(const Operand& op, const int64_t* index, int64_t count, void* out, int kind) {
  try {
    float* row = scratch<5>(op.cols);
    for (int64_t i = 0; i < count; i++) {
      op.kernels->rows(op, index + i, 1, row);
      for (int64_t j = 0; j < op.cols; j++) write_float(out, kind, i * op.cols + j, row[j]);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace reallm

#define REALLM_ENTRY(Codec)                                                                                        \
  extern "C" int64_t reallm_abi_bytes() { return sizeof(reallm::Operand); }                                       \
  extern "C" int64_t reallm_behind(int64_t cols) { return reallm::Codec::behind(reallm::padded(cols)); }           \
  extern "C" int64_t reallm_layout() { return reallm::Codec::kLayout; }                                            \
  extern "C" const reallm::Kernels* reallm_kernels(int rotated) {                                                  \
    return rotated ? &reallm::Linear<reallm::Codec>::kRotated : &reallm::Linear<reallm::Codec>::kKernels;          \
  }                                                                                                                \
  extern "C" int reallm_linear(const reallm::Operand* op, const void* x, void* y, int kind, int64_t batch,         \
                               int threads) {                                                                      \
    return reallm::linear(*op, x, y, kind, batch, threads);                                                        \
  }                                                                                                                \
  extern "C" int reallm_rows(const reallm::Operand* op, const int64_t* index, int64_t count, void* out, int kind) { \
    return reallm::lookup(*op, index, count, out, kind);                                                           \
  }
