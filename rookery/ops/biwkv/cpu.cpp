#include "simd.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int CHANNELS = 256;       // of a unit of work at most: rows long enough to be read well
constexpr int LINES = 32;           // channels in whole cache lines of any dtype: no two threads write to one
constexpr double NOTHING = -1e38;   // the unit of an empty sum: unlike -inf it can be subtracted from itself
constexpr double ROOM = 16;         // what the logarithm of a run's decay may reach; float32 has 87

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

#ifndef LEAN
#define LEAN 1
#endif
// e^x for x < 88
INLINE Vec<float> power(const Vec<float>& x) {
#if LEAN
    const Vec<float> clamped = choose(x < -87.33f, -87.33f, x);
    const Vec<float> magic = 12582912.f;
    const Vec<float> shifted = clamped * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    Vec<float> r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<float> p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return choose(x < -87.33f, 0.f, p * as_floats((as_ints(shifted) + 127) << 23));
#else
    return exp(x);
#endif
}
INLINE Vec<double> power(const Vec<double>& x) { return exp(x); }

// The rows of a chunk's tokens, of the channels of a unit. An odd number of cache lines lies between two rows: a column
// of them then finds room in the first cache, of which lines a power of two apart share few places.
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

// A number for every channel of a unit; the last unit has fewer, and zeros after them.
template <class R> struct Row {
    alignas(64) R x[CHANNELS] = {};
    Vec<R> operator[](int j) const { return load(x + j * LANES<R>); }
    void set(int j, const Vec<R>& value) { store(x + j * LANES<R>, value); }
};

// Sums of weighted values and of weights, in units of e^p
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
    Vec<R> weight;      // in units of its run's largest key
    Sums<R> past, future, left;
    Vec<R> share, y;    // dy / the sum of all weights
};

template <class R> struct Run {
    int64_t begin, count;
    Vec<R> key, m, own;
};

// Sums as the tokens of a run meet them one after the other, in one unit
template <class R> struct Chain {
    Sums<R> entered, now;
    Vec<R> key, scale;
    INLINE Chain(const Sums<R>& s, const Vec<R>& key, int64_t count) : entered(s), key(key) {
        now.p = count == 1 ? s.p : larger(s.p, key);
        const Vec<R> factor = power(s.p - now.p);
        now.a = factor * s.a, now.b = factor * s.b, scale = power(key - now.p);
    }
    // a: weighted value and weight in units of the key
    INLINE void join(const Vec<R>& a, const Vec<R>& b, const Vec<R>& growth) {
        now.a = now.a + scale * a + now.a * growth;
        now.b = now.b + scale * b + now.b * growth;
    }
    INLINE Sums<R> left(const Vec<R>& log_w, int64_t count, const Vec<R>& a, const Vec<R>& b) const {
        const Vec<R> fade = R(count) * log_w, unit = larger(entered.p + fade, key);
        if (count == 1) {
            const Vec<R> old = power(entered.p - unit + fade), own = power(key - unit);
            return {old * entered.a + own * a, old * entered.b + own * b, unit};
        }
        const Vec<R> factor = power(now.p - unit);
        return {factor * now.a, factor * now.b, unit};
    }
};

template <class R>
struct Column {
    Channels<R> x;
    std::vector<Token<R>> token;
    std::vector<Run<R>> run;
    int64_t runs;

    Column(int64_t chunk) : token(chunk), run(chunk) {}

    INLINE Sums<R> from_right(const Rows<R>& k, const Rows<R>& v, int j, int64_t tokens, Sums<R> future) {
        runs = (tokens + x.run - 1) / x.run;
        for (int64_t i = runs - 1; i >= 0; i--) {
            Run<R>& r = run[i];
            r.begin = i * x.run, r.count = std::min(x.run, tokens - r.begin), r.key = R(NOTHING);
            for (int64_t t = 0; t < r.count; t++) r.key = larger(k(r.begin + t, j), r.key);
            Chain<R> chain(future, r.key, r.count);
            Vec<R> weight, weighted;
            for (int64_t t = r.begin + r.count - 1; t >= r.begin; t--) {
                weight = power(k(t, j) - r.key), weighted = weight * v(t, j);
                token[t].weight = weight, token[t].future = chain.now;
                chain.join(weighted, weight, x.growth);
            }
            future = chain.left(x.log_w, r.count, weighted, weight);
        }
        return future;
    }
    template <bool GRADIENT>
    INLINE Sums<R> from_left(const Rows<R>& v, Rows<R>& dy, int j, Sums<R> past, Sums<R>& left) {
        for (int64_t i = 0; i < runs; i++) {
            Run<R>& r = run[i];
            Chain<R> chain(past, r.key, r.count);
            const Vec<R> q = token[r.begin].future.p;
            r.m = larger(chain.now.p, q);
            if (r.count == 1) r.m = larger(r.m, r.key + x.u);
            r.own = power(r.key - r.m + x.u);
            const Vec<R> of_past = power(chain.now.p - r.m), of_future = power(q - r.m);
            Vec<R> weighted, share;
            Chain<R> back(left, -r.m, r.count);
            for (int64_t t = r.begin; t < r.begin + r.count; t++) {
                Token<R>& token = this->token[t];
                const Vec<R> own = r.own * token.weight;
                const Vec<R> total = of_past * chain.now.b + (of_future * token.future.b + own);
                weighted = token.weight * v(t, j);
                const Vec<R> sum = of_past * chain.now.a + (of_future * token.future.a + r.own * weighted);
                if constexpr (GRADIENT) {
                    const Vec<R> inverse = R(1) / total;
                    token.past = chain.now, token.left = back.now;
                    token.y = sum * inverse, token.share = share = dy(t, j) * inverse;
                    back.join(share, -share * token.y, x.growth);
                } else
                    dy.set(t, j, sum / total);
                chain.join(weighted, token.weight, x.growth);
            }
            const int64_t last = r.begin + r.count - 1;
            past = chain.left(x.log_w, r.count, weighted, token[last].weight);
            if constexpr (GRADIENT) left = back.left(x.log_w, r.count, share, -share * token[last].y);
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
    Sums<R> none;

    for (int64_t c = call.chunks() - 1; c >= 0; c--) {
        future.put(kept, call, at, c);
        if (c == 0) break;
        k.get(k_in, call, at, c), v.get(v_in, call, at, c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = all[j];
            future.set(j, column.from_right(k, v, j, call.count(c), future[j]));
        }
    }
    for (int64_t c = 0; c < call.chunks(); c++) {
        k.get(k_in, call, at, c), v.get(v_in, call, at, c);
        future.get(kept, call, at, c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = all[j];
            column.from_right(k, v, j, call.count(c), future[j]);
            past.set(j, column.template from_left<false>(v, y, j, past[j], none));
        }
        y.put(y_out, call, at, c);
    }
}

template <class R> void backward(const Call& call, const Unit& at) {
    const Array &k_in = call.x[1], &v_in = call.x[2], &kept = call.x[4], &dy_in = call.x[5], &noted = call.x[6];
    const Array &dlog_w_out = call.x[7], &dk_out = call.x[8], &dv_out = call.x[9], &du_out = call.x[10];
    Rows<R> k(call, at), v(call, at), dy(call, at), dk(call, at), dv(call, at);
    Row<R> dlog_w, du;
    State<R> past, future, left, right;
    const auto all = channels<R>(call, at);
    Column<R> column(call.chunk);
    const auto get = [&](int64_t c) {
        k.get(k_in, call, at, c), v.get(v_in, call, at, c), dy.get(dy_in, call, at, c);
        future.get(kept, call, at, c);
    };
    for (int64_t c = 0; c < call.chunks(); c++) {
        past.put(noted, call, at, c), left.put(noted, call, at, c, 3);
        get(c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = all[j];
            column.from_right(k, v, j, call.count(c), future[j]);
            Sums<R> s = left[j];
            past.set(j, column.template from_left<true>(v, dy, j, past[j], s));
            left.set(j, s);
        }
    }
    for (int64_t c = call.chunks() - 1; c >= 0; c--) {
        past.get(noted, call, at, c), left.get(noted, call, at, c, 3);
        get(c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = all[j];
            column.from_right(k, v, j, call.count(c), future[j]);
            Sums<R> s = left[j];
            column.template from_left<true>(v, dy, j, past[j], s);
            Sums<R> h = right[j];
            Vec<R> dlog_w_sum = R(0), du_sum = R(0);
            const Vec<R> log_w = all[j].log_w;
            for (int64_t i = column.runs - 1; i >= 0; i--) {
                const Run<R>& r = column.run[i];
                Chain<R> chain(h, -r.m, r.count);
                const Token<R>& first = column.token[r.begin];
                const Vec<R> by_left = power(r.key + first.left.p), by_right = power(r.key + chain.now.p);
                const Vec<R> decay_left = power(first.future.p + first.left.p + log_w);
                const Vec<R> decay_right = power(first.past.p + chain.now.p + log_w);
                Vec<R> left_sum = R(0), right_sum = R(0), share, lost;
                for (int64_t t = r.begin + r.count - 1; t >= r.begin; t--) {
                    const Token<R>& token = column.token[t];
                    share = token.share, lost = -share * token.y;
                    const Vec<R> v_t = v(t, j), own = r.own * share, by_bonus = own * (v_t - token.y);
                    const Vec<R> ga = by_left * token.left.a + by_right * chain.now.a;
                    const Vec<R> gb = by_left * token.left.b + by_right * chain.now.b;
                    dv.set(t, j, token.weight * (ga + own));
                    dk.set(t, j, token.weight * (ga * v_t + gb + by_bonus));
                    du_sum += token.weight * by_bonus;
                    left_sum += token.left.a * token.future.a + token.left.b * token.future.b;
                    right_sum += chain.now.a * token.past.a + chain.now.b * token.past.b;
                    chain.join(share, lost, all[j].growth);
                }
                dlog_w_sum += decay_left * left_sum + decay_right * right_sum;
                h = chain.left(log_w, r.count, share, lost);
            }
            right.set(j, h);
            dlog_w.set(j, dlog_w[j] + dlog_w_sum), du.set(j, du[j] + du_sum);
        }
        dk.put(dk_out, call, at, c), dv.put(dv_out, call, at, c);
    }
    dlog_w_out.put(dlog_w.x, at.sequence, 0, at.channel, at.n);
    du_out.put(du.x, at.sequence, 0, at.channel, at.n);
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

// x: log_w, k, v, u, kept, dy, room for a note [sequences * chunks, 6, A], then the gradients of log_w, k, v, u. Those of
// log_w and u are a row a sequence.
extern "C" void biwkv_backward(const Array* x, const int64_t*, int64_t sequences, int64_t tokens, int64_t channels,
                               int64_t chunk, int64_t threads) {
    const Call call(x, 11, tokens, channels, chunk);
    if (x[4].dtype == FLOAT64)
        each(call, sequences, threads, [&](const Unit& unit) { backward<double>(call, unit); });
    else
        each(call, sequences, threads, [&](const Unit& unit) { backward<float>(call, unit); });
}
