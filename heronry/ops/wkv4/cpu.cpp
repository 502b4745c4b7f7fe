// WKV4, forward and backward. Channels are independent: each vector lane is one, with its sums (a, b) in units of e^p.
//
// Units are subtracted first, (p - m) + log_w: see README.md. The gradients treat them as constants, so the gradient of
// a sum is held in that sum's own unit, and no exponent is above 0 on the way back either.
#include "simd.h"
#include "threads.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int CHANNELS = 256;  // of a unit of work: enough to read long pieces of every row

// The arguments of one call. Tensors are [.., .., A] with a head stride of 1: `head` of an Array is the first channel.
struct Call {
    std::vector<Array> x;  // in the order listed at the entry points below
    const int64_t* cu;     // boundaries of packed sequences, or null
    int64_t tokens, channels, chunk;

    Call(const Array* tensors, int count, const int64_t* cu, int64_t tokens, int64_t channels, int64_t chunk)
        : x(tensors, tensors + count), cu(cu), tokens(tokens), channels(channels), chunk(chunk) {
        for (Array& tensor : x) tensor.head = 1;
    }

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
};

// One number per channel of a unit of work; the last unit may have fewer channels, followed by zeros.
template <class R> struct Row {
    alignas(64) R x[CHANNELS] = {};
    Vec<R> operator[](int j) const { return load(x + j * LANES<R>); }
    void set(int j, Vec<R> value) { store(x + j * LANES<R>, value); }
};

template <class R> struct State {
    Row<R> a, b, p;
    void get(const Array& states, int64_t row, int64_t channel, int n) {
        states.get(a.x, row, 0, channel, n), states.get(b.x, row, 1, channel, n), states.get(p.x, row, 2, channel, n);
    }
    void put(const Array& states, int64_t row, int64_t channel, int n) const {
        states.put(a.x, row, 0, channel, n), states.put(b.x, row, 1, channel, n), states.put(p.x, row, 2, channel, n);
    }
};

// Adds a token to the sums: the factors of the old sums and of the token, and the new unit. The unit is the larger of
// the two exponents, so one factor is e^0 = 1, apart from the rounding error of a decayed unit.
template <class R> struct Update {
    Vec<R> unit, old, own;
    INLINE Update(Vec<R> p, Vec<R> k, Vec<R> log_w) {
        const auto stays = k < p + log_w;
        unit = choose(stays, p + log_w, k);
        const Vec<R> decayed = p - unit + log_w, factor = exp(choose(stays, k - unit, decayed));
        old = choose(stays, larger(1 + decayed, R(0)), factor);
        own = choose(stays, factor, R(1));
    }
};

// The output of a token: the two factors as above, 1 / the sum of all weights, and y, the mean of the values
template <class R> struct Output {
    Vec<R> old, own, inverse, y;
    INLINE Output(Vec<R> a, Vec<R> b, Vec<R> p, Vec<R> k, Vec<R> v, Vec<R> u) {
        const Vec<R> ahead = k - p + u, factor = exp(smaller(ahead, -ahead));
        const auto first = ahead < R(0);
        old = choose(first, R(1), factor);
        own = choose(first, factor, R(1));
        inverse = R(1) / (old * b + own);
        y = (old * a + own * v) * inverse;
    }
};

template <class R> void forward(const Call& call, int64_t sequence, int64_t channel) {
    const Array &log_w_in = call.x[0], &k_in = call.x[1], &v_in = call.x[2], &u_in = call.x[3], &state = call.x[4];
    const Array &y_out = call.x[5], &final_state = call.x[6], &kept = call.x[7];
    const Call::Span at = call.span(sequence);
    const int n = std::min<int64_t>(CHANNELS, call.channels - channel), vectors = (n + LANES<R> - 1) / LANES<R>;
    Row<R> log_w, u, k, v, y;
    State<R> s;
    log_w_in.get(log_w.x, 0, 0, channel, n);
    u_in.get(u.x, 0, 0, channel, n);
    s.get(state, sequence, channel, n);

    for (int64_t t = 0; t < at.end - at.begin; t++) {
        if (kept.data && t % call.chunk == 0) s.put(kept, at.first + t / call.chunk, channel, n);
        k_in.get(k.x, at.batch, at.begin + t, channel, n);
        v_in.get(v.x, at.batch, at.begin + t, channel, n);
        for (const Array* x : {&k_in, &v_in}) x->prefetch(at.batch, at.begin + t + call.chunk, channel, n);
        for (int j = 0; j < vectors; j++) {
            y.set(j, Output<R>(s.a[j], s.b[j], s.p[j], k[j], v[j], u[j]).y);
            const Update<R> next(s.p[j], k[j], log_w[j]);
            s.a.set(j, next.old * s.a[j] + next.own * v[j]);
            s.b.set(j, next.old * s.b[j] + next.own);
            s.p.set(j, next.unit);
        }
        y_out.put(y.x, at.batch, at.begin + t, channel, n);
    }
    s.put(final_state, sequence, channel, n);
}

// Runs from the last token to the first; (ga, gb) is the gradient of the sums after a token. The sums before each token
// (`met`) are recomputed from those kept at the start of the chunk.
template <class R> void backward(const Call& call, int64_t sequence, int64_t channel) {
    const Array &log_w_in = call.x[0], &k_in = call.x[1], &v_in = call.x[2], &u_in = call.x[3], &kept = call.x[4];
    const Array &dy_in = call.x[5], &dfinal = call.x[6], &dlog_w_out = call.x[7], &dk_out = call.x[8];
    const Array &dv_out = call.x[9], &du_out = call.x[10], &dstate = call.x[11];
    const Call::Span at = call.span(sequence);
    const int n = std::min<int64_t>(CHANNELS, call.channels - channel), vectors = (n + LANES<R> - 1) / LANES<R>;
    struct Token {
        State<R> met;
        Row<R> k, v, old, own;
    };
    std::vector<Token> tokens(std::min(call.chunk, at.end - at.begin));
    Row<R> log_w, u, dlog_w, du, dy, dk, dv;
    State<R> g;  // its p is unused until the end
    log_w_in.get(log_w.x, 0, 0, channel, n);
    u_in.get(u.x, 0, 0, channel, n);
    g.get(dfinal, sequence, channel, n);

    for (int64_t chunk = (at.end - at.begin - 1) / call.chunk; chunk >= 0; chunk--) {
        const int64_t begin = at.begin + chunk * call.chunk, count = std::min(call.chunk, at.end - begin);
        tokens[0].met.get(kept, at.first + chunk, channel, n);
        for (int64_t t = 0; t < count; t++) {
            Token& token = tokens[t];
            State<R>& next = tokens[t + 1 < count ? t + 1 : t].met;
            k_in.get(token.k.x, at.batch, begin + t, channel, n);
            v_in.get(token.v.x, at.batch, begin + t, channel, n);
            for (const Array* x : {&k_in, &v_in, &dy_in}) x->prefetch(at.batch, begin + t - call.chunk, channel, n);
            for (int j = 0; j < vectors; j++) {
                const Vec<R> a = token.met.a[j], b = token.met.b[j];
                const Update<R> update(token.met.p[j], token.k[j], log_w[j]);
                token.old.set(j, update.old);
                token.own.set(j, update.own);
                if (t + 1 == count) continue;
                next.a.set(j, update.old * a + update.own * token.v[j]);
                next.b.set(j, update.old * b + update.own);
                next.p.set(j, update.unit);
            }
        }
        for (int64_t t = count - 1; t >= 0; t--) {
            const Token& token = tokens[t];
            dy_in.get(dy.x, at.batch, begin + t, channel, n);
            for (int j = 0; j < vectors; j++) {
                const Vec<R> a = token.met.a[j], b = token.met.b[j], k = token.k[j], v = token.v[j];
                const Vec<R> old = token.old[j], own = token.own[j], ga = g.a[j], gb = g.b[j];
                const Output<R> out(a, b, token.met.p[j], k, v, u[j]);
                const Vec<R> q = dy[j] * out.inverse, by_bonus = out.own * q * (v - out.y);
                dv.set(j, own * ga + out.own * q);
                dk.set(j, own * (ga * v + gb) + by_bonus);
                du.set(j, du[j] + by_bonus);
                dlog_w.set(j, dlog_w[j] + old * (ga * a + gb * b));
                g.a.set(j, old * ga + out.old * q);
                g.b.set(j, old * gb - out.old * q * out.y);
            }
            dk_out.put(dk.x, at.batch, begin + t, channel, n);
            dv_out.put(dv.x, at.batch, begin + t, channel, n);
        }
    }
    for (int j = 0; j < vectors; j++) g.p.set(j, tokens[0].met.a[j] * g.a[j] + tokens[0].met.b[j] * g.b[j]);
    dlog_w_out.put(dlog_w.x, sequence, 0, channel, n);
    du_out.put(du.x, sequence, 0, channel, n);
    g.put(dstate, sequence, channel, n);
}

// calls work(sequence, first channel) for all units of work
template <class F> void each(const Call& call, int64_t sequences, int threads, const F& work) {
    const int64_t blocks = (call.channels + CHANNELS - 1) / CHANNELS;
    parallel(sequences * blocks, threads, [&](int64_t unit) { work(unit / blocks, unit % blocks * CHANNELS); });
}

}  // namespace

// x: log_w, k, v, u, state, y, final state, kept states (null data: none are kept)
EXPORT int wkv4_forward(const Array* x, const int64_t* cu, int64_t sequences, int64_t tokens, int64_t channels,
                        int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call(x, 8, cu, tokens, channels, chunk);
        if (x[4].dtype == FLOAT64)
            each(call, sequences, threads, [&](int64_t s, int64_t channel) { forward<double>(call, s, channel); });
        else
            each(call, sequences, threads, [&](int64_t s, int64_t channel) { forward<float>(call, s, channel); });
    });
}

// x: log_w, k, v, u, kept states, dy, gradient of the final state, then the gradients of log_w, k, v, u and of the
// initial state. Those of log_w and u have one row per sequence.
EXPORT int wkv4_backward(const Array* x, const int64_t* cu, int64_t sequences, int64_t tokens, int64_t channels,
                         int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call(x, 12, cu, tokens, channels, chunk);
        if (x[4].dtype == FLOAT64)
            each(call, sequences, threads, [&](int64_t s, int64_t channel) { backward<double>(call, s, channel); });
        else
            each(call, sequences, threads, [&](int64_t s, int64_t channel) { backward<float>(call, s, channel); });
    });
}
