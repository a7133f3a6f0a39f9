// One code per several weights of a row: additive codebooks and lattice words; and uncompressed weights.
//
//   additive   W = scale_n sum_m codebooks[m][code_m]                      words of 2, 4 or 8 weights
//   lattice    W = scale_b (word(code) + c word_2(residual)),  word(code) = (signs a[code >> 8]) +- 1/4
//
// Words are read from float32 tables of a few KiB, which stay in the L1 cache, and multiplied directly. Loads of words
// are the bottleneck, so codes are loaded eight bytes at a time and split in registers. Tables of partial dot products
// would need one load per word too, and would have to be built for every x.
#pragma once

#include <type_traits>

#include "codes.hpp"
#include "kernel.hpp"
#include "linear.hpp"

namespace reallm {

// Codes of row n as `Code` (uint8_t or uint16_t): in place if each is stored in one or two whole bytes, otherwise
// unpacked to scratch memory, as row `slot` of at most kSlots.
template <class Code, int bits, int kSlots>
REALLM_INLINE const uint8_t* row_codes(const void* stored, int64_t rows, int64_t n, int64_t count, int slot) {
  if constexpr (bits == 8 * sizeof(Code)) return static_cast<const uint8_t*>(stored) + sizeof(Code) * n * count;
  float* held = scratch<3>(kSlots * (count / 2 + 4)) + slot * (count / 2 + 4);
  unpack(stored, bits, rows * count, n * count, count, reinterpret_cast<Code*>(held));
  return reinterpret_cast<const uint8_t*>(held);
}

// The `width` bits of `word` from bit `from`, as the byte offset of a table entry of 2^shift bytes. `from` must be
// constant after loops are unrolled.
REALLM_INLINE uint64_t entry_offset(uint64_t word, int from, int width, int shift) {
  const int by = (from - shift) & 63;  // a rotation keeps the word, which saves an instruction over a shift
  return (word >> by | word << (-by & 63)) & (((uint64_t(1) << width) - 1) << shift);
}

template <class V>
REALLM_INLINE V entry(const float* table, uint64_t offset) {
  return load<V>(reinterpret_cast<const uint8_t*>(table) + offset);
}

// op.table: codebooks [books, 2^bits, dim]; for dim 2 two more floats follow the last word.
template <int books, int bits, int dim>
struct Additive : Bare {
  static constexpr int kRows = 4, kTotals = 2;
  using Code = std::conditional_t<(bits <= 8), uint8_t, uint16_t>;
  using Word = std::conditional_t<dim == 8, F8, F4>;
  static constexpr int kCode = sizeof(Code), kEntry = dim == 8 ? 5 : dim == 4 ? 4 : 3;  // bytes; log2 of bytes
  static constexpr int kTogether = 8 / kCode, kReads = kTogether % books ? books : 1;  // codes per read; reads per turn
  static constexpr int kGroups = kReads * kTogether / books;                            // groups per turn

  static int64_t groups(const Operand& op) { return (op.cols + dim - 1) / dim; }

  REALLM_INLINE static Word columns(const float* xc, int64_t g) {
    if constexpr (dim == 2) return Word{xc[2 * g], xc[2 * g + 1], 0, 0};
    else return load<Word>(xc + g * dim);
  }

  template <int rows>
  static void some(const Operand& op, const float* xc, float* yc, int64_t n) {
    const int64_t count = groups(op), stride = count * books * kCode;
    const uint8_t* codes[rows];
    Word total[rows][kTotals];
    for (int r = 0; r < rows; r++) {
      codes[r] = row_codes<Code, bits, rows>(op.codes, op.rows, n + r, count * books, r);
      for (int t = 0; t < kTotals; t++) total[r][t] = Word{};
    }
    int64_t g = 0;
    for (; g + kGroups <= count; g += kGroups)
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        const uint8_t* from = codes[r] + g * books * kCode;
        if (bits == 8 * kCode && g * books * kCode % 64 < 8 * kReads) __builtin_prefetch(from + rows * stride);
#pragma GCC unroll 8
        for (int k = 0; k < kReads; k++) {
          const uint64_t read = load<uint64_t>(from + 8 * k);
#pragma GCC unroll 8
          for (int i = 0; i < kTogether; i++) {
            const int at = k * kTogether + i;
            const float* book = op.table + (int64_t(at % books) << bits) * dim;
            const Word word = entry<Word>(book, entry_offset(read, 8 * kCode * i, bits, kEntry));
            total[r][at % kTotals] = fma(columns(xc, g + at / books), word, total[r][at % kTotals]);
          }
        }
      }
    for (; g < count; g++)
      for (int r = 0; r < rows; r++)
        for (int m = 0; m < books; m++) {
          const int64_t code = load<Code>(codes[r] + kCode * (g * books + m));
          const Word word = load<Word>(op.table + ((int64_t(m) << bits) + code) * dim);
          total[r][m % kTotals] = fma(columns(xc, g), word, total[r][m % kTotals]);
        }
    for (int r = 0; r < rows; r++) yc[n + r] = sum(total[r][0] + total[r][1]) * half_at(op.scales, n + r);
  }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + kRows <= last; n += kRows) some<kRows>(op, xc, yc, n);
    for (; n < last; n++) some<1>(op, xc, yc, n);
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    const int64_t count = groups(op) * books;
    for (int64_t n = first; n < last; n++, panel += stride) {
      const uint8_t* codes = row_codes<Code, bits, 1>(op.codes, op.rows, n, count, 0);
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

// op.table: [256, 8] vectors a, with the last entry negated where a has an odd number of entries 3/2; [256, 8] signs
// and [256] shifts, indexed by the low byte of a code, with the eighth sign chosen so that the number of minus signs is
// even; at 3 bits also the second words [256, 8], already multiplied by the residual scale `c`.
template <int bits>
struct Lattice : Bare {
  static constexpr int kWord = 8, kTile = 16, kTurn = 8;  // columns of a word, columns of a scale, groups per turn
  static constexpr float kShift = 0.25f;
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

  // Computed from x once for all rows of a call: x times the scales of its columns; the sums of its groups of eight,
  // times minus the shift; and both times the residual scale.
  struct Scaled {
    float *x, *shifts, *second, *second_shifts;

    Scaled(const Operand& op, const float* xc) {
      const int64_t width = padded(op.cols), count = (width / kWord + kTurn - 1) / kTurn * kTurn;
      x = scratch<3>((bits == 4 ? 2 : 1) * (width + count));
      shifts = x + width, second = x + (width + count) * (bits == 4), second_shifts = second + width;
      for (int64_t j = 0; j < width; j++) x[j] = j < op.cols ? xc[j] * half_at(op.scales, j / kTile) : 0;
      for (int64_t g = 0; g < count; g++) shifts[g] = g * kWord < width ? sum(load<F8>(x + g * kWord)) * -kShift : 0;
      for (int64_t j = 0; bits == 4 && j < width + count; j++) second[j] = x[j] * kResidual;
    }
  };

  // The shifts of eight words times x: `shifts`, negated where the shift is positive.
  REALLM_INLINE static F8 shifted(const uint8_t* codes, const float* shifts) {
    typedef uint16_t Codes __attribute__((vector_size(16)));
    return (F8)(load<U8>(shifts) ^ __builtin_convertvector(load<Codes>(codes), U8) << 31);
  }

  // Adds four words without their shifts, times x, to `total`.
  REALLM_INLINE static void four(const float* table, const uint8_t* codes, const float* x, F8* total) {
    const uint64_t read = load<uint64_t>(codes);
    const float* signs = table + 256 * kWord;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const U8 flip = entry<U8>(signs, entry_offset(read, 16 * i, 8, 5));
      const F8 word = (F8)(entry<U8>(table, entry_offset(read, 16 * i + 8, 8, 5)) ^ flip);
      total[i % 2] = fma(load<F8>(x + i * kWord), word, total[i % 2]);
    }
  }

  template <int rows>
  static void some(const Operand& op, const Scaled& scaled, float* yc, int64_t n) {
    constexpr int kBytes = bits == 4 ? 2 : 1;  // bytes of the code of a residual
    const int64_t count = groups(op);
    const uint8_t *codes = static_cast<const uint8_t*>(op.codes) + 2 * n * count, *residuals = nullptr;
    if (bits > 2) residuals = static_cast<const uint8_t*>(op.residuals) + kBytes * n * count;
    F8 total[rows][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = F8{};
    int64_t g = 0;
    for (; g + kTurn <= count; g += kTurn)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          const int64_t at = r * count + g + 4 * half;
          if (half == 0) {
            if (g % 32 == 0) __builtin_prefetch(codes + 2 * (at + rows * count));
            total[r][0] += shifted(codes + 2 * at, scaled.shifts + g);
            if constexpr (bits == 4) total[r][1] += shifted(residuals + 2 * at, scaled.second_shifts + g);
          }
          four(op.table, codes + 2 * at, scaled.x + (g + 4 * half) * kWord, total[r]);
          if constexpr (bits == 4) four(op.table, residuals + 2 * at, scaled.second + (g + 4 * half) * kWord, total[r]);
          if constexpr (bits == 3) {
            const float* words = op.table + 2 * 256 * kWord + 256;
            const uint64_t read = load<uint32_t>(residuals + at);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
              total[r][i % 2] = fma(load<F8>(scaled.x + (g + 4 * half + i) * kWord),
                                    entry<F8>(words, entry_offset(read, 8 * i, 8, 5)), total[r][i % 2]);
          }
        }
    for (; g < count; g++)
      for (int r = 0; r < rows; r++)
        total[r][0] = fma(load<F8>(scaled.x + g * kWord), value(op, (n + r) * count + g), total[r][0]);
    for (int r = 0; r < rows; r++) yc[n + r] = sum(total[r][0] + total[r][1]);
  }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    const Scaled scaled(op, xc);
    int64_t n = first;
    for (; n + 4 <= last; n += 4) some<4>(op, scaled, yc, n);
    for (; n < last; n++) some<1>(op, scaled, yc, n);
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
