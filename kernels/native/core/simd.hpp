// Vectors of the tier that a file is compiled for: kLanes floats or 32-bit integers, 16 with AVX-512, otherwise 8.
// Most operations use GCC's vector extensions, which fall back to what the machine has; the others use intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define REALLM_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define REALLM_AVX2 1
#endif

#define REALLM_INLINE inline __attribute__((always_inline))

namespace reallm {

#if defined(REALLM_AVX512)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

constexpr float kTiny = 1e-30f;  // where x is rounded to integers, a block of x with no larger entry becomes zero

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));

template <class V, class T>
REALLM_INLINE V load(const T* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
REALLM_INLINE void store(T* to, V value) {
  memcpy(to, &value, sizeof value);
}

REALLM_INLINE U spread(uint32_t value) { return U{} + value; }
// Written out, because 0 + x is an addition, which turns -0 into +0.
REALLM_INLINE F8 all8(float x) { return F8{x, x, x, x, x, x, x, x}; }
#if defined(REALLM_AVX512)
REALLM_INLINE F spread(float value) { return (F)_mm512_set1_ps(value); }
#else
REALLM_INLINE F spread(float value) { return all8(value); }
#endif

// a b + c, rounded once where the machine can.
template <class V>
REALLM_INLINE V fma(V a, V b, V c) {
#if defined(REALLM_AVX512)
  if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(V) == 16) return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#endif
  return a * b + c;
}

template <class V>
REALLM_INLINE float sum(V v) {
  if constexpr (sizeof(V) == 64) {
    F8 low, high;
    memcpy(&low, &v, 32);
    memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
    return sum(low + high);
  } else if constexpr (sizeof(V) == 32) {
    F4 low, high;
    memcpy(&low, &v, 16);
    memcpy(&high, reinterpret_cast<const char*>(&v) + 16, 16);
    return sum(low + high);
  } else {
    return (v[0] + v[2]) + (v[1] + v[3]);
  }
}

// Converts integers below 2^31 to floats; for these a signed conversion is correct.
REALLM_INLINE F to_float(U v) { return __builtin_convertvector((I)v, F); }

// pair_sums, then sum_of_pairs: the sum of the four bytes of every entry.
REALLM_INLINE U pair_sums(U v) {
#if defined(REALLM_AVX512)
  return (U)_mm512_maddubs_epi16((__m512i)v, _mm512_set1_epi8(1));
#elif defined(REALLM_AVX2)
  return (U)_mm256_maddubs_epi16((__m256i)v, _mm256_set1_epi8(1));
#else
  return (v & 0x00FF00FF) + ((v >> 8) & 0x00FF00FF);
#endif
}

REALLM_INLINE U sum_of_pairs(U v) {
#if defined(REALLM_AVX512)
  return (U)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1));
#elif defined(REALLM_AVX2)
  return (U)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1));
#else
  return (v & 0xFFFF) + (v >> 16);
#endif
}

// IEEE half precision, bit pattern to value.
REALLM_INLINE float half(uint16_t bits) {
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
  uint32_t pattern;
  float value;
  if (magnitude >= 0x7C00) {
    pattern = 0x7F800000 | (magnitude & 0x3FF) << 13;
  } else {
    pattern = (magnitude << 13) + (uint32_t(112) << 23);
    if (magnitude < 0x400) {  // subnormal: a multiple of 2^-24
      value = float(magnitude) * 5.9604644775390625e-8f;
      memcpy(&pattern, &value, 4);
    }
  }
  pattern |= sign;
  memcpy(&value, &pattern, 4);
  return value;
#endif
}

REALLM_INLINE float half_at(const void* from, int64_t index) {
  return half(load<uint16_t>(static_cast<const uint8_t*>(from) + 2 * index));
}

// Converts `count` fp16 values from index `first` to floats; reads no byte beyond them.
inline void halves(const void* from, int64_t first, int64_t count, float* to) {
  int64_t i = 0;
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  const uint8_t* bytes = static_cast<const uint8_t*>(from) + 2 * first;
  for (; i + 8 <= count; i += 8) store(to + i, _mm256_cvtph_ps(load<__m128i>(bytes + 2 * i)));
#endif
  for (; i < count; i++) to[i] = half_at(from, first + i);
}

inline uint16_t to_half(float value) {
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t pattern;
  memcpy(&pattern, &value, 4);
  const uint32_t sign = pattern >> 16 & 0x8000;
  pattern &= 0x7FFFFFFF;
  if (pattern > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (pattern >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and above round to infinity
  if (pattern < 0x38800000) {                                 // below 2^-14: multiples of 2^-24, rounded by an addition
    float magnitude;
    memcpy(&magnitude, &pattern, 4);
    magnitude += 0.5f;
    memcpy(&pattern, &magnitude, 4);
    return uint16_t(sign | (pattern - 0x3F000000));
  }
  pattern += 0xFFF + (pattern >> 13 & 1);
  return uint16_t(sign | ((pattern >> 13) - (uint32_t(112) << 10)));
#endif
}

// Scratch memory of the calling thread, kept between calls. A larger request discards the contents of the slot.
template <int slot>
inline float* scratch(int64_t floats) {
  struct Held {
    float* memory = nullptr;
    int64_t size = 0;
    ~Held() { ::operator delete(memory, std::align_val_t(64)); }
  };
  static thread_local Held held;
  if (held.size < floats) {
    ::operator delete(held.memory, std::align_val_t(64));
    held.memory = nullptr;
    held.size = 0;
    held.memory = static_cast<float*>(::operator new(sizeof(float) * floats, std::align_val_t(64)));
    held.size = floats;
  }
  return held.memory;
}

}  // namespace reallm
