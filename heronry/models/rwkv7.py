"""RWKV-7 "Goose" (x070), 7a with DeepEmbed, and 7b with DeepEmbedAttention too.

What is special about it:
- the state is edited by a generalised delta rule: what it holds under the key kappa is partly replaced, at an
  in-context learning rate a; see ops/wkv7
- decay, learning rate, value residual and gate depend on the data through low-rank matrices
- values of later layers are mixed with those of layer 0 (v_first)
- the channel mix has no receptance
- the bonus for the current token comes after the group norm, not inside the recurrence
- RWKV-7a: every token and layer has a small matrix of its own, which scales the channel mix
- RWKV-7b: attention over all tokens so far beside every time mix (deep_embed_attention.py), so its state grows
Source: "RWKV-7 Goose" (arXiv 2503.14456); parameter names are those of BlinkDL's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..ops.wkv7 import wkv7
from .base import Model
from .deep_embed_attention import Added, DeepEmbedAttention, Words, extend
from .layers import (
    Linear,
    check_heads,
    count_layers,
    embedding,
    group_norm,
    last_shift,
    last_tokens,
    orthogonal_,
    token_shift,
    widen,
)
from .sequence_parallel import Boundaries, run_operator
from .state import Context, LayerState, State


@dataclass(frozen=True)
class RWKV7Config:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    decay_rank: int
    iclr_rank: int
    value_rank: int
    gate_rank: int
    ln_x_eps: float = 64e-5  # BlinkDL divides by 8 = head_size_divisor before a norm of eps 1e-5
    time_state: bool = False  # the initial state is a parameter (state tuning)
    deep_rank: int = 0  # RWKV-7a: rows and columns of a token's matrix; 0: RWKV-7
    dea_rank: int = 0  # RWKV-7b: numbers that a token's key, and its value, are kept as; 0: no DeepEmbedAttention
    dea_dim: int = 0  # RWKV-7b: of a query and a key
    ln0_folded: bool = False  # emb.weight holds LN0(embedding), so block 0 has no ln0 (rwkv-rs)

    def __post_init__(self) -> None:
        check_heads(self)

    @property
    def variant(self) -> str:
        """Its name where it reads the token ids beyond the embedding; "" for a plain RWKV-7."""
        if self.dea_rank:
            return "RWKV-7b (DeepEmbedAttention)"
        return "RWKV-7a (DeepEmbed)" if self.deep_rank else ""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> RWKV7Config:
        """Reads every size off the tensors of a checkpoint."""
        vocab_size, n_embd = shapes["emb.weight"]
        return cls(
            vocab_size=vocab_size,
            n_layer=count_layers(shapes),
            n_embd=n_embd,
            dim_att=shapes["blocks.0.att.key.weight"][0],
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            head_size=shapes["blocks.0.att.r_k"][1],
            decay_rank=shapes["blocks.0.att.w1"][1],
            iclr_rank=shapes["blocks.0.att.a1"][1],
            # layer 0 has no value residual of its own, whatever a file may carry there
            value_rank=shapes["blocks.1.att.v1"][1] if "blocks.1.att.v1" in shapes else 0,
            gate_rank=shapes["blocks.0.att.g1"][1],
            time_state="blocks.0.att.time_state" in shapes,
            deep_rank=shapes["blocks.0.ffn.s1"][1] if "blocks.0.ffn.s1" in shapes else 0,
            dea_rank=shapes["blocks.0.qkv.k1"][1] if "blocks.0.qkv.k1" in shapes else 0,
            dea_dim=shapes["blocks.0.qkv.qq.weight"][0] if "blocks.0.qkv.k1" in shapes else 0,
        )

    @classmethod
    def sized(cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64) -> RWKV7Config:
        """A new model of this size with the ranks and widths of the training recipe."""

        def rank(factor: float) -> int:
            return max(32, 32 * round(factor * math.sqrt(n_embd) / 32))

        ranks = (rank(2.5), rank(2.5), rank(1.7) if n_layer > 1 else 0, rank(5))
        return cls(vocab_size, n_layer, n_embd, n_embd, 4 * n_embd, head_size, *ranks)


class TimeMix(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        self.layer = layer
        c, a = config.n_embd, config.dim_att
        self.heads = a // config.head_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        # m-type mixes: the share of the previous token
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (parameter(1, 1, c) for _ in range(6))
        # low-rank: y = (x @ _1) @ _2, not in the layout of nn.Linear
        self.w0, self.w1, self.w2 = parameter(1, 1, a), parameter(c, config.decay_rank), parameter(config.decay_rank, a)
        self.a0, self.a1, self.a2 = parameter(1, 1, a), parameter(c, config.iclr_rank), parameter(config.iclr_rank, a)
        if layer > 0:
            self.v0 = parameter(1, 1, a)
            self.v1, self.v2 = parameter(c, config.value_rank), parameter(config.value_rank, a)
        self.g1, self.g2 = parameter(c, config.gate_rank), parameter(config.gate_rank, a)
        self.k_k, self.k_a = parameter(1, 1, a), parameter(1, 1, a)
        self.r_k = parameter(self.heads, config.head_size)
        self.time_state = parameter(self.heads, config.head_size, config.head_size) if config.time_state else None
        self.receptance = Linear(c, a)
        self.key = Linear(c, a)
        self.value = Linear(c, a)
        self.output = Linear(a, c)
        self.ln_x = nn.GroupNorm(self.heads, a, eps=config.ln_x_eps)

    def initial_wkv(self, time_state: Tensor | None = None) -> Tensor:
        """The state before the first token, [H, N_v, N_k]; `time_state` of the same shape replaces the model's own."""
        tuned = self.time_state if time_state is None else time_state
        if tuned is not None:
            return widen(tuned)
        like = self.r_k
        return widen(torch.zeros(*like.shape, like.shape[1], dtype=like.dtype, device=like.device))

    def forward(
        self,
        x: Tensor,  # [B, T, C]
        shift: Tensor,
        wkv: Tensor,
        v_first: Tensor | None,  # the values of layer 0 for the same tokens, [B, T, A]; None in layer 0
        cu: Boundaries | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d = token_shift(x, shift, cu) - x
        xr, xw, xk, xv, xa, xg = (
            torch.addcmul(x, d, m) for m in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r = self.receptance(xr)  # [B, T, A]
        k = self.key(xk)
        v = self.value(xv)
        # the log of the decay, in (-e^-0.5, 0); float32, because 1 - w can be as small as 0.0003
        log_w = -math.exp(-0.5) * torch.sigmoid(widen(self.w0) + widen(torch.tanh(xw @ self.w1) @ self.w2))
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)  # in-context learning rate
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2).to(v.dtype))

        def per_head(x: Tensor) -> Tensor:  # [B, T, A] -> [B, T, H, N]
            return torch.unflatten(x, -1, (self.heads, -1))

        kappa = F.normalize(widen(per_head(k * self.k_k)), dim=-1, eps=1e-12)  # of the key before it is scaled below
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v, a = per_head(r), per_head(k), per_head(v), per_head(a)
        y, wkv = run_operator(wkv7, (r, per_head(log_w), k, v, -kappa, kappa * a), wkv, cu)
        y = group_norm(y.to(x.dtype), self.ln_x)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.output((y + bonus.flatten(-2)) * g), wkv, v_first


class ChannelMix(nn.Module):
    def __init__(self, config: RWKV7Config):
        super().__init__()
        c, f, d = config.n_embd, config.dim_ffn, config.deep_rank
        self.x_k = nn.Parameter(torch.zeros(1, 1, c))
        self.key = Linear(c, f)
        self.value = Linear(f, c)
        self.deep_rank = d
        if d:
            self.s_emb = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, d * d), freeze=False)
            self.s_emb_x = Linear(c, d * d)
            self.s1, self.s2 = nn.Parameter(torch.zeros(c, d)), nn.Parameter(torch.zeros(d, f))
            self.s0 = nn.Parameter(torch.zeros(f))

    def forward(self, x: Tensor, shift: Tensor, cu: Boundaries | None, deep: tuple[Tensor, Tensor] | None) -> Tensor:
        xk = torch.addcmul(x, token_shift(x, shift, cu) - x, self.x_k)
        k = torch.relu(self.key(xk)) ** 2  # [B, T, F]
        if deep is not None:
            tokens, e = deep
            matrix = (self.s_emb(tokens) + self.s_emb_x(e)).unflatten(-1, (self.deep_rank, -1))  # [B, T, D, D]
            k = k * (((x @ self.s1)[..., None, :] @ matrix)[..., 0, :] @ self.s2 + self.s0)
        return self.value(k)


class Block(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.Identity() if config.ln0_folded else nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        if config.dea_rank:
            self.qkv = DeepEmbedAttention(config.vocab_size, config.n_embd, config.dea_dim, config.dea_rank)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        v_first: Tensor | None,
        cu: Boundaries | None,
        deep: tuple[Tensor, Tensor] | None,  # RWKV-7a: the tokens, and their input to the first block
        words: Words | None,  # RWKV-7b: all tokens so far
        past: Sequence[tuple[Tensor, Tensor, Tensor]],  # RWKV-7b: this layer's part of each sequence's context
    ) -> tuple[Tensor, Tensor, LayerState, Added | None]:
        x1 = self.ln1(x)
        y, wkv, v_first = self.att(x1, state.att_shift, state.wkv, v_first, cu)
        added = None
        if words is not None:
            found, added = self.qkv(x, past, words, cu)
            y = y + found
        x = x + y
        x2 = self.ln2(x)
        x = x + self.ffn(x2, state.ffn_shift, cu, deep)
        return x, v_first, LayerState(last_shift(x1, cu), wkv, last_shift(x2, cu)), added


class RWKV7(Model):
    """`logits, state = model(tokens, state)`, for a prompt, a training batch and a single step alike.

    tokens: integers [B, T]. state: a State of B rows, or None. cu_seqlens: packs many sequences into B = 1,
    one state row each. logits: [B, T, V]; with last_only [B, 1, V], packed [1, sequences, V]; float32 or in the dtype
    of the weights.
    """

    name = "rwkv7"
    Config = RWKV7Config
    ignored_keys = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # layer 0 has no value residual
    config_only = (*Model.config_only, "ln0_folded")

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.native_step_enabled = not config.variant  # there is no C++ for 7a and 7b
        self.affine = not config.dea_rank
        self.emb = embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)

    @property
    def generation(self) -> str:
        return "rwkv7b" if self.config.dea_rank else "rwkv7a" if self.config.deep_rank else "rwkv7"

    def initial_state(self, rows: int = 1, time_states: Mapping[str, Tensor] | None = None) -> State:
        state = super().initial_state(rows, time_states)
        if not self.config.dea_rank:
            return state
        layers, rank, dim = self.config.n_layer, self.config.dea_rank, self.config.dea_dim
        new = state.layers[0].wkv.new_zeros  # [L, T, R] with T = 0
        tokens = torch.zeros(0, dtype=torch.int64, device=self.device)
        empty = Context(tokens, new(layers, 0, rank), new(layers, 0, rank), new(layers, dim))
        return State(state.layers, state.fingerprint, contexts=[empty] * rows)

    def accepts_contexts(self, contexts: Sequence[Context]) -> bool:
        if not self.config.dea_rank:
            return not contexts
        layers, rank, dim = self.config.n_layer, self.config.dea_rank, self.config.dea_dim
        for tokens, *parts in contexts:
            cache = (layers, tokens.numel(), rank)
            if tokens.ndim != 1 or tokens.dtype != torch.int64 or not all(x.is_floating_point() for x in parts):
                return False
            if [tuple(x.shape) for x in parts] != [cache, cache, (layers, dim)]:
                return False
            checked = len(tokens) == 0 or torch.compiler.is_compiling()
            if not checked and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
                return False
        return len(contexts) > 0

    def embed(self, tokens: Tensor, state: State, cu: Boundaries | None) -> tuple[Tensor, Words | None]:
        """The input of the first block [B, T, C]; for RWKV-7b also that for all earlier tokens."""
        ln0 = self.blocks[0].ln0
        if not self.config.dea_rank:
            return ln0(self.emb(tokens)), None
        words = Words.look_up(tokens, state.contexts, cu, lambda ids: ln0(self.emb(ids)))
        return words.of_call().view(*tokens.shape, -1), words

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, State]:
        state, cu = self.validate_inputs(tokens, state, cu_seqlens)
        if step := self.select_native_step(tokens, state, cu):
            return step(tokens, state, cu, last_only)
        x, words = self.embed(tokens, state, cu)  # [B, T, C]
        deep = (tokens, x) if self.config.deep_rank else None
        v_first = None
        layers, added = [], []
        for i, (block, layer) in enumerate(zip(self.blocks, state.layers, strict=True)):
            past = [(context.kc[i], context.vc[i], context.q[i]) for context in state.contexts]
            x, v_first, layer, more = self.run_block(block, x, layer, v_first, cu, deep, words, past)
            layers.append(layer)
            added.append(more)
        if last_only:
            x = last_tokens(x, cu)
        contexts = () if words is None else extend(state.contexts, tokens, words.counts, added)
        return self.head(self.ln_out(x)), State(layers, state.fingerprint, contexts=contexts)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The initialisation of the training recipe; a model that starts elsewhere ends up worse.

        Raises:
            InputError: an RWKV-7b, for whose attention no initialisation was published.
        """
        if self.config.dea_rank:
            raise InputError(f"no initialisation of {self.config.variant} was published: train from a checkpoint")
        c, a = self.config.n_embd, self.config.dim_att
        d = torch.arange(c) / c
        channel = torch.arange(a) / (a - 1)  # 0 .. 1 over all heads
        lin = channel - 0.5
        size = self.config.head_size
        s = torch.arange(a) % size * 2 / (size - 1) - 1  # -1 .. 1 over each head
        zigzag = s * s.abs()
        layers = self.config.n_layer

        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        orthogonal_(self.head.weight, 0.5 * max(1.0, self.config.vocab_size / c) ** 0.5)
        for i, block in enumerate(self.blocks):
            rho = i / (layers - 1) if layers > 1 else 0.0  # 0 .. 1 over the layers
            tau = 1 - i / layers  # 1 .. 1 / layers
            att, ffn = block.att, block.ffn
            for mix, power in ((att.x_r, 0.2), (att.x_w, 0.9), (att.x_k, 0.7), (att.x_v, 0.7), (att.x_a, 0.9)):
                mix.copy_(1 - d ** (power * tau))
            att.x_g.copy_(1 - d ** (0.2 * tau))
            ffn.x_k.copy_(1 - d ** (tau**4))
            att.w0.copy_(-5.5 + 6 * channel ** (1 + rho**0.3) + 2.5 * zigzag)
            att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * lin)
            if i > 0:
                att.v0.copy_(0.73 - 0.4 * lin)
            att.k_k.copy_(0.71 - 0.1 * lin)
            att.k_a.fill_(1.02)
            att.r_k.fill_(-0.04)
            if self.config.time_state:
                att.time_state.zero_()
            for rank in "wavg" if i > 0 else "wag":
                getattr(att, f"{rank}1").zero_()
                up = getattr(att, f"{rank}2")
                orthogonal_(up, 0.1 * max(1.0, up.shape[0] / up.shape[1]) ** 0.5)
            orthogonal_(att.receptance.weight, 1.0)
            orthogonal_(att.key.weight, 0.1)
            orthogonal_(att.value.weight, 1.0)
            att.output.weight.zero_()
            orthogonal_(ffn.key.weight, 1.0)
            ffn.value.weight.zero_()
            if self.config.deep_rank:  # initially every token scales by 1
                ffn.s_emb.weight.copy_(torch.eye(self.config.deep_rank).flatten())
                ffn.s_emb_x.weight.zero_()
                ffn.s1.zero_()
                orthogonal_(ffn.s2, 0.1)
                ffn.s0.fill_(1)
            att.ln_x.weight.fill_(((1 + i) / layers) ** 0.7)
            att.ln_x.bias.zero_()
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.fill_(1)
            norm.bias.zero_()

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW (betas 0.9, 0.99; eps 1e-18): the decay's bias w0 learns twice as fast; weight decay for
        matrices, embedding, head and a tuned state included, not for vectors and low-rank matrices."""
        fast, matrices, rest = [], [], []
        for name, p in self.named_parameters():
            if name.endswith("att.w0"):
                fast.append(p)
            elif (name.endswith(".weight") and p.ndim == 2) or name.endswith("att.time_state"):
                matrices.append(p)
            else:
                rest.append(p)
        return [
            {"params": rest, "lr": lr, "weight_decay": 0.0},
            {"params": fast, "lr": 2 * lr, "weight_decay": 0.0},
            {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        ]
