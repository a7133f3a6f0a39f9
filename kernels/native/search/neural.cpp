// The cheapest walk through the windows of a neural decoder (reallm/codecs/neural): Viterbi search over all windows.
//
// A window s of L bits holds the last L / k codes, the newest in the lowest bits, and stands for V values. The past of
// a step is its window without the newest code, h = s >> k; the past of the next step is s mod 2^(L - k). Walks begin
// in past 0.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace {

constexpr int BLOCK = 8;  // pasts whose metrics are computed together
typedef float Floats __attribute__((vector_size(4 * BLOCK)));
typedef int32_t Ints __attribute__((vector_size(4 * BLOCK)));

struct Shape {
    int64_t steps;
    int64_t pasts;    // 2^(L - k)
    int64_t choices;  // 2^k
    int code_bits;
};

inline Floats load(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof(result));
    return result;
}

// For every next past, its metric and the oldest code of its best window. `values` is [V, 2^L]; `norms` [2^L] are half
// the squared norms of the values.
template <int V>
void step(const Shape& shape, const float* x, const float* values, const float* norms, const float* best, float* next,
          uint8_t* came) {
    const int64_t windows = shape.pasts * shape.choices;
    if (shape.pasts < BLOCK || shape.choices < BLOCK) {
        for (int64_t past = 0; past < shape.pasts; ++past) {
            next[past] = std::numeric_limits<float>::infinity();
            came[past] = 0;
            for (int64_t oldest = 0; oldest < shape.choices; ++oldest) {
                const int64_t window = oldest * shape.pasts + past;
                float metric = best[window >> shape.code_bits] + norms[window];
                for (int v = 0; v < V; ++v) metric -= x[v] * values[v * windows + window];
                if (metric < next[past]) {
                    next[past] = metric;
                    came[past] = static_cast<uint8_t>(oldest);
                }
            }
        }
        return;
    }
    for (int64_t first = 0; first < shape.pasts; first += BLOCK) {
        Floats least = Floats{} + std::numeric_limits<float>::infinity();
        Ints from = Ints{};
        for (int64_t oldest = 0; oldest < shape.choices; ++oldest) {
            const int64_t window = oldest * shape.pasts + first;
            Floats metric = load(norms + window) + best[window >> shape.code_bits];
            for (int v = 0; v < V; ++v) metric -= load(values + v * windows + window) * x[v];
            const Ints better = metric < least;
            least = better ? metric : least;
            from = better ? Ints{} + static_cast<int32_t>(oldest) : from;
        }
        std::memcpy(next + first, &least, sizeof(least));
        for (int lane = 0; lane < BLOCK; ++lane) came[first + lane] = static_cast<uint8_t>(from[lane]);
    }
}

template <int V>
void walk(const Shape& shape, const float* x, const float* values, const float* norms, int32_t* codes) {
    std::vector<float> best(shape.pasts, std::numeric_limits<float>::infinity()), next(shape.pasts);
    std::vector<uint8_t> table(shape.steps * shape.pasts);
    best[0] = 0;
    for (int64_t t = 0; t < shape.steps; ++t) {
        step<V>(shape, x + t * V, values, norms, best.data(), next.data(),
                &table[t * shape.pasts]);
        best.swap(next);
    }
    int64_t past = 0;
    for (int64_t h = 1; h < shape.pasts; ++h) past = best[h] < best[past] ? h : past;
    for (int64_t t = shape.steps - 1; t >= 0; --t) {
        const int64_t window = table[t * shape.pasts + past] * shape.pasts + past;
        codes[t] = static_cast<int32_t>(window & (shape.choices - 1));
        past = window >> shape.code_bits;
    }
}

}  // namespace

// x [walks, steps, V], values [V, 2^L], norms [2^L] -> codes [walks, steps]. Returns 0, or 1 for an unsupported shape,
// 2 when out of memory.
extern "C" int reallm_neural_walks(const float* x, int64_t walks, int64_t steps, int dim, int window_bits, int code_bits,
                                   const float* values, const float* norms, int32_t* codes) {
    if (code_bits < 1 || code_bits > 8 || window_bits < code_bits || window_bits > 20) return 1;
    const int64_t pasts = int64_t{1} << (window_bits - code_bits), choices = int64_t{1} << code_bits;
    const Shape shape{steps, pasts, choices, code_bits};
    try {
        for (int64_t i = 0; i < walks; ++i) {
            const float* from = x + i * steps * dim;
            int32_t* to = codes + i * steps;
            if (dim == 1) walk<1>(shape, from, values, norms, to);
            else if (dim == 2) walk<2>(shape, from, values, norms, to);
            else if (dim == 4) walk<4>(shape, from, values, norms, to);
            else if (dim == 8) walk<8>(shape, from, values, norms, to);
            else return 1;
        }
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
