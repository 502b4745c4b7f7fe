// y = W x for a few rows x at once, with W in any format: every weight is read once for up to BLOCK rows.
//
// How activations enter a product: as they are for FLOAT32 and FLOAT16, rounded to bfloat16 for BFLOAT16, and for INT8
// and INT4 rounded to 8-bit integers with one scale per group of a row, so that a group is one sum of integers. All
// other sums are float32.
//
// A row of activations gives bit-identical results whatever other rows are in the call: which sums are taken, and in
// which order, depends on the columns alone.
//
// The layout of INT8 and INT4 weights (produced by ops/packed): tiles of 16 output rows; within a tile, every 4 inputs
// make a vector of 64 bytes, 4 per output row. INT8 stores q + 128. INT4 stores two such vectors in one, the first in
// the low nibbles, as indices into a table that holds 16 values + 64. scales: float16 [tiles, groups, 16].
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

enum Format : int64_t { INT8 = 4, INT4 = 5 };  // they continue Dtype
constexpr int GROUP = 32;                      // weights, and activations, that share a scale

struct Tensor {  // filled in by Python
    const char* data;
    const char* scales;
    int64_t dtype, rows, columns;
    const uint8_t* table;  // the 16 values of INT4, + 64
};

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Range {
    int64_t begin, end;
};
// the part of 0 .. n that thread `index` of `count` takes, in whole units
INLINE Range share(int64_t n, int64_t unit, int index, int count) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * index / count * unit, end = units * (index + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}

// How an activation that was rounded to bfloat16 is stored.
#if defined(__AVX512BF16__)
typedef uint16_t Half;  // bfloat16, which the processor multiplies
#else
typedef float Half;  // the same value as a float
#endif
// How an integer activation is stored: in 8 bits where one instruction adds four products of bytes. AVX2 can add them
// too, but the sum of two products must fit 16 bits, as it does for INT4, whose weights have 7 bits. Otherwise in 16
// bits, every 4 of them in the order 0, 2, 1, 3.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
template <int64_t FORMAT> using Whole = int8_t;
#elif defined(__AVX2__)
template <int64_t FORMAT> using Whole = std::conditional_t<FORMAT == INT4, int8_t, int16_t>;
#else
template <int64_t FORMAT> using Whole = int16_t;
#endif

// Activations [count, width] and the converted copies that some formats multiply; rows are padded with zeros.
struct Rows {
    float* x;
    int64_t count, width, stride;
    Half* half;  // rounded to bfloat16
    int16_t* q;    // rounded to -127 .. 127, stored as Whole<FORMAT>
    float* scale;  // of q, [count, stride / GROUP]
    int32_t* sum;  // of the integers of a group, to correct for the offset of the stored weights (128 or 64)

    // Row stride in numbers: whole vectors, and never a multiple of 4096 bytes, because lines that are 4096 bytes apart
    // fall into one set of the L1 cache, which holds only 8.
    static INLINE int64_t padded(int64_t width) { return round_up(width, 64) + 32; }
    INLINE float* row(int64_t m) const { return x + m * stride; }

    // converts numbers begin .. end of row m to what the format of `w` multiplies; begin is a multiple of GROUP
    void pack(const Tensor& w, int64_t m, int64_t begin, int64_t end) const {
        const float* from = row(m);
        if (w.dtype == BFLOAT16) {
            for (int64_t i = begin; i < end; i += 16) round_to_half(from + i, half + m * stride + i);
        } else if (w.dtype == INT8) {
            for (int64_t g = begin; g < end; g += GROUP) round_group(from + g, m * stride + g, (Whole<INT8>*)q);
        } else if (w.dtype == INT4) {
            for (int64_t g = begin; g < end; g += GROUP) round_group(from + g, m * stride + g, (Whole<INT4>*)q);
        }
    }
    static INLINE void round_to_half(const float* from, Half* to) {
#if defined(__AVX512BF16__)
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(from).part[0]);
        memcpy(to, &rounded, 32);
#else
        uint16_t rounded[16];
        store16(rounded, BFLOAT16, load(from));
        store(to, load16(rounded, BFLOAT16));
#endif
    }
    template <class W> INLINE void round_group(const float* from, int64_t at, W* to) const {
        Vec<float> most{};
        for (int64_t i = 0; i < GROUP; i += 16) {
            const Vec<float> v = load(from + i);
            most = larger(most, larger(v, -v));
        }
        const float top = largest(most), step = top / 127, inverse = top > 0 ? 127 / top : 0;
        Ints total{};
        for (int64_t i = 0; i < GROUP; i += 16) {
            const Vec<float> magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
            const Ints v = as_ints(load(from + i) * inverse + magic) - as_ints(magic);
            total += v;
            put_whole(to + at + i, v);
        }
        scale[at / GROUP] = step;
        sum[at / GROUP] = ::sum<int32_t>(total);
    }
    static INLINE void put_whole(int8_t* to, const Ints& v) {
#if defined(__AVX512F__)
        const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v.part[0]);
        memcpy(to, &bytes, 16);
#else
        for (int i = 0; i < 16; i++) to[i] = int8_t(v[i]);
#endif
    }
    static INLINE void put_whole(int16_t* to, const Ints& v) {
#if defined(__AVX2__)
        __m256i x[2];
        memcpy(x, &v, 64);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x[0], x[1]), 0xd8);
        _mm256_storeu_si256((__m256i*)to, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(packed, 0xd8), 0xd8));
#else
        for (int i = 0; i < 16; i++) to[(i & ~3) + (i & 1) * 2 + (i >> 1 & 1)] = v[i];
#endif
    }
};

// ---- dense: FLOAT32, BFLOAT16, FLOAT16, row after row --------------------------------------------------------------

// How weights of a dtype are multiplied, STEP numbers at a time.
template <int64_t DTYPE> struct Dense {
    static constexpr int STEP = WIDTH<float>;
    static constexpr bool by_half = DTYPE == BFLOAT16;  // takes activations from Rows::half, not Rows::x
    typedef Reg<float> Number;
    static INLINE Number weights(const char* w) {
        return DTYPE == FLOAT32 ? get((const float*)w) : widen((const uint16_t*)w, DTYPE);
    }
    static INLINE Number inputs(const char* x) { return get((const float*)x); }
    static INLINE Reg<float> step(Reg<float> total, Number w, Number x) { return total + w * x; }
};
#if defined(__AVX512BF16__)
template <> struct Dense<BFLOAT16> {
    static constexpr int STEP = 32;
    static constexpr bool by_half = true;
    typedef __m512i Number;
    static INLINE Number weights(const char* w) { return _mm512_loadu_si512(w); }
    static INLINE Number inputs(const char* x) { return _mm512_loadu_si512(x); }
    static INLINE Reg<float> step(Reg<float> total, Number w, Number x) {
        return (Reg<float>)_mm512_dpbf16_ps((__m512)total, (__m512bh)w, (__m512bh)x);
    }
};
#endif

// A panel of weights has PANEL rows and CUT columns; the columns of a row are accumulated in one sum. With narrow
// registers a product takes many loads, so panels must fit the L1 cache; with wide ones L2 is fast enough.
constexpr int64_t CUT = REGISTER == 64 ? 1024 : 512, PANEL = REGISTER == 64 ? 32 : 8;
// A row has CHAINS independent accumulators, to which its steps are added in turn, so that additions need not wait for
// each other. Registers hold one accumulator for each of TALL rows of weights with each of BLOCK rows of activations.
constexpr int CHAINS = REGISTER == 64 ? 1 : 2, TALL = 4, BLOCK = REGISTER == 64 ? 6 : 3;
// For up to STREAM rows of activations, weights are read from memory one row at a time: reading several rows at once is
// half as fast, because the hardware prefetcher follows a single stream.
constexpr int STREAM = REGISTER == 64 ? 6 : 4;

// Row strides: `pitch` bytes for the weights, `stride` bytes for the activations, `to` numbers for y.
struct Place {
    int64_t columns, pitch, stride, to;
    bool add;  // to y instead of overwriting it
    // prefetch rows `from` .. `until` of the TALL rows that lie `ahead` bytes further on
    int64_t ahead = 0, from = 0, until = 0;
};

// R rows of weights times M rows of activations, over at most CUT columns
template <int64_t DTYPE, int R, int M> INLINE void tile(const Place& at, const char* w, const char* x, float* y) {
    typedef Dense<DTYPE> D;
    constexpr int size = DTYPE == FLOAT32 ? 4 : 2, in = D::by_half ? sizeof(Half) : 4;
    constexpr int WAYS = R == 1 ? CHAINS : 1;  // interleaves the chains to read weights in order, or runs them in turn
    const int64_t whole = at.columns / D::STEP, left = at.columns % D::STEP;
    Reg<float> found[M * R];
    for (int first = 0; first < CHAINS; first += WAYS) {
        Reg<float> total[WAYS][M][R] = {};
        const auto add = [&](auto way, const char* weights, int64_t pitch, const char* inputs)
                             __attribute__((always_inline)) {
            typename D::Number x[M];
            for (int m = 0; m < M; m++) x[m] = D::inputs(inputs + m * at.stride);
            for (int r = 0; r < R; r++) {
                const auto w = D::weights(weights + r * pitch);
                for (int m = 0; m < M; m++) total[way][m][r] = D::step(total[way][m][r], w, x[m]);
            }
        };
        const auto step = [&](auto way, int64_t i) __attribute__((always_inline)) {
            add(way, w + i * D::STEP * size, at.pitch, x + i * D::STEP * in);
        };
        const auto rest = [&](auto way) {  // the activations are padded with zeros, the weights are not
            alignas(64) char last[R][64] = {};
            for (int r = 0; r < R; r++) memcpy(last[r], w + r * at.pitch + whole * D::STEP * size, left * size);
            add(way, last[0], 64, x + whole * D::STEP * in);
        };
        constexpr std::integral_constant<int, 0> one;
        constexpr std::integral_constant<int, WAYS - 1> other;
        int64_t i = first;
        for (; i + WAYS <= whole; i += CHAINS) {
            if (REGISTER == 64)
                for (int64_t r = at.from; r < at.until; r++)
                    __builtin_prefetch(w + r * at.pitch + i * D::STEP * size + at.ahead);
            else if (R == 1 && size == 2)
                __builtin_prefetch(w + i * D::STEP * size + 1024);
            step(one, i);
            if (WAYS > 1) step(other, i + 1);
        }
        if (i < whole) step(one, i);
        if (left && WAYS > 1)
            whole % CHAINS ? rest(other) : rest(one);
        else if (left && whole % CHAINS == first)
            rest(one);
        for (int n = 0; n < M * R; n++) {
            Reg<float> sum = total[0][n / R][n % R];
            if (WAYS > 1) sum += total[WAYS - 1][n / R][n % R];
            found[n] = first ? found[n] + sum : sum;
        }
    }
    const auto put = [&](int i, float x) {
        float& to = y[i / R * at.to + i % R];
        to = at.add ? to + x : x;
    };
    int done = 0;
    for (; done + 4 <= M * R; done += 4) {
        float four[4];
        sums(found[done], found[done + 1], found[done + 2], found[done + 3], four);
        for (int i = 0; i < 4; i++) put(done + i, four[i]);
    }
    for (; done < M * R; done++) put(done, sum<float>(found[done]));
}

// calls work with the number of rows of activations, 1 to 6, as a compile-time constant
template <class F> INLINE void with_rows(int64_t rows, const F& work) {
    switch (rows) {
        case 1: return work(std::integral_constant<int, 1>());
        case 2: return work(std::integral_constant<int, 2>());
        case 3: return work(std::integral_constant<int, 3>());
#if defined(__AVX512F__)
        case 5: return work(std::integral_constant<int, 5>());
        case 6: return work(std::integral_constant<int, 6>());
#endif
        default: return work(std::integral_constant<int, 4>());
    }
}

template <int64_t DTYPE> void stream(const Tensor& w, const char* x, int64_t stride, int64_t count, float* y, int64_t to,
                                     Range rows) {
    constexpr int size = DTYPE == FLOAT32 ? 4 : 2, in = Dense<DTYPE>::by_half ? sizeof(Half) : 4;
    with_rows(count, [&](auto number) {
        for (int64_t r = rows.begin; r < rows.end; r++)
            for (int64_t k = 0; k < w.columns; k += CUT) {
                const Place at{std::min(CUT, w.columns - k), w.columns * size, stride, to, k > 0};
                tile<DTYPE, 1, decltype(number)::value>(at, w.data + (r * w.columns + k) * size, x + k * in, y + r);
            }
    });
}

// More than STREAM rows of activations are processed BLOCK at a time: each block, in the L1 cache, is multiplied with a
// panel of weights, while the next panel is prefetched. Weights that must be widened to float32 to be multiplied are
// instead widened once per panel, for all blocks.
template <int64_t DTYPE> void dense(const Tensor& w, const Rows& rows, float* y, int64_t to, Range own) {
    typedef Dense<DTYPE> D;
    constexpr int size = DTYPE == FLOAT32 ? 4 : 2, in = D::by_half ? sizeof(Half) : 4;
    constexpr bool widened = size == 2 && D::STEP == WIDTH<float>;
    const char* x = D::by_half ? (const char*)rows.half : (const char*)rows.x;
    const int64_t stride = rows.stride * in, count = rows.count, passes = (count + BLOCK - 1) / BLOCK;
    if (count <= STREAM) return stream<DTYPE>(w, x, stride, count, y, to, own);
    constexpr int64_t WIDE = CUT + 16;  // not a multiple of 4096 bytes either
    alignas(64) static thread_local float wide[widened ? PANEL * WIDE : 1];
    for (int64_t k = 0; k < w.columns; k += CUT)
        for (int64_t p = own.begin; p < own.end; p += PANEL) {
            const int64_t end = std::min(p + PANEL, own.end);
            const char* panel = w.data + (p * w.columns + k) * size;
            Place at{std::min(CUT, w.columns - k), w.columns * size, stride, to, k > 0, PANEL * w.columns * size};
            if (widened) {
                for (int64_t r = p; r < end; r++)
                    read(wide + (r - p) * WIDE, w.data + (r * w.columns + k) * size, DTYPE, int(at.columns));
                panel = (const char*)wide, at.pitch = WIDE * 4;
            }
            for (int64_t m = 0, pass = 0; m < count; pass++) {
                if (!widened) at.from = TALL * pass / passes, at.until = TALL * (pass + 1) / passes;
                with_rows(std::min<int64_t>(BLOCK, count - m), [&](auto number) {
                    constexpr int M = decltype(number)::value;
                    constexpr int64_t AS = widened ? int64_t(FLOAT32) : DTYPE;
                    const char* inputs = x + m * stride + k * in;
                    int64_t r = p;
                    for (; r + TALL <= end; r += TALL)
                        tile<AS, TALL, M>(at, panel + (r - p) * at.pitch, inputs, y + m * to + r);
                    for (at.from = at.until = 0; r < end; r++)
                        tile<AS, 1, M>(at, panel + (r - p) * at.pitch, inputs, y + m * to + r);
                    m += M;
                });
            }
        }
}

// ---- INT8 and INT4 ------------------------------------------------------------------------------------------------

// w[2 i] * x[0] + w[2 i + 1] * x[1] in every 32-bit lane i; the pair x is broadcast
INLINE Reg<int32_t> pairs(const Reg<uint16_t>& w, const int16_t* x) {
#if defined(__SSE2__)
    int32_t two;
    memcpy(&two, x, 4);
#if defined(__AVX512BW__)
    return (Reg<int32_t>)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(two));
#elif defined(__AVX2__)
    return (Reg<int32_t>)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(two));
#else
    return (Reg<int32_t>)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(two));
#endif
#else
    const Reg<int32_t> both = (Reg<int32_t>)w;
    return (both & 0xffff) * x[0] + (both >> 16 & 0xffff) * x[1];
#endif
}

// keeps the sum in a register: otherwise GCC first collects all products of a group in memory
INLINE void keep(Reg<int32_t>& sum) {
#if defined(__SSE2__)
    asm("" : "+x"(sum));
#endif
}

INLINE Reg<int32_t> four(const int8_t* x) {  // 4 bytes, broadcast to all lanes
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return Reg<int32_t>{} + bytes;
}

// The weights of the same 4 inputs for 16 output rows, unsigned. add() adds their products with 4 activations x.
template <class W> struct Quads;
template <> struct Quads<int16_t> {
    Reg<uint16_t> even[Ints::PARTS], odd[Ints::PARTS];
    explicit INLINE Quads(const Ints& bytes) {
        for (int i = 0; i < Ints::PARTS; i++) {
            even[i] = (Reg<uint16_t>)bytes.part[i] & 0xff;
            odd[i] = (Reg<uint16_t>)bytes.part[i] >> 8;
        }
    }
    INLINE void add(Ints& total, const int16_t* x) const {
        for (int i = 0; i < Ints::PARTS; i++) {
            Reg<int32_t> sum = total.part[i] + (pairs(even[i], x) + pairs(odd[i], x + 2));
            keep(sum);
            total.part[i] = sum;
        }
    }
};
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int LESS = 128;  // subtracted from the weights, because ARM multiplies signed bytes only
template <> struct Quads<int8_t> {
    Reg<int32_t> bytes[Ints::PARTS];
    explicit INLINE Quads(const Ints& weights) {
        for (int i = 0; i < Ints::PARTS; i++) bytes[i] = weights.part[i] ^ int32_t(0x80808080);
    }
    INLINE void add(Ints& total, const int8_t* x) const {
        for (int i = 0; i < Ints::PARTS; i++)
            total.part[i] =
                (Reg<int32_t>)vdotq_s32((int32x4_t)total.part[i], (int8x16_t)bytes[i], (int8x16_t)four(x));
    }
};
#else
constexpr int LESS = 0;
template <> struct Quads<int8_t> {
    const Ints& bytes;
    explicit INLINE Quads(const Ints& bytes) : bytes(bytes) {}
    INLINE void add(Ints& total, const int8_t* x) const {
        for (int i = 0; i < Ints::PARTS; i++) {
#if defined(__AVX512VNNI__)
            total.part[i] =
                (Reg<int32_t>)_mm512_dpbusd_epi32((__m512i)total.part[i], (__m512i)bytes.part[i], (__m512i)four(x));
#elif defined(__AVX512BW__)
            const __m512i two = _mm512_maddubs_epi16((__m512i)bytes.part[i], (__m512i)four(x));
            total.part[i] += (Reg<int32_t>)_mm512_madd_epi16(two, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
            const __m256i two = _mm256_maddubs_epi16((__m256i)bytes.part[i], (__m256i)four(x));
            Reg<int32_t> sum = total.part[i] + (Reg<int32_t>)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
            keep(sum);
            total.part[i] = sum;
#endif
        }
    }
};
#endif

// table[i] for each of 64 bytes i
INLINE Ints look_up(const Ints& places, const uint8_t* table) {
#if defined(__AVX512BW__)
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    return Ints::each([&](int i) { return (Reg<int32_t>)_mm512_shuffle_epi8(values, (__m512i)places.part[i]); });
#elif defined(__AVX2__)
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return Ints::each([&](int i) { return (Reg<int32_t>)_mm256_shuffle_epi8(values, (__m256i)places.part[i]); });
#else
    uint8_t bytes[64];
    memcpy(bytes, &places, 64);
    for (int i = 0; i < 64; i++) bytes[i] = table[bytes[i]];
    Ints y;
    memcpy(&y, bytes, 64);
    return y;
#endif
}

// one tile of 16 output rows times M rows of activations from row `first` on
template <int64_t FORMAT, int M>
INLINE void packed16(const Tensor& w, const Rows& in, int64_t first, const char* data, const char* scales, float* y,
                     int64_t to, int64_t valid) {
    typedef Whole<FORMAT> W;
    constexpr bool wide = REGISTER == 64 && sizeof(W) == 1;
    constexpr int PARALLEL = !wide ? 1 : M == 1 ? 4 : M == 2 ? 2 : 1;  // independent accumulators
    const W* x = (const W*)in.q + first * in.stride;
    Vec<float> total[M] = {};
    for (int64_t at = 0; at < w.columns; at += GROUP) {
        Ints sums[M][PARALLEL] = {};
        for (int m = 0; m < M; m++) sums[m][0] = (LESS - (FORMAT == INT8 ? 128 : 64)) * in.sum[((first + m) * in.stride + at) / GROUP];
        const auto add = [&](const Ints& weights, int64_t i, int chain) __attribute__((always_inline)) {
            const Quads<W> quads(weights);
            for (int m = 0; m < M; m++) quads.add(sums[m][chain % PARALLEL], x + m * in.stride + i);
        };
        const auto next = [&]() __attribute__((always_inline)) {
            if (M == 1 && REGISTER < 64) __builtin_prefetch(data + 2048, 0, 0);  // read only once: need not be cached
            const Ints vector = load((const int32_t*)data);
            data += 64;
            return vector;
        };
        if (FORMAT == INT8)
            for (int64_t i = 0; i < GROUP; i += 16)
                for (int j = 0; j < 4; j++) add(next(), at + i + 4 * j, j);
        else
            for (int64_t i = 0; i < GROUP; i += 16)
                for (int j = 0; j < 2; j++) {
                    const Ints vector = next();
                    add(look_up(vector & 0x0f0f0f0f, w.table), at + i + 8 * j, 2 * j);
                    add(look_up(vector >> 4 & 0x0f0f0f0f, w.table), at + i + 8 * j + 4, 2 * j + 1);
                }
        const Vec<float> scale = load16(scales, FLOAT16);
        scales += 32;
        for (int m = 0; m < M; m++) {
            Ints all = sums[m][0];
            for (int c = 1; c < PARALLEL; c++) all += sums[m][c];
            total[m] += to_floats(all) * (scale * in.scale[((first + m) * in.stride + at) / GROUP]);
        }
    }
    for (int m = 0; m < M; m++) memcpy(y + m * to, &total[m], valid * 4);
}

template <int64_t FORMAT> void packed(const Tensor& w, const Rows& in, float* y, int64_t to, Range rows) {
    const int64_t tile = w.columns * (FORMAT == INT8 ? 16 : 8), tile_scales = w.columns / GROUP * 32;
    constexpr int64_t PANEL = 192;  // rows of activations that stay in the L2 cache while all weights stream by
    for (int64_t panel = 0; panel < in.count; panel += PANEL)
        for (int64_t r = rows.begin; r < rows.end; r += 16) {
            const char *data = w.data + r / 16 * tile, *scales = w.scales + r / 16 * tile_scales;
            const int64_t valid = rows.end - r < 16 ? rows.end - r : 16;
            const int64_t end = panel + PANEL < in.count ? panel + PANEL : in.count;
            for (int64_t m = panel; m < end;) {
                auto block = [&](auto rows_at_once) {
                    constexpr int M = decltype(rows_at_once)::value;
                    packed16<FORMAT, M>(w, in, m, data, scales, y + m * to + r, to, valid);
                    m += M;
                };
                const int64_t left = end - m;
#if defined(__AVX512F__)
                if (left >= 12) block(std::integral_constant<int, 12>());
                else if (left >= 8) block(std::integral_constant<int, 8>());
                else
#endif
                if (left >= 4) block(std::integral_constant<int, 4>());
                else if (left >= 2) block(std::integral_constant<int, 2>());
                else block(std::integral_constant<int, 1>());
            }
        }
}

// y[m, r] = (W x_m)[r] for every row x_m of `in` and every r in `rows` (begin a multiple of 16); the row stride of y is
// `to`
inline void matmul(const Tensor& w, const Rows& in, float* y, int64_t to, Range rows) {
    switch (w.dtype) {
        case FLOAT32: return dense<FLOAT32>(w, in, y, to, rows);
        case BFLOAT16: return dense<BFLOAT16>(w, in, y, to, rows);
        case FLOAT16: return dense<FLOAT16>(w, in, y, to, rows);
        case INT8: return packed<INT8>(w, in, y, to, rows);
        default: return packed<INT4>(w, in, y, to, rows);
    }
}
