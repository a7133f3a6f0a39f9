// Vectors of eight floats for the decode step, in the compiler's own vector types: the same code on every tier.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace reallm {
namespace step {

constexpr int kLanes = 8;
typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline F8 all(float x) { return F8{x, x, x, x, x, x, x, x}; }

inline F8 load(const float* p) {
  F8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline F8 load(const Bf16* p) {
  H8 half;
  memcpy(&half, p, sizeof half);
  return (F8)(__builtin_convertvector(half, U8) << 16);
}
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline float widen(float x) { return x; }
inline float widen(Fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  uint32_t bits = (rest << 13) + 0x38000000u;   // the exponent's bias, 15 to 127
  if (rest >= 0x7C00) bits += 0x38000000u;      // infinity, NaN
  float y;
  if (rest < 0x0400) {
    y = float(rest) * 0x1p-24f;  // subnormal
    memcpy(&bits, &y, 4);
  }
  bits |= sign;
  memcpy(&y, &bits, 4);
  return y;
}
inline F8 load(const Fp16* p) {
#if defined(__F16C__)
  return (F8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F8 v;
  for (int i = 0; i < kLanes; i++) v[i] = widen(p[i]);
  return v;
#endif
}

inline void store(float* p, F8 v) { memcpy(p, &v, sizeof v); }
// To the nearest, ties to even; no NaN is stored.
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, Bf16& y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y.bits = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// a b + c, rounded once where the machine can.
inline F8 fma(F8 a, F8 b, F8 c) {
#if defined(__AVX2__) && defined(__FMA__)
  return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float sum(F8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
inline float largest(F8 v) {
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
}
inline F8 pick(I8 mask, F8 a, F8 b) { return mask ? a : b; }
inline F8 clip(F8 x, float low, float high) {
  x = pick(x < all(low), all(low), x);
  return pick(x > all(high), all(high), x);
}

// e^x within 2 units in the last place; 0 below -87 (also for -infinity), finite everywhere (Cephes' polynomial).
inline F8 exponential(F8 x) {
  const F8 bounded = clip(x, -87.0f, 88.0f), magic = all(12582912.0f);  // 1.5 2^23: adding it rounds to an integer
  const F8 n = fma(bounded, all(1.44269504088896341f), magic) - magic;
  F8 r = fma(n, all(-0.693359375f), bounded);
  r = fma(n, all(2.12194440e-4f), r);
  F8 p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, all(c));
  p = fma(p, r * r, r + all(1.0f));
  const I8 power = (__builtin_convertvector(n, I8) + 127) << 23;
  return pick(x < all(-87.0f), all(0.0f), p * (F8)power);
}

// tanh x = 1 - 2 / (e^2x + 1): the error is absolute, 2^-23 or so, which is what its uses here need.
inline F8 hyperbolic_tangent(F8 x) { return all(1.0f) - all(2.0f) / (exponential(x + x) + all(1.0f)); }

inline F8 silu(F8 x) { return x / (all(1.0f) + exponential(-x)); }
inline F8 gelu_tanh(F8 x) {
  const F8 inner = all(0.7978845608028654f) * (x + all(0.044715f) * x * x * x);
  return all(0.5f) * x * (all(1.0f) + hyperbolic_tangent(inner));
}

// f on n values from `x` into `y`, eight at a time; the last ones in a vector filled with zeros.
template <class F>
inline void map(const float* x, float* y, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i < n) {
    F8 v = all(0.0f);
    memcpy(&v, x + i, (n - i) * sizeof(float));
    v = f(v);
    memcpy(y + i, &v, (n - i) * sizeof(float));
  }
}

}  // namespace step
}  // namespace reallm
