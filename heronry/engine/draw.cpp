// Draws a token from logits: draw.py is the definition, and this gives the same token to the bit.
//
// The weights are whole numbers whose sums a double holds exactly, so they may be added in any order: sixteen at a time,
// and by classes of size in place of sorting.
#pragma GCC optimize("fp-contract=off")  // a product rounds before it is added to, as in NumPy; Clang keeps to that here
#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace {

constexpr float BEST = 0x1p34f;  // the weight of the most likely token
constexpr int64_t BLOCK = 256;

// Filled in by draw.py.
struct Options {
    int64_t top_k;  // 0: all
    double top_p, min_p;
    float temperature, inverse;  // temperature 0: the most likely token
    int32_t tempered_first;
};

float of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// 16 logits, minus infinity past the end
INLINE Vec<float> logits_at(const float* logits, int64_t i, int64_t size) {
    if (i + 16 <= size) return load(logits + i);
    float rest[16];
    for (int64_t j = 0; j < 16; j++) rest[j] = i + j < size ? logits[i + j] : -INFINITY;
    return load(rest);
}

// BEST * e^x for x <= 0, rounded to a whole number; the exponential is that of simd.h, without what only other x need.
INLINE Vec<float> weight_of(Vec<float> x) {
    x = larger(x, -87.4f);
    const Vec<float> magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const Vec<float> shifted = x * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec<float> p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Vec<float> weight = as_floats(as_ints(p) + ((as_ints(shifted) - as_ints(magic) + 34) << 23));  // p * 2^(n + 34)
    const Vec<float> rounded = weight + 0x1p23f - 0x1p23f;  // what is larger is a whole number
    return choose(weight < 0x1p22f, rounded, weight);
}

// Weights of all tokens, with zeros up to a whole block.
void weigh(const float* logits, int64_t size, float most, float inverse, float* weights) {
    for (int64_t i = 0; i < (size + BLOCK - 1) / BLOCK * BLOCK; i += 16)
        store(weights + i, weight_of((logits_at(logits, i, size) - most) * inverse));
}

// The sum of a block's weights, of those tokens whose `sizes` are at least `least`.
double sum_block(const float* weights, const float* sizes, float least) {
    typedef float Half __attribute__((vector_size(REGISTER / 2)));
    Reg<double> total[4] = {};
    for (int64_t i = 0; i < BLOCK; i += 4 * WIDTH<double>)
        for (int j = 0; j < 4; j++) {
            Half weight, size;
            memcpy(&weight, weights + i + j * WIDTH<double>, sizeof(Half));
            memcpy(&size, sizes + i + j * WIDTH<double>, sizeof(Half));
            total[j] += __builtin_convertvector(size >= least ? weight : Half{}, Reg<double>);
        }
    return sum<double>(total[0] + total[1] + (total[2] + total[3]));
}

// Whether any of 16 numbers is from `begin` to below `end`.
INLINE bool any_within(const float* from, float begin, float end) {
    const Vec<float> x = load(from);
    const Ints mask = (x < end) & ((x < begin) != Ints(-1));
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask.part[0], (__m512i)mask.part[0]);
#else
    int64_t lanes[LANES<int64_t>], found = 0;
    memcpy(lanes, &mask, sizeof lanes);
    for (int64_t lane : lanes) found |= lane;
    return found;
#endif
}

// What tokens are added up by.
enum Measure { COUNT, SUM };

struct Cut {
    float weight;
    double above;  // what the tokens of larger weights add up to
};

// The largest weight for which the tokens that have at least so much add up to `needed`; 0 where that takes those of
// weight 0. Classes are by a number's leading bits, then by the following ones in the class where the cut is, then by
// the last. size: a multiple of 16. What is below `least`, at least 1, is not needed. candidates: room for as many.
template <Measure MEASURE>
Cut find_cut(const float* weights, int64_t size, float least, double needed, float* candidates) {
    constexpr int FIRST = 18, NEXT = 9;                    // bits that a class leaves open
    constexpr int32_t ONE = 0x3f800000, END = 0x50800000;  // the bits of 1 and of BEST
    double classes[((END - ONE) >> FIRST) + 2];            // the first is that of 0
    double above = 0;
    int32_t low = ONE - (1 << FIRST);
    int64_t count = sizeof classes / sizeof *classes;
    float begin = least, end = INFINITY;
    for (int shift = FIRST;; shift -= NEXT, count = 1 << NEXT) {
        memset(classes, 0, count * sizeof(double));
        for (int64_t i = 0; i < size; i += 16) {
            if (!any_within(weights + i, begin, end)) continue;
            int32_t own[16];
            store(own, larger((as_ints(load(weights + i)) - low) >> shift, Ints(0)));
            for (int j = 0; j < 16; j++) classes[own[j]] += MEASURE == COUNT ? 1 : weights[i + j];
        }
        int64_t at = count - 1;
        for (; at > 0 && (!classes[at] || above + classes[at] < needed); at--) above += classes[at];
        if (shift == FIRST && at == 0) return {0, above};
        low += int32_t(at) << shift;
        begin = of_bits(low), end = of_bits(low + (1 << shift));
        if (!shift) return {begin, above};
        int64_t found = 0;
        for (int64_t i = 0; i < size; i += 16) {
            if (!any_within(weights + i, begin, end)) continue;
            for (int64_t j = i; j < i + 16; j++) {
                const float weight = weights[j];
                candidates[found] = weight;
                found += weight >= begin && weight < end;
            }
        }
        for (size = found; size % 16; size++) candidates[size] = 0;
        weights = candidates;
    }
}

// The token that `random`, from 0 to 1, falls on; -2 if the logits contain NaN or infinity, -3 if all are minus infinity.
// memory: 3 * (size + BLOCK) floats.
int64_t draw(const float* logits, int64_t size, const Options& o, double random, float* memory) {
    Vec<float> most(-INFINITY);
    Ints wrong(0);
    for (int64_t i = 0; i < size; i += 16) {
        const Vec<float> x = logits_at(logits, i, size);
        most = larger(most, x);
        wrong += x != x;
    }
    const float best = largest(most);
    if (sum<int32_t>(wrong) || best == INFINITY) return -2;
    if (best == -INFINITY) return -3;
    if (o.temperature == 0) return std::find(logits, logits + size, best) - logits;

    const int64_t padded = (size + BLOCK - 1) / BLOCK * BLOCK;
    float *weights = memory, *sizes = memory, *candidates = memory + 2 * padded;  // sizes: what decides what stays
    weigh(logits, size, best, o.inverse, weights);
    if (!o.tempered_first && o.inverse != 1) {
        sizes = memory + padded;
        weigh(logits, size, best, 1, sizes);
    }
    const auto sum_from = [&](float least) {
        double total = 0;
        for (int64_t i = 0; i < padded; i += BLOCK) total += sum_block(sizes + i, sizes + i, least);
        return total;
    };
    double least = o.min_p * BEST, mass = 0;
    if (o.top_k && o.top_k < size) {
        const Cut cut = find_cut<COUNT>(sizes, padded, 1, double(o.top_k), candidates);
        least = std::max(least, double(cut.weight));
        if (o.tempered_first)  // top_p counts only what top_k left
            mass = o.top_p * (sum_from(std::nextafter(cut.weight, INFINITY)) + (o.top_k - cut.above) * cut.weight);
    }
    if (o.top_p < 1) {
        const double total = sum_from(0);
        if (!mass) mass = o.top_p * total;
        const float rest = float(0.99 * (total - mass) / padded);  // if all that are smaller were missing, it would do
        least = std::max(least, double(find_cut<SUM>(sizes, padded, std::max(1.f, rest), mass, candidates).weight));
    }
    float threshold = float(least);
    if (threshold < least) threshold = std::nextafter(threshold, INFINITY);

    double* sums = (double*)candidates;  // of the weights of each block that stay
    double total = 0;
    for (int64_t i = 0; i < padded; i += BLOCK)
        total += sums[i / BLOCK] = sum_block(weights + i, sizes + i, threshold);
    const double point = std::min(random * total, total - 1);
    double passed = 0;
    int64_t token = 0;
    for (; passed + sums[token / BLOCK] <= point; token += BLOCK) passed += sums[token / BLOCK];
    for (;; token++) {
        if (sizes[token] >= threshold) passed += weights[token];
        if (passed > point) return token;
    }
}

}  // namespace

// The tokens of several rows of logits, each with options and a random number of its own. memory: as much for each thread.
EXPORT int draw_rows(const float* const* logits, int64_t rows, int64_t size, const Options* options,
                     const double* randoms, int64_t* tokens, float* memory, int64_t threads) {
    on_threads(int(threads), [&](int index, int count) {
        for (int64_t i = index; i < rows; i += count)
            tokens[i] = draw(logits[i], size, options[i], randoms[i], memory + index * 3 * (size + BLOCK));
    });
    return 0;
}
