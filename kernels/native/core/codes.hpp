// Planar codes (kernels/formats/bit_planes.py): a code of `bits` bits is cut into planes of 8, 4, 2 and 1 bits. The
// widest plane comes first and holds the lowest bits; within a plane, codes follow each other from the lowest bit of
// each byte.
#pragma once

#include "simd.hpp"

namespace reallm {

constexpr int kGroup = 32;  // codes read at once: whole 32-bit words of every plane
constexpr int kParts = kGroup / kLanes;
constexpr int kAhead = 1024;  // distance of prefetches, in bytes

// Unpacks `count` codes from index `first`, at any alignment.
template <class T>
inline void unpack(const void* from, int bits, int64_t total, int64_t first, int64_t count, T* to) {
  const uint8_t* plane = static_cast<const uint8_t*>(from);
  int shift = 0;
  for (int64_t i = 0; i < count; i++) to[i] = 0;
  for (int width = 16; width > 0; width /= 2) {
    if (!(bits & width)) continue;
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = (first + i) * width;
      const uint32_t raw = width == 16 ? plane[at / 8] | plane[at / 8 + 1] << 8 : plane[at / 8] >> at % 8;
      to[i] = T(to[i] | (raw & ((1u << width) - 1)) << shift);
    }
    plane += 4 * ((total * width + 31) / 32);
    shift += width;
  }
}

// Codes [kLanes part, kLanes (part + 1)) of the 32 codes of a plane at `from`.
template <int width, int part>
REALLM_INLINE U plane_part(const uint8_t* from) {
  if constexpr (width == 8) {
#if defined(REALLM_AVX512)
    return (U)_mm512_cvtepu8_epi32(load<__m128i>(from + part * kLanes));
#elif defined(REALLM_AVX2)
    return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + part * kLanes)));
#else
    U value;
    for (int l = 0; l < kLanes; l++) value[l] = from[part * kLanes + l];
    return value;
#endif
  } else {
    constexpr int bit = part * kLanes * width, word = bit / 32 * 4;
    U value = spread(load<uint32_t>(from + word)), shift;
    if constexpr (kLanes * width > 32) {  // two words
      const U next = spread(load<uint32_t>(from + word + 4));
      for (int l = 8; l < kLanes; l++) value[l] = next[l];
    }
    for (int l = 0; l < kLanes; l++) shift[l] = (bit + l * width) % 32;
    return value >> shift & ((1u << width) - 1);
  }
}

// The address of a code in each plane of a matrix; group i is the i-th group of 32 codes from there.
template <int bits>
struct Planes {
  const uint8_t* plane[4];

  // Starts at code `first`, a multiple of 32, of a matrix of `total` codes.
  Planes(const void* from, uint64_t total, uint64_t first) {
    const uint8_t* next = static_cast<const uint8_t*>(from);
    int i = 0;
    for (int width = 8; width > 0; width /= 2) {
      if (!(bits & width)) continue;
      plane[i++] = next + first / 8 * width;
      next += 4 * ((total * width + 31) / 32);
    }
  }

  // Codes [kLanes part, kLanes (part + 1)) of a group.
  template <int part>
  REALLM_INLINE U codes(uint64_t group) const {
    U value = U{};
    int i = 0, shift = 0;
    each<8, part>(group, i, shift, value);
    each<4, part>(group, i, shift, value);
    each<2, part>(group, i, shift, value);
    each<1, part>(group, i, shift, value);
    return value;
  }

 private:
  template <int width, int part>
  REALLM_INLINE void each(uint64_t group, int& i, int& shift, U& value) const {
    if constexpr ((bits & width) != 0) {
      value |= plane_part<width, part>(plane[i++] + group * (4 * width)) << uint32_t(shift);
      shift += width;
    }
  }
};

// Unpacks `count` of `total` codes from index `first`, at any alignment, to floats.
template <int bits>
inline void unpack_floats(const void* from, int64_t total, int64_t first, int64_t count, float* to) {
  const Planes<bits> planes(from, total, 0);
  for (const int64_t last = first + count; first < last;) {
    if (first % kGroup == 0 && first + kGroup <= last) {
      store(to, to_float(planes.template codes<0>(first / kGroup)));
      store(to + kLanes, to_float(planes.template codes<1>(first / kGroup)));
      if constexpr (kParts == 4) {
        store(to + 2 * kLanes, to_float(planes.template codes<2>(first / kGroup)));
        store(to + 3 * kLanes, to_float(planes.template codes<3>(first / kGroup)));
      }
      first += kGroup, to += kGroup;
    } else {
      const int64_t next = (first / kGroup + 1) * kGroup, some = (next < last ? next : last) - first;
      uint8_t codes[kGroup];
      unpack(from, bits, total, first, some, codes);
      for (int64_t i = 0; i < some; i++) to[i] = codes[i];
      first += some, to += some;
    }
  }
}

}  // namespace reallm
