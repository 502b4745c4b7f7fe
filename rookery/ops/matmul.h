// y = W x for a few rows x at once, with W in any format: every weight is read once for up to BLOCK rows.
//
// What a format multiplies: FLOAT32 and FLOAT16 numbers as they are, BFLOAT16 activations rounded to bfloat16,
// INT8 and INT4 activations rounded to 8-bit integers with one scale for each group of a row, so that a group is
// one sum of integers. All sums are float32.
//
// The layout of INT8 and INT4 (made in ops/packed): tiles of 16 output rows; in a tile, for every 4 inputs, 16 times
// 4 bytes. INT8 holds q + 128. INT4 holds two such vectors in one, the first in the low halves of the bytes, as
// places in a table of 16 values + 128. scales: float16 [tiles, groups, 16].
#pragma once

#include <type_traits>

#include "simd.h"

enum Format : int64_t { INT8 = 4, INT4 = 5 };  // they continue Dtype
constexpr int GROUP = 32;                      // weights, and activations, that share a scale

struct Tensor {  // as Python hands it over
    const char* data;
    const char* scales;
    int64_t dtype, rows, columns;
    const uint8_t* table;  // of INT4
};

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Range {
    int64_t begin, end;
};
// the part of n that thread `index` of `count` takes, in whole units
INLINE Range share(int64_t n, int64_t unit, int index, int count) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * index / count * unit, end = units * (index + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}

// Activations [count, width] with the copies that formats want, every row padded with zeros.
struct Rows {
    float* x;
    int64_t count, width, stride;
    uint16_t* half;  // bfloat16
    int8_t* q;
    float* scale;  // [count, stride / GROUP]
    int32_t* sum;  // -128 times the sum of a group's integers, which takes back what the weights are too large

    // Numbers from one row to the next: whole vectors, and not a multiple of 4096 bytes, at which the first cache has
    // only 8 places.
    static INLINE int64_t padded(int64_t width) { return round_up(width, 64) + 32; }
    INLINE float* row(int64_t m) const { return x + m * stride; }

    // makes the copy that `w` wants of the numbers begin .. end of row m; begin is a multiple of GROUP
    void pack(const Tensor& w, int64_t m, int64_t begin, int64_t end) const {
        const float* from = row(m);
        if (w.dtype == BFLOAT16) {
            uint16_t* to = half + m * stride;
            int64_t i = begin;
#if defined(__AVX512BF16__)
            for (; i + 16 <= end; i += 16) {
                const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(from + i));
                memcpy(to + i, &rounded, 32);
            }
#endif
            for (; i < end; i++) to[i] = to_bfloat16(from[i]);
        } else if (w.dtype >= INT8) {
            for (int64_t g = begin; g < end; g += GROUP) pack_group(from + g, m * stride + g);
        }
    }
    INLINE void pack_group(const float* from, int64_t at) const {
        Vec<float> most{};
        for (int64_t i = 0; i < GROUP; i += 16) {
            const Vec<float> v = load(from + i);
            most = larger(most, larger(v, -v));
        }
        float top = 0;
        for (int i = 0; i < 16; i++) top = most[i] > top ? most[i] : top;
        const float step = top / 127, inverse = top > 0 ? 127 / top : 0;
        int32_t total = 0;
        for (int64_t i = 0; i < GROUP; i += 16) {
            const Vec<float> magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to whole numbers
            const Lanes<float>::bits v =
                (Lanes<float>::bits)(load(from + i) * inverse + magic) - (Lanes<float>::bits)magic;
#if defined(__AVX512F__)
            const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v);
            memcpy(q + at + i, &bytes, 16);
            total += _mm512_reduce_add_epi32((__m512i)v);
#else
            for (int j = 0; j < 16; j++) {
                q[at + i + j] = int8_t(v[j]);
                total += v[j];
            }
#endif
        }
        scale[at / GROUP] = step;
        sum[at / GROUP] = -128 * total;
    }
};

// ---- dense: FLOAT32, BFLOAT16, FLOAT16, row after row --------------------------------------------------------------

// the sums of four vectors
INLINE void sums(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c, const Vec<float>& d, float* to) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
    to[0] = sum<float>(a), to[1] = sum<float>(b), to[2] = sum<float>(c), to[3] = sum<float>(d);
#endif
}

// numbers that one step of `Dense` takes, and one step
template <int64_t DTYPE> struct Dense {
    static constexpr int STEP = 16;
    static constexpr bool half = false;  // the activations are the bfloat16 copy
    typedef Vec<float> W;
    static INLINE W weights(const char* w) { return load16(w, DTYPE); }
    static INLINE Vec<float> inputs(const char* x) { return load((const float*)x); }
    static INLINE Vec<float> step(Vec<float> total, W w, Vec<float> x) { return total + w * x; }
};
template <> struct Dense<BFLOAT16> {
    static constexpr bool half = true;
#if defined(__AVX512BF16__)
    static constexpr int STEP = 32;
    typedef __m512i W;
    static INLINE W weights(const char* w) { return _mm512_loadu_si512(w); }
    static INLINE W inputs(const char* x) { return _mm512_loadu_si512(x); }
    static INLINE Vec<float> step(Vec<float> total, W w, W x) {
        return (Vec<float>)_mm512_dpbf16_ps((__m512)total, (__m512bh)w, (__m512bh)x);
    }
#else
    static constexpr int STEP = 16;
    typedef Vec<float> W;
    static INLINE W weights(const char* w) { return load16(w, BFLOAT16); }
    static INLINE W inputs(const char* x) { return load16(x, BFLOAT16); }
    static INLINE Vec<float> step(Vec<float> total, W w, W x) { return total + w * x; }
#endif
};

#if defined(__AVX512F__)
constexpr int BLOCK = 6;  // rows of activations that share a read of the weights; 4 x 6 sums fill the registers
#else
constexpr int BLOCK = 2;
#endif

// What a tile of a dense product is cut from: `columns` of the weights and activations from there on, and how far the
// rows lie apart. What is read soon lies `ahead` bytes on: of the 4 rows there, `from` to `until` are sent for.
struct Cut {
    int64_t columns, pitch, stride, to;
    int64_t ahead, from, until;
    bool add;  // to what y holds already
};

// 4 rows of weights times M rows of activations. STREAM: one row after the other, as they come from memory, which is
// half as fast with four of them at once, and prefetched by the processor better than by hand. The sums are the same
// to the last bit either way.
template <int64_t DTYPE, int M, bool STREAM> INLINE void dense4(const Cut& cut, const char* w, const char* x, float* y) {
    typedef Dense<DTYPE> D;
    constexpr int size = DTYPE == FLOAT32 ? 4 : 2, in = D::half ? 2 : 4;
    Vec<float> total[M][4] = {};
    const int64_t whole = cut.columns / D::STEP * D::STEP;
    if constexpr (STREAM) {
        for (int r = 0; r < 4; r++) {
            const char* row = w + r * cut.pitch;
            Vec<float> of_row[M] = {};
            for (int64_t i = 0; i < whole; i += D::STEP) {
                const auto weights = D::weights(row + i * size);
                for (int m = 0; m < M; m++)
                    of_row[m] = D::step(of_row[m], weights, D::inputs(x + (m * cut.stride + i) * in));
            }
            for (int m = 0; m < M; m++) total[m][r] = of_row[m];
        }
    } else {
        for (int64_t i = 0; i < whole; i += D::STEP) {
            typename D::W weights[4];
            for (int64_t r = cut.from; r < cut.until; r++)
                __builtin_prefetch(w + r * cut.pitch + i * size + cut.ahead);
            for (int r = 0; r < 4; r++) weights[r] = D::weights(w + r * cut.pitch + i * size);
            for (int m = 0; m < M; m++) {
                const auto inputs = D::inputs(x + (m * cut.stride + i) * in);
                for (int r = 0; r < 4; r++) total[m][r] = D::step(total[m][r], weights[r], inputs);
            }
        }
    }
    if (whole < cut.columns)  // the activations are padded with zeros, the weights are not
        for (int r = 0; r < 4; r++) {
            alignas(64) char rest[64] = {};
            memcpy(rest, w + r * cut.pitch + whole * size, (cut.columns - whole) * size);
            for (int m = 0; m < M; m++)
                total[m][r] = D::step(total[m][r], D::weights(rest), D::inputs(x + (m * cut.stride + whole) * in));
        }
    for (int m = 0; m < M; m++) {
        float four[4];
        sums(total[m][0], total[m][1], total[m][2], total[m][3], four);
        for (int r = 0; r < 4; r++) y[m * cut.to + r] = cut.add ? y[m * cut.to + r] + four[r] : four[r];
    }
}

// the last 1 to 3 rows of weights
template <int64_t DTYPE, int M>
INLINE void dense_rest(const Cut& cut, int64_t rows, const char* w, const char* x, float* y) {
    Cut one = cut;
    one.pitch = one.from = one.until = 0;  // the same row 4 times
    one.to = 4;
    one.add = false;
    for (int64_t r = 0; r < rows; r++) {
        float four[M * 4];
        dense4<DTYPE, M, false>(one, w + r * cut.pitch, x, four);
        for (int m = 0; m < M; m++) y[m * cut.to + r] = cut.add ? y[m * cut.to + r] + four[m * 4] : four[m * 4];
    }
}

// Many rows of activations are taken BLOCK at a time; a block in the first cache meets a panel of weights in the
// second, and while all blocks do, the next panel comes from memory.
template <int64_t DTYPE> void dense(const Tensor& w, const Rows& in, float* y, int64_t to, Range rows) {
    constexpr int size = DTYPE == FLOAT32 ? 4 : 2, in_size = Dense<DTYPE>::half ? 2 : 4;
    const char* x = Dense<DTYPE>::half ? (const char*)in.half : (const char*)in.x;
    const int64_t passes = (in.count + BLOCK - 1) / BLOCK, pitch = w.columns * size;
    const int64_t width = passes > 1 ? 1024 : w.columns, panel = passes > 1 ? 32 : 4;
    for (int64_t k = 0; k < w.columns; k += width)
        for (int64_t p = rows.begin; p < rows.end; p += panel) {
            const int64_t end = p + panel < rows.end ? p + panel : rows.end;
            for (int64_t m = 0, pass = 0; m < in.count; pass++) {
                Cut cut{w.columns - k < width ? w.columns - k : width, pitch, in.stride, to, panel * pitch, 0, 0, k > 0};
                cut.from = 4 * pass / passes, cut.until = 4 * (pass + 1) / passes;
                const int64_t left = in.count - m;
                auto tiles = [&](auto block) {
                    constexpr int M = decltype(block)::value;
                    const char* at = x + (m * in.stride + k) * in_size;
                    int64_t r = p;
                    for (; r + 4 <= end; r += 4) {
                        const char* from = w.data + r * pitch + k * size;
                        if (passes == 1)
                            dense4<DTYPE, M, true>(cut, from, at, y + m * to + r);
                        else
                            dense4<DTYPE, M, false>(cut, from, at, y + m * to + r);
                    }
                    dense_rest<DTYPE, M>(cut, end - r, w.data + r * pitch + k * size, at, y + m * to + r);
                    m += M;
                };
                if (left >= BLOCK) tiles(std::integral_constant<int, BLOCK>());
#if defined(__AVX512F__)
                else if (left == 5) tiles(std::integral_constant<int, 5>());
                else if (left == 4) tiles(std::integral_constant<int, 4>());
                else if (left == 3) tiles(std::integral_constant<int, 3>());
                else if (left == 2) tiles(std::integral_constant<int, 2>());
#endif
                else tiles(std::integral_constant<int, 1>());
            }
        }
}

// ---- INT8 and INT4 ------------------------------------------------------------------------------------------------

typedef Lanes<float>::bits Ints;  // 16 int32

// total[row] + the 4 products of each of 16 rows; x are the same 4 signed integers for all. The weights are unsigned,
// 128 too large: with VNNI the sums stay so, and begin with Rows::sum to make up for it.
#if defined(__AVX512VNNI__)
constexpr bool TOO_LARGE = true;
#else
constexpr bool TOO_LARGE = false;
#endif
INLINE Ints dot4(Ints total, Ints weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    // 16-bit sums of two products must not overflow: the sign of a weight moves over to x, and 127 * 127 * 2 fits
    const __m256i four = _mm256_set1_epi32(x), offset = _mm256_set1_epi8(-128), one = _mm256_set1_epi16(1);
    __m256i halves[2], sums[2];
    memcpy(halves, &weights, 64);
    memcpy(sums, &total, 64);
    for (int i = 0; i < 2; i++) {
        const __m256i w = _mm256_xor_si256(halves[i], offset);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four, w));
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, one));
    }
    memcpy(&total, sums, 64);
    return total;
#else
    uint8_t w[64];
    int8_t four[4];
    memcpy(w, &weights, 64);
    memcpy(four, &x, 4);
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++) total[r] += (int(w[4 * r + i]) - 128) * four[i];
    return total;
#endif
}

// 64 halves of bytes as the numbers they stand for
INLINE Ints look_up(Ints places, const uint8_t* table) {
    Ints y;
#if defined(__AVX512BW__)
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    y = (Ints)_mm512_shuffle_epi8(values, (__m512i)places);
#elif defined(__AVX2__)
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    __m256i halves[2];
    memcpy(halves, &places, 64);
    for (int i = 0; i < 2; i++) halves[i] = _mm256_shuffle_epi8(values, halves[i]);
    memcpy(&y, halves, 64);
#else
    uint8_t bytes[64];
    memcpy(bytes, &places, 64);
    for (int i = 0; i < 64; i++) bytes[i] = table[bytes[i]];
    memcpy(&y, bytes, 64);
#endif
    return y;
}

// one tile of 16 output rows times M rows of activations from row `first` on
template <int64_t FORMAT, int M>
INLINE void packed16(const Tensor& w, const Rows& in, int64_t first, const char* data, const char* scales, float* y,
                     int64_t to, int64_t valid) {
    constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums that do not wait for each other
    const int8_t* x = in.q + first * in.stride;
    Vec<float> total[M] = {};
    for (int64_t at = 0; at < w.columns; at += GROUP) {
        Ints sums[M][CHAINS] = {};
        if (TOO_LARGE)
            for (int m = 0; m < M; m++) sums[m][0] += in.sum[((first + m) * in.stride + at) / GROUP];
        auto add = [&](Ints weights, int64_t i, int chain) {
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, x + m * in.stride + i, 4);
                sums[m][chain % CHAINS] = dot4(sums[m][chain % CHAINS], weights, four);
            }
        };
        Ints vector;
        if (FORMAT == INT8)
            for (int64_t i = 0; i < GROUP; i += 16)
                for (int j = 0; j < 4; j++, data += 64) {
                    memcpy(&vector, data, 64);
                    add(vector, at + i + 4 * j, j);
                }
        else
            for (int64_t i = 0; i < GROUP; i += 16)
                for (int j = 0; j < 2; j++, data += 64) {
                    memcpy(&vector, data, 64);
                    add(look_up(vector & 0x0f0f0f0f, w.table), at + i + 8 * j, 2 * j);
                    add(look_up((vector >> 4) & 0x0f0f0f0f, w.table), at + i + 8 * j + 4, 2 * j + 1);
                }
        const Vec<float> scale = load16(scales, FLOAT16);
        scales += 32;
        for (int m = 0; m < M; m++) {
            Ints all = sums[m][0];
            for (int c = 1; c < CHAINS; c++) all += sums[m][c];
            total[m] +=
                __builtin_convertvector(all, Vec<float>) * (scale * in.scale[((first + m) * in.stride + at) / GROUP]);
        }
    }
    for (int m = 0; m < M; m++) memcpy(y + m * to, &total[m], valid * 4);
}

template <int64_t FORMAT> void packed(const Tensor& w, const Rows& in, float* y, int64_t to, Range rows) {
    const int64_t tile = w.columns * (FORMAT == INT8 ? 16 : 8), tile_scales = w.columns / GROUP * 32;
    constexpr int64_t PANEL = 192;  // rows of activations that stay in the second cache while all weights pass by
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
                else if (left >= 4) block(std::integral_constant<int, 4>());
                else
#endif
                if (left >= 2) block(std::integral_constant<int, 2>());
                else block(std::integral_constant<int, 1>());
            }
        }
}

// y[m, r] = W x for the rows r of W in `rows` (begin a multiple of 16) and all m; y's rows lie `to` numbers apart
inline void matmul(const Tensor& w, const Rows& in, float* y, int64_t to, Range rows) {
    switch (w.dtype) {
        case FLOAT32: return dense<FLOAT32>(w, in, y, to, rows);
        case BFLOAT16: return dense<BFLOAT16>(w, in, y, to, rows);
        case FLOAT16: return dense<FLOAT16>(w, in, y, to, rows);
        case INT8: return packed<INT8>(w, in, y, to, rows);
        default: return packed<INT4>(w, in, y, to, rows);
    }
}
