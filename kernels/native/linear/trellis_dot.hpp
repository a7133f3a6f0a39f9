// One row of x times trellis codes, for machines with AVX2: a vector holds the states of several rows.
//
// Rows of a tile follow each other in memory, the last row first, each in `width` bytes, and a state is at an offset in
// its row that the width determines. So one vector takes the same columns of 8 / kGroups rows: kGroups groups of
// columns of every row (the last columns in group 0), each lane one 32-bit window of the bytes of a row. One load and
// one shuffle give the windows for several columns; then for each column
//
//   state = window >> shift & mask      pairs = sums of pairs of bytes of state M      sum += pairs x
//
// with x in 16 bits: in each block of columns x is rounded to multiples of its largest entry / 32767, with an error of
// at most 2^-16 of that entry. Sums of a block are integers below 2^31, hence exact; scales are applied in float32.
#pragma once

#include "linear.hpp"
#include "simd.hpp"

namespace reallm {

#define REALLM_TAKE __attribute__((always_inline))

constexpr int kTile = 16;
constexpr uint32_t kMultipliers[] = {0x83DCD12D, 0x9E3779B1};

#if defined(REALLM_AVX512) || defined(REALLM_AVX2)

// x of one block of columns, as `Windows::dot` reads it: every entry twice in 32 bits, column 15 - i at entries[at(i)].
struct ShortBlock {
  uint32_t entries[kTile];
  float unit, sum;  // x = unit times the integer; the sum of the rounded x of the block

  static constexpr int at(int i) { return i / 8 + i % 4 * 4 + i % 8 / 4 * 2; }

  void round(const float* x) {
    __m128 v[4];
    for (int i = 0; i < 4; i++) v[i] = load<__m128>(x + 4 * i);
    const __m128 sign = _mm_set1_ps(-0.0f);
    __m128 top = _mm_max_ps(_mm_max_ps(_mm_andnot_ps(sign, v[0]), _mm_andnot_ps(sign, v[1])),
                            _mm_max_ps(_mm_andnot_ps(sign, v[2]), _mm_andnot_ps(sign, v[3])));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    const float most = _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
    const __m128 steps = _mm_set1_ps(most > kTiny ? 32767 / most : 0);
    __m128i rounded[4], total = _mm_setzero_si128();
    __m128 nothing = _mm_setzero_ps();  // NaN if x is not finite, which integers cannot express
    for (int i = 0; i < 4; i++) {
      nothing = _mm_add_ps(nothing, _mm_mul_ps(v[i], _mm_setzero_ps()));
      rounded[i] = _mm_cvtps_epi32(_mm_mul_ps(v[i], steps));
      total = _mm_add_epi32(total, rounded[i]);
      rounded[i] = _mm_or_si128(_mm_slli_epi32(rounded[i], 16), _mm_and_si128(rounded[i], _mm_set1_epi32(0xFFFF)));
    }
    nothing = _mm_add_ps(nothing, _mm_movehl_ps(nothing, nothing));
    unit = most / 32767 + _mm_cvtss_f32(_mm_add_ss(nothing, _mm_movehdup_ps(nothing)));
    total = _mm_add_epi32(total, _mm_unpackhi_epi64(total, total));
    sum = unit * float(_mm_cvtsi128_si32(total) + _mm_extract_epi32(total, 1));
    __m128 a = (__m128)rounded[3], b = (__m128)rounded[1], c = (__m128)rounded[2], d = (__m128)rounded[0];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    store(entries, d), store(entries + 4, c), store(entries + 8, b), store(entries + 12, a);
  }
};

template <int width, int state_bits>
struct Windows {
  static constexpr int values = width % 2 ? 2 : 1, bits = width * values / 2;
  static constexpr int kGroups = width <= 8 ? 2 : 4, kRows = 8 / kGroups, kVectors = kTile / kRows;
  static constexpr int kTogether = 4;  // vectors at once: their windows and sums take half of the registers
  static constexpr int kSteps = kTile / kGroups / values;  // of one group of columns
  static constexpr int kBytes = kTile * width;
  static constexpr int kGroupBits = 8 * width / kGroups;
  // Rows in a piece of 16 bytes; a vector takes one piece twice, or two pieces.
  static constexpr int kPiece = width <= 3 ? kRows : kRows / 2;
  static constexpr bool kAligned = kGroupBits % 8 == 0;  // otherwise every other group starts four bits into a byte

  // First byte, relative to its group, of the window of group 0 that contains step j.
  static constexpr int byte(int j) {
    int start = 0;
    for (int i = 0; i <= j; i++)
      if (bits * i - 8 * start + state_bits + (kAligned ? 0 : 4) > 32) start = bits * i / 8;
    return start;
  }
  static constexpr int shift(int j) { return bits * j - 8 * byte(j); }
  // The group in lane l of a row, in the order of ShortBlock::at.
  static constexpr int group(int l) { return kGroups == 2 ? l : l / 2 + l % 2 * 2; }
  static constexpr int start(int l) { return kGroupBits * group(l) / 8; }

  template <int from>
  REALLM_INLINE static __m128i piece(const uint8_t* ring) {
    if constexpr (from + 16 <= kBytes) return load<__m128i>(ring + from);
    else return _mm_alignr_epi8(load<__m128i>(ring), load<__m128i>(ring + kBytes - 16), from - (kBytes - 16));
  }

  // The windows that start at byte `first` of each row of vector v.
  template <int v, int first>
  REALLM_INLINE static U8 windows(const uint8_t* ring) {
    constexpr int from = v * kRows * width + first;
    __m256i bytes = _mm256_broadcastsi128_si256(piece<from>(ring));
    if constexpr (kPiece < kRows)
      bytes = _mm256_blend_epi32(bytes, _mm256_broadcastsi128_si256(piece<from + kPiece * width>(ring)), 0xF0);
    if constexpr (width != 8) {
      U8 pick;
      for (int l = 0; l < 8; l++) {
        const int byte = l / kGroups % kPiece * width + start(l % kGroups);
        pick[l] = uint32_t(byte + 3) << 24 | (byte + 2) << 16 | (byte + 1) << 8 | byte;
      }
      bytes = _mm256_shuffle_epi8(bytes, (__m256i)pick);
    }
    return (U8)bytes;
  }

  template <int j>
  REALLM_INLINE static U8 state(U8 window) {
    if constexpr (kAligned) {
      if constexpr (shift(j) > 0) window = window >> uint32_t(shift(j));
      if constexpr (shift(j) + state_bits == 32) return window;
    } else {
      U8 by;
      for (int l = 0; l < 8; l++) by[l] = shift(j) + kGroupBits * group(l % kGroups) % 8;
      window = window >> by;
    }
    return window & ((1u << state_bits) - 1);
  }

  // x of the i-th columns of all groups, counted from the last column of each group.
  template <int i>
  REALLM_INLINE static __m256i entries(const ShortBlock& x) {
    const uint32_t* from = x.entries + ShortBlock::at(i);
    if constexpr (kGroups == 2) return _mm256_set1_epi64x(load<int64_t>(from));
    else return _mm256_broadcastsi128_si256(load<__m128i>(from));
  }

  template <int value>
  REALLM_INLINE static void add(const U8* states, __m256i entry, __m256i* sums) {
    for (int v = 0; v < kTogether; v++) {
      const __m256i pairs = _mm256_maddubs_epi16((__m256i)(states[v] * kMultipliers[value]), _mm256_set1_epi8(1));
      sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(pairs, entry));
    }
    // Fixes the order: a compiler that postpones all additions spills the terms to memory.
    for (int v = 0; v < kTogether; v++) asm volatile("" : "+x"(sums[v]));
  }

  // Steps j to the last for kTogether vectors from v.
  template <int v, int j = 0>
  REALLM_INLINE static void steps(const uint8_t* ring, const ShortBlock& x, U8* window, __m256i* sums) {
    if constexpr (j < kSteps) {
      if constexpr (j == 0 || byte(j) != byte(j - 1)) all_windows<v, byte(j)>(ring, window);
      U8 states[kTogether];
      for (int i = 0; i < kTogether; i++) states[i] = state<j>(window[i]);
      if constexpr (values == 2) {
        add<1>(states, entries<2 * j>(x), sums);
        add<0>(states, entries<2 * j + 1>(x), sums);
      } else {
        add<0>(states, entries<j>(x), sums);
      }
      steps<v, j + 1>(ring, x, window, sums);
    }
  }

  template <int v, int first, int i = 0>
  REALLM_INLINE static void all_windows(const uint8_t* ring, U8* window) {
    if constexpr (i < kTogether) {
      window[i] = windows<v + i, first>(ring);
      all_windows<v, first, i + 1>(ring, window);
    }
  }

  // Sums of the rows of kTogether vectors from v, two sums per row.
  template <int v, class Store>
  REALLM_INLINE static void some(const uint8_t* ring, const ShortBlock& x, const Store& put) {
    U8 window[kTogether];
    __m256i total[kTogether];
    for (int i = 0; i < kTogether; i++) total[i] = _mm256_setzero_si256();
    steps<v>(ring, x, window, total);
    if constexpr (kGroups == 2)
      for (int i = 0; i < kTogether; i++) put(v + i, total[i]);
    else
      for (int i = 0; i < kTogether; i += 2)
        put((v + i) / 2, _mm256_permute4x64_epi64(_mm256_hadd_epi32(total[i], total[i + 1]), 0xD8));
  }

  // For row 15 - m of `count` tiles, adds scale sum_c bytesum(state M) x[c] in two parts to sums[2 m] and sums[2 m +
  // 1]. Prefetches the bytes at distance `ahead`: the same tiles of the next block.
  static void dot(const uint8_t* ring, int64_t count, const ShortBlock& x, float scale, float* sums, int64_t ahead) {
    const F8 factor = F8{} + scale;
    for (; count > 0; count--, ring += kBytes, sums += 2 * kTile) {
      const auto put = [=](int v, __m256i total) REALLM_TAKE {
        store(sums + 8 * v, fma((F8)_mm256_cvtepi32_ps(total), factor, load<F8>(sums + 8 * v)));
      };
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ring + line + ahead);
      some<0>(ring, x, put);
      if constexpr (kVectors > kTogether) some<kTogether>(ring, x, put);
    }
  }
};

// y of the 16 rows of a tile from the sums of `dot`, minus `mean`.
REALLM_INLINE void tile_rows(const float* sums, float mean, float* y) {
  const __m256i order = _mm256_setr_epi32(7, 6, 3, 2, 5, 4, 1, 0);
  for (int half = 0; half < 2; half++, sums += kTile) {
    const __m256 pairs = _mm256_hadd_ps(load<__m256>(sums), load<__m256>(sums + 8));
    store(y + 8 - 8 * half, _mm256_sub_ps(_mm256_permutevar8x32_ps(pairs, order), _mm256_set1_ps(mean)));
  }
}

#else

inline void tile_rows(const float* sums, float mean, float* y) {
  for (int row = 0; row < kTile; row++) {
    const float* sum = sums + 2 * (kTile - 1 - row);
    y[row] = sum[0] + sum[1] - mean;
  }
}

#endif

}  // namespace reallm
