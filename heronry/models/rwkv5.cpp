// A step of RWKV-5 "Eagle" (5.0, 5.1, 5.2) for a few tokens: the forward pass of rwkv5.py in one call, in the same
// order.
//
// Activations between the matrices stay in float32. Threads split every phase and synchronise where the next phase
// needs all of the previous one.

#include "native_step.h"

#define MODEL(X)                                                                              \
    X(emb, "emb.weight")                                                                      \
    X(ln0_weight, "blocks.0.ln0.weight") X(ln0_bias, "blocks.0.ln0.bias")                     \
    X(ln_out_weight, "ln_out.weight") X(ln_out_bias, "ln_out.bias") X(head, "head.weight")

// 5.0 has no gate; the bonus is either time_first or time_faaaa
#define LAYER(X)                                                                              \
    X(ln1_weight, "ln1.weight") X(ln1_bias, "ln1.bias")                                       \
    X(mix_k, "att.time_mix_k") X(mix_v, "att.time_mix_v")                                     \
    X(mix_r, "att.time_mix_r") X(mix_g, "att.time_mix_g")                                     \
    X(time_decay, "att.time_decay")                                                           \
    X(time_first, "att.time_first") X(time_faaaa, "att.time_faaaa")                           \
    X(receptance, "att.receptance.weight") X(key, "att.key.weight")                           \
    X(value, "att.value.weight") X(gate, "att.gate.weight") X(output, "att.output.weight")    \
    X(ln_x_weight, "att.ln_x.weight") X(ln_x_bias, "att.ln_x.bias")                           \
    X(ln2_weight, "ln2.weight") X(ln2_bias, "ln2.bias")                                       \
    X(ffn_mix_k, "ffn.time_mix_k") X(ffn_mix_r, "ffn.time_mix_r")                             \
    X(ffn_receptance, "ffn.receptance.weight") X(ffn_key, "ffn.key.weight")                   \
    X(ffn_value, "ffn.value.weight")

struct Model { MODEL(TENSOR) };
struct Layer { LAYER(TENSOR) };
EXPORT const char* model_names() { return MODEL(NAME); }
EXPORT const char* layer_names() { return LAYER(NAME); }

// 16 numbers of head h from channel i on; the weight has one number per channel (5.2) or one per head
INLINE Vec<float> of_head(const Call& c, const Tensor& w, int64_t h, int64_t i) {
    const bool per_channel = w.rows == c.heads && w.columns == c.attention / c.heads;
    return per_channel ? at(w, i, h) : Vec<float>(at(w, h)[0]);
}

template <int SIZE>
void run_head(const Call& c, const Layer& layer, int64_t h, int64_t s, const HeadInput& from, const float* entering,
              float* state, const Rows& out) {
    auto bonus = [&](int64_t i) {
        return layer.time_first.data ? exp(of_head(c, layer.time_first, h, i)) : of_head(c, layer.time_faaaa, h, i);
    };
    auto decay = [&](int64_t, int64_t i) { return exp(-exp(of_head(c, layer.time_decay, h, i))); };
    head_with_bonus<SIZE>(c, h, s, from, bonus, decay, entering, state, out);
}

EXPORT int step(const Call* call) {
    const Call& c = *call;
    const Model& model = *(const Model*)c.model;
    const Layer* layers = (const Layer*)c.layers;
    const int64_t M = c.rows, C = c.channels, A = c.attention, size = A / c.heads;
    const int64_t kept_shift = c.sequences * C, kept_wkv = c.sequences * A * size;  // numbers of a layer's state

    with_memory(c.memory, c.memory_size, [&](Arena& memory) {
        const Rows x = memory.rows(M, C), out = memory.rows(c.last_only ? c.sequences : M, C);
        const Rows xk = memory.rows(M, C), xv = memory.rows(M, C), xr = memory.rows(M, C), xg = memory.rows(M, C);
        const Rows y = memory.rows(M, A), hidden = memory.rows(M, c.hidden);
        float *normed = memory.floats(M, C), *added = memory.floats(M, C), *gate = memory.floats(M, C);
        float *r = memory.floats(M, A), *k = memory.floats(M, A), *v = memory.floats(M, A), *g = memory.floats(M, A);
        if (!memory.block) return;
        const auto run = size == 64 ? run_head<64> : run_head<0>;

        team(int(c.threads), [&](Member me) {
            const Range own = me.part(C), own_att = me.part(A), heads = share(c.heads, 1, me.index, me.count);
            embed(me, c, model.emb, model.ln0_weight, model.ln0_bias, x);
            me.wait();
            for (int64_t l = 0; l < c.layer_count; l++) {
                const Layer& layer = layers[l];
                const float* const* entering = c.entering + 3 * l;
                const bool gated = layer.gate.data;

                // time mix
                norm_and_shift(c, own, x, layer.ln1_weight, layer.ln1_bias, normed, entering[0],
                               c.att_shift + l * kept_shift,
                               [&](int64_t m, int64_t i, Vec<float> now, Vec<float> before) {
                                   const Vec<float> d = now - before;
                                   store_some(xk.row(m) + i, before + d * at(layer.mix_k, i), C - i);
                                   store_some(xv.row(m) + i, before + d * at(layer.mix_v, i), C - i);
                                   store_some(xr.row(m) + i, before + d * at(layer.mix_r, i), C - i);
                                   if (gated) store_some(xg.row(m) + i, before + d * at(layer.mix_g, i), C - i);
                               });
                for (int64_t m = 0; m < M; m++) {
                    xk.pack(layer.key, m, own.begin, own.end);
                    xv.pack(layer.value, m, own.begin, own.end);
                    xr.pack(layer.receptance, m, own.begin, own.end);
                    if (gated) xg.pack(layer.gate, m, own.begin, own.end);
                }
                me.wait();
                matmul(layer.receptance, xr, r, y.stride, own_att);
                matmul(layer.key, xk, k, y.stride, own_att);
                matmul(layer.value, xv, v, y.stride, own_att);
                if (gated) matmul(layer.gate, xg, g, y.stride, own_att);
                me.wait();
                const HeadInput projected{r, k, v, gated ? g : nullptr, y.stride, layer.ln_x_weight, layer.ln_x_bias};
                for (int64_t h = heads.begin; h < heads.end; h++)
                    for (int64_t s = 0; s < c.sequences; s++) {
                        const int64_t place = (s * c.heads + h) * size * size;
                        run(c, layer, h, s, projected, entering[1] + place, c.wkv + l * kept_wkv + place, y);
                    }
                me.wait();
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
