// One code a weight: integers, tables of levels and rows with tables of their own, scaled by groups of a row.
//
//   table      W = level[code] scale             int, uint   W = (code - zero) scale, with zero = 2^(bits - 1) for int
//   double     scale = scale_min + scale_code / (2^c - 1) range           km          W = level_n[code]
//
// 32 codes are read at once where rows are whole groups of 32 codes and scales change only between them; other rows are
// unpacked to bytes first. A scale multiplies the finished sum of its group. The zero of integers is taken off there
// too, by the sum of the group's x (`prepare` adds one for every kSums columns).
#pragma once

#include "codes.hpp"
#include "kernel.hpp"
#include "linear.hpp"

namespace reallm {

enum class Table { integers, levels, row_levels };

// Levels by code: in registers up to 4 bits, otherwise gathered from memory. `table` holds max(8, 2^bits) floats.
template <int bits>
struct Levels {
  const float* table;
#if defined(REALLM_AVX512)
  __m512 low;
#elif defined(REALLM_AVX2)
  __m256 low, high;
#endif

  REALLM_INLINE explicit Levels(const float* from) : table(from) {
#if defined(REALLM_AVX512)
    low = bits == 4 ? load<__m512>(from) : _mm512_insertf32x8(_mm512_setzero_ps(), load<__m256>(from), 0);
#elif defined(REALLM_AVX2)
    low = load<__m256>(from);
    high = bits == 4 ? load<__m256>(from + 8) : low;
#endif
  }

  REALLM_INLINE F operator()(U code) const {
#if defined(REALLM_AVX512)
    if constexpr (bits <= 4) return (F)_mm512_permutexvar_ps((__m512i)code, low);
    return (F)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, (__m512i)code, table, 4);
#elif defined(REALLM_AVX2)
    if constexpr (bits <= 4) {
      const __m256 first = _mm256_permutevar8x32_ps(low, (__m256i)code);
      if constexpr (bits < 4) return (F)first;
      const __m256 second = _mm256_permutevar8x32_ps(high, (__m256i)code);
      return (F)_mm256_blendv_ps(first, second, (__m256)(code << 28u));
    }
    return (F)_mm256_i32gather_ps(table, (__m256i)code, 4);
#else
    F value;
    for (int l = 0; l < kLanes; l++) value[l] = table[code[l]];
    return value;
#endif
  }
};

// `double_bits` of a scale's code, 0 for fp16 scales; their block of scales is op.double_block.
template <Table table, int bits, int group_size, bool stored_zeros, int double_bits, int double_block>
struct Scalar {
  static constexpr int64_t kSums = table == Table::integers ? kGroup : 0;
  static constexpr int kTableFloats = bits < 3 ? 8 : 1 << bits;

  static int64_t groups(const Operand& op) {
    return table == Table::row_levels ? 0 : group_size ? (op.cols + group_size - 1) / group_size : 1;
  }
  static int64_t group_width(const Operand& op) {
    return group_size && group_size < op.cols ? group_size : op.cols;
  }
  // Whether codes can be read where they lie, and scales change only between groups of 32.
  static bool whole(const Operand& op) {
    return op.cols % kGroup == 0 && (table == Table::row_levels || group_width(op) % kGroup == 0);
  }

  // The scales of row n, one a group, and their zeros; the table of a row in `levels`.
  static void row_scales(const Operand& op, int64_t n, float* scales, float* zeros) {
    const int64_t count = groups(op), first = n * count;
    if constexpr (double_bits == 0) {
      halves(op.scales, first, count, scales);
    } else {
      uint8_t* codes = reinterpret_cast<uint8_t*>(zeros);
      unpack(op.scale_codes, double_bits, op.rows * count, first, count, codes);
      constexpr float steps = (1 << double_bits) - 1;
      for (int64_t g = 0; g < count; g++)
        scales[g] = op.scale_min + codes[g] / steps * half_at(op.scale_ranges, (first + g) / double_block);
    }
    if constexpr (table != Table::integers) return;
    constexpr float half_range = 1 << (bits - 1);
    if constexpr (stored_zeros) {
      uint8_t* codes = reinterpret_cast<uint8_t*>(zeros) + 3 * count;  // read before they are overwritten
      unpack(op.zeros, bits, op.rows * count, first, count, codes);
      for (int64_t g = 0; g < count; g++) zeros[g] = codes[g];
    } else {
      for (int64_t g = 0; g < count; g++) {
        zeros[g] = half_range;
        scales[g] /= half_range;
      }
    }
  }

  // Where the scales of a row and what else is its own are kept: [scales, zeros, table].
  struct Row {
    float *scales, *zeros, *table_;
    explicit Row(const Operand& op) {
      const int64_t count = (groups(op) + 15) / 16 * 16;
      scales = scratch<3>(2 * count + 256);
      zeros = scales + count;
      table_ = zeros + count;
    }
    const float* read(const Operand& op, int64_t n) {
      if constexpr (table == Table::row_levels) {
        halves(op.scales, n << bits, 1 << bits, table_);
        return table_;
      }
      row_scales(op, n, scales, zeros);
      return op.table;
    }
  };

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    if (!whole(op)) return gemv_any(op, xc, yc, first, last);
    const Planes<bits> planes(op.codes, op.rows * op.cols);
    const float* x_sums = xc + padded(op.cols);
    const int64_t steps = table == Table::row_levels ? op.cols / kGroup : group_width(op) / kGroup;
    Row row(op);
    for (int64_t n = first; n < last; n++) {
      const float* levels = row.read(op, n);
      const Levels<bits> level(table == Table::integers ? row.table_ : levels);
      F total = F{};
      float offset = 0;
      for (int64_t at = 0, g = 0; at < op.cols; g++) {
        F part[kParts];
        for (int i = 0; i < kParts; i++) part[i] = F{};
        float x_sum = 0;
        for (int64_t step = 0; step < steps && at < op.cols; step++, at += kGroup) {
          each_part([&](auto i) {
            const U code = planes.template codes<decltype(i)::value>(n * op.cols + at);
            const F value = table == Table::integers ? to_float(code) : level(code);
            part[i] = fma(value, load<F>(xc + at + i * kLanes), part[i]);
          });
          if constexpr (table == Table::integers) x_sum += x_sums[at / kGroup];
        }
        F group = part[0] + part[1];
        if constexpr (kParts == 4) group += part[2] + part[3];
        if constexpr (table == Table::row_levels) {
          total += group;
        } else {
          total = fma(group, spread(row.scales[g]), total);
          if constexpr (table == Table::integers) offset += row.scales[g] * row.zeros[g] * x_sum;
        }
      }
      yc[n] = sum(total) - offset;
    }
  }

  static void gemv_any(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    const int64_t width = padded(op.cols);
    float* panel = scratch<1>(width);
    for (int64_t n = first; n < last; n++) {
      decode(op, n, n + 1, panel, width);
      product(xc, width, 1, panel, width, 1, width, yc + n, 1);
    }
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    const Planes<bits> planes(op.codes, op.rows * op.cols);
    const bool straight = op.cols % kGroup == 0;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch<4>(padded(op.cols) / 4 + 16));
    Row row(op);
    for (int64_t n = first; n < last; n++, panel += stride) {
      const float* levels = row.read(op, n);
      const Levels<bits> level(table == Table::integers ? row.table_ : levels);
      if (!straight) {
        memset(bytes, 0, padded(op.cols));
        unpack(op.codes, bits, op.rows * op.cols, n * op.cols, op.cols, bytes);
      }
      for (int64_t at = 0; at < stride; at += kGroup)
        each_part([&](auto i) {
          const U code = straight ? planes.template codes<decltype(i)::value>(n * op.cols + at)
                                  : plane_part<8, decltype(i)::value>(bytes + at);
          store(panel + at + i * kLanes, table == Table::integers ? to_float(code) : level(code));
        });
      if constexpr (table != Table::row_levels) {
        const int64_t width = group_width(op);
        for (int64_t g = 0; g < groups(op); g++) {
          const float scale = row.scales[g], zero = table == Table::integers ? row.zeros[g] : 0;
          const int64_t end = (g + 1) * width < op.cols ? (g + 1) * width : op.cols;
          for (int64_t j = g * width; j < end; j++) panel[j] = (panel[j] - zero) * scale;
        }
      }
      for (int64_t j = op.cols; j < stride; j++) panel[j] = 0;
    }
  }
};

}  // namespace reallm
