"""RWKV in a hundred lines of NumPy: RWKV-4 and RWKV-7, one token at a time, with nothing but a file of weights.

    python examples/numpy_rwkv.py                          # the bundled model tells a story
    python examples/numpy_rwkv.py MODEL.safetensors        # RWKV-4 or RWKV-7 under BlinkDL's names: the most likely ids

It is here to be read. The logits equal those of heronry (tests/test_examples.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def load(path):
    """name -> float32 array, from a .safetensors of float32 or bfloat16: a header in JSON, then the numbers."""
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    weights = {}
    for name, about in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in about["data_offsets"])
            if about["dtype"] == "BF16":  # the upper half of a float32
                numbers = (np.frombuffer(data[begin:end], "<u2").astype("<u4") << 16).view("<f4")
            else:
                numbers = np.frombuffer(data[begin:end], "<f4")
            weights[name] = numbers.reshape(about["shape"]).squeeze()
    return weights


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, weights, name, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


class RWKV:
    """`logits = model(token)`, with its memory in `model.state`: a dictionary that can be copied, kept and put back."""

    def __init__(self, weights):
        self.w = weights
        self.layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.v7 = "blocks.0.att.r_k" in weights
        self.state = {}

    def shift(self, x, name):
        """The same vector of the token before, zeros at first."""
        before, self.state[name] = self.state.get(name, np.zeros_like(x)), x
        return before

    def __call__(self, token):
        w, first = self.w, None
        x = norm(w["emb.weight"][token], w, "blocks.0.ln0")
        for i in range(self.layers):
            block = f"blocks.{i}"
            at = lambda name, block=block: w[f"{block}.{name}"]  # noqa: E731
            h = norm(x, w, f"{block}.ln1")
            if self.v7:
                y, first = self.time_mix_7(at, h, self.shift(h, f"{block}.att"), f"{block}.wkv", first)
            else:
                y = self.time_mix_4(at, h, self.shift(h, f"{block}.att"), f"{block}.wkv")
            x = x + y
            h = norm(x, w, f"{block}.ln2")
            x = x + (self.channel_mix_7 if self.v7 else self.channel_mix_4)(at, h, self.shift(h, f"{block}.ffn"))
        return w["head.weight"] @ norm(x, w, "ln_out")

    def time_mix_4(self, at, x, before, name):
        """A mean of all values so far, each with the weight exp(key), which fades by `decay` a token."""
        xk, xv, xr = (before + (x - before) * at(f"att.time_mix_{c}") for c in "kvr")
        k, v = at("att.key.weight") @ xk, at("att.value.weight") @ xv
        a, b, p = self.state.get(name, (0 * k, 0 * k, np.full_like(k, -1e38)))  # both sums, in units of e^p
        u = np.maximum(p, at("att.time_first") + k)
        now = np.exp(at("att.time_first") + k - u)
        y = (a * np.exp(p - u) + now * v) / (b * np.exp(p - u) + now)
        p = p - np.exp(at("att.time_decay"))
        u = np.maximum(p, k)
        self.state[name] = (a * np.exp(p - u) + np.exp(k - u) * v, b * np.exp(p - u) + np.exp(k - u), u)
        return at("att.output.weight") @ (sigmoid(at("att.receptance.weight") @ xr) * y)

    def channel_mix_4(self, at, x, before):
        xk, xr = (before + (x - before) * at(f"ffn.time_mix_{c}") for c in "kr")
        k = np.maximum(at("ffn.key.weight") @ xk, 0) ** 2
        return sigmoid(at("ffn.receptance.weight") @ xr) * (at("ffn.value.weight") @ k)

    def time_mix_7(self, at, x, before, name, first):
        """A matrix for each head: what it holds under the key is partly replaced by the new value."""
        heads, size = at("att.r_k").shape
        xr, xw, xk, xv, xa, xg = (x + (before - x) * at(f"att.x_{c}") for c in "rwkvag")
        r, k, v = at("att.receptance.weight") @ xr, at("att.key.weight") @ xk, at("att.value.weight") @ xv
        w = np.exp(-np.exp(-0.5) * sigmoid(at("att.w0") + np.tanh(xw @ at("att.w1")) @ at("att.w2")))
        a = sigmoid(at("att.a0") + xa @ at("att.a1") @ at("att.a2"))
        g = sigmoid(xg @ at("att.g1")) @ at("att.g2")
        if first is None:
            first = v
        else:
            v = v + (first - v) * sigmoid(at("att.v0") + xv @ at("att.v1") @ at("att.v2"))
        kappa = (k * at("att.k_k")).reshape(heads, size)
        kappa = kappa / np.maximum(np.linalg.norm(kappa, axis=-1, keepdims=True), 1e-12)
        k = k * (1 + (a - 1) * at("att.k_a"))
        r, w, k, v, a = (z.reshape(heads, size) for z in (r, w, k, v, a))
        s = self.state.get(name, np.zeros((heads, size, size), np.float32))  # [head, value, key]
        held = np.einsum("hvk,hk->hv", s, kappa)
        s = s * w[:, None] - held[:, :, None] * (kappa * a)[:, None] + v[:, :, None] * k[:, None]
        self.state[name] = s
        y = np.einsum("hvk,hk->hv", s, r)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 64e-5)
        y = y.reshape(-1) * at("att.ln_x.weight") + at("att.ln_x.bias")
        y = y + ((r * k * at("att.r_k")).sum(-1, keepdims=True) * v).reshape(-1)
        return at("att.output.weight") @ (y * g), first

    def channel_mix_7(self, at, x, before):
        return at("ffn.value.weight") @ np.maximum(at("ffn.key.weight") @ (x + (before - x) * at("ffn.x_k")), 0) ** 2


def main():
    if len(sys.argv) > 1:
        model = RWKV(load(sys.argv[1]))
        token = 0
        for _ in range(20):
            token = int(model(token).argmax())
            print(token, end=" ", flush=True)
        print()
        return
    from tokenizers import Tokenizer

    import heronry

    folder = Path(heronry.__file__).parent / "bundled"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model, random = RWKV(load(folder / "model.safetensors")), np.random.default_rng(1)
    ids = tokenizer.encode("Once upon a time").ids
    for token in [0, *ids]:  # 0 is what ends a text, and begins one
        logits = model(token)
    while len(ids) < 150 and token != 0:
        odds = np.exp((logits - logits.max()) / 0.7)
        token = int(random.choice(len(odds), p=odds / odds.sum()))
        ids.append(token)
        logits = model(token)
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
