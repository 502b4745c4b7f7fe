// A step of RWKV-7 "Goose" for a few tokens: the forward pass of rwkv7.py in one call, in the same order.
//
// Activations between the matrices stay in float32. Threads split every phase and synchronise where the next phase
// needs all of the previous one.

#include "native_step.h"

#define MODEL(X)                                                                              \
    X(emb, "emb.weight")                                                                      \
    X(ln0_weight, "blocks.0.ln0.weight") X(ln0_bias, "blocks.0.ln0.bias")                     \
    X(ln_out_weight, "ln_out.weight") X(ln_out_bias, "ln_out.bias") X(head, "head.weight")

#define LAYER(X)                                                                              \
    X(ln1_weight, "ln1.weight") X(ln1_bias, "ln1.bias")                                       \
    X(x_r, "att.x_r") X(x_w, "att.x_w") X(x_k, "att.x_k")                                     \
    X(x_v, "att.x_v") X(x_a, "att.x_a") X(x_g, "att.x_g")                                     \
    X(w0, "att.w0") X(w1, "att.w1") X(w2, "att.w2")                                           \
    X(a0, "att.a0") X(a1, "att.a1") X(a2, "att.a2")                                           \
    X(v0, "att.v0") X(v1, "att.v1") X(v2, "att.v2")                                           \
    X(g1, "att.g1") X(g2, "att.g2")                                                           \
    X(k_k, "att.k_k") X(k_a, "att.k_a") X(r_k, "att.r_k")                                     \
    X(receptance, "att.receptance.weight") X(key, "att.key.weight")                           \
    X(value, "att.value.weight") X(output, "att.output.weight")                               \
    X(ln_x_weight, "att.ln_x.weight") X(ln_x_bias, "att.ln_x.bias")                           \
    X(ln2_weight, "ln2.weight") X(ln2_bias, "ln2.bias")                                       \
    X(ffn_x_k, "ffn.x_k") X(ffn_key, "ffn.key.weight") X(ffn_value, "ffn.value.weight")

struct Model { MODEL(TENSOR) };
struct Layer { LAYER(TENSOR) };
EXPORT const char* model_names() { return MODEL(NAME); }
EXPORT const char* layer_names() { return LAYER(NAME); }

// The projections of the tokens, [rows, attention]; w, a and v_mix are taken before bias and sigmoid, g is complete.
struct Projected {
    const float *r, *k, *v, *w, *a, *v_mix, *g;
    float* v_first;
    int64_t stride;
};

// Head h for all tokens of sequence s: in-context learning rate, delta rule, norm, bonus, gate.
template <int SIZE>
void run_head(const Call& c, const Layer& layer, bool first, int64_t h, int64_t s, const Projected& from,
              const float* entering, float* state, const Rows& out) {
    const int64_t size = SIZE ? SIZE : c.attention / c.heads, begin = h * size;
    constexpr int MOST = SIZE ? SIZE : 512;  // MAX_HEAD_SIZE in native_step.py, which rules out larger heads
    alignas(64) float r[MOST], w[MOST], k[MOST], v[MOST], a[MOST], b[MOST], wr[MOST], y[MOST];
    for (int64_t m = c.starts[s]; m < c.starts[s + 1]; m++) {
        const int64_t row = m * from.stride + begin;
        Vec<float> squares{}, bonuses{}, br{}, kr{};
        for (int64_t i = 0; i < size; i += 16) {
            const int64_t n = size - i;
            const Vec<float> rate = sigmoid(at(layer.a0, begin + i) + load_some(from.a + row + i, n));
            const Vec<float> key = load_some(from.k + row + i, n);
            const Vec<float> kappa = key * at(layer.k_k, begin + i);
            squares += kappa * kappa;
            store(a + i, kappa);
            store(b + i, rate);
            store(k + i, key * (1.f + (rate - 1.f) * at(layer.k_a, begin + i)));
            store(w + i, exp(-0.6065306597f * sigmoid(at(layer.w0, begin + i) + load_some(from.w + row + i, n))));
            Vec<float> value = load_some(from.v + row + i, n);
            if (first)
                store_some(from.v_first + row + i, value, n);
            else
                value += (load_some(from.v_first + row + i, n) - value) *
                         sigmoid(at(layer.v0, begin + i) + load_some(from.v_mix + row + i, n));
            store(v + i, value);
        }
        const float norm = std::sqrt(sum<float>(squares));
        const float inverse = 1 / (norm > 1e-12f ? norm : 1e-12f);
        for (int64_t i = 0; i < size; i += 16) {
            const Vec<float> kappa = load(a + i) * inverse, receptance = load_some(from.r + row + i, size - i);
            store(a + i, -kappa);
            store(b + i, kappa * load(b + i));
            store(r + i, receptance);
            store(wr + i, load(w + i) * receptance);
            br += load(b + i) * receptance;
            kr += load(k + i) * receptance;
            bonuses += receptance * load(k + i) * at(layer.r_k, i, h);
        }
        const float b_r = sum<float>(br), k_r = sum<float>(kr), bonus = sum<float>(bonuses);

        // S = S (diag(w) + a b^T) + v k^T, four rows at a time; y = S r for the new S, computed from the old one
        const float* old = m == c.starts[s] ? entering : state;
        // states of many sequences do not stay in the caches until the next step: what is written past them need not be
        // read before
        const int64_t state_bytes = c.layer_count * c.sequences * c.attention * size * 4;
        const bool past_caches = SIZE && c.starts[s + 1] - c.starts[s] == 1 && state_bytes > 16 << 20 &&
                                 uintptr_t(state) % sizeof(Reg<float>) == 0;
        for (int64_t i = 0; i < size; i += 4) {
            const int rows = int(size - i < 4 ? size - i : 4);
            Reg<float> z[4] = {}, p[4] = {};
            float zs[4], ps[4];
            for (int64_t j = 0; j < size; j += WIDTH<float>)
                for (int q = 0; q < rows; q++) {
                    if (j % 16 == 0) __builtin_prefetch(old + (i + 12 + q) * size + j);
                    const Reg<float> held = get_some(old + (i + q) * size + j, size - j);
                    z[q] += held * get(a + j);
                    p[q] += held * get(wr + j);
                }
            sums(z[0], z[1], z[2], z[3], zs);
            sums(p[0], p[1], p[2], p[3], ps);
            for (int q = 0; q < rows; q++) {
                y[i + q] = ps[q] + zs[q] * b_r + v[i + q] * k_r;
                for (int64_t j = 0; j < size; j += WIDTH<float>) {
                    const int64_t place = (i + q) * size + j, n = size - j;
                    const Reg<float> held = get_some(old + place, n);
                    const Reg<float> now = held * get(w + j) + zs[q] * get(b + j) + v[i + q] * get(k + j);
                    if (past_caches)
                        put_past_caches(state + place, now);
                    else
                        put_some(state + place, now, n);
                }
            }
        }

        for (int64_t i = size; i < round_up(size, 16); i++) y[i] = 0;
        const Moments of = moments(y, size, c.ln_x_eps);
        for (int64_t i = 0; i < size; i += 16) {
            const Vec<float> normed = (load(y + i) - of.mean) * of.scale * at(layer.ln_x_weight, begin + i) +
                                      at(layer.ln_x_bias, begin + i);
            store_some(out.row(m) + begin + i, (normed + bonus * load(v + i)) * load_some(from.g + row + i, size - i),
                       size - i);
        }
    }
}

EXPORT int step(const Call* call) {
    const Call& c = *call;
    const Model& model = *(const Model*)c.model;
    const Layer* layers = (const Layer*)c.layers;
    const int64_t M = c.rows, C = c.channels, A = c.attention, size = A / c.heads;
    const int64_t kept_shift = c.sequences * C, kept_wkv = c.sequences * A * size;  // numbers of a layer's state
    int64_t rank = 0;
    for (const Tensor* w : {&layers->w1, &layers->a1, &layers->g1, &layers[c.layer_count - 1].v1})
        rank = w->columns > rank ? w->columns : rank;

    with_memory(c.memory, c.memory_size, [&](Arena& memory) {
        const Rows x = memory.rows(M, C), out = memory.rows(c.last_only ? c.sequences : M, C);
        const Rows xr = memory.rows(M, C), xw = memory.rows(M, C), xk = memory.rows(M, C);
        const Rows xv = memory.rows(M, C), xa = memory.rows(M, C), xg = memory.rows(M, C);
        const Rows y = memory.rows(M, A), hidden = memory.rows(M, c.hidden);
        float *normed = memory.floats(M, C), *added = memory.floats(M, C);
        float *r = memory.floats(M, A), *k = memory.floats(M, A), *v = memory.floats(M, A);
        float *w = memory.floats(M, A), *a = memory.floats(M, A), *v_mix = memory.floats(M, A);
        float *g = memory.floats(M, A), *v_first = memory.floats(M, A);
        float *low_w = memory.floats(M, rank), *low_a = memory.floats(M, rank);
        float *low_v = memory.floats(M, rank), *low_g = memory.floats(M, rank);
        if (!memory.block) return;
        const int64_t low = Rows::padded(rank);
        const Projected projected{r, k, v, w, a, v_mix, g, v_first, y.stride};
        const auto run = size == 64 ? run_head<64> : run_head<0>;

        team(int(c.threads), [&](Member me) {
            const Range own = me.part(C), own_att = me.part(A), own_hidden = me.part(c.hidden);
            const Range heads = share(c.heads, 1, me.index, me.count), columns{heads.begin * size, heads.end * size};
            embed(me, c, model.emb, model.ln0_weight, model.ln0_bias, x);
            me.wait();
            for (int64_t l = 0; l < c.layer_count; l++) {
                const Layer& layer = layers[l];
                const float* const* entering = c.entering + 3 * l;

                // time mix
                norm_and_shift(c, own, x, layer.ln1_weight, layer.ln1_bias, normed, entering[0],
                               c.att_shift + l * kept_shift,
                               [&](int64_t m, int64_t i, Vec<float> now, Vec<float> before) {
                                   const Vec<float> d = before - now;
                                   store_some(xr.row(m) + i, now + d * at(layer.x_r, i), C - i);
                                   store_some(xw.row(m) + i, now + d * at(layer.x_w, i), C - i);
                                   store_some(xk.row(m) + i, now + d * at(layer.x_k, i), C - i);
                                   store_some(xv.row(m) + i, now + d * at(layer.x_v, i), C - i);
                                   store_some(xa.row(m) + i, now + d * at(layer.x_a, i), C - i);
                                   store_some(xg.row(m) + i, now + d * at(layer.x_g, i), C - i);
                               });
                for (int64_t m = 0; m < M; m++) {
                    xr.pack(layer.receptance, m, own.begin, own.end);
                    xk.pack(layer.key, m, own.begin, own.end);
                    xv.pack(layer.value, m, own.begin, own.end);
                }
                me.wait();
                matmul(layer.receptance, xr, r, y.stride, own_att);
                matmul(layer.key, xk, k, y.stride, own_att);
                matmul(layer.value, xv, v, y.stride, own_att);
                auto down = [&](const Tensor& w1, const Rows& in, float* to, auto change) {
                    const Range part = share(w1.columns, 16, me.index, me.count);
                    low_rank(w1, in.x, in.stride, M, to, low, part);
                    for (int64_t m = 0; m < M; m++)
                        for (int64_t i = part.begin; i < part.end; i += 16)
                            store(to + m * low + i, change(load(to + m * low + i)));
                };
                down(layer.w1, xw, low_w, [](Vec<float> x) { return tanh(x); });
                down(layer.a1, xa, low_a, [](Vec<float> x) { return x; });
                down(layer.g1, xg, low_g, [](Vec<float> x) { return sigmoid(x); });
                if (l > 0) down(layer.v1, xv, low_v, [](Vec<float> x) { return x; });
                me.wait();
                low_rank(layer.w2, low_w, low, M, w, y.stride, columns);
                low_rank(layer.a2, low_a, low, M, a, y.stride, columns);
                low_rank(layer.g2, low_g, low, M, g, y.stride, columns);
                if (l > 0) low_rank(layer.v2, low_v, low, M, v_mix, y.stride, columns);
                for (int64_t h = heads.begin; h < heads.end; h++)
                    for (int64_t s = 0; s < c.sequences; s++) {
                        const int64_t place = (s * c.heads + h) * size * size;
                        run(c, layer, l == 0, h, s, projected, entering[1] + place, c.wkv + l * kept_wkv + place, y);
                    }
                await_puts();
                me.wait();
                for (int64_t m = 0; m < M; m++) y.pack(layer.output, m, own_att.begin, own_att.end);
                me.wait();
                add_matmul(layer.output, y, x, added, own);
                me.wait();

                // channel mix
                norm_and_shift(c, own, x, layer.ln2_weight, layer.ln2_bias, normed, entering[2],
                               c.ffn_shift + l * kept_shift,
                               [&](int64_t m, int64_t i, Vec<float> now, Vec<float> before) {
                                   store_some(xk.row(m) + i, now + (before - now) * at(layer.ffn_x_k, i), C - i);
                               });
                for (int64_t m = 0; m < M; m++) xk.pack(layer.ffn_key, m, own.begin, own.end);
                me.wait();
                matmul(layer.ffn_key, xk, hidden.x, hidden.stride, own_hidden);
                for (int64_t m = 0; m < M; m++) {
                    for (int64_t i = own_hidden.begin; i < own_hidden.end; i += 16)
                        store(hidden.row(m) + i, squared_relu(load(hidden.row(m) + i)));
                    hidden.pack(layer.ffn_value, m, own_hidden.begin, own_hidden.end);
                }
                me.wait();
                add_matmul(layer.ffn_value, hidden, x, added, own);
                me.wait();
            }
            read_out(me, c, x, model.ln_out_weight, model.ln_out_bias, model.head, out);
        });
    });
    return 0;
}
