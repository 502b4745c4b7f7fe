// WKV7, forward and backward.
//
// A head's state is stored as rows [k][v], split into blocks of M registers of value channels. In the forward pass the
// value channels are independent, so all arithmetic is vertical, in one pass over the state per token: it updates row k
// and, while the row is in registers, adds its share to y_t and to z_{t+1} = S_t a_{t+1}.
#include "simd.h"
#include "threads.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int ROWS = 8;  // rows whose sums over the value channels are taken together

// Working memory, aligned to vectors and zero-initialised.
template <class R> class Buffer {
    struct alignas(64) Line {
        R x[LANES<R>];
    };
    std::vector<Line> lines;

  public:
    explicit Buffer(int64_t size) : lines((size + LANES<R> - 1) / LANES<R>) {}
    operator R*() { return lines[0].x; }
};

struct Span {  // a sequence: tokens start to end of a row of the batch
    int64_t batch, start, end;
};

// The arguments of one call.
struct Call {
    const int64_t* cu;  // boundaries of packed sequences, or null
    int64_t sequences, tokens, heads, chunk;
    int n;  // the size of a head

    int64_t square() const { return int64_t(n) * n; }
    Span span(int64_t sequence) const {
        return cu ? Span{0, cu[sequence], cu[sequence + 1]} : Span{sequence, 0, tokens};
    }
    // offset of the kept state before token `t`; every sequence has room for a partial chunk at its end
    int64_t kept(int64_t sequence, int64_t t, int64_t head) const {
        const int64_t before = cu ? cu[sequence] : sequence * tokens;
        const int64_t chunks = before / chunk + sequence + (t - span(sequence).start) / chunk;
        return (chunks * heads + head) * square();
    }
    // calls work(sequence, first head, end head) for groups of heads: large ones, but enough to keep all threads busy
    template <class F> void for_groups(int64_t threads, const F& work) const {
        const int64_t group = std::clamp(sequences * heads / (2 * threads), int64_t(1), std::min(heads, int64_t(16)));
        const int64_t groups = (heads + group - 1) / group;
        parallel(sequences * groups, threads, [&](int64_t unit) {
            const int64_t first = unit % groups * group;
            work(unit / groups, first, std::min(first + group, heads));
        });
    }
};

// to[j][i] = from[i][j], with row strides `to_row` and `from_row`
template <class R> void transpose(R* to, int to_row, const R* from, int from_row, int rows, int columns) {
    int i = 0;
#if defined(__SSE__)
    if constexpr (sizeof(R) == 4) {
        for (; i + 4 <= rows; i += 4) {
            int j = 0;
            for (; j + 4 <= columns; j += 4) {
                __m128 x[4];
                for (int k = 0; k < 4; k++) x[k] = _mm_loadu_ps(from + (i + k) * from_row + j);
                _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
                for (int k = 0; k < 4; k++) _mm_storeu_ps(to + (j + k) * to_row + i, x[k]);
            }
            for (; j < columns; j++)
                for (int k = 0; k < 4; k++) to[j * to_row + i + k] = from[(i + k) * from_row + j];
        }
    }
#endif
    for (; i < rows; i++)
        for (int j = 0; j < columns; j++) to[j * to_row + i] = from[i * from_row + j];
}

// The layout of a head in working memory, zero-padded to whole blocks of registers and to a multiple of ROWS rows.
template <class R, int M> struct Layout {
    static constexpr int W = M * WIDTH<R>;  // value channels of a block
    int n, blocks, rows, width, block, head;  // block, head: numbers in one

    explicit Layout(int n)
        : n(n), blocks((n + W - 1) / W), rows((n + ROWS - 1) / ROWS * ROWS), width((blocks * W + 15) / 16 * 16),
          block(rows * W), head(blocks * block) {}
    int inside(int j) const { return std::min(W, n - j * W); }  // channels of block j that are not padding

    // converts a state [v][k] to this layout, and back
    void load(R* head, const R* state) const {
        for (int j = 0; j < blocks; j++) transpose(head + j * block, W, state + j * W * n, n, inside(j), n);
    }
    void store(const R* head, R* state) const {
        for (int j = 0; j < blocks; j++) transpose(state + j * W * n, n, head + j * block, W, n, inside(j));
    }
    // write a kept state, which is [k][v], and read block j of one
    void keep(const R* head, R* kept) const {
        for (int j = 0; j < blocks; j++)
            for (int k = 0; k < n; k++)
                memcpy(kept + k * n + j * W, head + j * block + k * W, inside(j) * sizeof(R));
    }
    void recall(R* S, const R* kept, int j) const {
        for (int k = 0; k < n; k++) memcpy(S + k * W, kept + k * n + j * W, inside(j) * sizeof(R));
    }
};

// The vectors of a token, stored side by side: a power of two apart they would evict each other from the cache.
enum Field { r_, w_, k_, v_, a_, b_, INPUTS, y_ = INPUTS, FORWARD, dy_ = INPUTS, dr_, dw_, dk_, dv_, da_, db_, z_, dz_,
             BACKWARD };

// A chunk of tokens for a group of heads, [heads][chunk][fields][width]. Tensors are read and written token by token,
// all heads of the group together, because there the heads of a token are adjacent.
template <class R> struct Tokens {
    Buffer<R> rows;
    int64_t width, token, head;  // numbers in one

    Tokens(int64_t heads, int64_t chunk, int64_t fields, int64_t width)
        : rows(heads * chunk * fields * width), width(width), token(fields * width), head(chunk * token) {}
    R* operator()(int64_t h, int64_t t, int field) { return rows + h * head + t * token + field * width; }
};

// log w -> w, in place; zeros the padding
template <class R> INLINE void decay(R* w, int n, int width) {
    for (int i = 0; i < width; i += LANES<R>) store(w + i, exp(load(w + i)));
    std::fill(w + n, w + width, R(0));
}

// The tokens and heads that are being processed.
struct Piece {
    int64_t batch, start, length, first, heads;
    int n;

    template <class R> void get(const Array& from, Tokens<R>& to, int field) const {
        for (int64_t t = 0; t < length; t++)
            for (int64_t h = 0; h < heads; h++) from.get(to(h, t, field), batch, start + t, first + h, n);
    }
    template <class R> void put(Tokens<R>& from, int field, const Array& to) const {
        for (int64_t t = 0; t < length; t++)
            for (int64_t h = 0; h < heads; h++) to.put(from(h, t, field), batch, start + t, first + h, n);
    }
    template <class R> void get_inputs(const Array* x, Tokens<R>& to) const {
        for (int field = r_; field < INPUTS; field++) get(x[field], to, field);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < length; t++)
                decay(to(h, t, w_), n, to.width);
    }
};

// z = S a
template <class R, int M> INLINE void look(const R* S, const R* a, int rows, R* z) {
    constexpr int L = WIDTH<R>;
    Reg<R> sum[M] = {};
    for (int k = 0; k < rows; k++)
        for (int j = 0; j < M; j++) sum[j] += get(S + (k * M + j) * L) * a[k];
    for (int j = 0; j < M; j++) put(z + j * L, sum[j]);
}

// next = S diag(w) + z b^T + v k^T, then z_next = next a, with the a of the following token, and with READ y = next r
template <class R, int M, bool READ>
INLINE void step(const R* S, R* next, const R* r, const R* w, const R* k, const R* v, const R* a, const R* b, int rows,
                 const R* z, R* y, R* z_next) {
    constexpr int L = WIDTH<R>;
    Reg<R> own_v[M], own_z[M], out[M] = {}, look[M] = {};
    for (int j = 0; j < M; j++) own_v[j] = get(v + j * L), own_z[j] = get(z + j * L);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < M; j++) {
            const Reg<R> row = get(S + (i * M + j) * L) * w[i] + own_z[j] * b[i] + own_v[j] * k[i];
            put(next + (i * M + j) * L, row);
            if (READ) out[j] += row * r[i];
            look[j] += row * a[i];
        }
    for (int j = 0; j < M; j++) {
        if (READ) put(y + j * L, out[j]);
        put(z_next + j * L, look[j]);
    }
}

template <class R, int M>
void forward(const Call& call, int64_t sequence, int64_t first, int64_t last, const Array* x) {
    const Layout<R, M> at(call.n);
    const Span span = call.span(sequence);
    const int64_t heads = last - first, chunk = std::min(call.chunk, span.end - span.start);
    const R* state = (const R*)x[6].data + (sequence * call.heads + first) * call.square();
    R* final_state = (R*)x[8].data + (sequence * call.heads + first) * call.square();
    R* kept = (R*)x[9].data;

    Tokens<R> token(heads, chunk, FORWARD, at.width);
    Buffer<R> S(heads * at.head), z(at.W), nothing(at.width);
    for (int64_t h = 0; h < heads; h++) at.load(S + h * at.head, state + h * call.square());
    for (int64_t start = span.start; start < span.end; start += chunk) {
        const Piece piece{span.batch, start, std::min(chunk, span.end - start), first, heads, call.n};
        piece.get_inputs(x, token);
        for (int64_t h = 0; h < heads; h++) {
            if (kept) at.keep(S + h * at.head, kept + call.kept(sequence, start, first + h));
            for (int j = 0; j < at.blocks; j++) {
                R* own = S + h * at.head + j * at.block;
                look<R, M>(own, token(h, 0, a_), at.rows, z);
                for (int64_t t = 0; t < piece.length; t++) {
                    const auto in = [&](int field) { return token(h, t, field); };
                    const R* next_a = t + 1 < piece.length ? token(h, t + 1, a_) : nothing;
                    step<R, M, true>(own, own, in(r_), in(w_), in(k_), in(v_) + j * at.W, next_a, in(b_), at.rows, z,
                                     in(y_) + j * at.W, z);
                }
            }
        }
        piece.put(token, y_, x[7]);
    }
    for (int64_t h = 0; h < heads; h++) at.store(S + h * at.head, final_state + h * call.square());
}

// ---- backward ----------------------------------------------------------------------------------------------------
//
// G is dL/dS_t from everything after token t. Arriving at t: G += dy r^T; then dv = G k, dz = G b, and per row
// dr = S_t^T dy, dk = G^T v, db = G^T z. Leaving t: dw = the sum over v of S_{t-1} G, da = S_{t-1}^T dz, and then
// G = G diag(w) + dz a^T. Leaving t and arriving at t - 1 read the same state S_{t-1}, so one pass does both.
//
// The states of a chunk are recomputed from the one kept before it.

// to[i] += the sum over the lanes of x[i], for ROWS registers
template <class R> INLINE void add_sums(R* to, const Reg<R>* x) {
#if defined(__AVX__)
    if constexpr (sizeof(R) == 4) {
        const auto eight = [&](int i) {  // sums of eight lanes each
            const float* lanes = (const float*)(x + i);
            const __m256 low = _mm256_load_ps(lanes);
            return REGISTER == 32 ? low : _mm256_add_ps(low, _mm256_load_ps(lanes + 8));
        };
        const auto four = [&](int i) {  // of rows i to i + 3, in either half
            return _mm256_hadd_ps(_mm256_hadd_ps(eight(i), eight(i + 1)), _mm256_hadd_ps(eight(i + 2), eight(i + 3)));
        };
        const __m256 first = four(0), second = four(4);
        const __m256 total = _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20),
                                           _mm256_permute2f128_ps(first, second, 0x31));
        return _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), total));
    }
#endif
    for (int i = 0; i < ROWS; i++)
        for (int lane = 0; lane < WIDTH<R>; lane++) to[i] += x[i][lane];
}

// Leaves one token and arrives at the one before it; at either end of a chunk it does only one of the two. S is the
// state between the tokens, `from` and `to` point to their fields.
template <class R, int M, bool LEAVE, bool ARRIVE>
INLINE void walk(const R* S, R* G, R* const* from, R* const* to, int rows) {
    constexpr int L = WIDTH<R>;
    Reg<R> dz[M], dy[M], v[M], z[M], dv[M] = {}, to_dz[M] = {};
    for (int j = 0; j < M; j++) {
        if (LEAVE) dz[j] = get(from[dz_] + j * L);
        if (ARRIVE) dy[j] = get(to[dy_] + j * L), v[j] = get(to[v_] + j * L), z[j] = get(to[z_] + j * L);
    }
    for (int block = 0; block < rows; block += ROWS) {
        Reg<R> dw[ROWS], da[ROWS], dr[ROWS], dk[ROWS], db[ROWS];
        for (int i = 0; i < ROWS; i++) {
            const int row = block + i;
            Reg<R> own_w{}, own_a{}, own_r{}, own_k{}, own_b{};
            for (int j = 0; j < M; j++) {
                const Reg<R> s = get(S + (row * M + j) * L);
                Reg<R> g = get(G + (row * M + j) * L);
                if (LEAVE) {
                    own_w += s * g;
                    own_a += s * dz[j];
                    g = g * from[w_][row] + dz[j] * from[a_][row];
                }
                if (ARRIVE) {
                    own_r += s * dy[j];
                    g += dy[j] * to[r_][row];
                    own_k += g * v[j];
                    own_b += g * z[j];
                    dv[j] += g * to[k_][row];
                    to_dz[j] += g * to[b_][row];
                }
                put(G + (row * M + j) * L, g);
            }
            if (LEAVE) dw[i] = own_w, da[i] = own_a;
            if (ARRIVE) dr[i] = own_r, dk[i] = own_k, db[i] = own_b;
        }
        if (LEAVE) add_sums<R>(from[dw_] + block, dw), add_sums<R>(from[da_] + block, da);
        if (ARRIVE)
            add_sums<R>(to[dr_] + block, dr), add_sums<R>(to[dk_] + block, dk), add_sums<R>(to[db_] + block, db);
    }
    if (ARRIVE)
        for (int j = 0; j < M; j++) put(to[dv_] + j * L, dv[j]), put(to[dz_] + j * L, to_dz[j]);
}

template <class R, int M>
void backward(const Call& call, int64_t sequence, int64_t first, int64_t last, const Array* x) {
    const Layout<R, M> at(call.n);
    const Span span = call.span(sequence);
    const int64_t heads = last - first, chunk = std::min(call.chunk, span.end - span.start);
    const R* kept = (const R*)x[6].data;
    const R* dfinal = (const R*)x[8].data + (sequence * call.heads + first) * call.square();
    R* dstate = (R*)x[15].data + (sequence * call.heads + first) * call.square();

    Tokens<R> token(heads, chunk, BACKWARD, at.width);
    Buffer<R> G(heads * at.head), S((chunk + 1) * at.block), nothing(at.width), unread(at.W);
    for (int64_t h = 0; h < heads; h++) at.load(G + h * at.head, dfinal + h * call.square());
    for (int64_t c = (span.end - span.start - 1) / chunk; c >= 0; c--) {
        const int64_t start = span.start + c * chunk;
        const Piece piece{span.batch, start, std::min(chunk, span.end - start), first, heads, call.n};
        const int64_t last_t = piece.length - 1;
        piece.get_inputs(x, token);
        piece.get(x[7], token, dy_);
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t t = 0; t <= last_t; t++)
                for (int field : {dr_, dw_, dk_, da_, db_}) std::fill_n(token(h, t, field), at.width, R(0));
            for (int j = 0; j < at.blocks; j++) {
                const auto state = [&](int64_t t) { return S + t * at.block; };  // before token t
                at.recall(S, kept + call.kept(sequence, start, first + h), j);
                look<R, M>(S, token(h, 0, a_), at.rows, token(h, 0, z_) + j * at.W);
                for (int64_t t = 0; t <= last_t; t++) {
                    const auto in = [&](int field) { return token(h, t, field); };
                    const R* next_a = t < last_t ? token(h, t + 1, a_) : nothing;
                    R* next_z = t < last_t ? token(h, t + 1, z_) + j * at.W : unread;
                    step<R, M, false>(state(t), state(t + 1), in(r_), in(w_), in(k_), in(v_) + j * at.W, next_a,
                                      in(b_), at.rows, in(z_) + j * at.W, nullptr, next_z);
                }

                R* own = G + h * at.head + j * at.block;
                R *from[BACKWARD] = {}, *to[BACKWARD] = {};
                const auto reach = [&](int64_t t) {
                    std::copy_n(to, int(BACKWARD), from);
                    for (int field = 0; field < BACKWARD; field++) to[field] = token(h, t, field);
                    for (int field : {v_, dy_, dv_, z_, dz_}) to[field] += j * at.W;  // by value channel
                };
                reach(last_t);
                walk<R, M, false, true>(state(last_t + 1), own, from, to, at.rows);
                for (int64_t t = last_t; t > 0; t--) {
                    reach(t - 1);
                    walk<R, M, true, true>(state(t), own, from, to, at.rows);
                }
                walk<R, M, true, false>(S, own, to, to, at.rows);
            }
            for (int64_t t = 0; t <= last_t; t++)
                for (int64_t i = 0; i < at.width; i++) token(h, t, dw_)[i] *= token(h, t, w_)[i];
        }
        for (int i = 0; i < INPUTS; i++) piece.put(token, dr_ + i, x[9 + i]);
    }
    for (int64_t h = 0; h < heads; h++) at.store(G + h * at.head, dstate + h * call.square());
}

// A block has no more registers than a head needs. Doubles, which serve for checks, get a single block size: every
// further one takes a second to compile.
template <class R> void any_forward(const Call& call, const Array* x, int64_t threads) {
    auto body = forward<R, 2>;
    if constexpr (sizeof(R) == 4)
        body = call.n <= WIDTH<R> ? forward<R, 1> : call.n <= 2 * WIDTH<R> ? forward<R, 2> : forward<R, 4>;
    call.for_groups(threads, [&](int64_t s, int64_t first, int64_t last) { body(call, s, first, last, x); });
}
template <class R> void any_backward(const Call& call, const Array* x, int64_t threads) {
    auto body = backward<R, 2>;
    if constexpr (sizeof(R) == 4)
        body = call.n <= WIDTH<R> ? backward<R, 1> : call.n <= 2 * WIDTH<R> ? backward<R, 2> : backward<R, 4>;
    call.for_groups(threads, [&](int64_t s, int64_t first, int64_t last) { body(call, s, first, last, x); });
}

}  // namespace

// x: r, log_w, k, v, a, b, state, y, final state, kept states (null data: none are kept)
EXPORT int wkv7_forward(const Array* x, const int64_t* cu, int64_t sequences, int64_t tokens, int64_t heads,
                        int64_t size, int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call{cu, sequences, tokens, heads, chunk, int(size)};
        x[6].dtype == FLOAT64 ? any_forward<double>(call, x, threads) : any_forward<float>(call, x, threads);
    });
}

// x: r, log_w, k, v, a, b, kept states, dy, gradient of the final state; then the gradients of r, log_w, k, v, a, b
// and of the initial state
EXPORT int wkv7_backward(const Array* x, const int64_t* cu, int64_t sequences, int64_t tokens, int64_t heads,
                         int64_t size, int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call{cu, sequences, tokens, heads, chunk, int(size)};
        x[6].dtype == FLOAT64 ? any_backward<double>(call, x, threads) : any_backward<float>(call, x, threads);
    });
}
