// Bi-WKV, forward and backward. Channels are independent: each vector lane is one.
//
// Tokens are processed in chunks, and a chunk in runs: as many tokens as decay by at most e^ROOM, which is the whole
// chunk unless decays are steep. Within a run sums keep one unit and are multiplied by the decay, which takes one
// exponential per token; from run to run the unit changes, so that nothing overflows. See README.md.
#include "simd.h"
#include "threads.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int CHANNELS = 256;      // of a unit of work at most: enough to read long pieces of every row
constexpr int LINES = 32;          // channels that fill whole cache lines in any dtype: no two threads write to one
constexpr double NOTHING = -1e38;  // the unit of an empty sum: unlike -inf it can be subtracted from itself
constexpr double ROOM = 16;        // all weights of an output then add up to e^-32 at least; float32 ends at e^-87

// The arguments of one call. Tensors are [.., .., A] with a head stride of 1: `head` of an Array is the first channel.
struct Call {
    std::vector<Array> x;  // in the order listed at the entry points below
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

// e^x for x below 88 only, which is cheaper than the exp of floats in simd.h
INLINE Vec<float> power(const Vec<float>& x) {
    const Vec<float> magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const Vec<float> shifted = x * 1.44269504f + magic, n = shifted - magic, r = x - n * 0.693147182f;
    Vec<float> p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return choose(x < -87.f, 0.f, p * as_floats((as_ints(shifted) + 127) << 23));
}
INLINE Vec<double> power(const Vec<double>& x) { return exp(x); }

// One number per channel of a unit of work; the last unit may have fewer channels, followed by zeros.
template <class R> struct Row {
    alignas(64) R x[CHANNELS] = {};
    Vec<R> operator[](int j) const { return load(x + j * LANES<R>); }
    void set(int j, const Vec<R>& value) { store(x + j * LANES<R>, value); }
};

// The rows of a chunk. The row stride is an odd number of cache lines, so that a column fits the L1 cache: lines a
// power of two apart would share only a few of its sets.
template <class R> struct Rows {
    struct alignas(64) Line {
        R x[LANES<R>] = {};
    };
    int64_t stride;
    std::vector<Line> lines;

    Rows(const Call& call, const Unit& at) : stride(at.vectors<R>() | 1), lines(call.chunk * stride) {}
    INLINE Vec<R> operator()(int64_t t, int j) const { return load(lines[t * stride + j].x); }
    INLINE void set(int64_t t, int j, const Vec<R>& value) { store(lines[t * stride + j].x, value); }
    // reads chunk c and prefetches chunk `next`
    void get(const Array& from, const Call& call, const Unit& at, int64_t c, int64_t next) {
        for (int64_t t = 0; t < call.count(c); t++) {
            from.get(lines[t * stride].x, at.sequence, c * call.chunk + t, at.channel, at.n);
            from.prefetch(at.sequence, next * call.chunk + t, at.channel, at.n);
        }
    }
    void put(const Array& to, const Call& call, const Unit& at, int64_t c) const {
        for (int64_t t = 0; t < call.count(c); t++)
            to.put(lines[t * stride].x, at.sequence, c * call.chunk + t, at.channel, at.n);
    }
};

// Two sums: of weighted values and of weights, or the two that gradients are computed from
template <class R> struct Pair {
    Vec<R> a, b;
};

template <class R> struct Sums {  // in units of e^p
    Pair<R> pair;
    Vec<R> p;
};

template <class R> struct State {
    Row<R> a, b, p;
    State() { std::fill(p.x, p.x + CHANNELS, R(NOTHING)); }
    Sums<R> operator[](int j) const { return {{a[j], b[j]}, p[j]}; }
    void set(int j, const Sums<R>& s) { a.set(j, s.pair.a), b.set(j, s.pair.b), p.set(j, s.p); }
    void get(const Array& states, const Call& call, const Unit& at, int64_t c, int first = 0) {
        for (Row<R>* x : {&a, &b, &p}) states.get(x->x, at.sequence * call.chunks() + c, first++, at.channel, at.n);
    }
    void put(const Array& states, const Call& call, const Unit& at, int64_t c, int first = 0) const {
        for (const Row<R>* x : {&a, &b, &p})
            states.put(x->x, at.sequence * call.chunks() + c, first++, at.channel, at.n);
    }
};

// An exclusive scan over the tokens of a run, from either side: `entered` is the sums before the run, `met` those that
// the next token sees, `joined` what the tokens of the run have added so far
template <class R> struct Chain {
    Sums<R> entered, met;
    Pair<R> joined{R(0), R(0)};  // in units of e^key
    Vec<R> key, scale;

    // In a run of one token `met` is read before anything joins, so its unit need not suit the key as well.
    INLINE Chain(const Sums<R>& s, const Vec<R>& key, int64_t count) : entered(s), key(key) {
        met.p = count == 1 ? s.p : larger(s.p, key);
        const Vec<R> factor = power(s.p - met.p);
        met.pair = {factor * s.pair.a, factor * s.pair.b};
        scale = power(key - met.p);
    }
    INLINE void join(const Pair<R>& x, const Vec<R>& w) {
        met.pair = {w * met.pair.a + scale * x.a, w * met.pair.b + scale * x.b};
        joined = {w * joined.a + x.a, w * joined.b + x.b};
    }
    // The sums after the run, in the unit of the next one; `fade` is the log of the decay over the whole run. They come
    // from `entered` and not from `met`: w is rounded, and its error would accumulate with every token. Units are
    // subtracted first, because the difference of nearby numbers is exact. Where the new unit is the decayed old one,
    // e^rest = 1 + rest, with rest the rounding error of that unit; added separately it is not rounded away.
    INLINE Sums<R> left(const Vec<R>& fade) const {
        const auto stays = key < entered.p + fade;
        const Vec<R> unit = choose(stays, entered.p + fade, key), none = R(0);
        const Vec<R> rest = entered.p - unit + fade, own = power(key - unit);
        const Vec<R> whole = choose(stays, R(1), none), old = choose(stays, rest, power(rest));
        const auto sum = [&](const Vec<R>& entered, const Vec<R>& joined) __attribute__((always_inline)) {
            return whole * entered + (old * entered + own * joined);
        };
        return {{sum(entered.pair.a, joined.a), sum(entered.pair.b, joined.b)}, unit};
    }
};

// The constants of one vector of channels
template <class R> struct Channels {
    Vec<R> log_w, w, u;
    int64_t run;  // tokens per run
};

template <class R> std::vector<Channels<R>> read_channels(const Call& call, const Unit& at) {
    Row<R> log_w, w, u;
    call.x[0].get(log_w.x, 0, 0, at.channel, at.n);
    call.x[3].get(u.x, 0, 0, at.channel, at.n);
    std::vector<Channels<R>> all;
    for (int j = 0; j < at.vectors<R>(); j++) {
        R decay = 0, bonus = 0;
        for (int i = j * LANES<R>; i < (j + 1) * LANES<R>; i++) {
            w.x[i] = std::exp(log_w.x[i]);
            decay = std::max(decay, std::fabs(log_w.x[i])), bonus = std::max(bonus, std::fabs(u.x[i]));
        }
        int64_t run = bonus > R(ROOM) ? 1 : call.chunk;
        if (decay * run > R(ROOM)) run = std::max<int64_t>(R(ROOM) / decay, 1);
        all.push_back({log_w[j], w[j], u[j], run});
    }
    return all;
}

template <class R> struct Token {
    Vec<R> weight, share, y;  // e^(k - key of the run), dy / (sum of all weights in units of e^m), output
    Pair<R> past, future, left;
};

template <class R> struct Run {
    int64_t begin, count;
    Vec<R> key, past, future, left;  // the largest key, and the units of the sums within the run
    Vec<R> m, own;                   // the unit of the output, and the factor of a token's own weight in it
};

// A vector of channels over a chunk
template <class R> struct Column {
    Channels<R> x;
    std::vector<Token<R>> tokens;
    std::vector<Run<R>> runs;
    int64_t count;  // of runs

    Column(int64_t chunk) : tokens(chunk), runs(chunk) {}

    // Computes the weight of every token of a chunk and the sums over the tokens after it. `future`: those after the
    // chunk; returns those before it.
    INLINE Sums<R> from_right(const Rows<R>& k, const Rows<R>& v, int j, int64_t length, Sums<R> future) {
        count = (length + x.run - 1) / x.run;
        for (int64_t i = count - 1; i >= 0; i--) {
            Run<R>& run = runs[i];
            run.begin = i * x.run, run.count = std::min(x.run, length - run.begin), run.key = R(NOTHING);
            const int64_t end = run.begin + run.count;
            for (int64_t t = run.begin; t < end; t++) run.key = larger(k(t, j), run.key);
            Chain<R> chain(future, run.key, run.count);
            run.future = chain.met.p;
            for (int64_t t = end - 1; t >= run.begin; t--) {
                const Vec<R> weight = power(k(t, j) - run.key);
                tokens[t].weight = weight, tokens[t].future = chain.met.pair;
                chain.join({weight * v(t, j), weight}, x.w);
            }
            future = chain.left(R(run.count) * x.log_w);
        }
        return future;
    }

    // Computes the outputs; from_right must have run. `past`: the sums before the chunk; returns those after it.
    // Without GRADIENT, `row` is y and is written. With it, `row` is dy and is read, and `left`, the gradient's sums
    // before the chunk, is replaced by those after it.
    template <bool GRADIENT>
    INLINE Sums<R> from_left(const Rows<R>& v, Rows<R>& row, int j, Sums<R> past, Sums<R>& left) {
        for (int64_t i = 0; i < count; i++) {
            Run<R>& run = runs[i];
            Chain<R> chain(past, run.key, run.count);
            run.past = chain.met.p, run.m = larger(run.past, run.future);
            if (run.count == 1) run.m = larger(run.m, run.key + x.u);
            run.own = power(run.key - run.m + x.u);
            const Vec<R> of_past = power(run.past - run.m), of_future = power(run.future - run.m);
            Chain<R> back(left, -run.m, run.count);
            run.left = back.met.p;
            for (int64_t t = run.begin; t < run.begin + run.count; t++) {
                Token<R>& token = tokens[t];
                const Pair<R>&before = chain.met.pair, &after = token.future;
                const Pair<R> joins{token.weight * v(t, j), token.weight};
                const Vec<R> values = of_past * before.a + (of_future * after.a + run.own * joins.a);
                const Vec<R> weights = of_past * before.b + (of_future * after.b + run.own * joins.b);
                if constexpr (GRADIENT) {
                    const Vec<R> inverse = R(1) / weights;
                    token.y = values * inverse, token.share = row(t, j) * inverse;
                    token.past = before, token.left = back.met.pair;
                    back.join({token.share, -token.share * token.y}, x.w);
                } else {
                    row.set(t, j, values / weights);
                }
                chain.join(joins, x.w);
            }
            past = chain.left(R(run.count) * x.log_w);
            if constexpr (GRADIENT) left = back.left(R(run.count) * x.log_w);
        }
        return past;
    }

    // Computes the gradients; both passes above must have run. `right`, the gradient's sums after the chunk, is
    // replaced by those before it.
    INLINE void back(const Rows<R>& v, Rows<R>& dk, Rows<R>& dv, int j, Sums<R>& right, Vec<R>& dlog_w,
                     Vec<R>& du) const {
        for (int64_t i = count - 1; i >= 0; i--) {
            const Run<R>& run = runs[i];
            Chain<R> chain(right, -run.m, run.count);
            const Vec<R> of_left = power(run.key + run.left), of_right = power(run.key + chain.met.p);
            Vec<R> over_past = R(0), over_future = R(0);
            for (int64_t t = run.begin + run.count - 1; t >= run.begin; t--) {
                const Token<R>& token = tokens[t];
                const Pair<R>&left = token.left, &right = chain.met.pair;
                const Vec<R> own = run.own * token.share, by_bonus = token.weight * own * (v(t, j) - token.y);
                const Vec<R> a = of_left * left.a + of_right * right.a, b = of_left * left.b + of_right * right.b;
                dv.set(t, j, token.weight * (a + own));
                dk.set(t, j, token.weight * (a * v(t, j) + b) + by_bonus);
                du += by_bonus;
                over_past += right.a * token.past.a + right.b * token.past.b;
                over_future += left.a * token.future.a + left.b * token.future.b;
                chain.join({token.share, -token.share * token.y}, x.w);
            }
            dlog_w += power(run.past + chain.met.p + x.log_w) * over_past;
            dlog_w += power(run.future + run.left + x.log_w) * over_future;
            right = chain.left(R(run.count) * x.log_w);
        }
    }
};

template <class R> void forward(const Call& call, const Unit& at) {
    const Array &k_in = call.x[1], &v_in = call.x[2], &y_out = call.x[4], &kept = call.x[5];
    const auto channels = read_channels<R>(call, at);
    Rows<R> k(call, at), v(call, at), y(call, at);
    State<R> past, future;
    Column<R> column(call.chunk);
    Sums<R> no_gradient = past[0];

    for (int64_t c = call.chunks() - 1; c >= 0; c--) {
        future.put(kept, call, at, c);
        if (c == 0) break;
        k.get(k_in, call, at, c, c - 1), v.get(v_in, call, at, c, c - 1);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = channels[j];
            future.set(j, column.from_right(k, v, j, call.count(c), future[j]));
        }
    }
    for (int64_t c = 0; c < call.chunks(); c++) {
        k.get(k_in, call, at, c, c + 1), v.get(v_in, call, at, c, c + 1);
        future.get(kept, call, at, c);
        for (int j = 0; j < at.vectors<R>(); j++) {
            column.x = channels[j];
            column.from_right(k, v, j, call.count(c), future[j]);
            past.set(j, column.template from_left<false>(v, y, j, past[j], no_gradient));
        }
        y.put(y_out, call, at, c);
    }
}

// The gradients need sums from both sides too. The pass from left to right notes the past and the gradient's sums from
// the left at the start of every chunk; the pass from right to left then has all four sums for each chunk.
template <class R> void backward(const Call& call, const Unit& at) {
    const Array &k_in = call.x[1], &v_in = call.x[2], &kept = call.x[4], &dy_in = call.x[5], &noted = call.x[6];
    const Array &dlog_w_out = call.x[7], &dk_out = call.x[8], &dv_out = call.x[9], &du_out = call.x[10];
    const auto channels = read_channels<R>(call, at);
    Rows<R> k(call, at), v(call, at), dy(call, at), dk(call, at), dv(call, at);
    State<R> past, future, left, right;
    Row<R> dlog_w, du;
    Column<R> column(call.chunk);

    // fills `column` with the sums that the tokens of chunk c see; returns the past after the chunk
    const auto meet = [&](int64_t c, int j, Sums<R>& left_sums) __attribute__((always_inline)) {
        column.x = channels[j];
        column.from_right(k, v, j, call.count(c), future[j]);
        return column.template from_left<true>(v, dy, j, past[j], left_sums);
    };
    const auto get = [&](int64_t c, int64_t next) {
        k.get(k_in, call, at, c, next), v.get(v_in, call, at, c, next), dy.get(dy_in, call, at, c, next);
        future.get(kept, call, at, c);
    };

    for (int64_t c = 0; c < call.chunks(); c++) {
        past.put(noted, call, at, c), left.put(noted, call, at, c, 3);
        get(c, c + 1);
        for (int j = 0; j < at.vectors<R>(); j++) {
            Sums<R> left_sums = left[j];
            past.set(j, meet(c, j, left_sums));
            left.set(j, left_sums);
        }
    }
    for (int64_t c = call.chunks() - 1; c >= 0; c--) {
        past.get(noted, call, at, c), left.get(noted, call, at, c, 3);
        get(c, c - 1);
        for (int j = 0; j < at.vectors<R>(); j++) {
            Sums<R> left_sums = left[j], right_sums = right[j];
            Vec<R> dlog_w_sum = R(0), du_sum = R(0);  // of the chunk first: limits the rounding error of long sums
            meet(c, j, left_sums);
            column.back(v, dk, dv, j, right_sums, dlog_w_sum, du_sum);
            right.set(j, right_sums);
            dlog_w.set(j, dlog_w[j] + dlog_w_sum), du.set(j, du[j] + du_sum);
        }
        dk.put(dk_out, call, at, c), dv.put(dv_out, call, at, c);
    }
    dlog_w_out.put(dlog_w.x, at.sequence, 0, at.channel, at.n);
    du_out.put(du.x, at.sequence, 0, at.channel, at.n);
}

// calls work(unit) for all units of work: the fewest blocks of channels that give all threads the same number of units
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

// x: log_w, k, v, u, y, kept [sequences * chunks, 3, A]: the future after every chunk. Sequences cannot be packed.
EXPORT int biwkv_forward(const Array* x, const int64_t*, int64_t sequences, int64_t tokens, int64_t channels,
                         int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call(x, 6, tokens, channels, chunk);
        if (x[5].dtype == FLOAT64)
            each(call, sequences, threads, [&](const Unit& unit) { forward<double>(call, unit); });
        else
            each(call, sequences, threads, [&](const Unit& unit) { forward<float>(call, unit); });
    });
}

// x: log_w, k, v, u, kept, dy, scratch for notes [sequences * chunks, 6, A], then the gradients of log_w, k, v, u.
// Those of log_w and u have one row per sequence.
EXPORT int biwkv_backward(const Array* x, const int64_t*, int64_t sequences, int64_t tokens, int64_t channels,
                          int64_t chunk, int64_t threads) {
    return status([&] {
        const Call call(x, 11, tokens, channels, chunk);
        if (x[4].dtype == FLOAT64)
            each(call, sequences, threads, [&](const Unit& unit) { backward<double>(call, unit); });
        else
            each(call, sequences, threads, [&](const Unit& unit) { backward<float>(call, unit); });
    });
}
