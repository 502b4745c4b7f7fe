// Bi-WKV, forward and backward. Channels never meet: each lane of a vector is one, with sums (a, b) in units of e^p: the
// past of a token, which goes on from the left, and its future, which goes on from the right.
//
// The future is read first and kept at every chunk's end; going from left to right, a chunk's is computed again from
// there. As in WKV4 units are subtracted first, and to the gradients they are constants: see README.md.
#include "simd.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int CHANNELS = 256;  // of a unit of work at most: rows long enough to be read well
constexpr double NOTHING = -1e38;
constexpr int ROOM = 16;
constexpr int LINES = 32;      // channels in whole cache lines of any dtype: no two threads write to one

// One call, as Python hands it over. Tensors are [.., .., A] with head stride 1: a head is a channel to begin at.
struct Call {
    std::vector<Array> x;  // in the order that the entry points below name
    int64_t tokens, channels, chunk;

    Call(const Array* tensors, int count, int64_t tokens, int64_t channels, int64_t chunk)
        : x(tensors, tensors + count), tokens(tokens), channels(channels), chunk(chunk) {
        for (Array& tensor : x) tensor.head = 1;
    }
    int64_t chunks() const { return (tokens + chunk - 1) / chunk; }
    int64_t count(int64_t c) const { return std::min(chunk, tokens - c * chunk); }  // tokens of a chunk
};

struct Unit {
    int64_t sequence, channel;
    int n;  // channels
    template <class R> int vectors() const { return (n + LANES<R> - 1) / LANES<R>; }
};

// A number for every channel of a unit; the last unit has fewer, and zeros after them.
template <class R> struct Row {
    alignas(64) R x[CHANNELS] = {};
    Vec<R> operator[](int j) const { return load(x + j * LANES<R>); }
    void set(int j, const Vec<R>& value) { store(x + j * LANES<R>, value); }
};

template <class R> struct Rows {
    struct alignas(64) Lanes {
        R x[LANES<R>] = {};
    };
    int64_t stride;
    std::vector<Lanes> all;
    Rows(const Call& call, const Unit& at) : stride(at.vectors<R>() | 1), all(call.chunk * stride) {}
    INLINE Vec<R> operator()(int64_t t, int j) const { return load(all[t * stride + j].x); }
    INLINE void set(int64_t t, int j, const Vec<R>& value) { store(all[t * stride + j].x, value); }
    void get(const Array& from, const Call& call, const Unit& at, int64_t c) {
        for (int64_t t = 0; t < call.count(c); t++)
            from.get(all[t * stride].x, at.sequence, c * call.chunk + t, at.channel, at.n);
    }
    void put(const Array& to, const Call& call, const Unit& at, int64_t c) const {
        for (int64_t t = 0; t < call.count(c); t++)
            to.put(all[t * stride].x, at.sequence, c * call.chunk + t, at.channel, at.n);
    }
};

template <class R> struct Sums {
    Vec<R> a, b, p;
};

template <class R> struct State {
    Row<R> a, b, p;
    State() { std::fill(p.x, p.x + CHANNELS, R(NOTHING)); }
    Sums<R> operator[](int j) const { return {a[j], b[j], p[j]}; }
    void set(int j, const Sums<R>& s) { a.set(j, s.a), b.set(j, s.b), p.set(j, s.p); }
    void get(const Array& states, const Call& call, const Unit& at, int64_t c, int first = 0) {
        const int64_t row = at.sequence * call.chunks() + c;
        for (Row<R>* x : {&a, &b, &p}) states.get(x->x, row, first++, at.channel, at.n);
    }
    void put(const Array& states, const Call& call, const Unit& at, int64_t c, int first = 0) const {
        const int64_t row = at.sequence * call.chunks() + c;
        for (const Row<R>* x : {&a, &b, &p}) states.put(x->x, row, first++, at.channel, at.n);
    }
};

// What the channels of a vector have for all tokens
template <class R> struct Channels {
    Vec<R> log_w, growth, u;  // growth = w - 1
    int64_t run;              // tokens
};

template <class R> struct Token {
    Vec<R> weight;             // in units of its run's largest key
    Vec<R> a, b, c, d;         // the sums of its past and its future, in units of its run
    Vec<R> share, y;           // dy (in the forward pass 1) / the sum of all weights
    Vec<R> ga, gb;             // the gradient's sums from the left
};

template <class R> struct Run {
    int64_t begin, count;
    Vec<R> key;  // the largest
    Sums<R> past, future, left;
    Vec<R> p, q, m, own;
    bool alone() const { return count == 1; }
};

// Sums that decay while others are added up
template <class R> INLINE Sums<R> pass(const Sums<R>& s, const Vec<R>& fade, const Sums<R>& joined) {
    const Vec<R> unit = larger(s.p + fade, joined.p);
    const Vec<R> old = exp(s.p - unit + fade), own = exp(joined.p - unit);
    return {old * s.a + own * joined.a, old * s.b + own * joined.b, unit};
}

template <class R>
struct Column {
    Channels<R> x;
    std::vector<Token<R>> token;
    std::vector<Run<R>> run;
    int64_t runs;

    Column(int64_t chunk) : token(chunk), run(chunk) {}

    INLINE void weigh(const Rows<R>& k, int j, int64_t count) {
        runs = 0;
        for (int64_t begin = 0; begin < count; begin += x.run) {
            Run<R>& r = run[runs++];
            r.begin = begin, r.count = std::min(x.run, count - begin), r.key = R(NOTHING);
            for (int64_t t = begin; t < begin + r.count; t++) r.key = larger(k(t, j), r.key);
            for (int64_t t = begin; t < begin + r.count; t++) token[t].weight = exp(k(t, j) - r.key);
        }
    }
    // the future before the tokens of a run, given that after them
    INLINE Sums<R> before(const Run<R>& r, const Sums<R>& future, const Rows<R>& v, int j) const {
        Sums<R> joined{R(0), R(0), r.key};
        for (int64_t t = r.begin + r.count - 1; t >= r.begin; t--) {
            const Vec<R> weight = token[t].weight;
            joined.a = joined.a + weight * v(t, j) + joined.a * x.growth;
            joined.b = joined.b + weight + joined.b * x.growth;
        }
        return pass(future, R(r.count) * x.log_w, joined);
    }
    INLINE Sums<R> meet(Sums<R> past, Sums<R> future, const Rows<R>& v, const Rows<R>* dy, int j) {
        for (int64_t i = runs - 1; i >= 0; i--) {
            run[i].future = future;
            if (i > 0) future = before(run[i], future, v, j);
        }
        for (int64_t i = 0; i < runs; i++) {
            Run<R>& r = run[i];
            const int64_t begin = r.begin, end = begin + r.count;
            r.past = past;
            const Vec<R> joins = r.alone() ? Vec<R>(R(NOTHING)) : r.key;
            r.p = larger(past.p, joins), r.q = larger(r.future.p, joins);
            r.m = larger(r.p, r.q);
            if (r.alone()) r.m = larger(r.m, r.key + x.u);
            r.own = exp(r.key - r.m + x.u);
            const Vec<R> key_p = exp(r.key - r.p), key_q = exp(r.key - r.q);
            const Vec<R> of_past = exp(r.p - r.m), of_future = exp(r.q - r.m);
            const Vec<R> enters_p = exp(past.p - r.p), enters_q = exp(r.future.p - r.q);
            Vec<R> c = enters_q * r.future.a, d = enters_q * r.future.b;
            for (int64_t t = end - 1; t >= begin; t--) {
                const Vec<R> weight = key_q * token[t].weight;
                token[t].c = c, token[t].d = d;
                c = c + weight * v(t, j) + c * x.growth;
                d = d + weight + d * x.growth;
            }
            Vec<R> a = enters_p * past.a, b = enters_p * past.b;
            Sums<R> joined{R(0), R(0), r.key};
            for (int64_t t = begin; t < end; t++) {
                Token<R>& token = this->token[t];
                const Vec<R> v_t = v(t, j), own = r.own * token.weight, weight = key_p * token.weight;
                const Vec<R> inverse = R(1) / (of_past * b + (of_future * token.d + own));
                token.a = a, token.b = b;
                token.y = (of_past * a + (of_future * token.c + own * v_t)) * inverse;
                token.share = dy ? (*dy)(t, j) * inverse : inverse;
                a = a + weight * v_t + a * x.growth;
                b = b + weight + b * x.growth;
                joined.a = joined.a + token.weight * v_t + joined.a * x.growth;
                joined.b = joined.b + token.weight + joined.b * x.growth;
            }
            past = pass(past, R(r.count) * x.log_w, joined);
        }
        return past;
    }
};

template <class R> std::vector<Channels<R>> channels(const Call& call, const Unit& at) {
    Row<R> log_w, u, growth;
    call.x[0].get(log_w.x, 0, 0, at.channel, at.n);
    call.x[3].get(u.x, 0, 0, at.channel, at.n);
    std::vector<Channels<R>> all;
    for (int j = 0; j < at.vectors<R>(); j++) {
        R steep = 0, bonus = 0;
        for (int i = j * LANES<R>; i < (j + 1) * LANES<R>; i++) {
            growth.x[i] = std::expm1(log_w.x[i]);
            steep = std::max(steep, std::fabs(log_w.x[i])), bonus = std::max(bonus, std::fabs(u.x[i]));
        }
        int64_t run = bonus > ROOM ? 1 : call.chunk;
        if (steep * run > ROOM) run = std::max(int64_t(ROOM / steep), int64_t(1));
        all.push_back({log_w[j], growth[j], u[j], run});
    }
    return all;
}

template <class R> void forward(const Call& call, const Unit& at) {
    const Array &k_in = call.x[1], &v_in = call.x[2], &y_out = call.x[4], &kept = call.x[5];
    Rows<R> k(call, at), v(call, at), y(call, at);
    State<R> past, future;
    const auto all = channels<R>(call, at);
    Column<R> column(call.chunk);

    for (int64_t c = call.chunks() - 1; c >= 0; c--) {
        future.put(kept, call, at, c);
        if (c == 0) break;
        k.get(k_in, call, at, c), v.get(v_in, call, at, c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = all[j];
            column.weigh(k, j, call.count(c));
            Sums<R> s = future[j];
            for (int64_t i = column.runs - 1; i >= 0; i--) s = column.before(column.run[i], s, v, j);
            future.set(j, s);
        }
    }
    for (int64_t c = 0; c < call.chunks(); c++) {
        k.get(k_in, call, at, c), v.get(v_in, call, at, c);
        future.get(kept, call, at, c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = all[j];
            column.weigh(k, j, call.count(c));
            past.set(j, column.meet(past[j], future[j], v, nullptr, j));
            for (int64_t t = 0; t < call.count(c); t++) y.set(t, j, column.token[t].y);
        }
        y.put(y_out, call, at, c);
    }
}

template <class R> void backward(const Call& call, const Unit& at) {
}

// work(unit) for all units of work: as few blocks of channels as give every thread as many units as any other
template <class F> void each(const Call& call, int64_t sequences, int threads, const F& work) {
    const int64_t most = (call.channels + LINES - 1) / LINES;
    int64_t blocks = (call.channels + CHANNELS - 1) / CHANNELS;
    while (blocks < most && sequences * blocks % threads != 0) blocks++;
    const int64_t block = (most + blocks - 1) / blocks * LINES;
    blocks = (call.channels + block - 1) / block;
    parallel(sequences * blocks, threads, [&](int64_t unit) {
        const int64_t channel = unit % blocks * block;
        work(Unit{unit / blocks, channel, int(std::min(block, call.channels - channel))});
    });
}

}  // namespace

// x: log_w, k, v, u, y, kept [sequences * chunks, 3, A]: the future at every chunk's end
extern "C" void biwkv_forward(const Array* x, const int64_t*, int64_t sequences, int64_t tokens, int64_t channels,
                              int64_t chunk, int64_t threads) {
    const Call call(x, 6, tokens, channels, chunk);
    if (x[5].dtype == FLOAT64)
        each(call, sequences, threads, [&](const Unit& unit) { forward<double>(call, unit); });
    else
        each(call, sequences, threads, [&](const Unit& unit) { forward<float>(call, unit); });
}

// x: log_w, k, v, u, kept, dy, room for a note [sequences * chunks, 5, A], then the gradients of log_w, k, v, u. Those of
// log_w and u are a row a sequence.
extern "C" void biwkv_backward(const Array* x, const int64_t*, int64_t sequences, int64_t tokens, int64_t channels,
                               int64_t chunk, int64_t threads) {
    const Call call(x, 11, tokens, channels, chunk);
    if (x[4].dtype == FLOAT64)
        each(call, sequences, threads, [&](const Unit& unit) { backward<double>(call, unit); });
    else
        each(call, sequences, threads, [&](const Unit& unit) { backward<float>(call, unit); });
}
