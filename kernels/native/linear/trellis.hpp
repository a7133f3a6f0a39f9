// The bitshift trellis (kernels/codes/trellis.py): weights of a tile of 16 x 16 from a ring of 16 `width` bytes.
//
// A row of a tile takes `width` bytes of the ring, the last row first, and the state of each weight is `state_bits`
// bits of the ring at an offset that the width determines. Products with one row of x are in `trellis_dot.hpp`. For
// decoding, a row is read once, every lane shifts out its state, and one multiplication and the sum of its bytes give
// the code. Rows at the end of the ring continue at its start: they are read from a copy.
//
//   yc[n] = 2^-7 sum_b scale_b sum_c (bytesum(state M) - 510) x[b, c]
//
// Blocks of columns are the outer loop, the order in which words are stored; sums of up to kChunk tiles, two per row,
// stay in the L1 cache. The 510 is subtracted once, times the sum of the scaled x.
#pragma once

#include "kernel.hpp"
#include "linear.hpp"
#include "simd.hpp"
#include "trellis_dot.hpp"

namespace reallm {

constexpr int kChains = 8;

template <int width, int state_bits>
struct Steps {
  static constexpr int values = width % 2 ? 2 : 1, bits = width * values / 2;
  static constexpr int parts = kTile / kLanes;

  // First bit of the state of column c within the bytes of the row.
  static constexpr int place(int c) { return bits * (kTile / values - 1 - c / values); }
  // First byte read for part h (kLanes columns).
  static constexpr int byte(int h) { return place(kLanes * h + kLanes - 1) / 8; }
  // Whether one 32-bit word holds all states of part h; otherwise each lane selects its bytes out of 16.
  static constexpr bool narrow(int h) { return place(kLanes * h) - 8 * byte(h) + state_bits <= 32; }
  static constexpr bool narrow() { return narrow(0) && narrow(parts - 1); }
  static constexpr int reach = narrow() ? byte(0) + 4 : 16;
  // Number of rows whose reads go past the end of the ring.
  static constexpr int tail_rows = (reach + width - 1) / width - 1 < kTile ? (reach + width - 1) / width - 1 : kTile;
};

// Bytes from the start of the ring that are copied after its end.
constexpr int kSeam = 16;

// Calls take(row, part, code) for every row and part (kLanes columns) of the tile at `ring`; code = bytesum(state M).
template <int state_bits, class Take>
inline void each_row_of(int width, const uint8_t* ring, const Take& take) {
  const int values = width % 2 ? 2 : 1, bits = width * values / 2;
  uint8_t bytes[kTile * 15 + kSeam];
  memcpy(bytes, ring, kTile * width);
  for (int i = 0; i < kSeam; i++) bytes[kTile * width + i] = ring[i % (kTile * width)];
  for (int row = 0; row < kTile; row++)
    for (int h = 0; h < kTile / kLanes; h++) {
      U code;
      for (int l = 0; l < kLanes; l++) {
        const int place = bits * (kTile / values - 1 - (kLanes * h + l) / values);
        const uint8_t* at = bytes + (kTile - 1 - row) * width + place / 8;
        const uint32_t state = uint32_t(at[0] | at[1] << 8 | at[2] << 16) >> place % 8 & ((1u << state_bits) - 1);
        code[l] = state * kMultipliers[l % values];
      }
      take(row, h, to_float(sum_of_pairs(pair_sums(code))));
    }
}

#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
// The same for a width known at compile time.
template <int width, int state_bits, class Take>
REALLM_INLINE void each_row(const uint8_t* ring, const Take& take) {
  typedef Steps<width, state_bits> S;
  U shift[S::parts], pick[S::parts], factor;
  for (int h = 0; h < S::parts; h++)
    for (int l = 0; l < kLanes; l++) {
      const int place = S::place(kLanes * h + l), byte = place / 8;
      shift[h][l] = S::narrow() ? place - 8 * S::byte(h) : place % 8;
      pick[h][l] = 0x80000000u | (byte + 2) << 16 | (byte + 1) << 8 | byte;  // 3 bytes hold 7 + state_bits bits
    }
  for (int l = 0; l < kLanes; l++) factor[l] = kMultipliers[l % S::values];
  alignas(32) uint8_t tail[S::tail_rows * width + kSeam];
  memcpy(tail, ring + (kTile - S::tail_rows) * width, S::tail_rows * width);
  memcpy(tail + S::tail_rows * width, ring, kSeam);
  const U mask = spread((uint32_t(1) << state_bits) - 1);
  // Each step is done for kChains vectors: a single one would wait for itself, about 25 cycles from load to sum.
  constexpr int rows = kChains / S::parts;
#pragma GCC unroll 16
  for (int first = 0; first < kTile; first += rows) {
    U v[kChains];
    F code[kChains];
    for (int i = 0; i < kChains; i++) {
      const int row = first + i / S::parts;
      const uint8_t* at =
          row < S::tail_rows ? tail + (S::tail_rows - 1 - row) * width : ring + (kTile - 1 - row) * width;
      if constexpr (S::narrow()) {
        v[i] = spread(load<uint32_t>(at + S::byte(i % S::parts)));
      } else {
#if defined(REALLM_AVX512)
        v[i] = (U)_mm512_maskz_broadcast_i32x4(0xFFFF, load<__m128i>(at));
        v[i] = (U)_mm512_shuffle_epi8((__m512i)v[i], (__m512i)pick[i % S::parts]);
#else
        v[i] = (U)_mm256_broadcastsi128_si256(load<__m128i>(at));
        v[i] = (U)_mm256_shuffle_epi8((__m256i)v[i], (__m256i)pick[i % S::parts]);
#endif
      }
    }
    for (int i = 0; i < kChains; i++) v[i] = v[i] >> shift[i % S::parts];
    for (int i = 0; i < kChains; i++) v[i] = v[i] & mask;
    for (int i = 0; i < kChains; i++) v[i] = v[i] * factor;
    for (int i = 0; i < kChains; i++) v[i] = pair_sums(v[i]);
    for (int i = 0; i < kChains; i++) v[i] = sum_of_pairs(v[i]);
    for (int i = 0; i < kChains; i++) code[i] = to_float(v[i]);
    for (int i = 0; i < kChains; i++) take(first + i / S::parts, i % S::parts, code[i]);
  }
}
#endif

template <int state_bits>
struct Trellis {
  static constexpr int kChunk = 96;  // tiles
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
  static constexpr int64_t kLayout = 1;
  static int64_t behind(int64_t width) { return width / kTile * int64_t(sizeof(ShortBlock) / sizeof(float)); }
  static void append(const float* xc, int64_t width, float* to) {
    for (int64_t block = 0; block < width / kTile; block++)
      reinterpret_cast<ShortBlock*>(to)[block].round(xc + block * kTile);
  }
#else
  static constexpr int64_t kLayout = 0;
  static int64_t behind(int64_t) { return 0; }
  static void append(const float*, int64_t, float*) {}
#endif
  static constexpr float kMean = 510, kUnit = 1.0f / 128;

  // Calls take(i, row, part, code) for `count` tiles of `width` from `ring` on. `take` is passed by value, so that
  // what the loop needs is in registers and not behind a pointer that a store may change.
  template <class Take>
  REALLM_INLINE static void each_tile(int width, const uint8_t* ring, int64_t count, const Take take) {
    switch (width) {
      case 0: break;
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
#define REALLM_WIDTH(w)                                                      \
  case w:                                                                    \
    if constexpr (Steps<w, state_bits>::bits <= state_bits)                  \
      for (int64_t i = 0; i < count; i++, ring += kTile * w)                 \
        each_row<w, state_bits>(ring, [=](int row, int h, F code) REALLM_TAKE { take(i, row, h, code); }); \
    break;
      REALLM_WIDTH(1) REALLM_WIDTH(2) REALLM_WIDTH(3) REALLM_WIDTH(4) REALLM_WIDTH(5)
      REALLM_WIDTH(6) REALLM_WIDTH(7) REALLM_WIDTH(8) REALLM_WIDTH(10) REALLM_WIDTH(12)
#undef REALLM_WIDTH
#endif
      default:
        for (int64_t i = 0; i < count; i++, ring += kTile * width)
          each_row_of<state_bits>(width, ring, [=](int row, int h, F code) { take(i, row, h, code); });
    }
  }

  static const uint8_t* ring(const Operand& op, int64_t block, int64_t tile) {
    return static_cast<const uint8_t*>(op.codes) + 4 * op.starts[block] + tile * kTile * op.widths[block];
  }

  static int64_t blocks(const Operand& op) { return (op.cols + kTile - 1) / kTile; }

  static void gemv(const Operand& op, const float* xc, float* yc, int64_t first, int64_t last) {
    const int64_t end = (last + kTile - 1) / kTile;
    for (int64_t tile = first / kTile; tile < end; tile += kChunk)
      chunk(op, xc, yc, tile, tile + kChunk < end ? tile + kChunk : end, last);
  }

  static void chunk(const Operand& op, const float* xc, float* yc, int64_t tile, int64_t end, int64_t last) {
    alignas(64) float sums[kChunk * kTile * 2];  // two per row, the last row of a tile first
    memset(sums, 0, sizeof(float) * (end - tile) * kTile * 2);
    float mean = 0;
    for (int64_t block = 0; block < blocks(op); block++)
      if (op.widths[block]) mean += kMean * column(op, xc, block, tile, end - tile, sums);
    const float* sum = sums;
    for (int64_t row = tile * kTile; row < last && tile < end; tile++, row += kTile, sum += 2 * kTile) {
      float y[kTile];
      tile_rows(sum, mean, y);
      memcpy(yc + row, y, sizeof(float) * (last - row < kTile ? last - row : kTile));
    }
  }

  // Adds `count` tiles of a block of columns to the sums; returns the sum of the scaled x of the block.
  static float column(const Operand& op, const float* xc, int64_t block, int64_t tile, int64_t count, float* sums) {
    const float scale = half_at(op.scales, block) * kUnit;
    const uint8_t* codes = ring(op, block, tile);
#if defined(REALLM_AVX512) || defined(REALLM_AVX2)
    const ShortBlock& x = reinterpret_cast<const ShortBlock*>(xc + padded(op.cols))[block];
    const int64_t ahead = (block + 1 < blocks(op) ? ring(op, block + 1, tile) : codes) - codes;
    switch (op.widths[block]) {
#define REALLM_WIDTH(w)                                                          \
  case w:                                                                        \
    if constexpr (Steps<w, state_bits>::bits <= state_bits)                      \
      Windows<w, state_bits>::dot(codes, count, x, scale * x.unit, sums, ahead); \
    return scale * x.sum;
      REALLM_WIDTH(1) REALLM_WIDTH(2) REALLM_WIDTH(3) REALLM_WIDTH(4) REALLM_WIDTH(5)
      REALLM_WIDTH(6) REALLM_WIDTH(7) REALLM_WIDTH(8) REALLM_WIDTH(10) REALLM_WIDTH(12)
#undef REALLM_WIDTH
    }
#endif
    const float* from = xc + block * kTile;
    each_tile(op.widths[block], codes, count, [=](int64_t i, int row, int h, F code) {
      sums[2 * (i * kTile + kTile - 1 - row) + h] += sum(code * load<F>(from + h * kLanes)) * scale;
    });
    float total = 0;
    for (int c = 0; c < kTile; c++) total += from[c];
    return total * scale;
  }

  static void decode(const Operand& op, int64_t first, int64_t last, float* panel, int64_t stride) {
    const int64_t tile = first / kTile, end = (last + kTile - 1) / kTile, skip = first - tile * kTile;
    const bool whole = skip == 0 && last == end * kTile;
    float* tiles = whole ? panel : scratch<3>((end - tile) * kTile * kTile);
    for (int64_t block = 0; block < blocks(op); block++) {
      const F scale = spread(half_at(op.scales, block) * kUnit), offset = spread(-kMean) * scale;
      float* const to = whole ? panel + block * kTile : tiles;
      const int64_t step = whole ? stride : kTile;
      if (op.widths[block] == 0)
        for (int64_t row = 0; row < (end - tile) * kTile; row++) memset(to + row * step, 0, sizeof(float) * kTile);
      each_tile(op.widths[block], ring(op, block, tile), end - tile, [=](int64_t i, int row, int h, F code) REALLM_TAKE {
        store(to + (i * kTile + row) * step + h * kLanes, fma(code, scale, offset));
      });
      for (int64_t n = first; !whole && n < last; n++)
        memcpy(panel + (n - first) * stride + block * kTile, tiles + (n - first + skip) * kTile, sizeof(float) * kTile);
    }
    const int64_t written = blocks(op) * kTile;
    for (int64_t n = 0; n < last - first && written < stride; n++)
      memset(panel + n * stride + written, 0, sizeof(float) * (stride - written));
  }
};

}  // namespace reallm
