// Shared by the native steps of all generations: norms, token shift, low-rank products, embedding and head.
#pragma once

#include <initializer_list>

#include "team.h"

// ---- arguments from Python -----------------------------------------------------------------------------------------

// The arguments of one step, filled in by native_step.py. A row is a token; the rows of a sequence are contiguous.
struct Call {
    const void *model, *layers;  // arrays of Tensor, in the order of model_names() and layer_names()
    int64_t layer_count, threads;
    int64_t rows, sequences, channels, attention, heads, hidden, vocabulary;
    const int64_t *tokens, *starts;  // [rows], [sequences + 1]
    const float* const* entering;    // [3 * layers]: att_shift, wkv, ffn_shift of every layer before the step
    float *att_shift, *wkv, *ffn_shift;  // [layers, sequences, ...]: the states after the step
    float* logits;                       // [rows, vocabulary]; with last_only [sequences, vocabulary]
    int64_t last_only;
    double ln_x_eps;
    char* memory;          // see with_memory
    int64_t* memory_size;
};

// ---- vectors -------------------------------------------------------------------------------------------------------

// loads n numbers into a register and zeros the other lanes; n may exceed the width or be negative
INLINE Reg<float> get_some(const float* from, int64_t n) {
    if (n >= WIDTH<float>) return get(from);
    float rest[WIDTH<float>] = {};
    memcpy(rest, from, (n > 0 ? n : 0) * 4);
    return get(rest);
}
INLINE void put_some(float* to, const Reg<float>& x, int64_t n) {
    if (n >= WIDTH<float>) return put(to, x);
    memcpy(to, &x, (n > 0 ? n : 0) * 4);
}
// the same as put, without a copy in the caches; `to` is aligned to a register
INLINE void put_past_caches(float* to, const Reg<float>& x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)x);
#else
    put(to, x);
#endif
}
// other threads see what was put past the caches
INLINE void await_puts() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}
// get_some and put_some for a Vec of 16 numbers
INLINE Vec<float> load_some(const float* from, int64_t n) {
    if (n >= 16) return load(from);
    return Vec<float>::each([&](int i) { return get_some(from + i * WIDTH<float>, n - i * WIDTH<float>); });
}
INLINE void store_some(float* to, const Vec<float>& x, int64_t n) {
    if (n >= 16) return store(to, x);
    for (int i = 0; i < Vec<float>::PARTS; i++) put_some(to + i * WIDTH<float>, x.part[i], n - i * WIDTH<float>);
}
// x with every lane after the first n set to zero
INLINE Vec<float> first(const Vec<float>& x, int64_t n) { return n >= 16 ? x : load_some((const float*)&x, n); }
// columns i .. i + 15 of a row of w as floats, zeros past the end of the row
INLINE Vec<float> at(const Tensor& w, int64_t i, int64_t row = 0) {
    const char* from = w.data + (row * w.columns + i) * bytes(w.dtype);
    if (i + 16 <= w.columns) return load16(from, w.dtype);
    float rest[16] = {};
    read(rest, from, w.dtype, int(w.columns - i));
    return load(rest);
}
INLINE Vec<float> squared_relu(Vec<float> x) {
    x = larger(x, Vec<float>{});
    return x * x;
}

struct Moments {
    float mean, scale;  // scale: 1 / standard deviation
};
// mean and 1 / standard deviation of x[0] .. x[n - 1]; x must be zero-padded to whole vectors of 16
INLINE Moments moments(const float* x, int64_t n, double eps) {
    Vec<float> total{}, squares{};
    for (int64_t i = 0; i < n; i += 16) total += load(x + i);
    const float mean = sum<float>(total) / n;
    for (int64_t i = 0; i < n; i += 16) {
        const Vec<float> d = first(load(x + i) - mean, n - i);
        squares += d * d;
    }
    return {mean, 1 / std::sqrt(float(sum<float>(squares) / n + eps))};
}

constexpr double LN_EPS = 1e-5;

// x = ln0(emb[token]), or emb[token] where there is no ln0; the rows are dealt out to the threads
inline void embed(const Member& me, const Call& c, const Tensor& emb, const Tensor& weight, const Tensor& bias,
                  const Rows& x) {
    for (int64_t m = me.index; m < c.rows; m += me.count) {
        for (int64_t i = 0; i < c.channels; i += 16) store(x.row(m) + i, at(emb, i, c.tokens[m]));
        if (!weight.data) continue;
        const Moments of = moments(x.row(m), c.channels, LN_EPS);
        for (int64_t i = 0; i < c.channels; i += 16)
            store(x.row(m) + i, (load(x.row(m) + i) - of.mean) * of.scale * at(weight, i) + at(bias, i));
    }
}

// Layer norm and token shift for the channels in `own`. Calls mix(m, i, x, before) for every row m and every 16
// channels from i on: x is the normalised input, `before` that of the previous token, read from `entering` for the
// first token of a sequence. That of its last token is written to `leaving`, the shift state of the next call.
template <class F>
INLINE void norm_and_shift(const Call& c, Range own, const Rows& x, const Tensor& weight, const Tensor& bias,
                           float* normed, const float* entering, float* leaving, const F& mix) {
    for (int64_t s = 0; s < c.sequences; s++)
        for (int64_t m = c.starts[s]; m < c.starts[s + 1]; m++) {
            const Moments of = moments(x.row(m), c.channels, LN_EPS);
            const bool first = m == c.starts[s], last = m + 1 == c.starts[s + 1];
            for (int64_t i = own.begin; i < own.end; i += 16) {
                const int64_t n = own.end - i;
                const Vec<float> now = (load(x.row(m) + i) - of.mean) * of.scale * at(weight, i) + at(bias, i);
                const Vec<float> before =
                    first ? load_some(entering + s * c.channels + i, n) : load(normed + (m - 1) * x.stride + i);
                store(normed + m * x.stride + i, now);
                if (last) store_some(leaving + s * c.channels + i, now, n);
                mix(m, i, now, before);
            }
        }
}

// x += W y for the channels in `own`; `scratch` has the layout of x
INLINE void add_matmul(const Tensor& w, const Rows& y, const Rows& x, float* scratch, Range own) {
    matmul(w, y, scratch, x.stride, own);
    for (int64_t m = 0; m < x.count; m++)
        for (int64_t i = own.begin; i < own.end; i += 16)
            store_some(x.row(m) + i, load(x.row(m) + i) + load(scratch + m * x.stride + i), own.end - i);
}

// Low-rank matrices are stored transposed, [in, out]: y[m, c] = sum_i x[m, i] w[i, c]. This block computes M rows and V
// registers of columns from c on. n columns are left from c on, fewer than a register only if V is 1.
template <int64_t DTYPE, int V, int M>
INLINE void low_rank_block(const Tensor& w, const float* x, int64_t stride, float* y, int64_t to, int64_t c, int64_t n) {
    constexpr int64_t size = DTYPE == FLOAT32 ? 4 : 2, L = WIDTH<float>;
    Reg<float> total[M][V] = {};
    const int64_t pitch = w.columns * size;
    const int64_t ahead = (4096 / pitch + 1) * pitch;  // pieces a row apart: the hardware prefetcher misses them
    const char* from = w.data + c * size;
    for (int64_t i = 0; i < w.rows; i++, from += pitch) {
        for (int64_t byte = 0; byte < V * L * size; byte += 64) __builtin_prefetch(from + ahead + byte);
        for (int v = 0; v < V; v++) {
            const char* part = from + v * L * size;
            Reg<float> weights;
            if (V > 1 || n >= L)
                weights = DTYPE == FLOAT32 ? get((const float*)part) : widen((const uint16_t*)part, DTYPE);
            else {
                float rest[16] = {};
                read(rest, part, DTYPE, int(n));
                weights = get(rest);
            }
            for (int m = 0; m < M; m++) total[m][v] += weights * x[m * stride + i];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) put_some(y + m * to + c + v * L, total[m][v], n - v * L);
}
template <int64_t DTYPE>
void low_rank_of(const Tensor& w, const float* x, int64_t stride, int64_t rows, float* y, int64_t to, Range own) {
    constexpr int L = WIDTH<float>;
    for (int64_t m = 0; m < rows;) {
        int64_t c = own.begin;
        auto blocks = [&](auto registers, auto rows_at_once) {
            constexpr int V = decltype(registers)::value, M = decltype(rows_at_once)::value;
            for (; own.end - c >= V * L || (V == 1 && c < own.end); c += V * L)
                low_rank_block<DTYPE, V, M>(w, x + m * stride, stride, y + m * to, to, c, own.end - c);
        };
        auto columns = [&](auto most, auto rows_at_once) {
            blocks(most, rows_at_once);
            blocks(std::integral_constant<int, 4>(), rows_at_once);
            blocks(std::integral_constant<int, 2>(), rows_at_once);
            blocks(std::integral_constant<int, 1>(), rows_at_once);
            m += decltype(rows_at_once)::value;
        };
#if defined(__AVX512F__)
        if (rows - m >= 6)
            columns(std::integral_constant<int, 4>(), std::integral_constant<int, 6>());
        else
#endif
        if (rows - m >= 3)
            columns(std::integral_constant<int, 4>(), std::integral_constant<int, 3>());
        else
            columns(std::integral_constant<int, 12>(), std::integral_constant<int, 1>());
    }
}
inline void low_rank(const Tensor& w, const float* x, int64_t stride, int64_t rows, float* y, int64_t to, Range own) {
    switch (w.dtype) {
        case FLOAT32: return low_rank_of<FLOAT32>(w, x, stride, rows, y, to, own);
        case BFLOAT16: return low_rank_of<BFLOAT16>(w, x, stride, rows, y, to, own);
        default: return low_rank_of<FLOAT16>(w, x, stride, rows, y, to, own);
    }
}

// logits = head(ln_out(x)); with last_only, for the last token of each sequence only
inline void read_out(Member& me, const Call& c, const Rows& x, const Tensor& weight, const Tensor& bias,
                     const Tensor& head, const Rows& out) {
    for (int64_t m = me.index; m < out.count; m += me.count) {
        const float* from = x.row(c.last_only ? c.starts[m + 1] - 1 : m);
        const Moments of = moments(from, c.channels, LN_EPS);
        for (int64_t i = 0; i < c.channels; i += 16)
            store(out.row(m) + i, (load(from + i) - of.mean) * of.scale * at(weight, i) + at(bias, i));
        out.pack(head, m, 0, c.channels);
    }
    me.wait();
    matmul(head, out, c.logits, c.vocabulary, me.part(c.vocabulary));
}

// The channel mix of RWKV-4 to 6, given its token-shifted and packed inputs: x += sigmoid(R xr) * V relu(K xk)^2
inline void gated_channel_mix(Member& me, const Tensor& receptance, const Rows& xr, const Tensor& key, const Rows& xk,
                              const Tensor& value, const Rows& hidden, float* gate, float* added, const Rows& x) {
    const Range own = me.part(x.width), own_hidden = me.part(hidden.width);
    matmul(receptance, xr, gate, x.stride, own);
    matmul(key, xk, hidden.x, hidden.stride, own_hidden);
    for (int64_t m = 0; m < x.count; m++) {
        for (int64_t i = own_hidden.begin; i < own_hidden.end; i += 16)
            store(hidden.row(m) + i, squared_relu(load(hidden.row(m) + i)));
        hidden.pack(value, m, own_hidden.begin, own_hidden.end);
    }
    me.wait();
    matmul(value, hidden, added, x.stride, own);
    for (int64_t m = 0; m < x.count; m++)
        for (int64_t i = own.begin; i < own.end; i += 16) {
            const int64_t place = m * x.stride + i;
            store_some(x.x + place, load(x.x + place) + sigmoid(load(gate + place)) * load(added + place), own.end - i);
        }
}

// The inputs and norm weights of the heads of RWKV-5 or 6. r, k, v and g are [rows, attention]; g is taken before its
// SiLU, and is null if there is no gate.
struct HeadInput {
    const float *r, *k, *v, *g;
    int64_t stride;
    const Tensor &norm_weight, &norm_bias;
};

// Head h for all tokens of sequence s: y = (S + v (u k)^T) r, then S = S diag(w) + v k^T, then norm and gate. bonus(i)
// returns u and decay(m, i) the w of token m, for 16 channels of the head from i on.
template <int SIZE, class U, class W>
INLINE void head_with_bonus(const Call& c, int64_t h, int64_t s, const HeadInput& from, const U& bonus, const W& decay,
                            const float* entering, float* state, const Rows& out) {
    const int64_t size = SIZE ? SIZE : c.attention / c.heads, begin = h * size;
    constexpr int MOST = SIZE ? SIZE : 512;  // MAX_HEAD_SIZE in native_step.py, which rules out larger heads
    alignas(64) float r[MOST], w[MOST], k[MOST], v[MOST], y[MOST];
    for (int64_t m = c.starts[s]; m < c.starts[s + 1]; m++) {
        const int64_t row = m * from.stride + begin;
        Vec<float> ruk{};
        for (int64_t i = 0; i < size; i += 16) {
            const Vec<float> receptance = load_some(from.r + row + i, size - i);
            const Vec<float> key = load_some(from.k + row + i, size - i);
            ruk += receptance * bonus(i) * key;
            store(r + i, receptance);
            store(k + i, key);
            store(v + i, load_some(from.v + row + i, size - i));
            store(w + i, decay(m, i));
        }
        const float now = sum<float>(ruk);

        // four rows of S at a time
        const float* old = m == c.starts[s] ? entering : state;
        for (int64_t i = 0; i < size; i += 4) {
            const int rows = int(size - i < 4 ? size - i : 4);
            Reg<float> read[4] = {};
            float reads[4];
            for (int64_t j = 0; j < size; j += WIDTH<float>)
                for (int q = 0; q < rows; q++) {
                    const int64_t place = (i + q) * size + j, n = size - j;
                    const Reg<float> held = get_some(old + place, n);
                    read[q] += held * get(r + j);
                    put_some(state + place, held * get(w + j) + v[i + q] * get(k + j), n);
                }
            sums(read[0], read[1], read[2], read[3], reads);
            for (int q = 0; q < rows; q++) y[i + q] = reads[q] + v[i + q] * now;
        }

        for (int64_t i = size; i < round_up(size, 16); i++) y[i] = 0;
        const Moments of = moments(y, size, c.ln_x_eps);
        for (int64_t i = 0; i < size; i += 16) {
            Vec<float> normed = (load(y + i) - of.mean) * of.scale * at(from.norm_weight, begin + i) +
                                at(from.norm_bias, begin + i);
            if (from.g) {
                const Vec<float> g = load_some(from.g + row + i, size - i);
                normed *= g * sigmoid(g);
            }
            store_some(out.row(m) + begin + i, normed, size - i);
        }
    }
}

// The fields of a struct of Tensors, and their names: Python takes the order from them and needs no list of its own.
#define TENSOR(field, name) Tensor field;
#define NAME(field, name) name " "
