// AVX-512 as kernels/native uses it, in plain C++ for a machine that has AVX2: included before a source, it makes the
// source take the way of the AVX-512 tier. Vectors of 64 bytes are the compiler's to cut up; what is an instruction there
// is a loop here, by Intel's description of it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1

namespace avx512 {

template <class T, class V>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(T);
  T lane[kCount];
  explicit Lanes(V vector) { memcpy(lane, &vector, sizeof vector); }
  Lanes() { memset(lane, 0, sizeof lane); }
  T& operator[](int i) { return lane[i]; }
  operator V() const {
    V vector;
    memcpy(&vector, lane, sizeof vector);
    return vector;
  }
};
using Floats = Lanes<float, __m512>;
using Words = Lanes<int32_t, __m512i>;
using Shorts = Lanes<int16_t, __m512i>;
using Bytes = Lanes<int8_t, __m512i>;

inline bool set(__mmask16 mask, int i) { return mask >> i & 1; }
inline int16_t saturated(int x) { return int16_t(x > 32767 ? 32767 : x < -32768 ? -32768 : x); }

inline __m512 setzero_ps() { return Floats(); }
inline __m512 set1_ps(float x) {
  Floats r;
  for (float& lane : r.lane) lane = x;
  return r;
}
inline __m512i set1_epi8(char x) {
  Bytes r;
  for (int8_t& lane : r.lane) lane = x;
  return r;
}
inline __m512i set1_epi16(short x) {
  Shorts r;
  for (int16_t& lane : r.lane) lane = x;
  return r;
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Floats x(a), y(b), r(c);
  for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(x[i], y[i], r[i]);
  return r;
}
inline __m512i maddubs_epi16(__m512i a, __m512i b) {
  Bytes x(a), y(b);
  Shorts r;
  for (int i = 0; i < 32; i++)
    r[i] = saturated(uint8_t(x[2 * i]) * y[2 * i] + uint8_t(x[2 * i + 1]) * y[2 * i + 1]);
  return r;
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  Shorts x(a), y(b);
  Words r;
  for (int i = 0; i < 16; i++) r[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return r;
}
inline __m512i cvtepu8_epi32(__m128i a) {
  Lanes<uint8_t, __m128i> x(a);
  Words r;
  for (int i = 0; i < 16; i++) r[i] = x[i];
  return r;
}
inline __m512i shuffle_epi8(__m512i a, __m512i by) {
  Bytes x(a), pick(by), r;
  for (int i = 0; i < 64; i++) r[i] = pick[i] < 0 ? int8_t(0) : x[i / 16 * 16 + pick[i] % 16];
  return r;
}
inline __m512 maskz_permutexvar_ps(__mmask16 mask, __m512i by, __m512 a) {
  Words pick(by);
  Floats x(a), r;
  for (int i = 0; i < 16; i++) r[i] = set(mask, i) ? x[pick[i] & 15] : 0.0f;
  return r;
}
inline __m512 maskz_broadcast_f32x8(__mmask16 mask, __m256 a) {
  Lanes<float, __m256> x(a);
  Floats r;
  for (int i = 0; i < 16; i++) r[i] = set(mask, i) ? x[i % 8] : 0.0f;
  return r;
}
inline __m512i maskz_broadcast_i32x4(__mmask16 mask, __m128i a) {
  Lanes<int32_t, __m128i> x(a);
  Words r;
  for (int i = 0; i < 16; i++) r[i] = set(mask, i) ? x[i % 4] : 0;
  return r;
}
inline __m512 mask_i32gather_ps(__m512 without, __mmask16 mask, __m512i index, const void* base, int scale) {
  Words at(index);
  Floats r(without);
  for (int i = 0; i < 16; i++)
    if (set(mask, i)) memcpy(&r[i], static_cast<const char*>(base) + int64_t(at[i]) * scale, 4);
  return r;
}

}  // namespace avx512

#define _mm512_setzero_ps avx512::setzero_ps
#define _mm512_set1_ps avx512::set1_ps
#define _mm512_set1_epi8 avx512::set1_epi8
#define _mm512_set1_epi16 avx512::set1_epi16
#define _mm512_fmadd_ps avx512::fmadd_ps
#define _mm512_maddubs_epi16 avx512::maddubs_epi16
#define _mm512_madd_epi16 avx512::madd_epi16
#define _mm512_cvtepu8_epi32 avx512::cvtepu8_epi32
#define _mm512_shuffle_epi8 avx512::shuffle_epi8
#define _mm512_maskz_permutexvar_ps avx512::maskz_permutexvar_ps
#define _mm512_maskz_broadcast_f32x8 avx512::maskz_broadcast_f32x8
#define _mm512_maskz_broadcast_i32x4 avx512::maskz_broadcast_i32x4
#undef _mm512_mask_i32gather_ps
#define _mm512_mask_i32gather_ps avx512::mask_i32gather_ps
