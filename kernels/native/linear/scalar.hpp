// One code per weight: integers, tables of levels, and rows with a table each (km); scaled by groups of a row.
//
//   table      W = level[code] scale             int, uint   W = (code - zero) scale, with zero = 2^(bits - 1) for int
//   double     scale = scale_min + scale_code / (2^c - 1) range           km          W = level_n[code]
//
// 32 codes are read at once where rows consist of whole groups of 32 codes and scales change only between these; other
// rows are unpacked to bytes first. A scale multiplies the finished sum of its group. The zero point of integers is
// subtracted there too, times the sum of the x of the group (`prepare` writes these sums after xc).
#pragma once

#include "codes.hpp"
#include "kernel.hpp"
#include "linear.hpp"
#include "scalar_dot.hpp"

namespace reallm {

enum class Table { integers, levels, row_levels };

// Looks levels up by code: in registers up to 4 bits, otherwise gathered from memory. `table` has max(8, 2^bits)
// floats.
template <int bits>
struct Levels {
  const float* table;
#if defined(REALLM_AVX512)
  __m512 low;
#elif defined(REALLM_AVX2)
  __m256 low;
  __m256i bytes[4];  // byte i of each of 16 levels, twice
#endif

  REALLM_INLINE explicit Levels(const float* from) : table(from) {
#if defined(REALLM_AVX512)
    if constexpr (bits == 4) low = load<__m512>(from);
    else low = _mm512_maskz_broadcast_f32x8(0xFFFF, load<__m256>(from));
#elif defined(REALLM_AVX2)
    low = load<__m256>(from);
    if constexpr (bits == 4) {
      const __m128i gather = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      __m128 part[4];
      for (int i = 0; i < 4; i++) part[i] = _mm_castsi128_ps(_mm_shuffle_epi8(load<__m128i>(from + 4 * i), gather));
      _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
      for (int i = 0; i < 4; i++) bytes[i] = _mm256_broadcastsi128_si256(_mm_castps_si128(part[i]));
    }
#endif
  }

  REALLM_INLINE F operator()(U code) const {
#if defined(REALLM_AVX512)
    if constexpr (bits <= 4) return (F)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)code, low);
    return (F)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, (__m512i)code, table, 4);
#elif defined(REALLM_AVX2)
    if constexpr (bits < 4) return (F)_mm256_permutevar8x32_ps(low, (__m256i)code);
    return (F)_mm256_i32gather_ps(table, (__m256i)code, 4);
#else
    F value;
    for (int l = 0; l < kLanes; l++) value[l] = table[code[l]];
    return value;
#endif
  }

#if defined(REALLM_AVX2)
  // The levels of 32 codes of 4 bits: the bytes of the floats are looked up separately, then interleaved. Codes are
  // first arranged so that the interleaving of each half leaves the floats in order.
  REALLM_INLINE void sixteen(const uint8_t* from, F* values) const {
    const __m256i pick = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                          2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    const __m256i twice = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(from)), pick);
    const __m256i even = _mm256_and_si256(twice, _mm256_set1_epi16(0x000F));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(twice, 4), _mm256_set1_epi16(0x0F00));
    const __m256i code = _mm256_or_si256(even, odd);
    __m256i byte[4];
    for (int i = 0; i < 4; i++) byte[i] = _mm256_shuffle_epi8(bytes[i], code);
    const __m256i low01 = _mm256_unpacklo_epi8(byte[0], byte[1]), low23 = _mm256_unpacklo_epi8(byte[2], byte[3]);
    const __m256i high01 = _mm256_unpackhi_epi8(byte[0], byte[1]), high23 = _mm256_unpackhi_epi8(byte[2], byte[3]);
    values[0] = (F)_mm256_unpacklo_epi16(low01, low23);
    values[1] = (F)_mm256_unpackhi_epi16(low01, low23);
    values[2] = (F)_mm256_unpacklo_epi16(high01, high23);
    values[3] = (F)_mm256_unpackhi_epi16(high01, high23);
  }
#endif
};

// `stored_zeros`: uint. `double_bits`: bits of the code of a scale, 0 for fp16 scales; `double_block` scales share a
// range.
template <Table table, int bits, int group_size, bool stored_zeros, int double_bits, int double_block>
struct Scalar {
  static constexpr bool kIntegers = table == Table::integers, kOwnLevels = table == Table::row_levels;
  static constexpr bool kWholeGroups = kOwnLevels || group_size % kGroup == 0;
  static constexpr int64_t kSums = !kIntegers ? 0 : group_size == 0 ? int64_t(1) << 40 : kWholeGroups ? group_size : kGroup;
  static constexpr float kUnit = kIntegers && !stored_zeros ? 1.0f / (1 << (bits - 1)) : 1.0f;  // step of a code
  static constexpr float kZero = 1 << (bits - 1);                                              // zero point of int

#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  static constexpr bool kShort = kWholeGroups && (kIntegers || bits <= 4);
#else
  static constexpr bool kShort = false;
#endif
  static constexpr int64_t kLayout = kShort ? 16 + kByteOrder<bits> : kSums << 8;

  static int64_t behind(int64_t width) {
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
    if constexpr (kShort) return Short<bits>::floats(width);
#endif
    return kSums ? (width + kSums - 1) / kSums : 0;
  }

  // Writes x as scalar_dot.hpp needs it, or, where that is not used, sums of x, one per kSums columns.
  static void append(const float* xc, int64_t width, float* to) {
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
    if constexpr (kShort) return Short<bits>::write(xc, width, to);
#endif
    for (int64_t g = 0; kSums && g * kSums < width; g++) {
      float total = 0;
      for (int64_t j = g * kSums; j < width && j - g * kSums < kSums; j++) total += xc[j];
      to[g] = total;
    }
  }

  static int64_t groups(const Operand& op) { return group_size ? (op.cols + group_size - 1) / group_size : 1; }
  static int64_t group_width(const Operand& op) { return group_size && group_size < op.cols ? group_size : op.cols; }
  // Whether codes can be read in place, and scales change only between groups of 32.
  static bool whole(const Operand& op) { return op.cols % kGroup == 0 && kWholeGroups; }

  // The scales and zero points of one row, one per group, or its table. They are read for several rows at once.
  struct Row {
    const int64_t end, count, together;
    float *scales = nullptr, *zeros = nullptr, *levels, *const held;
    int64_t from = 0, to = 0;

    // Rows from `last` on are not read.
    Row(const Operand& op, int64_t last)
        : end(last), count(groups(op)), together(count < 1024 ? 2048 / count : 1),
          levels(scratch<3>(2 * together * count + 16)), held(levels) {}

    REALLM_INLINE Levels<bits> read(const Operand& op, int64_t n) {
      if constexpr (kOwnLevels) {
        halves(op.scales, n << bits, 1 << bits, levels);
        return Levels<bits>(levels);
      }
      if (n < from || n >= to) fill(op, n);
      scales = held + (n - from) * count;
      zeros = scales + together * count;
      return Levels<bits>(kIntegers ? scales : op.table);  // integers use no levels
    }

    void fill(const Operand& op, int64_t n) {
      from = n, to = n + together < end ? n + together : end;
      const int64_t first = n * count, last = to * count;
      if constexpr (double_bits == 0) {
        halves(op.scales, first, last - first, held);
      } else {
        unpack_floats<double_bits>(op.scale_codes, op.rows * count, first, last - first, held);
        constexpr float steps = (1 << double_bits) - 1;
        for (int64_t i = first; i < last;) {
          const int64_t block = i / double_block, stop = (block + 1) * double_block;
          const float range = half_at(op.scale_ranges, block);
          for (; i < stop && i < last; i++) held[i - first] = op.scale_min + held[i - first] / steps * range;
        }
      }
      if constexpr (stored_zeros)
        unpack_floats<bits>(op.zeros, op.rows * count, first, last - first, held + together * count);
    }

    // Part of the sum of a row of integers due to zero points: sum_g scale_g zero_g (sum of the x of the group).
    REALLM_INLINE float offset(const float* x_sums) const {
      float total;
      if constexpr (stored_zeros)
        for (int64_t g = 0; g < count; g++) scales[g] *= zeros[g];
      product_tile<1, 1>(scales, 0, x_sums, 0, count, &total, 0, false);
      return stored_zeros ? total : total * kZero;
    }
  };

  // Values of 32 codes, before scale and zero point.
  REALLM_INLINE static void values(const Planes<bits>& planes, uint64_t group, const Levels<bits>& level, F* to) {
#if defined(REALLM_AVX2)
    if constexpr (!kIntegers && bits == 4) return level.sixteen(planes.plane[0] + group * 16, to);
#endif
    to[0] = value<0>(planes, group, level);
    to[1] = value<1>(planes, group, level);
    if constexpr (kParts == 4) {
      to[2] = value<2>(planes, group, level);
      to[3] = value<3>(planes, group, level);
    }
  }

  template <int part>
  REALLM_INLINE static F value(const Planes<bits>& planes, uint64_t group, const Levels<bits>& level) {
    const U code = planes.template codes<part>(group);
    if constexpr (kIntegers) return to_float(code);
    else return level(code);
  }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    if (!whole(op)) return gemv_any(op, xc, yc, first, last);
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
    if constexpr (kShort) return gemv_short(op, xc, yc, first, last);
#endif
    const int64_t count = kOwnLevels ? 1 : groups(op), all = op.cols / kGroup;
    const int64_t steps = kOwnLevels ? all : group_width(op) / kGroup;
    const float* x_sums = xc + padded(op.cols);
    Row row(op, last);
    for (int64_t n = first; n < last; n++) {
      const Planes<bits> planes(op.codes, op.rows * op.cols, n * op.cols);
      const Levels<bits> level = row.read(op, n);
      const float *x = xc, *scales = row.scales;
      F total = F{};
      int64_t at = 0;
      for (int64_t g = 0; g < count; g++) {
        F even = F{}, odd = F{}, v[kParts];
        const int64_t end = at + steps < all ? at + steps : all;
        for (; at < end; at++, x += kGroup) {
          values(planes, at, level, v);
          even = fma(v[0], load<F>(x), even);
          odd = fma(v[1], load<F>(x + kLanes), odd);
          if constexpr (kParts == 4) {
            even = fma(v[2], load<F>(x + 2 * kLanes), even);
            odd = fma(v[3], load<F>(x + 3 * kLanes), odd);
          }
        }
        total = kOwnLevels ? even + odd : fma(even + odd, spread(scales[g]), total);
      }
      float result = sum(total);
      if constexpr (kIntegers) result -= row.offset(x_sums);
      yc[n] = result * kUnit;
    }
  }

#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  static void gemv_short(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    const int64_t all = op.cols / kGroup, steps = kOwnLevels ? all : group_width(op) / kGroup;
    const Short<bits> x(xc + padded(op.cols), padded(op.cols));
    Row row(op, last);
    float* const factors = scratch<2>(Short<bits>::groups(padded(op.cols)));
    for (int64_t i = 0; i < Short<bits>::groups(padded(op.cols)); i++) factors[i] = kOwnLevels ? x.units[i] : 0;
    // Levels of several rows are prepared at once: a single row would wait for the maximum of its levels.
    ShortLevels levels[kOwnLevels ? kRowBlock : 1] = {};
    if constexpr (table == Table::levels) levels[0] = ShortLevels::of<bits, false>(op.table);
    for (int64_t n = first; n < last; n++) {
      const Planes<bits> planes(op.codes, op.rows * op.cols, n * op.cols);
      const int slot = kOwnLevels ? (n - first) % kRowBlock : 0;
      if constexpr (kOwnLevels)
        for (int64_t r = n; slot == 0 && r < last && r < n + kRowBlock; r++) {
          row.read(op, r);
          levels[r - n] = ShortLevels::of<bits, true>(row.levels);
        }
      const ShortLevels& own = levels[slot];
      if constexpr (!kOwnLevels) {
        row.read(op, n);
        spread_scales(row.scales, x.units, all, steps, factors);
      }
      F8 even = F8{}, odd = F8{};
      int64_t at = 0;
      for (; at + 2 <= all; at += 2) {
        if constexpr (bits >= 4) __builtin_prefetch(planes.plane[0] + (bits == 8 ? 32 : 16) * at + kAhead);
        even = fma(x.template dot<kIntegers>(planes, at, own), all8(factors[at]), even);
        odd = fma(x.template dot<kIntegers>(planes, at + 1, own), all8(factors[at + 1]), odd);
      }
      if (at < all) even = fma(x.template dot<kIntegers>(planes, at, own), all8(factors[at]), even);
      F8 zeros = F8{};
      if constexpr (stored_zeros) spread_scales(row.zeros, factors, all, steps, factors);
      for (int64_t i = 0; kIntegers && i < all; i += 8) zeros = fma(load<F8>(factors + i), load<F8>(x.sums + i), zeros);
      const F8 total = even + odd - (stored_zeros ? zeros : all8(kIntegers ? kZero : 0) * zeros);
      yc[n] = sum(total) * (kIntegers ? kUnit : own.unit);
    }
  }
#endif

  static void gemv_any(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    const int64_t width = padded(op.cols);
    float* panel = scratch<1>(width);
    for (int64_t n = first; n < last; n++) {
      decode(op, n, n + 1, panel, width);
      product(xc, width, 1, panel, width, 1, width, yc + n, 1);
    }
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    const int64_t cols = op.cols, width = group_width(op);
    const bool straight = cols % kGroup == 0;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch<4>(padded(cols) / 4 + 16));
    Row row(op, last);
    for (int64_t n = first; n < last; n++, panel += stride) {
      const Levels<bits> level = row.read(op, n);
      if (straight) {
        const Planes<bits> planes(op.codes, op.rows * cols, n * cols);
        F v[kParts];
        for (int64_t at = 0; at < cols / kGroup; at++) {
          values(planes, at, level, v);
          for (int i = 0; i < kParts; i++) store(panel + at * kGroup + i * kLanes, v[i]);
        }
      } else {
        unpack(op.codes, bits, op.rows * cols, n * cols, cols, bytes);
        for (int64_t j = 0; j < cols; j++) panel[j] = kIntegers ? bytes[j] : level.table[bytes[j]];
      }
      for (int64_t g = 0; !kOwnLevels && g < groups(op); g++) {
        const float scale = row.scales[g] * kUnit;
        float zero = 0;
        if constexpr (kIntegers) zero = stored_zeros ? row.zeros[g] : kZero;
        const int64_t end = (g + 1) * width < cols ? (g + 1) * width : cols;
        for (int64_t j = g * width; j < end; j++) panel[j] = (panel[j] - zero) * scale;
      }
      for (int64_t j = cols; j < stride; j++) panel[j] = 0;
    }
  }
};

}  // namespace reallm
