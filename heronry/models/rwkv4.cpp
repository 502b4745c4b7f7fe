// A step of RWKV-4 "Dove" for a few tokens: the forward pass of rwkv4.py in one call, in the same order.
//
// Activations between the matrices stay in float32. Threads split every phase and synchronise where the next phase
// needs all of the previous one. The recurrence works per channel, so each thread continues with the channels that it
// computed.

#include "native_step.h"

#define MODEL(X)                                                                              \
    X(emb, "emb.weight")                                                                      \
    X(ln0_weight, "blocks.0.ln0.weight") X(ln0_bias, "blocks.0.ln0.bias")                     \
    X(ln_out_weight, "ln_out.weight") X(ln_out_bias, "ln_out.bias") X(head, "head.weight")

#define LAYER(X)                                                                              \
    X(ln1_weight, "ln1.weight") X(ln1_bias, "ln1.bias")                                       \
    X(mix_k, "att.time_mix_k") X(mix_v, "att.time_mix_v") X(mix_r, "att.time_mix_r")          \
    X(time_decay, "att.time_decay") X(time_first, "att.time_first")                           \
    X(receptance, "att.receptance.weight") X(key, "att.key.weight")                           \
    X(value, "att.value.weight") X(output, "att.output.weight")                               \
    X(ln2_weight, "ln2.weight") X(ln2_bias, "ln2.bias")                                       \
    X(ffn_mix_k, "ffn.time_mix_k") X(ffn_mix_r, "ffn.time_mix_r")                             \
    X(ffn_receptance, "ffn.receptance.weight") X(ffn_key, "ffn.key.weight")                   \
    X(ffn_value, "ffn.value.weight")

struct Model { MODEL(TENSOR) };
struct Layer { LAYER(TENSOR) };
EXPORT const char* model_names() { return MODEL(NAME); }
EXPORT const char* layer_names() { return LAYER(NAME); }

// The projections of the tokens, [rows, attention]; r is taken before its sigmoid.
struct Projected {
    const float *r, *k, *v;
    int64_t stride;
};

// 16 channels from i on, for all tokens of sequence s: the mean of the values weighted by e^key, gated. The state is
// the triple (a, b, p), three rows of A numbers, read from `entering` and written to `state`.
void run_channels(const Call& c, const Layer& layer, int64_t i, int64_t s, const Projected& from, const float* entering,
                  float* state, const Rows& y) {
    const int64_t A = c.attention, n = A - i;
    const Vec<float> log_w = -exp(at(layer.time_decay, i)), u = at(layer.time_first, i);
    Vec<float> a = load_some(entering + i, n), b = load_some(entering + A + i, n), p = load_some(entering + 2 * A + i, n);
    for (int64_t m = c.starts[s]; m < c.starts[s + 1]; m++) {
        const int64_t place = m * from.stride + i;
        const Vec<float> r = load_some(from.r + place, n), k = load_some(from.k + place, n);
        const Vec<float> v = load_some(from.v + place, n);
        // units are subtracted first; ops/wkv4/reference.py says why
        Vec<float> unit = larger(p, k + u);
        Vec<float> old = exp(p - unit), now = exp(k - unit + u);
        store_some(y.row(m) + i, sigmoid(r) * ((old * a + now * v) / (old * b + now)), n);
        unit = larger(p + log_w, k);
        old = exp(p - unit + log_w), now = exp(k - unit);
        a = old * a + now * v, b = old * b + now, p = unit;
    }
    store_some(state + i, a, n), store_some(state + A + i, b, n), store_some(state + 2 * A + i, p, n);
}

EXPORT int step(const Call* call) {
    const Call& c = *call;
    const Model& model = *(const Model*)c.model;
    const Layer* layers = (const Layer*)c.layers;
    const int64_t M = c.rows, C = c.channels, A = c.attention;
    const int64_t kept_shift = c.sequences * C, kept_wkv = c.sequences * 3 * A;  // numbers of a layer's state

    with_memory(c.memory, c.memory_size, [&](Arena& memory) {
        const Rows x = memory.rows(M, C), out = memory.rows(c.last_only ? c.sequences : M, C);
        const Rows xk = memory.rows(M, C), xv = memory.rows(M, C), xr = memory.rows(M, C);
        const Rows y = memory.rows(M, A), hidden = memory.rows(M, c.hidden);
        float *normed = memory.floats(M, C), *added = memory.floats(M, C), *gate = memory.floats(M, C);
        float *r = memory.floats(M, A), *k = memory.floats(M, A), *v = memory.floats(M, A);
        if (!memory.block) return;
        const Projected projected{r, k, v, y.stride};

        team(int(c.threads), [&](Member me) {
            const Range own = me.part(C), own_att = me.part(A);
            embed(me, c, model.emb, model.ln0_weight, model.ln0_bias, x);
            me.wait();
            for (int64_t l = 0; l < c.layer_count; l++) {
                const Layer& layer = layers[l];
                const float* const* entering = c.entering + 3 * l;

                // time mix
                norm_and_shift(c, own, x, layer.ln1_weight, layer.ln1_bias, normed, entering[0],
                               c.att_shift + l * kept_shift,
                               [&](int64_t m, int64_t i, Vec<float> now, Vec<float> before) {
                                   const Vec<float> d = now - before;
                                   store_some(xk.row(m) + i, before + d * at(layer.mix_k, i), C - i);
                                   store_some(xv.row(m) + i, before + d * at(layer.mix_v, i), C - i);
                                   store_some(xr.row(m) + i, before + d * at(layer.mix_r, i), C - i);
                               });
                for (int64_t m = 0; m < M; m++) {
                    xk.pack(layer.key, m, own.begin, own.end);
                    xv.pack(layer.value, m, own.begin, own.end);
                    xr.pack(layer.receptance, m, own.begin, own.end);
                }
                me.wait();
                matmul(layer.receptance, xr, r, y.stride, own_att);
                matmul(layer.key, xk, k, y.stride, own_att);
                matmul(layer.value, xv, v, y.stride, own_att);
                for (int64_t s = 0; s < c.sequences; s++)
                    for (int64_t i = own_att.begin; i < own_att.end; i += 16)
                        run_channels(c, layer, i, s, projected, entering[1] + s * 3 * A,
                                     c.wkv + l * kept_wkv + s * 3 * A, y);
                for (int64_t m = 0; m < M; m++) y.pack(layer.output, m, own_att.begin, own_att.end);
                me.wait();
                add_matmul(layer.output, y, x, added, own);
                me.wait();

                // channel mix
                norm_and_shift(c, own, x, layer.ln2_weight, layer.ln2_bias, normed, entering[2],
                               c.ffn_shift + l * kept_shift,
                               [&](int64_t m, int64_t i, Vec<float> now, Vec<float> before) {
                                   const Vec<float> d = now - before;
                                   store_some(xk.row(m) + i, before + d * at(layer.ffn_mix_k, i), C - i);
                                   store_some(xr.row(m) + i, before + d * at(layer.ffn_mix_r, i), C - i);
                               });
                for (int64_t m = 0; m < M; m++) {
                    xk.pack(layer.ffn_key, m, own.begin, own.end);
                    xr.pack(layer.ffn_receptance, m, own.begin, own.end);
                }
                me.wait();
                gated_channel_mix(me, layer.ffn_receptance, xr, layer.ffn_key, xk, layer.ffn_value, hidden, gate, added,
                                  x);
                me.wait();
            }
            read_out(me, c, x, model.ln_out_weight, model.ln_out_bias, model.head, out);
        });
    });
    return 0;
}
