// One row of x times scalar codes of up to 4 bits, or integers of up to 8, for machines with AVX2.
//
// A shift and a mask of each plane turn 32 codes into 32 bytes, in an order that depends on the planes. x is stored in
// the same order, in 16 bits: 32 columns are rounded to multiples of their largest entry / 32767, with an error of at
// most 2^-16 of that entry. Levels are likewise rounded to multiples of the largest / 16383 and their two bytes looked
// up separately. Sums of 32 products are integers below 2^31, hence exact; units and scales are multiplied in float32.
#pragma once

#include "codes.hpp"

namespace reallm {

// Widths of codes with the same kByteOrder need x in the same order.
template <int bits>
constexpr int64_t kByteOrder = bits == 8 ? 1 : bits >= 4 ? 2 : bits >= 2 ? 3 : 4;

#if defined(REALLM_AVX512) || defined(REALLM_AVX2)

// The index of the code that becomes byte p of 32; the byte that entry e of two vectors of 16-bit entries comes from.
template <int bits>
constexpr int byte_code(int p) {
  if (bits == 8) return p;
  if (bits >= 4) return p % 16 * 2 + p / 16;
  if (bits >= 2) return p % 8 * 4 + p / 8;
  return p % 4 * 8 + p / 4;
}
constexpr int entry_byte(int e) { return e % 16 / 8 * 16 + e / 16 * 8 + e % 8; }

// Where a one-bit plane has the bit for each of the 32 bytes: the byte in the plane, and a mask of the bit.
template <int bits>
struct Single {
  uint8_t byte[32] = {}, mask[32] = {};
  constexpr Single() {
    for (int p = 0; p < 32; p++) byte[p] = byte_code<bits>(p) / 8, mask[p] = uint8_t(1 << byte_code<bits>(p) % 8);
  }
};
template <int bits>
alignas(32) constexpr Single<bits> kSingle;

// The 32 codes of a group as bytes.
template <int bits>
struct Bytes {
  // planes.plane[i] are the planes of `bits`, widest first.
  REALLM_INLINE static __m256i of(const Planes<bits>& planes, uint64_t group) {
    if constexpr (bits == 8) {
      return load<__m256i>(planes.plane[0] + 32 * group);
    } else if constexpr (bits >= 4) {
      __m256i v = _mm256_broadcastsi128_si256(load<__m128i>(planes.plane[0] + 16 * group));
      v = _mm256_and_si256(_mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), _mm256_set1_epi8(15));
      if constexpr (bits & 2) v = _mm256_or_si256(v, pairs(planes.plane[1] + 8 * group));
      if constexpr (bits & 1) v = _mm256_or_si256(v, top(planes.plane[(bits & 2) ? 2 : 1] + 4 * group));
      return v;
    } else if constexpr (bits >= 2) {
      __m256i v = _mm256_set1_epi64x(load<int64_t>(planes.plane[0] + 8 * group));
      v = _mm256_and_si256(_mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 2, 4, 6)), _mm256_set1_epi8(3));
      if constexpr (bits & 1) v = _mm256_or_si256(v, top(planes.plane[1] + 4 * group));
      return v;
    } else {
      const __m256i v = _mm256_set1_epi32(load<int32_t>(planes.plane[0] + 4 * group));
      return _mm256_and_si256(_mm256_srlv_epi32(v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), _mm256_set1_epi8(1));
    }
  }

 private:
  // Two-bit codes as bits 4 and 5. Of two result bytes from one source byte, the first has its code at bit 0 or 2
  // there, the second at bit 4 or 6.
  REALLM_INLINE static __m256i pairs(const uint8_t* from) {
    const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7,  //
                                           0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi64x(load<int64_t>(from)), twice);
    v = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    return _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(v, 4), _mm256_set1_epi16(0x0030)),
                           _mm256_and_si256(v, _mm256_set1_epi16(0x3000)));
  }

  // One-bit codes as the highest bit.
  REALLM_INLINE static __m256i top(const uint8_t* from) {
    const __m256i byte = load<__m256i>(kSingle<bits>.byte), mask = load<__m256i>(kSingle<bits>.mask);
    const __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(from)), byte);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(v, mask), mask);
    return _mm256_and_si256(set, _mm256_set1_epi8(1 << (bits - 1)));
  }
};

// Up to 16 levels in 15 bits: their low bytes and their high bytes.
struct ShortLevels {
  __m256i low, high;
  float unit;

  // For fp16 levels the unit is a power of two, so that levels above a sixteenth of the largest are exact.
  template <int bits, bool halves>
  REALLM_INLINE static ShortLevels of(const float* levels) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const int third = bits > 1 ? -1 : 0, fifth = bits > 2 ? -1 : 0;
    const __m256i there = _mm256_setr_epi32(-1, -1, third, third, fifth, fifth, fifth, fifth);
    const __m256 a = _mm256_maskload_ps(levels, there);  // reads only the levels that exist
    const __m256 b = bits == 4 ? load<__m256>(levels + (bits == 4 ? 8 : 0)) : a;
    const __m256 all = _mm256_max_ps(_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b));
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    const float most = _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
    float unit = most / 16383;
    if (halves) {
      uint32_t pattern;
      memcpy(&pattern, &most, 4);
      pattern = (pattern & 0x7F800000) - (13u << 23);  // exponents of fp16 values are far above the lowest of float32
      memcpy(&unit, &pattern, 4);
    }
    const __m256 steps = _mm256_set1_ps(most > 0 ? 1 / unit : 0);
    const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(a, steps)), y = _mm256_cvtps_epi32(_mm256_mul_ps(b, steps));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xD8);  // level i in word i
    const __m256i bytes = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i apart = _mm256_shuffle_epi8(words, bytes);
    return {_mm256_permute4x64_epi64(apart, 0x88), _mm256_permute4x64_epi64(apart, 0xDD), most > 0 ? unit : 0};
  }
};

// x of `width` columns: 16-bit entries [width]; per group of 32 the unit and the sum of the rounded x, both padded with
// zeros to a multiple of eight groups.
template <int bits>
struct Short {
  const int16_t* entries;
  const float *units, *sums;

  static int64_t groups(int64_t width) { return (width / kGroup + 7) / 8 * 8; }
  static int64_t floats(int64_t width) { return width / 2 + 2 * groups(width); }

  Short(const float* at, int64_t width)
      : entries(reinterpret_cast<const int16_t*>(at)), units(at + width / 2), sums(units + groups(width)) {}

  static void write(const float* xc, int64_t width, float* to) {
    int16_t* entries = reinterpret_cast<int16_t*>(to);
    float *units = to + width / 2, *sums = units + groups(width);
    for (int64_t i = 0; i < 2 * groups(width); i++) units[i] = 0;
    for (int64_t i = 0; i < width / kGroup; i++, xc += kGroup, entries += kGroup) {
      const __m256 sign = _mm256_set1_ps(-0.0f);
      __m256 v[4], most = _mm256_setzero_ps();
      F8 nothing = F8{};  // NaN if x is not finite, which integers cannot express
      for (int j = 0; j < 4; j++) {
        v[j] = load<__m256>(xc + 8 * j);
        nothing += (F8)v[j] * all8(0);
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[j]));
      }
      float largest = 0;
      for (int l = 0; l < 8; l++) largest = most[l] > largest ? most[l] : largest;
      const __m256 steps = _mm256_set1_ps(largest > kTiny ? 32767 / largest : 0);
      int32_t rounded[kGroup], total = 0;
      for (int j = 0; j < 4; j++) store(rounded + 8 * j, _mm256_cvtps_epi32(_mm256_mul_ps(v[j], steps)));
      for (int e = 0; e < kGroup; e++) {
        entries[e] = int16_t(rounded[byte_code<bits>(entry_byte(e))]);
        total += rounded[e];
      }
      units[i] = largest / 32767 + sum(nothing);
      sums[i] = float(total);
    }
  }

  // Products of the codes, or levels, of group `at` with its entries: eight integers whose sum is the dot product.
  template <bool integers>
  REALLM_INLINE F8 dot(const Planes<bits>& planes, int64_t at, const ShortLevels& levels) const {
    const __m256i codes = Bytes<bits>::of(planes, at);
    const __m256i low = integers ? codes : _mm256_shuffle_epi8(levels.low, codes);
    const __m256i high = integers ? _mm256_setzero_si256() : _mm256_shuffle_epi8(levels.high, codes);
    const int16_t* x = entries + at * kGroup;
    const __m256i a = _mm256_madd_epi16(_mm256_unpacklo_epi8(low, high), load<__m256i>(x));
    const __m256i b = _mm256_madd_epi16(_mm256_unpackhi_epi8(low, high), load<__m256i>(x + 16));
    return (F8)_mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
  }
};

// factors[i] = units[i] scales[i / steps] for `count` groups of 32.
REALLM_INLINE void spread_scales(const float* scales, const float* units, int64_t count, int64_t steps, float* factors) {
  int64_t i = 0;
  if (steps == 2)
    for (; i + 8 <= count; i += 8) {
      const __m256 four = _mm256_castps128_ps256(load<__m128>(scales + i / 2));
      const __m256 twice = _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
      store(factors + i, _mm256_mul_ps(twice, load<__m256>(units + i)));
    }
  for (; i < count; i++) factors[i] = units[i] * scales[steps == 2 ? i / 2 : steps == 4 ? i / 4 : i / steps];
}

#endif

}  // namespace reallm
