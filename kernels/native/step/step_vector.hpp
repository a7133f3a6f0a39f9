// Vectors of eight floats for the decode step, in addition to simd.hpp: exponentials, and the number types of the
// cache.
#pragma once

#include <cmath>
#include <initializer_list>

#include "simd.hpp"

namespace reallm {
namespace step {

constexpr int kEight = 8;
typedef uint16_t H8 __attribute__((vector_size(16)));

struct Bf16 {
  uint16_t bits;
};

REALLM_INLINE F8 all(float x) { return all8(x); }
REALLM_INLINE F8 load(const float* from) { return reallm::load<F8>(from); }
REALLM_INLINE F8 load(const Bf16* from) { return (F8)(__builtin_convertvector(reallm::load<H8>(from), U8) << 16); }
// Rounds to nearest, ties to even; x must not be NaN.
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, Bf16& y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y.bits = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float largest(F8 v) {
  float m = v[0];
  for (int i = 1; i < kEight; i++) m = v[i] > m ? v[i] : m;
  return m;
}
inline F8 pick(I8 mask, F8 a, F8 b) { return mask ? a : b; }
inline F8 clip(F8 x, float low, float high) {
  x = pick(x < all(low), all(low), x);
  return pick(x > all(high), all(high), x);
}

// e^x within 2 units in the last place; 0 below -87, -infinity included, and finite everywhere (polynomial from
// Cephes).
inline F8 exponential(F8 x) {
  const F8 bounded = clip(x, -87.0f, 88.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
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

// tanh x = 1 - 2 / (e^2x + 1), with an absolute error of about 2^-23, which suffices for the uses here.
inline F8 hyperbolic_tangent(F8 x) { return all(1.0f) - all(2.0f) / (exponential(x + x) + all(1.0f)); }

inline F8 silu(F8 x) { return x / (all(1.0f) + exponential(-x)); }
inline F8 gelu_tanh(F8 x) {
  const F8 inner = all(0.7978845608028654f) * (x + all(0.044715f) * x * x * x);
  return all(0.5f) * x * (all(1.0f) + hyperbolic_tangent(inner));
}

// y[i] = f(x[i]) for n values, eight at a time; the last vector is filled up with zeros.
template <class F>
inline void map(const float* x, float* y, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kEight <= n; i += kEight) store(y + i, f(load(x + i)));
  if (i < n) {
    F8 v = all(0.0f);
    memcpy(&v, x + i, (n - i) * sizeof(float));
    v = f(v);
    memcpy(y + i, &v, (n - i) * sizeof(float));
  }
}

}  // namespace step
}  // namespace reallm
