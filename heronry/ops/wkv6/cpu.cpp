// WKV6 (and WKV5), forward and backward:  y_t = S_{t-1} r_t + (r_t . u k_t) v_t,  S_t = S_{t-1} diag(w_t) + v_t k_t^T
//
// The state [N_v, N_k] keeps the layout that Python has, one row per value channel. Along a row all operations are
// elementwise, those for the gradients of r, k and w included; only y and dv are sums over a row. Rows are independent,
// so a tile of a few rows stays in registers for a chunk of tokens.
#include "simd.h"
#include "threads.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// ---- registers ---------------------------------------------------------------------------------------------------
//
constexpr int ROWS = REGISTER == 64 ? 4 : 2;  // of a tile, with up to 4 registers each: as many as registers can hold
constexpr int TOKENS = 16;                    // of a chunk in the forward pass: their rows stay in the L1 cache

// x and y consist of groups of 2 G lanes: adds the two halves of every group; the groups of x come first
template <int G, class V, int... I> INLINE V halve(V x, V y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, y, (I / G * 2 * G + I % G)...) +
           __builtin_shufflevector(x, y, (I / G * 2 * G + I % G + G)...);
#else
    using Indices = decltype(x < y);
    return __builtin_shuffle(x, y, Indices{(I / G * 2 * G + I % G)...}) +
           __builtin_shuffle(x, y, Indices{(I / G * 2 * G + I % G + G)...});
#endif
}

// Reduces registers of `from` rows each to one register of `to` rows; part(i) returns the register that begins with row
// i. In a register of n rows each row has WIDTH / n lanes, which add up to the sum of the row.
template <class R, int from, int to, class F> INLINE Reg<R> fold(const F& part, int first = 0) {
    if constexpr (from == to)
        return part(first);
    else
        return halve<WIDTH<R> / to>(fold<R, from, to / 2>(part, first), fold<R, from, to / 2>(part, first + to / 2),
                                    std::make_integer_sequence<int, WIDTH<R>>());
}

// ---- one head of one sequence ------------------------------------------------------------------------------------

// The arguments of one call.
struct Call {
    const Array* x;     // the tensors, in the order listed at the entry points below
    const int64_t* cu;  // boundaries of packed sequences, or null
    int64_t tokens, heads;
    int n, chunk;

    struct Span {
        int64_t batch, begin, end;
        int64_t first;  // index of its first kept state
    };
    Span span(int64_t sequence) const {
        const auto chunks = [&](int64_t length) { return (length + chunk - 1) / chunk; };
        if (!cu) return {sequence, 0, tokens, sequence * chunks(tokens)};
        int64_t first = 0;
        for (int64_t s = 0; s < sequence; s++) first += chunks(cu[s + 1] - cu[s]);
        return {0, cu[sequence], cu[sequence + 1], first};
    }
    // the matrix [N, N] of `row` and `head` in a tensor [rows, H, N, N]
    template <class R> R* matrix(const Array& states, int64_t row, int64_t head) const {
        return (R*)states.data + (row * heads + head) * n * n;
    }
};

// Working memory in whole vectors, zero-initialised
template <class R> struct Memory {
    struct alignas(64) Line {
        R lanes[LANES<R>];
    };
    std::vector<Line> lines;
    R* next;
    explicit Memory(int64_t size) : lines((size + LANES<R> - 1) / LANES<R>), next(lines.data()->lanes) {}
    R* take(int64_t size) { return std::exchange(next, next + size); }
};

template <class R> INLINE void copy(R* to, int to_stride, const R* from, int from_stride, int n) {
    for (int row = 0; row < n; row++) memcpy(to + row * to_stride, from + row * from_stride, n * sizeof(R));
}

// Reads token t into the rows r, w (as e^log_w), k and v, and prefetches token t + ahead, of the next chunk
template <class R>
INLINE void fetch(const Call& call, int64_t batch, int64_t t, int64_t head, int64_t ahead, R* r, R* w, R* k, R* v,
                  int width) {
    R* rows[] = {r, w, k, v};
    for (int i = 0; i < 4; i++) {
        call.x[i].get(rows[i], batch, t, head, call.n);
        call.x[i].prefetch(batch, t + ahead, head, call.n);
    }
    std::fill(w + call.n, w + width, R(0));
    for (int i = 0; i < width; i += LANES<R>) store(w + i, exp(load(w + i)));
}

template <class R> INLINE Vec<R> dot(const R* x, const R* y, const R* z, int width) {
    Vec<R> total = {};
    for (int i = 0; i < width; i += LANES<R>) total += load(x + i) * load(y + i) * load(z + i);
    return sum<R>(total);
}

// V registers of a row are processed at a time; rows are zero-padded to whole stripes of V registers.
template <class R, int V> void forward(const Call& call, int64_t sequence, int64_t h) {
    constexpr int L = WIDTH<R>, STRIPE = V * L, Q = ROWS;
    const Array &u_in = call.x[4], &state = call.x[5], &y_out = call.x[6], &final_state = call.x[7], &kept = call.x[8];
    const Call::Span at = call.span(sequence);
    const int n = call.n, width = (n + STRIPE - 1) / STRIPE * STRIPE;
    const int longest = std::min<int64_t>(TOKENS, at.end - at.begin);
    Memory<R> memory((width + 1 + 5 * longest) * width + longest * L * L / Q);
    R *S = memory.take(width * width), *u = memory.take(width);
    R* parts = memory.take(longest * L * L / Q);  // per token the partial sums of L rows, one register per tile
    R *r, *w, *k, *v, *y;
    for (R** x : {&r, &w, &k, &v, &y}) *x = memory.take(longest * width);
    copy(S, width, call.matrix<R>(state, sequence, h), n, n);
    u_in.get(u, 0, 0, h, n);

    for (int64_t begin = at.begin; begin < at.end; begin += TOKENS) {
        const int tokens = std::min<int64_t>(TOKENS, at.end - begin);
        if (kept.data && (begin - at.begin) % call.chunk == 0)
            copy(call.matrix<R>(kept, at.first + (begin - at.begin) / call.chunk, h), n, S, width, n);
        for (int t = 0; t < tokens; t++) {
            const int i = t * width;
            fetch(call, at.batch, begin + t, h, TOKENS, r + i, w + i, k + i, v + i, width);
        }
        for (int rows = 0; rows < n; rows += L) {
            for (int c = 0; c < width; c += STRIPE)
                for (int row = rows; row < rows + L; row += Q) {
                    Reg<R> x[Q][V];
                    for (int i = 0; i < Q; i++)
                        for (int j = 0; j < V; j++) x[i][j] = get(S + (row + i) * width + c + j * L);
                    for (int t = 0; t < tokens; t++) {
                        const int here = t * width;
                        Reg<R> read[Q] = {};
#pragma GCC unroll 8
                        for (int j = 0; j < V; j++) {
                            const int at = here + c + j * L;
                            const Reg<R> r_t = get(r + at), w_t = get(w + at), k_t = get(k + at);
                            for (int i = 0; i < Q; i++) {
                                read[i] += x[i][j] * r_t;
                                x[i][j] = x[i][j] * w_t + v[here + row + i] * k_t;
                            }
                        }
                        R* part = parts + t * L * L / Q + (row - rows) * L / Q;
                        const Reg<R> sums = fold<R, 1, Q>([&](int i) { return read[i]; });
                        put(part, c ? get(part) + sums : sums);
                    }
                    for (int i = 0; i < Q; i++)
                        for (int j = 0; j < V; j++) put(S + (row + i) * width + c + j * L, x[i][j]);
                }
            for (int t = 0; t < tokens; t++)
                put(y + t * width + rows, fold<R, Q, L>([&](int i) { return get(parts + (t * L + i) * L / Q); }));
        }
        for (int t = 0; t < tokens; t++) {
            const Vec<R> bonus = dot(r + t * width, u, k + t * width, width);
            for (int i = t * width; i < (t + 1) * width; i += LANES<R>) store(y + i, load(y + i) + bonus * load(v + i));
            y_out.put(y + t * width, at.batch, begin + t, h, n);
        }
    }
    copy(call.matrix<R>(final_state, sequence, h), n, S, width, n);
}

// Runs from the last token to the first; G is the gradient of the state after a token. The states before each token
// (`met`) are recomputed from the one kept at the start of the chunk.
template <class R, int V> void backward(const Call& call, int64_t sequence, int64_t h, bool constant_decay) {
    constexpr int L = WIDTH<R>, STRIPE = V * L, Q = ROWS;
    const Array &u_in = call.x[4], &kept = call.x[5], &dy_in = call.x[6], &dfinal = call.x[7];
    const Array &dr_out = call.x[8], &dlog_w_out = call.x[9], &dk_out = call.x[10], &dv_out = call.x[11];
    const Array &du_out = call.x[12], &dstate = call.x[13];
    const Call::Span at = call.span(sequence);
    const int n = call.n, width = (n + STRIPE - 1) / STRIPE * STRIPE;
    const int longest = std::min<int64_t>(call.chunk, at.end - at.begin);
    Memory<R> memory((2 * width + 3 + 9 * longest) * width + longest * (STRIPE * Q + L * L / Q));
    R *G = memory.take(width * width), *entering = memory.take(width * width);
    R *states = memory.take(longest * STRIPE * Q), *parts = memory.take(longest * L * L / Q);
    R *u = memory.take(width), *du = memory.take(width), *dlog_w_sum = memory.take(width);
    R *r, *w, *k, *v, *dy, *dr, *dw, *dk, *dv;
    for (R** x : {&r, &w, &k, &v, &dy, &dr, &dw, &dk, &dv}) *x = memory.take(longest * width);
    copy(G, width, call.matrix<R>(dfinal, sequence, h), n, n);
    u_in.get(u, 0, 0, h, n);

    for (int64_t chunk = (at.end - at.begin - 1) / call.chunk; chunk >= 0; chunk--) {
        const int64_t begin = at.begin + chunk * call.chunk;
        const int tokens = std::min<int64_t>(call.chunk, at.end - begin);
        copy(entering, width, call.matrix<R>(kept, at.first + chunk, h), n, n);
        for (int t = 0; t < tokens; t++) {
            const int i = t * width;
            fetch(call, at.batch, begin + t, h, -call.chunk, r + i, w + i, k + i, v + i, width);
            dy_in.get(dy + i, at.batch, begin + t, h, n);
            dy_in.prefetch(at.batch, begin + t - call.chunk, h, n);
            for (R* x : {dr, dw, dk}) std::fill(x + i, x + i + width, R(0));
        }
        for (int rows = 0; rows < n; rows += L) {
            for (int c = 0; c < width; c += STRIPE)
                for (int row = rows; row < rows + L; row += Q) {
                    Reg<R> x[Q][V];  // the states before the tokens, then the gradients of the states after them
                    for (int i = 0; i < Q; i++)
                        for (int j = 0; j < V; j++) x[i][j] = get(entering + (row + i) * width + c + j * L);
                    for (int t = 0; t < tokens; t++) {
                        const int here = t * width;
                        R* met = states + t * STRIPE * Q;
#pragma GCC unroll 8
                        for (int j = 0; j < V; j++) {
                            const int at = here + c + j * L;
                            const Reg<R> w_t = get(w + at), k_t = get(k + at);
                            Reg<R> dr_t = get(dr + at);
                            for (int i = 0; i < Q; i++) {
                                put(met + (j * Q + i) * L, x[i][j]);
                                dr_t += x[i][j] * dy[here + row + i];
                                x[i][j] = x[i][j] * w_t + v[here + row + i] * k_t;
                            }
                            put(dr + at, dr_t);
                        }
                    }
                    for (int i = 0; i < Q; i++)
                        for (int j = 0; j < V; j++) x[i][j] = get(G + (row + i) * width + c + j * L);
                    for (int t = tokens - 1; t >= 0; t--) {
                        const int here = t * width;
                        const R* met = states + t * STRIPE * Q;
                        Reg<R> read[Q] = {};
#pragma GCC unroll 8
                        for (int j = 0; j < V; j++) {
                            const int at = here + c + j * L;
                            const Reg<R> r_t = get(r + at), w_t = get(w + at), k_t = get(k + at);
                            Reg<R> dw_t = get(dw + at), dk_t = get(dk + at);
                            for (int i = 0; i < Q; i++) {
                                dw_t += x[i][j] * get(met + (j * Q + i) * L);
                                dk_t += x[i][j] * v[here + row + i];
                                read[i] += x[i][j] * k_t;
                                x[i][j] = x[i][j] * w_t + dy[here + row + i] * r_t;
                            }
                            put(dw + at, dw_t);
                            put(dk + at, dk_t);
                        }
                        R* part = parts + t * L * L / Q + (row - rows) * L / Q;
                        const Reg<R> sums = fold<R, 1, Q>([&](int i) { return read[i]; });
                        put(part, c ? get(part) + sums : sums);
                    }
                    for (int i = 0; i < Q; i++)
                        for (int j = 0; j < V; j++) put(G + (row + i) * width + c + j * L, x[i][j]);
                }
            for (int t = 0; t < tokens; t++)
                put(dv + t * width + rows, fold<R, Q, L>([&](int i) { return get(parts + (t * L + i) * L / Q); }));
        }
        for (int t = tokens - 1; t >= 0; t--) {
            const Vec<R> bonus = dot(r + t * width, u, k + t * width, width);
            Vec<R> dbonus = {};
            for (int i = t * width; i < (t + 1) * width; i += LANES<R>) dbonus += load(dy + i) * load(v + i);
            dbonus = sum<R>(dbonus);
            for (int c = 0; c < width; c += LANES<R>) {
                const int i = t * width + c;
                const Vec<R> r_t = load(r + i), k_t = load(k + i), u_t = load(u + c);
                const Vec<R> dlog_w = load(w + i) * load(dw + i);
                store(dr + i, load(dr + i) + u_t * k_t * dbonus);
                store(dk + i, load(dk + i) + u_t * r_t * dbonus);
                store(dv + i, load(dv + i) + bonus * load(dy + i));
                store(du + c, load(du + c) + r_t * k_t * dbonus);
                store(dw + i, dlog_w);
                store(dlog_w_sum + c, load(dlog_w_sum + c) + dlog_w);
            }
            dr_out.put(dr + t * width, at.batch, begin + t, h, n);
            dk_out.put(dk + t * width, at.batch, begin + t, h, n);
            dv_out.put(dv + t * width, at.batch, begin + t, h, n);
            if (!constant_decay) dlog_w_out.put(dw + t * width, at.batch, begin + t, h, n);
        }
    }
    if (constant_decay) dlog_w_out.put(dlog_w_sum, sequence, 0, h, n);
    du_out.put(du, sequence, 0, h, n);
    copy(call.matrix<R>(dstate, sequence, h), n, G, width, n);
}

// Calls work(R(), V, sequence, head) for every head of every sequence, with R and V as dtype and head size need them
template <class F> void each(const Call& call, int64_t sequences, int threads, bool doubles, const F& work) {
    const auto run = [&](auto number, auto vectors) {
        parallel(sequences * call.heads, threads, [&](int64_t unit) {
            work(number, vectors, unit / call.heads, unit % call.heads);
        });
    };
    const std::integral_constant<int, 64 / REGISTER> narrow;  // one Vec
    const std::integral_constant<int, 4> wide;
    if (doubles)
        call.n % (4 * WIDTH<double>) ? run(double(), narrow) : run(double(), wide);
    else
        call.n % (4 * WIDTH<float>) ? run(float(), narrow) : run(float(), wide);
}

}  // namespace

// x: r, log_w, k, v, u, state, y, final state, kept states (null data: none are kept)
EXPORT int wkv6_forward(const Array* x, const int64_t* cu, int64_t sequences, int64_t tokens, int64_t heads,
                        int64_t size, int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call{x, cu, tokens, heads, int(size), int(chunk)};
        each(call, sequences, threads, x[5].dtype == FLOAT64, [&](auto number, auto vectors, int64_t s, int64_t h) {
            forward<decltype(number), vectors()>(call, s, h);
        });
    });
}

// x: r, log_w, k, v, u, kept states, dy, gradient of the final state, then the gradients of r, log_w, k, v, u and of
// the initial state. That of u, and of log_w where it is constant, has one row per sequence.
EXPORT int wkv6_backward(const Array* x, const int64_t* cu, int64_t sequences, int64_t tokens, int64_t heads,
                         int64_t size, int64_t chunk, int64_t constant_decay, int64_t threads) {
    return status([&] {
        const Call call{x, cu, tokens, heads, int(size), int(chunk)};
        each(call, sequences, threads, x[5].dtype == FLOAT64, [&](auto number, auto vectors, int64_t s, int64_t h) {
            backward<decltype(number), vectors()>(call, s, h, constant_decay);
        });
    });
}
