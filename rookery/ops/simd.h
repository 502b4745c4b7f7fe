// What all kernels share: vectors of 64 bytes, numbers of any dtype, threads.
//
// Vectors are the compiler's own (GCC, Clang), so one source becomes AVX-512, AVX2 or plain code by the flags it is
// compiled with; only what a compiler does not find by itself is spelled out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

template <class R> struct Lanes;
template <> struct Lanes<float> {
    typedef float vec __attribute__((vector_size(64)));
    typedef int32_t bits __attribute__((vector_size(64)));
};
template <> struct Lanes<double> {
    typedef double vec __attribute__((vector_size(64)));
    typedef int64_t bits __attribute__((vector_size(64)));
};
template <class R> using Vec = typename Lanes<R>::vec;  // 16 floats or 8 doubles
template <class R> constexpr int LANES = 64 / sizeof(R);

template <class R> INLINE Vec<R> load(const R* from) {
    Vec<R> x;
    memcpy(&x, from, 64);
    return x;
}
template <class R> INLINE void store(R* to, Vec<R> x) { memcpy(to, &x, 64); }
template <class R> INLINE Vec<R> all(R x) { return Vec<R>{} + x; }
template <class V> INLINE V larger(V x, V y) { return x > y ? x : y; }

template <class R> INLINE R sum(Vec<R> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(R) == 4)
        return _mm512_reduce_add_ps((__m512)x);
    else
        return _mm512_reduce_add_pd((__m512d)x);
#else
    R total = 0;
    for (int i = 0; i < LANES<R>; i++) total += x[i];
    return total;
#endif
}

// e^x. float: to 1 unit in the last place over the whole range, 0 below -87.3 (no denormals), inf above 88.7.
INLINE Vec<float> exp(Vec<float> x) {
    typedef Lanes<float>::bits Bits;
    const Vec<float> clamped = larger(x < 88.8f ? x : all(88.8f), all(-87.4f));
    const Vec<float> magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Vec<float> shifted = clamped * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    Vec<float> r = clamped - n * 0.693359375f;  // log 2 in two parts: the first product is exact
    r = r + n * 2.12194440e-4f;
    Vec<float> p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, for 2^128 is no float
    const Bits whole = (Bits)shifted - (Bits)magic;
    const Bits half = whole >> 1;
    const Vec<float> scaled = p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((whole - half + 127) << 23);
    return x != x ? x : (x < -87.33654f ? Vec<float>{} : scaled);
}
INLINE Vec<double> exp(Vec<double> x) {
    for (int i = 0; i < 8; i++) x[i] = std::exp(x[i]);
    return x;
}
INLINE Vec<float> sigmoid(Vec<float> x) { return 1.f / (1.f + exp(-x)); }
INLINE Vec<float> tanh(Vec<float> x) {
    // near 0 the quotient of exponentials has lost its digits; the series is exact to rounding up to 0.25 there
    const Vec<float> s = x * x;
    const Vec<float> series =
        x + x * s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835 + s * (-1382.f / 155925)))));
    const Vec<float> e = exp(-2.f * larger(x, -x));
    const Vec<float> far = (1.f - e) / (1.f + e);
    return s < 0.0625f ? series : (x < 0.f ? -far : far);
}

// ---- numbers in memory -------------------------------------------------------------------------------------------

enum Dtype : int32_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3 };  // the order of DTYPES in build.py

INLINE int bytes(int32_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

INLINE float from_bfloat16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE uint16_t to_bfloat16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE float from_float16(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    const uint32_t sign = uint32_t(x & 0x8000) << 16;
    uint32_t bits = uint32_t(x & 0x7fff) << 13;
    float y;
    if (bits >= 0x0f800000u) bits += 0x70000000u;  // inf and nan
    memcpy(&y, &bits, 4);
    y *= 0x1p112f;  // moves the exponent, denormals included
    if ((x & 0x7c00) == 0x7c00) {
        bits = 0x7f800000u | uint32_t(x & 0x3ff) << 13;
        memcpy(&y, &bits, 4);
    }
    memcpy(&bits, &y, 4);
    bits |= sign;
    memcpy(&y, &bits, 4);
    return y;
#endif
}
INLINE uint16_t to_float16(float x) {  // to the nearest, ties to even
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    if (x != x) return sign | 0x7e00;
    float size = std::fabs(x);
    if (size >= 65520.f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
    memcpy(&bits, &size, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | uint16_t((bits - 0x38000000u) >> 13);
#endif
}

// 16 numbers as floats
INLINE Vec<float> load16(const void* from, int32_t dtype) {
    if (dtype == FLOAT32) return load((const float*)from);
    Vec<float> y;
    const uint16_t* x = (const uint16_t*)from;
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256((const __m256i*)x);
    if (dtype == BFLOAT16)
        y = (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    else
        y = (Vec<float>)_mm512_cvtph_ps(half);
#else
    if (dtype == BFLOAT16)
        for (int i = 0; i < 16; i++) y[i] = from_bfloat16(x[i]);
    else
        for (int i = 0; i < 16; i++) y[i] = from_float16(x[i]);
#endif
    return y;
}

// and back, to float32, bfloat16 or float16
INLINE void store16(void* to, int32_t dtype, Vec<float> x) {
    if (dtype == FLOAT32) return store((float*)to, x);
    uint16_t* y = (uint16_t*)to;
#if defined(__AVX512F__)
    if (dtype == BFLOAT16) {
        typedef Lanes<float>::bits Bits;
        const Bits bits = (Bits)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
        const Bits upper = x != x ? Bits{} + 0x7fc00000 : rounded;
        _mm256_storeu_si256((__m256i*)y, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)upper, 16)));
    } else
        _mm256_storeu_si256((__m256i*)y, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    if (dtype == BFLOAT16)
        for (int i = 0; i < 16; i++) y[i] = to_bfloat16(x[i]);
    else
        for (int i = 0; i < 16; i++) y[i] = to_float16(x[i]);
#endif
}

// n numbers of any dtype to and from the kernel's own
template <class R> INLINE void read(R* to, const void* from, int32_t dtype, int n) {
    int i = 0;
    if constexpr (sizeof(R) == 4) {
        if (dtype != FLOAT64)
            for (; i + 16 <= n; i += 16) store(to + i, load16((const char*)from + i * bytes(dtype), dtype));
    }
    for (; i < n; i++) switch (dtype) {
            case FLOAT32: to[i] = ((const float*)from)[i]; break;
            case FLOAT64: to[i] = ((const double*)from)[i]; break;
            case BFLOAT16: to[i] = from_bfloat16(((const uint16_t*)from)[i]); break;
            default: to[i] = from_float16(((const uint16_t*)from)[i]);
        }
}
template <class R> INLINE void write(void* to, int32_t dtype, const R* from, int n) {
    int i = 0;
    if constexpr (sizeof(R) == 4) {
        if (dtype != FLOAT64)
            for (; i + 16 <= n; i += 16) store16((char*)to + i * bytes(dtype), dtype, load(from + i));
    }
    for (; i < n; i++) switch (dtype) {
            case FLOAT32: ((float*)to)[i] = from[i]; break;
            case FLOAT64: ((double*)to)[i] = from[i]; break;
            case BFLOAT16: ((uint16_t*)to)[i] = to_bfloat16(from[i]); break;
            default: ((uint16_t*)to)[i] = to_float16(from[i]);
        }
}

// A tensor of activations as Python hands it over: [B, T, H, N] with the last axis dense; strides count numbers.
struct Array {
    void* data;
    int64_t batch, time, head;  // strides
    int64_t dtype;
    template <class R> INLINE void get(R* to, int64_t b, int64_t t, int64_t h, int n) const {
        read(to, (const char*)data + (b * batch + t * time + h * head) * bytes(dtype), dtype, n);
    }
    template <class R> INLINE void put(const R* from, int64_t b, int64_t t, int64_t h, int n) const {
        write((char*)data + (b * batch + t * time + h * head) * bytes(dtype), dtype, from, n);
    }
    // a row that will be needed soon: rows of one head lie too far apart for the processor to guess the next
    INLINE void prefetch(int64_t b, int64_t t, int64_t h, int n) const {
        const char* row = (const char*)data + (b * batch + t * time + h * head) * bytes(dtype);
        for (int i = 0; i < n * bytes(dtype); i += 64) __builtin_prefetch(row + i, 0, 2);
    }
};

// ---- threads -----------------------------------------------------------------------------------------------------

// work(unit) for every unit below `units`, on up to `threads` threads
template <class F> INLINE void parallel(int64_t units, int threads, const F& work) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) work(unit);
}
