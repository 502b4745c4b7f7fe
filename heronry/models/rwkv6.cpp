// A step of RWKV-6 "Finch" for a few tokens: the forward pass of rwkv6.py in one call, in the same order.
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
    X(maa_x, "att.time_maa_x") X(maa_w, "att.time_maa_w") X(maa_k, "att.time_maa_k")          \
    X(maa_v, "att.time_maa_v") X(maa_r, "att.time_maa_r") X(maa_g, "att.time_maa_g")          \
    X(maa_w1, "att.time_maa_w1") X(maa_w2, "att.time_maa_w2")                                 \
    X(time_decay, "att.time_decay")                                                           \
    X(time_decay_w1, "att.time_decay_w1") X(time_decay_w2, "att.time_decay_w2")               \
    X(time_faaaa, "att.time_faaaa")                                                           \
    X(receptance, "att.receptance.weight") X(key, "att.key.weight")                           \
    X(value, "att.value.weight") X(gate, "att.gate.weight") X(output, "att.output.weight")    \
    X(ln_x_weight, "att.ln_x.weight") X(ln_x_bias, "att.ln_x.bias")                           \
    X(ln2_weight, "ln2.weight") X(ln2_bias, "ln2.bias")                                       \
    X(ffn_maa_k, "ffn.time_maa_k") X(ffn_maa_r, "ffn.time_maa_r")                             \
    X(ffn_receptance, "ffn.receptance.weight") X(ffn_key, "ffn.key.weight")                   \
    X(ffn_value, "ffn.value.weight")

struct Model { MODEL(TENSOR) };
struct Layer { LAYER(TENSOR) };
EXPORT const char* model_names() { return MODEL(NAME); }
EXPORT const char* layer_names() { return LAYER(NAME); }

// low_w [rows, attention]: the output of the low-rank matrices, added to time_decay
template <int SIZE>
void run_head(const Call& c, const Layer& layer, int64_t h, int64_t s, const HeadInput& from, const float* low_w,
              const float* entering, float* state, const Rows& out) {
    const int64_t size = SIZE ? SIZE : c.attention / c.heads, begin = h * size;
    auto bonus = [&](int64_t i) { return at(layer.time_faaaa, i, h); };
    auto decay = [&](int64_t m, int64_t i) {
        const Vec<float> moved = load_some(low_w + m * from.stride + begin + i, size - i);
        return exp(-exp(at(layer.time_decay, begin + i) + moved));
    };
    head_with_bonus<SIZE>(c, h, s, from, bonus, decay, entering, state, out);
}

EXPORT int step(const Call* call) {
    const Call& c = *call;
    const Model& model = *(const Model*)c.model;
    const Layer* layers = (const Layer*)c.layers;
    const int64_t M = c.rows, C = c.channels, A = c.attention, size = A / c.heads;
    const int64_t kept_shift = c.sequences * C, kept_wkv = c.sequences * A * size;  // numbers of a layer's state
    const int64_t mix_rank = layers->maa_w1.columns / 5, decay_rank = layers->time_decay_w1.columns;

    with_memory(c.memory, c.memory_size, [&](Arena& memory) {
        const Rows x = memory.rows(M, C), out = memory.rows(c.last_only ? c.sequences : M, C), xx = memory.rows(M, C);
        const Rows xw = memory.rows(M, C), xk = memory.rows(M, C), xv = memory.rows(M, C);
        const Rows xr = memory.rows(M, C), xg = memory.rows(M, C);
        const Rows y = memory.rows(M, A), hidden = memory.rows(M, c.hidden);
        float *normed = memory.floats(M, C), *d = memory.floats(M, C), *moved = memory.floats(M, C);
        float *added = memory.floats(M, C), *gate = memory.floats(M, C);
        float *r = memory.floats(M, A), *k = memory.floats(M, A), *v = memory.floats(M, A), *g = memory.floats(M, A);
        float *w = memory.floats(M, A), *low_mix = memory.floats(M, 5 * mix_rank), *low_w = memory.floats(M, decay_rank);
        if (!memory.block) return;
        const int64_t mix_stride = Rows::padded(5 * mix_rank), decay_stride = Rows::padded(decay_rank);
        const auto run = size == 64 ? run_head<64> : run_head<0>;

        team(int(c.threads), [&](Member me) {
            const Range own = me.part(C), own_att = me.part(A);
            const Range heads = share(c.heads, 1, me.index, me.count), columns{heads.begin * size, heads.end * size};
            auto down = [&](const Tensor& w1, const Rows& in, float* to, int64_t stride) {
                const Range part = share(w1.columns, 16, me.index, me.count);
                low_rank(w1, in.x, in.stride, M, to, stride, part);
                for (int64_t m = 0; m < M; m++)
                    for (int64_t i = part.begin; i < part.end; i += 16)
                        store(to + m * stride + i, tanh(load(to + m * stride + i)));
            };
            embed(me, c, model.emb, model.ln0_weight, model.ln0_bias, x);
            me.wait();
            for (int64_t l = 0; l < c.layer_count; l++) {
                const Layer& layer = layers[l];
                const float* const* entering = c.entering + 3 * l;

                // time mix
                norm_and_shift(c, own, x, layer.ln1_weight, layer.ln1_bias, normed, entering[0],
                               c.att_shift + l * kept_shift,
                               [&](int64_t m, int64_t i, Vec<float> now, Vec<float> before) {
                                   store(d + m * x.stride + i, before - now);
                                   store_some(xx.row(m) + i, now + (before - now) * at(layer.maa_x, i), C - i);
                               });
                me.wait();
                down(layer.maa_w1, xx, low_mix, mix_stride);
                me.wait();
                auto mix = [&](int number, const Tensor& maa, const Rows& to) {
                    Tensor up = layer.maa_w2;
                    up.rows = mix_rank;
                    up.data += number * mix_rank * C * bytes(up.dtype);
                    low_rank(up, low_mix + number * mix_rank, mix_stride, M, moved, x.stride, own);
                    for (int64_t m = 0; m < M; m++)
                        for (int64_t i = own.begin; i < own.end; i += 16) {
                            const int64_t place = m * x.stride + i;
                            const Vec<float> mixed = at(maa, i) + load(moved + place);
                            store_some(to.x + place, load(normed + place) + load(d + place) * mixed, C - i);
                        }
                };
                mix(0, layer.maa_w, xw);
                mix(1, layer.maa_k, xk);
                mix(2, layer.maa_v, xv);
                mix(3, layer.maa_r, xr);
                mix(4, layer.maa_g, xg);
                for (int64_t m = 0; m < M; m++) {
                    xk.pack(layer.key, m, own.begin, own.end);
                    xv.pack(layer.value, m, own.begin, own.end);
                    xr.pack(layer.receptance, m, own.begin, own.end);
                    xg.pack(layer.gate, m, own.begin, own.end);
                }
                me.wait();
                matmul(layer.receptance, xr, r, y.stride, own_att);
                matmul(layer.key, xk, k, y.stride, own_att);
                matmul(layer.value, xv, v, y.stride, own_att);
                matmul(layer.gate, xg, g, y.stride, own_att);
                down(layer.time_decay_w1, xw, low_w, decay_stride);
                me.wait();
                low_rank(layer.time_decay_w2, low_w, decay_stride, M, w, y.stride, columns);
                const HeadInput projected{r, k, v, g, y.stride, layer.ln_x_weight, layer.ln_x_bias};
                for (int64_t h = heads.begin; h < heads.end; h++)
                    for (int64_t s = 0; s < c.sequences; s++) {
                        const int64_t place = (s * c.heads + h) * size * size;
                        run(c, layer, h, s, projected, w, entering[1] + place, c.wkv + l * kept_wkv + place, y);
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
                                   const Vec<float> d = before - now;
                                   store_some(xk.row(m) + i, now + d * at(layer.ffn_maa_k, i), C - i);
                                   store_some(xr.row(m) + i, now + d * at(layer.ffn_maa_r, i), C - i);
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
