// One code for several weights of a row: additive codebooks and lattice words, and weights that are not coded at all.
//
//   additive   W = scale_n sum_m codebooks[m][code_m]                      words of 2, 4 or 8 weights
//   lattice    W = scale_b (word(code) + c word_2(residual)),  word(code) = (signs a[code >> 8]) +- 1/4
//
// Words are read from float32 tables of a few KiB, which stay in the first cache, and multiplied as they come: one load
// of a code, one product of a word. Partial-dot tables would need one load a word too, and have to be built for every x.
#pragma once

#include <type_traits>

#include "codes.hpp"
#include "kernel.hpp"
#include "linear.hpp"

namespace reallm {

// Codes of row n: where they lie if each is a byte or two, otherwise unpacked. `Code` is uint8_t or uint16_t.
template <class Code, int bits>
REALLM_INLINE const uint8_t* row_codes(const void* stored, int64_t rows, int64_t n, int64_t count, float* held) {
  if constexpr (bits == 8 * sizeof(Code)) return static_cast<const uint8_t*>(stored) + sizeof(Code) * n * count;
  unpack(stored, bits, rows * count, n * count, count, reinterpret_cast<Code*>(held));
  return reinterpret_cast<const uint8_t*>(held);
}

// op.table: codebooks [books, 2^bits, dim]; for dim 2 the last word is followed by two more floats.
template <int books, int bits, int dim>
struct Additive : Bare {
  static constexpr int kRows = 8;
  using Code = std::conditional_t<(bits <= 8), uint8_t, uint16_t>;
  using Word = std::conditional_t<dim == 8, F8, F4>;

  static int64_t groups(const Operand& op) { return (op.cols + dim - 1) / dim; }

  static float* held(const Operand& op) { return scratch<3>(kRows * (groups(op) * books / 2 + 4)); }

  template <int rows>
  static void some(const Operand& op, const float* xc, float* yc, int64_t n) {
    const int64_t count = groups(op) * books;
    const uint8_t* codes[rows];
    for (int r = 0; r < rows; r++)
      codes[r] = row_codes<Code, bits>(op.codes, op.rows, n + r, count, held(op) + r * (count / 2 + 4));
    Word total[rows];
    for (int r = 0; r < rows; r++) total[r] = Word{};
    for (int64_t g = 0; g < groups(op); g++) {
      Word x;
      if constexpr (dim == 2) {
        x = Word{xc[2 * g], xc[2 * g + 1], 0, 0};
      } else {
        x = load<Word>(xc + g * dim);
      }
      for (int m = 0; m < books; m++)
        for (int r = 0; r < rows; r++) {
          const int64_t code = load<Code>(codes[r] + sizeof(Code) * (g * books + m));
          total[r] = fma(x, load<Word>(op.table + ((int64_t(m) << bits) + code) * dim), total[r]);
        }
    }
    for (int r = 0; r < rows; r++) yc[n + r] = sum(total[r]) * half_at(op.scales, n + r);
  }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + kRows <= last; n += kRows) some<kRows>(op, xc, yc, n);
    for (; n < last; n++) some<1>(op, xc, yc, n);
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    const int64_t count = groups(op) * books;
    for (int64_t n = first; n < last; n++, panel += stride) {
      const uint8_t* codes = row_codes<Code, bits>(op.codes, op.rows, n, count, held(op));
      const float scale = half_at(op.scales, n);
      for (int64_t g = 0; g < groups(op); g++)
        for (int d = 0; d < dim; d++) {
          float value = 0;
          for (int m = 0; m < books; m++)
            value += op.table[((int64_t(m) << bits) + load<Code>(codes + sizeof(Code) * (g * books + m))) * dim + d];
          panel[g * dim + d] = value * scale;
        }
      for (int64_t j = op.cols; j < stride; j++) panel[j] = 0;
    }
  }
};

// op.table: [256, 8] vectors a, the last entry of one with an odd number of entries 3/2 negated; [256, 8] signs and
// [256] shifts by the low byte of a code, its eighth sign making the number of minuses even; at 3 bits then the second
// words [256, 8]; words of residuals are already multiplied by the residual scale `c`.
template <int bits>
struct Lattice : Bare {
  static constexpr int kWord = 8, kTile = 16;
  static constexpr float kResidual = bits == 4 ? 0.265625f : 1.0f;

  static int64_t groups(const Operand& op) { return (op.cols + kWord - 1) / kWord; }

  REALLM_INLINE static F8 word(const float* table, uint32_t code) {
    const float *signs = table + 256 * kWord, *shifts = signs + 256 * kWord;
    const uint32_t low = code & 255;
    const U8 flipped = load<U8>(table + (code >> 8) * kWord) ^ load<U8>(signs + low * kWord);
    return (F8)flipped + shifts[low];
  }

  REALLM_INLINE static F8 value(const Operand& op, int64_t index) {
    const F8 first = word(op.table, load<uint16_t>(static_cast<const uint8_t*>(op.codes) + 2 * index));
    const uint8_t* residuals = static_cast<const uint8_t*>(op.residuals);
    if constexpr (bits == 3) return first + load<F8>(op.table + (2 * 256 * kWord + 256) + residuals[index] * kWord);
    if constexpr (bits == 4) return fma(F8{} + kResidual, word(op.table, load<uint16_t>(residuals + 2 * index)), first);
    return first;
  }

  // x times the scales of its columns: once for all rows of a call.
  static const float* scaled(const Operand& op, const float* xc) {
    float* x = scratch<3>(padded(op.cols));
    for (int64_t j = 0; j < padded(op.cols); j++) x[j] = 0;
    for (int64_t j = 0; j < op.cols; j += kTile) {
      const float scale = half_at(op.scales, j / kTile);
      for (int64_t i = j; i < j + kTile && i < op.cols; i++) x[i] = xc[i] * scale;
    }
    return x;
  }

  template <int rows>
  static void some(const Operand& op, const float* x, float* yc, int64_t n) {
    F8 total[rows];
    for (int r = 0; r < rows; r++) total[r] = F8{};
    const int64_t count = groups(op);
    for (int64_t g = 0; g < count; g++) {
      const F8 part = load<F8>(x + g * kWord);
      for (int r = 0; r < rows; r++) total[r] = fma(part, value(op, (n + r) * count + g), total[r]);
    }
    for (int r = 0; r < rows; r++) yc[n + r] = sum(total[r]);
  }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    const float* x = scaled(op, xc);
    int64_t n = first;
    for (; n + 4 <= last; n += 4) some<4>(op, x, yc, n);
    for (; n < last; n++) some<1>(op, x, yc, n);
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    const int64_t count = groups(op);
    for (int64_t n = first; n < last; n++, panel += stride) {
      for (int64_t g = 0; g < count; g++)
        store(panel + g * kWord, value(op, n * count + g) * half_at(op.scales, g * kWord / kTile));
      for (int64_t j = op.cols; j < stride; j++) panel[j] = 0;
    }
  }
};

enum class Float { f16, bf16, f32 };

template <Float kind>
struct Dense : Bare {
  static constexpr int kBytes = kind == Float::f32 ? 4 : 2;
  static constexpr int kAhead = 1024;  // bytes that are called for before they are read

  REALLM_INLINE static float one(const uint8_t* at) {
    if constexpr (kind == Float::f32) return load<float>(at);
    if constexpr (kind == Float::f16) return half(load<uint16_t>(at));
    const uint32_t pattern = uint32_t(load<uint16_t>(at)) << 16;
    return load<float>(&pattern);
  }

  REALLM_INLINE static F8 eight(const uint8_t* at) {
    if constexpr (kind == Float::f32) return load<F8>(at);
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
    if constexpr (kind == Float::f16) return (F8)_mm256_cvtph_ps(load<__m128i>(at));
    return (F8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(at)), 16);
#else
    F8 value;
    for (int l = 0; l < 8; l++) value[l] = one(at + l * kBytes);
    return value;
#endif
  }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const uint8_t* row = static_cast<const uint8_t*>(op.codes) + n * op.cols * kBytes;
      F8 total[4] = {};
      int64_t j = 0;
      for (; j + 32 <= op.cols; j += 32) {
        __builtin_prefetch(row + j * kBytes + kAhead);
        for (int i = 0; i < 4; i++)
          total[i] = fma(load<F8>(xc + j + 8 * i), eight(row + (j + 8 * i) * kBytes), total[i]);
      }
      float rest = 0;
      for (; j < op.cols; j++) rest += xc[j] * one(row + j * kBytes);
      yc[n] = sum((total[0] + total[1]) + (total[2] + total[3])) + rest;
    }
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    for (int64_t n = first; n < last; n++, panel += stride) {
      const uint8_t* row = static_cast<const uint8_t*>(op.codes) + n * op.cols * kBytes;
      int64_t j = 0;
      for (; j + 8 <= op.cols; j += 8) store(panel + j, eight(row + j * kBytes));
      for (; j < op.cols; j++) panel[j] = one(row + j * kBytes);
      for (; j < stride; j++) panel[j] = 0;
    }
  }
};

}  // namespace reallm
