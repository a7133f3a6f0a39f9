// Viterbi search over the bitshift trellis (QTIP, arXiv 2406.11235), SIMD across states.
//
// A tile of 256 weights is a closed walk of n = 256 / V steps over 2^L states, s' = (s 2^k + bits) mod 2^L, where each
// state stands for V values. Metrics are 16-bit: squared distances in units of 8 / F^2, with distances clipped at 255 /
// F, minus the smallest metric of each step, saturated at kCap. Closed walks take two passes: the first, over the kSeam
// steps around the ends of the tile, finds the L - k bits that both ends share; the second is constrained to them.
//
// Written with the compiler's vector extensions, so the same source serves AVX-512, AVX2 and the portable tier.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifndef LANES
#define LANES 8
#endif

namespace {

typedef uint16_t u16;
typedef u16 Metric __attribute__((vector_size(2 * LANES)));
typedef int16_t Signed __attribute__((vector_size(2 * LANES)));
typedef float Line __attribute__((vector_size(64)));  // a row of a tile
typedef uint8_t Branch __attribute__((vector_size(LANES)));

constexpr int kTile = 16, kWeights = kTile * kTile, kSeam = 128, kPad = 256;
constexpr u16 kCap = 30000, kClip = 255;

inline void load(Metric& value, const u16* from) { memcpy(&value, from, sizeof value); }
inline void store(u16* to, const Metric& value) { memcpy(to, &value, sizeof value); }

struct Search {
  int states, steps;
  std::vector<uint8_t> branch;   // [steps, 2^(L - k)]: the best of the 2^k predecessors of each group of states
  std::vector<u16> metric, best;  // [2^L] after a step; [2^(L - k)] minimum over the predecessors
  std::vector<int16_t> code;      // [V, 2^L]
  std::vector<u16> walk;
  float factor, limit;
};

// One pass over `steps` steps of x [steps, V]. Both ends share the bits `shared`; a negative `shared` leaves them free.
template <int V, int k>
void viterbi(Search& search, const float* x, int steps, int shared) {
  const int states = search.states, groups = states >> k;
  u16 *metric = search.metric.data(), *best = search.best.data();
  Metric lane;
  for (int i = 0; i < LANES; i++) lane[i] = i >> k;
  for (int t = 0; t < steps; t++) {
    u16 least = 0;
    if (t == 0) {
      for (int u = 0; u < groups; u++) best[u] = (shared < 0 || u == shared) ? 0 : kCap;
    } else {
      uint8_t* branch = search.branch.data() + size_t(t) * groups;
      Metric low = Metric{} + u16(65535);
      for (int u = 0; u < groups; u += LANES) {
        Metric least_here, from = Metric{};
        load(least_here, metric + u);
        for (int a = 1; a < 1 << k; a++) {
          Metric value;
          load(value, metric + a * groups + u);
          const auto less = value < least_here;
          least_here = less ? value : least_here;
          from = less ? Metric{} + u16(a) : from;
        }
        store(best + u, least_here);
        low = least_here < low ? least_here : low;
        const Branch narrow = __builtin_convertvector(from, Branch);
        memcpy(branch + u, &narrow, sizeof narrow);
      }
      least = 65535;
      for (int i = 0; i < LANES && i < groups; i++) least = low[i] < least ? low[i] : least;
    }
    int16_t target[V];
    for (int v = 0; v < V; v++) {
      float value = x[t * V + v];
      value = value > search.limit ? search.limit : value < -search.limit ? -search.limit : value;
      target[v] = int16_t(lrintf(value * search.factor));
    }
    for (int s = 0; s < states; s += LANES) {
      Metric total;
      if ((1 << k) >= LANES) {
        total = Metric{} + best[s >> k];
      } else {
        load(total, best + (s >> k));
        total = __builtin_shuffle(total, lane);
      }
      total -= least;
      for (int v = 0; v < V; v++) {
        Signed code;
        memcpy(&code, search.code.data() + size_t(v) * states + s, sizeof code);
        Signed gap = (Signed{} + target[v]) - code;
        gap = gap < 0 ? -gap : gap;
        Metric distance = (Metric)gap;
        distance = distance < kClip ? distance : Metric{} + kClip;
        total += (distance * distance) >> 3;
      }
      total = total < kCap ? total : Metric{} + kCap;
      store(metric + s, total);
    }
  }
  int state = shared < 0 ? 0 : shared;
  const int stride = shared < 0 ? 1 : groups;
  for (int s = state; s < states; s += stride)
    if (metric[s] < metric[state]) state = s;
  for (int t = steps - 1; t >= 0; t--) {
    search.walk[t] = u16(state);
    const int group = state >> k;
    if (t) state = search.branch[size_t(t) * groups + group] * groups + group;
  }
}

template <int V, int k>
void closed_walk(Search& search, const float* x) {
  constexpr int steps = kWeights / V, seam = steps < kSeam ? steps : kSeam;
  float around[seam * V];
  for (int t = 0; t < seam; t++)
    for (int v = 0; v < V; v++) around[t * V + v] = x[(steps - seam / 2 + t) % steps * V + v];
  viterbi<V, k>(search, around, seam, -1);
  viterbi<V, k>(search, x, steps, search.walk[seam / 2] >> k);
}

// rest[row] -= feedback[row] (x - value) for the rows from `first`; x and value are one tile.
void take_off(const float* x, const float* value, const float* feedback, float* rest, int64_t first, int64_t rows) {
  Line error[kTile], found[kTile];
  memcpy(error, x, sizeof error);
  memcpy(found, value, sizeof found);
  for (int i = 0; i < kTile; i++) error[i] -= found[i];
  for (int64_t row = first; row < rows; row++) {
    const float* weight = feedback + row * kTile;
    Line line;
    memcpy(&line, rest + row * kTile, sizeof line);
    for (int i = 0; i < kTile; i++) line -= weight[i] * error[i];
    memcpy(rest + row * kTile, &line, sizeof line);
  }
}

typedef void (*Walker)(Search&, const float*);
Walker walker(int width) {
  switch (width) {
    case 1: return closed_walk<2, 1>;
    case 2: return closed_walk<1, 1>;
    case 3: return closed_walk<2, 3>;
    case 4: return closed_walk<1, 2>;
    case 5: return closed_walk<2, 5>;
    case 6: return closed_walk<1, 3>;
    case 7: return closed_walk<2, 7>;
    case 8: return closed_walk<1, 4>;
    case 10: return closed_walk<1, 5>;
    case 12: return closed_walk<1, 6>;
    default: return nullptr;
  }
}

}  // namespace

// Encodes one block of 16 columns: writes the walks `states` [tiles, 256 / V] and their values `values` [16 tiles, 16]
// for `target` [16 tiles, 16], in units of the standard deviation of the code. `code` is int16 [2^L, V] with standard
// deviation `deviation`. `feedback` is null or [tiles, 16 tiles, 16]: the error of a tile is subtracted from the rows
// below it, target[i] -= feedback[tile, i] error. Returns 0, or 1 for an unsupported width, 2 when out of memory.
extern "C" int reallm_trellis_block(const float* target, int64_t tiles, int state_bits, int width, const int16_t* code,
                                    float deviation, float clip, const float* feedback, float* values,
                                    uint16_t* states) {
  const Walker walk = walker(width);
  const int per_step = width % 2 ? 2 : 1, bits = width * per_step / 2;
  if (!walk || bits > state_bits || state_bits > 16 || (1 << state_bits) < LANES) return 1;
  try {
    Search search;
    search.states = 1 << state_bits;
    search.steps = kWeights / per_step;
    search.branch.resize((size_t(search.steps) << (state_bits - bits)) + kPad);
    search.metric.resize(search.states + kPad);
    search.best.resize((search.states >> bits) + kPad);
    search.walk.resize(search.steps);
    search.code.resize(size_t(search.states) * per_step + kPad);
    search.factor = kClip / clip;
    int16_t top = 0;
    for (int s = 0; s < search.states; s++)
      for (int v = 0; v < per_step; v++) {
        const int16_t value = code[s * per_step + v];
        top = abs(value) > top ? abs(value) : top;
        search.code[size_t(v) * search.states + s] = int16_t(lrintf(value / deviation * search.factor));
      }
    search.limit = top / deviation;
    const int64_t rows = tiles * kTile;
    std::vector<float> rest(target, target + rows * kTile);
    for (int64_t tile = 0; tile < tiles; tile++) {
      const float* x = rest.data() + tile * kWeights;
      float* value = values + tile * kWeights;
      walk(search, x);
      memcpy(states + tile * search.steps, search.walk.data(), search.steps * sizeof(u16));
      for (int t = 0; t < search.steps; t++)
        for (int v = 0; v < per_step; v++)
          value[t * per_step + v] = code[search.walk[t] * per_step + v] / deviation;
      if (!feedback) continue;
      take_off(x, value, feedback + tile * rows * kTile, rest.data(), (tile + 1) * kTile, rows);
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
