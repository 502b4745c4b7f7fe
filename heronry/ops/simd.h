// What all kernels share: registers, vectors of 64 bytes, numbers of any dtype.
//
// Registers are the compiler's own vectors (GCC, Clang), so one source becomes AVX-512, AVX2 or plain code by the flags
// it is compiled with; only what a compiler does not find by itself is spelled out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "platform.h"

// ---- registers -----------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
template <class T> struct RegisterOf { typedef T type __attribute__((vector_size(REGISTER))); };
template <class T> using Reg = typename RegisterOf<T>::type;
template <class T> constexpr int WIDTH = REGISTER / sizeof(T);

template <class T> INLINE Reg<T> get(const T* from) {
    Reg<T> x;
    memcpy(&x, from, REGISTER);
    return x;
}
template <class T> INLINE void put(T* to, Reg<T> x) { memcpy(to, &x, REGISTER); }

// ---- vectors -------------------------------------------------------------------------------------------------------

template <class T> struct SignedOf { typedef int32_t type; };
template <> struct SignedOf<double> { typedef int64_t type; };

// 64 bytes of numbers, 16 floats or 8 doubles, in as many registers as that takes. GCC has vectors of any width too,
// but it keeps those that are wider than a register in memory, which costs ten times the arithmetic.
template <class T> struct Vec {
    static constexpr int PARTS = 64 / REGISTER;
    typedef Vec<typename SignedOf<T>::type> Mask;  // the result of a comparison: all bits set where it holds
    Reg<T> part[PARTS];

    Vec() = default;
    INLINE Vec(T x) {
        for (auto& p : part) p = Reg<T>{} + x;
    }
    INLINE T operator[](int i) const { return part[i / WIDTH<T>][i % WIDTH<T>]; }
    template <class F> static INLINE Vec each(const F& of_part) {
        Vec y;
        for (int i = 0; i < PARTS; i++) y.part[i] = (Reg<T>)of_part(i);
        return y;
    }

#define OPERATOR(op)                                                                              \
    friend INLINE Vec operator op(const Vec& x, const Vec& y) {                                \
        return each([&](int i) { return x.part[i] op y.part[i]; });                               \
    }                                                                                             \
    INLINE Vec& operator op##=(const Vec& y) { return *this = *this op y; }
    OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&)
#undef OPERATOR
    friend INLINE Vec operator-(const Vec& x) {
        return each([&](int i) { return -x.part[i]; });
    }
    friend INLINE Vec operator<<(const Vec& x, int n) {
        return each([&](int i) { return x.part[i] << n; });
    }
    friend INLINE Vec operator>>(const Vec& x, int n) {
        return each([&](int i) { return x.part[i] >> n; });
    }
    friend INLINE Mask operator<(const Vec& x, const Vec& y) {
        return Mask::each([&](int i) { return x.part[i] < y.part[i]; });
    }
    friend INLINE Mask operator!=(const Vec& x, const Vec& y) {
        return Mask::each([&](int i) { return x.part[i] != y.part[i]; });
    }
    // x where the mask is set, y elsewhere
    friend INLINE Vec choose(const Mask& mask, const Vec& x, const Vec& y) {
        return each([&](int i) { return mask.part[i] ? x.part[i] : y.part[i]; });
    }
    friend INLINE Vec larger(const Vec& x, const Vec& y) { return choose(y < x, x, y); }
    friend INLINE Vec smaller(const Vec& x, const Vec& y) { return choose(x < y, x, y); }
};
typedef Vec<int32_t> Ints;  // 16 of them
template <class T> constexpr int LANES = 64 / sizeof(T);

template <class T> INLINE Vec<T> load(const T* from) {
    return Vec<T>::each([&](int i) { return get(from + i * WIDTH<T>); });
}
template <class T> INLINE void store(T* to, const Vec<T>& x) {
    for (int i = 0; i < Vec<T>::PARTS; i++) put(to + i * WIDTH<T>, x.part[i]);
}
INLINE Vec<float> as_floats(const Ints& x) {
    return Vec<float>::each([&](int i) { return (Reg<float>)x.part[i]; });
}
INLINE Ints as_ints(const Vec<float>& x) {
    return Ints::each([&](int i) { return (Reg<int32_t>)x.part[i]; });
}

INLINE Vec<float> to_floats(const Ints& x) {
    return Vec<float>::each([&](int i) { return __builtin_convertvector(x.part[i], Reg<float>); });
}

// the sum over the lanes of a register, bit-identical to what `sums` gives
template <class T> INLINE T sum(const Reg<T>& x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
        const __m512 two = _mm512_add_ps((__m512)x, _mm512_shuffle_ps((__m512)x, (__m512)x, 0x4e));
        const __m512 four = _mm512_add_ps(two, _mm512_shuffle_ps(two, two, 0xb1));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
        return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
#elif defined(__AVX__)
    if constexpr (std::is_same_v<T, float>) {
        const __m256 two = _mm256_add_ps((__m256)x, _mm256_movehdup_ps((__m256)x));
        const __m256 four = _mm256_add_ps(two, _mm256_shuffle_ps(two, two, 0x4e));
        return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    }
#endif
    T total = 0;
    for (int i = 0; i < WIDTH<T>; i++) total += x[i];
    return total;
}
template <class T> INLINE T sum(const Vec<T>& x) {
    Reg<T> total = x.part[0];
    for (int i = 1; i < Vec<T>::PARTS; i++) total += x.part[i];
    return sum<T>(total);
}

INLINE float largest(const Vec<float>& x) {
    Reg<float> most = x.part[0];
    for (int i = 1; i < Vec<float>::PARTS; i++) most = most > x.part[i] ? most : x.part[i];
    float lanes[WIDTH<float>];
    put(lanes, most);
    float found = lanes[0];
    for (float lane : lanes) found = lane > found ? lane : found;
    return found;
}

// to[0] .. to[3]: the sums over the lanes of a, b, c and d
INLINE void sums(const Reg<float>& a, const Reg<float>& b, const Reg<float>& c, const Reg<float>& d, float* to) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#elif defined(__AVX__)
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 t = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
    to[0] = sum<float>(a), to[1] = sum<float>(b), to[2] = sum<float>(c), to[3] = sum<float>(d);
#endif
}
INLINE void sums(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c, const Vec<float>& d, float* to) {
    Reg<float> total[4] = {a.part[0], b.part[0], c.part[0], d.part[0]};
    for (int i = 1; i < Vec<float>::PARTS; i++)
        total[0] += a.part[i], total[1] += b.part[i], total[2] += c.part[i], total[3] += d.part[i];
    sums(total[0], total[1], total[2], total[3], to);
}

// e^x. For floats within 1 unit in the last place over the whole range, 0 below -87.3 (no denormals), inf above 88.7.
INLINE Vec<float> exp(const Vec<float>& x) {
    const Vec<float> clamped = larger(choose(x < 88.8f, x, 88.8f), -87.4f);
    const Vec<float> magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const Vec<float> shifted = clamped * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    Vec<float> r = clamped - n * 0.693359375f;  // log 2 in two parts: the first product is exact
    r = r + n * 2.12194440e-4f;
    Vec<float> p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n as two factors, because 2^128 is not a float
    const Ints whole = as_ints(shifted) - as_ints(magic);
    const Ints half = whole >> 1;
    const Vec<float> scaled = p * as_floats((half + 127) << 23) * as_floats((whole - half + 127) << 23);
    return choose(x != x, x, choose(x < -87.33654f, 0.f, scaled));
}
INLINE Vec<double> exp(const Vec<double>& x) {
    double y[8];
    store(y, x);
    for (double& number : y) number = std::exp(number);
    return load(y);
}
INLINE Vec<float> sigmoid(const Vec<float>& x) { return 1.f / (1.f + exp(-x)); }
INLINE Vec<float> tanh(const Vec<float>& x) {
    // near 0 the quotient of exponentials loses digits to cancellation; the series is exact to rounding up to 0.25
    const Vec<float> s = x * x;
    const Vec<float> series =
        x + x * s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835 + s * (-1382.f / 155925)))));
    const Vec<float> e = exp(-2.f * larger(x, -x));
    const Vec<float> far = (1.f - e) / (1.f + e);
    return choose(s < 0.0625f, series, choose(x < 0.f, -far, far));
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

// bfloat16 or float16 numbers to a register of floats, and back
INLINE Reg<float> widen(const uint16_t* x, int32_t dtype) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256((const __m256i*)x);
    if (dtype == BFLOAT16) return (Reg<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    return (Reg<float>)_mm512_cvtph_ps(half);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128((const __m128i*)x);
    if (dtype == BFLOAT16) return (Reg<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    return (Reg<float>)_mm256_cvtph_ps(half);
#elif defined(__aarch64__)
    const uint16x4_t half = vld1_u16(x);
    if (dtype == BFLOAT16) return (Reg<float>)vshll_n_u16(half, 16);
    return (Reg<float>)vcvt_f32_f16(vreinterpret_f16_u16(half));
#else
    Reg<float> y;
    for (int i = 0; i < WIDTH<float>; i++) y[i] = dtype == BFLOAT16 ? from_bfloat16(x[i]) : from_float16(x[i]);
    return y;
#endif
}
INLINE void narrow(uint16_t* to, int32_t dtype, const Reg<float>& x) {
#if defined(__AVX2__) || defined(__aarch64__)
    if (dtype == BFLOAT16) {
        const Reg<int32_t> bits = (Reg<int32_t>)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
        const Reg<int32_t> upper = (x != x ? Reg<int32_t>{} + 0x7fc00000 : rounded) >> 16 & 0xffff;
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)upper));
    } else
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
        const __m128i low = _mm256_castsi256_si128((__m256i)upper), high = _mm256_extracti128_si256((__m256i)upper, 1);
        _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(low, high));
    } else
        _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
        vst1_u16(to, vmovn_u32((uint32x4_t)upper));
    } else
        vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#endif
#else
    for (int i = 0; i < WIDTH<float>; i++) to[i] = dtype == BFLOAT16 ? to_bfloat16(x[i]) : to_float16(x[i]);
#endif
}

// 16 numbers as floats, and back to float32, bfloat16 or float16
INLINE Vec<float> load16(const void* from, int32_t dtype) {
    if (dtype == FLOAT32) return load((const float*)from);
    return Vec<float>::each([&](int i) { return widen((const uint16_t*)from + i * WIDTH<float>, dtype); });
}
INLINE void store16(void* to, int32_t dtype, const Vec<float>& x) {
    if (dtype == FLOAT32) return store((float*)to, x);
    for (int i = 0; i < Vec<float>::PARTS; i++) narrow((uint16_t*)to + i * WIDTH<float>, dtype, x.part[i]);
}

// converts n numbers of any dtype to the kernel's type R, and back
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

// A tensor of activations, filled in by Python: [B, T, H, N], contiguous in the last axis; strides count numbers.
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
    // prefetches a row that is needed soon: the rows of a head are too far apart for the hardware prefetcher
    INLINE void prefetch(int64_t b, int64_t t, int64_t h, int n) const {
        const char* row = (const char*)data + (b * batch + t * time + h * head) * bytes(dtype);
        for (int i = 0; i < n * bytes(dtype); i += 64) __builtin_prefetch(row + i, 0, 2);
    }
};
