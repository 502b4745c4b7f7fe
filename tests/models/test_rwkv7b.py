"""RWKV-7b: its numbers, against a loop in float64, and all that its growing state must stand."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import heronry
from heronry import LLM, InputError, State
from heronry.adapters import apply_adapter
from heronry.adapters.inject import inject_adapter
from heronry.checkpoint import assemble
from heronry.convert import convert
from heronry.engine.generate import generate
from heronry.engine.sampling import Sampling
from heronry.models import RWKV7, deep_embed_attention
from heronry.models.deep_embed_attention import attend
from heronry.models.fingerprint import compute_fingerprint
from heronry.models.sequence_parallel import SequenceShard
from heronry.quantization import quantize
from heronry.train.config import read_config
from heronry.train.language_modeling import forward_flops_per_token
from heronry.train.trainer import Trainer

SMALL = {"width": 64, "heads": 2, "ffn": 96, "rank": 5, "deep": 4, "dea": 6}
TOKENS = torch.randint(101, (1, 33), generator=torch.Generator().manual_seed(0))
GREEDY = Sampling(temperature=0)

pytestmark = pytest.mark.usefixtures("one_thread")


# The definition: one token after the other, and every earlier token by itself


def norm(x, w, b, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(weights: dict[str, Tensor], tokens) -> np.ndarray:
    """The logits [T, V]."""
    z = {name: x.double().squeeze().numpy() for name, x in weights.items()}
    heads, size = z["blocks.0.att.r_k"].shape
    width = heads * size
    deep = round(z["blocks.0.ffn.s_emb.weight"].shape[1] ** 0.5)
    layers = 1 + max(int(name.split(".")[1]) for name in z if name.startswith("blocks."))
    start = {"att": np.zeros(width), "ffn": np.zeros(width), "q": 0, "k": 0, "v": 0}
    memory = [{**start, "s": np.zeros((heads, size, size)), "keys": [], "values": []} for _ in range(layers)]
    logits = []
    for token in tokens:
        e = x = norm(z["emb.weight"][token], z["blocks.0.ln0.weight"], z["blocks.0.ln0.bias"])
        for i, old in enumerate(memory):
            p = {name.split(".", 2)[2]: value for name, value in z.items() if name.startswith(f"blocks.{i}.")}
            # the time mix
            x1 = norm(x, p["ln1.weight"], p["ln1.bias"])
            xr, xw, xk, xv, xa, xg = (x1 + (old["att"] - x1) * p[f"att.x_{name}"] for name in "rwkvag")
            r, k, v = p["att.receptance.weight"] @ xr, p["att.key.weight"] @ xk, p["att.value.weight"] @ xv
            w = np.exp(-np.exp(-0.5) * sigmoid(p["att.w0"] + np.tanh(xw @ p["att.w1"]) @ p["att.w2"]))
            a = sigmoid(p["att.a0"] + xa @ p["att.a1"] @ p["att.a2"])
            g = sigmoid(xg @ p["att.g1"]) @ p["att.g2"]
            if i == 0:
                first = v
            else:
                v = v + (first - v) * sigmoid(p["att.v0"] + xv @ p["att.v1"] @ p["att.v2"])
            kappa = (k * p["att.k_k"]).reshape(heads, size)
            k = k * (1 + (a - 1) * p["att.k_a"])
            r, w, k, v, a = (u.reshape(heads, size) for u in (r, w, k, v, a))
            mixed = []
            for h in range(heads):
                n = kappa[h] / np.linalg.norm(kappa[h])
                s = old["s"][h]
                s = s * w[h] - np.outer(s @ n, n * a[h]) + np.outer(v[h], k[h])
                old["s"][h] = s
                y = norm(s @ r[h], 1, 0, 64e-5)
                part = slice(h * size, (h + 1) * size)
                y = y * p["att.ln_x.weight"][part] + p["att.ln_x.bias"][part]
                mixed.append(y + (r[h] * k[h] * p["att.r_k"][h]).sum() * v[h])
            y = p["att.output.weight"] @ (np.concatenate(mixed) * g)
            # the attention, which reads x and not its norm
            parts = {
                "q": p["qkv.qq.weight"] @ x,
                "k": (x @ p["qkv.k1"] @ p["qkv.k2"]) * (p["qkv.k_emb.weight"][token] + p["qkv.k_emb_x.weight"] @ e),
                "v": np.tanh(x @ p["qkv.v1"] @ p["qkv.v2"])
                * (p["qkv.v_emb.weight"][token] + p["qkv.v_emb_x.weight"] @ e),
            }
            done = {
                n: norm(u + (old[n] - u) * p[f"qkv.x_{n}"], p[f"qkv.ln{n}.weight"], p[f"qkv.ln{n}.bias"])
                for n, u in parts.items()
            }
            old["keys"].append(done["k"])
            old["values"].append(done["v"])
            scores = np.exp([64 * np.tanh(done["q"] @ key / 1024) for key in old["keys"]])
            y = y + sum(s * value for s, value in zip(scores / scores.sum(), old["values"], strict=True))
            old |= {"att": x1, **parts}
            x = x + y
            # the channel mix
            x2 = norm(x, p["ln2.weight"], p["ln2.bias"])
            k = np.maximum(p["ffn.key.weight"] @ (x2 + (old["ffn"] - x2) * p["ffn.x_k"]), 0) ** 2
            matrix = (p["ffn.s_emb.weight"][token] + p["ffn.s_emb_x.weight"] @ e).reshape(deep, deep)
            old["ffn"] = x2
            x = x + p["ffn.value.weight"] @ (k * (x2 @ p["ffn.s1"] @ matrix @ p["ffn.s2"] + p["ffn.s0"]))
        logits.append(z["head.weight"] @ norm(x, z["ln_out.weight"], z["ln_out.bias"]))
    return np.array(logits)


def published_case() -> dict[str, Tensor]:
    """Weights drawn in the order of a second implementation, of which numbers are known."""
    draw, z = np.random.default_rng(0), {}
    vocab, c, size, dim, low, deep = 50, 128, 64, 256, 32, 32

    def normal(name, *shape, scale=1.0, mean=0.0):
        z[name] = mean + scale * draw.normal(size=shape)

    def matrix(name, rows, columns, scale=1.0):
        normal(name, rows, columns, scale=scale * columns**-0.5)

    def low_rank(name, rows, columns):
        normal(name, rows, columns, scale=rows**-0.5)

    def layer_norm(name, n):
        normal(f"{name}.weight", n, scale=0.2, mean=1)
        normal(f"{name}.bias", n, scale=0.4)

    def mix(name, n):
        z[name] = draw.uniform(0, 1, (1, 1, n))

    normal("emb.weight", vocab, c)
    matrix("head.weight", vocab, c)
    layer_norm("ln_out", c)
    for i in range(12):
        b = f"blocks.{i}."
        for name in ("ln0", "ln1", "ln2")[i > 0 :]:
            layer_norm(b + name, c)
        for name in "rwkvag":
            mix(f"{b}att.x_{name}", c)
        for name, rank in zip("wavg", (16, 16, 8, 24), strict=True):
            low_rank(f"{b}att.{name}1", c, rank)
            low_rank(f"{b}att.{name}2", rank, c)
            if name != "g":
                normal(f"{b}att.{name}0", 1, 1, c, scale=0.4, mean=-2 * (name == "w"))
        for name in ("k_k", "k_a"):
            normal(f"{b}att.{name}", 1, 1, c, scale=0.4, mean=1)
        normal(f"{b}att.r_k", c // size, size, scale=0.4)
        for name in ("receptance", "key", "value", "output"):
            matrix(f"{b}att.{name}.weight", c, c)
        layer_norm(f"{b}att.ln_x", c)
        mix(f"{b}ffn.x_k", c)
        matrix(f"{b}ffn.key.weight", 4 * c, c)
        matrix(f"{b}ffn.value.weight", c, 4 * c)
        normal(f"{b}ffn.s_emb.weight", vocab, deep * deep, scale=0.3)
        matrix(f"{b}ffn.s_emb_x.weight", deep * deep, c, scale=0.3)
        matrix(f"{b}ffn.s1", c, deep)
        matrix(f"{b}ffn.s2", deep, 4 * c)
        normal(f"{b}ffn.s0", 1, 1, 4 * c, scale=0.4, mean=1)
        matrix(f"{b}qkv.qq.weight", dim, c)
        for name, n in (("k", dim), ("v", c)):
            matrix(f"{b}qkv.{name}1", c, low)
            matrix(f"{b}qkv.{name}2", low, n)
        for name, n in (("k", dim), ("v", c)):
            normal(f"{b}qkv.{name}_emb.weight", vocab, n)
            matrix(f"{b}qkv.{name}_emb_x.weight", n, c)
        for name, n in (("q", dim), ("k", dim), ("v", c)):
            mix(f"{b}qkv.x_{name}", n)
        for name, n in (("q", dim), ("k", dim), ("v", c)):
            layer_norm(f"{b}qkv.ln{name}", n)
    return {name: torch.from_numpy(x) for name, x in z.items()}


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint("7", **SMALL)


@pytest.fixture
def model(weights) -> RWKV7:
    """Float64."""
    return assemble({name: x.double() for name, x in weights.items()})


def close(x, y, limit=1e-10):
    torch.testing.assert_close(x, y, rtol=0, atol=limit)


def assert_same(state: State, other: State, limit=1e-10):
    assert state.rows == other.rows
    for a, b in zip((*state.layers, *state.contexts), (*other.layers, *other.contexts), strict=True):
        for x, y in zip(a, b, strict=True):
            close(x, y, limit)


# Numbers


@torch.no_grad()
def test_numbers():
    weights = published_case()
    tokens = torch.tensor([[(7 * i * i + 3 * i) % 50 for i in range(40)]])
    model = assemble(weights)
    assert (model.generation, model.config.dea_rank, model.config.dea_dim) == ("rwkv7b", 32, 256)
    logits, state = model(tokens)
    expected = torch.tensor([0.65091999, -0.80167146, -0.85962516, -0.24270504, 0.66820511], dtype=torch.float64)
    close(logits[0, -1, :5], expected, 5e-9)
    assert logits.std().item() == pytest.approx(1.117, abs=5e-4)
    close(logits[0], torch.from_numpy(reference(weights, tokens[0].tolist())))
    assert [context.kc.shape for context in state.contexts] == [(12, 40, 32)]
    single, _ = model.float()(tokens)
    close(single.double(), logits, 3e-5)


@torch.no_grad()
def test_odd_sizes_and_every_layer_against_the_loop(weights, model):
    assert (model.config.dea_rank, model.config.dea_dim, model.config.deep_rank) == (6, 15, 4)
    close(model(TOKENS)[0][0], torch.from_numpy(reference(weights, TOKENS[0].tolist())))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 33])
def test_scores_in_pieces(monkeypatch, length):
    q, k, v = (torch.randn(n, 5, dtype=torch.float64) for n in (length, 40, 40))
    whole = attend(q, k, v)
    monkeypatch.setattr(deep_embed_attention, "MAX_SCORES", 90)
    close(attend(q, k, v), whole)


def test_gradients_of_the_attention(monkeypatch):
    q, k, v = (30 * torch.randn(n, 3, dtype=torch.float64) for n in (4, 7, 7))
    for limit in (1 << 20, 8):  # at once, and recomputed piece by piece
        monkeypatch.setattr(deep_embed_attention, "MAX_SCORES", limit)
        assert torch.autograd.gradcheck(attend, [x.clone().requires_grad_() for x in (q, k, v)])


def test_every_parameter_moves_the_loss(model):
    """Through whole sequences, and through the state between two calls."""
    model.train()

    def loss() -> Tensor:
        first, state = model(TOKENS[:, :9])
        second, _ = model(TOKENS[:, 9:-1], state)
        return torch.nn.functional.cross_entropy(torch.cat([first, second], 1)[0], TOKENS[0, 1:])

    loss().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    attention, eps = model.blocks[1].qkv, 1e-6
    for name in ("qq.weight", "k1", "v2", "k_emb_x.weight", "x_v", "lnk.bias"):
        p = attention.get_parameter(name)
        place = tuple(n // 2 for n in p.shape)
        with torch.no_grad():
            losses = []
            for step in (eps, -2 * eps, eps):
                p[place] += step
                losses.append(loss().item())
        assert p.grad[place].item() == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-4, abs=1e-9), name
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = True
    loss().backward()
    for name, p in model.named_parameters():
        close(p.grad, plain[name])


# The state


@torch.no_grad()
def test_halves_steps_and_packed_rows(model):
    whole, end = model(TOKENS)
    first, state = model(TOKENS[:, :14])
    second, last = model(TOKENS[:, 14:], state)
    close(torch.cat([first, second], 1), whole)
    assert_same(end, last)
    steps, state = [], None
    for t in range(TOKENS.shape[1]):
        logits, state = model(TOKENS[:, t : t + 1].int(), state)
        steps.append(logits)
    close(torch.cat(steps, 1), whole)
    assert_same(end, state)
    cu = [0, 5, 6, 33]
    packed, ends = model(TOKENS, cu_seqlens=cu)
    for i, (a, b) in enumerate(pairwise(cu)):
        logits, end = model(TOKENS[:, a:b])
        close(packed[:, a:b], logits)
        assert_same(ends[i], end)
    last, _ = model(TOKENS, cu_seqlens=cu, last_only=True)
    close(last, packed[:, [4, 5, 32]])
    # rows of unequal lengths go on side by side, in one batch and packed
    rows = TOKENS[0, :6].view(3, 2)
    batch, after = model(rows, ends)
    again, packed_after = model(rows.view(1, 6), ends, cu_seqlens=[0, 2, 4, 6])
    close(again.view(3, 2, -1), batch)
    assert_same(after, packed_after)
    for i in range(3):
        logits, end = model(rows[i : i + 1], ends[i])
        close(logits[0], batch[i])
        assert_same(after[i], end)
    assert [len(context.tokens) for context in after.contexts] == [7, 3, 29]


@torch.no_grad()
def test_a_state_is_a_value(model, tmp_path):
    _, state = model(TOKENS, cu_seqlens=[0, 5, 33])
    before = [x.clone() for context in state.contexts for x in context]
    model(torch.tensor([[1], [2]]), state)
    assert all(map(torch.equal, before, [x for context in state.contexts for x in context]))
    fixed = sum(x.nbytes for layer in state.layers for x in layer) + 2 * 8 * 2 * 15
    assert state.bytes_per_token == 8 + 8 * 2 * 2 * 6  # float64: the id, and 2 x 6 numbers in each of 2 layers
    assert state.nbytes == fixed + 33 * state.bytes_per_token
    assert repr(state).endswith("after 5, 28 tokens, growing by 200 bytes a token)")
    assert_same(State.stack([state[1], state[0]]), state[[1, 0]], 0)
    assert_same(state[-1:], state[1], 0)
    copied = state.clone()
    assert copied.contexts[0].kc.data_ptr() != state.contexts[0].kc.data_ptr()
    state = state.with_texts(["one", "two"])
    for other in (copied, pickle.loads(pickle.dumps(state[1])), copy.deepcopy(state), state.detach(), state.to("cpu")):
        assert_same(other, state[1] if other.rows == 1 else state, 0)
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    assert_same(loaded, state, 0)
    assert (loaded.texts, loaded.fingerprint) == (("one", "two"), model.fingerprint)
    close(model(torch.tensor([[1], [2]]), loaded)[0], model(torch.tensor([[1], [2]]), state)[0])


@torch.no_grad()
def test_other_states_do_not_grow(random_checkpoint):
    state = assemble(random_checkpoint("7"))(TOKENS)[1]
    assert (state.contexts, state.bytes_per_token) == ((), 0)
    assert "growing" not in repr(state)


def test_states_that_do_not_fit_are_refused(model, random_checkpoint, tmp_path):
    _, state = model(TOKENS[:, :4])
    (context,) = state.contexts
    damaged = [
        (),
        [context._replace(tokens=context.tokens[:-1])],
        [context._replace(tokens=context.tokens + 100)],
        [context._replace(tokens=context.tokens - 101)],
        [context._replace(tokens=context.tokens.double())],
        [context._replace(kc=context.kc[:1])],
        [context._replace(vc=context.vc[..., :-1])],
        [context._replace(q=context.q[:, :-1])],
        [context._replace(kc=context.kc.long())],
    ]
    for contexts in damaged:
        with pytest.raises(InputError, match=r"^this state is damaged: its tensors do not fit the model$"):
            model(TOKENS, State(state.layers, state.fingerprint, contexts=contexts))
    for name in context._fields:
        away = context._replace(**{name: getattr(context, name).to("meta")})
        with pytest.raises(InputError, match=r"^state on meta, but the model is on cpu"):
            model(TOKENS, State(state.layers, state.fingerprint, contexts=[away]))
    with pytest.raises(ValueError, match="2 contexts for 1 rows"):
        State(state.layers, state.fingerprint, contexts=[context, context])
    plain = assemble(random_checkpoint("7", **(SMALL | {"dea": 0})))
    with pytest.raises(InputError, match="belongs to another model"):
        plain(TOKENS, state)
    with pytest.raises(InputError, match="this state is damaged"):
        plain(TOKENS, State(plain.initial_state().layers, plain.fingerprint, contexts=[context]))
    state.save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole.replace(b"rows.0.vc", b"rows.0.xx"))
    with pytest.raises(InputError, match="damaged or truncated state file"):
        State.load(tmp_path / "state")
    State(state.layers, state.fingerprint, contexts=[context._replace(vc=context.vc / 0)]).save(tmp_path / "state")
    with pytest.raises(InputError, match=r"rows\.0\.vc contains NaN or infinity"):
        State.load(tmp_path / "state")


# Text


def as_llm(random_checkpoint) -> LLM:
    weights = random_checkpoint("7", **(SMALL | {"vocab": 256}))
    return LLM(assemble({name: x.double() for name, x in weights.items()}))


def test_a_batch_of_unequal_lengths_is_each_alone(model):
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(101, (n,), generator=random).tolist() for n in (1, 40, 7, 300, 2)]
    together = generate(model, prompts, GREEDY, 12).run()
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], GREEDY, 12).run()
        assert found.tokens == alone.tokens
        assert_same(found.state, alone.state)
        assert len(found.state.contexts[0].tokens) == len(prompt) + 12


def test_texts(random_checkpoint, tmp_path):
    llm = as_llm(random_checkpoint)
    prompts = ["a", "A much longer prompt than that.", "ab"]
    whole = llm.generate(prompts, max_tokens=9, seed=1)
    assert [x.text for x in whole] == [llm.generate(p, max_tokens=9, seed=1).text for p in prompts]
    pieces = list(llm.generate("ab", max_tokens=9, seed=1, stream=True))
    assert "".join(piece.text for piece in pieces) == whole[2].text
    cut = pieces[2]  # generation goes on from any piece's state
    assert len(cut.state.contexts[0].tokens) == 2 + cut.usage.completion_tokens
    state = llm.state("A much longer prompt")
    state.save(tmp_path / "state")
    more = llm.generate(" than that.", state=State.load(tmp_path / "state"), max_tokens=9, seed=1)
    assert more.text == whole[1].text
    stopped = llm.generate(prompts, max_tokens=9, seed=1, stop=whole[1].text[3:5])
    assert stopped[1].text == whole[1].text[:3]
    assert stopped[0].text == whole[0].text[: len(stopped[0].text)]


def test_conversations(random_checkpoint, tmp_path):
    llm = as_llm(random_checkpoint)
    chat = llm.chat(template="story")
    chat.say("one", max_tokens=6, seed=1)
    two = chat.say("two", max_tokens=6, seed=2).text
    chat.fork("other")
    assert chat.undo() == "two"
    chat.say("three", max_tokens=6, seed=3)
    chat.save(tmp_path / "talk")
    other = llm.chat(template="story")
    other.load(tmp_path / "talk")
    for branch in ("main", "other"):
        chat.switch(branch)
        other.switch(branch)
        assert other.text == chat.text
        assert other.say("and?", max_tokens=6, seed=4).text == chat.say("and?", max_tokens=6, seed=4).text
        chat.undo()
    chat.switch("main")
    assert chat.retry(max_tokens=6, seed=2).text == two


# Files, and what else takes a model


@torch.no_grad()
def test_files(weights, tmp_path, command, caplog):
    torch.save(weights, tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth")
    assert "rwkv7b has no step in C++: each token runs in PyTorch" in caplog.text
    heronry.save(model, tmp_path / "saved")
    again = heronry.load(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    for name, to in (("a.safetensors", None), ("b.pth", None), ("folder", "heronry")):
        convert(tmp_path / "a.pth", tmp_path / name, to=to)
        assert torch.equal(heronry.load(tmp_path / name)(TOKENS)[0], model(TOKENS)[0])
    for to in ("huggingface", "gguf", "ggml", "webrwkv", "onnx", "onnx-step"):
        message = rf"a.pth: the format {to} does not support RWKV-7b \(DeepEmbedAttention\)"
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "a.pth", tmp_path / "out", to=to)
    code, out, _ = command("info", tmp_path / "a.pth")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, rows["generation"]) == (0, "rwkv7b")
    assert re.search("^DeepEmbedAttention rank +6$", out, re.MULTILINE)
    state = model.initial_state()
    assert rows["state"] == f"{state.nbytes / 1024:.4g} KiB a sequence and 104 bytes a token"
    model(TOKENS)[1].save(tmp_path / "state")
    code, out, _ = command("info", tmp_path / "state")
    rows = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if line.startswith(("tokens", "bytes")))
    assert rows["bytes per token"] == "104"
    del weights["blocks.1.qkv.k2"]
    with pytest.raises(InputError, match=r"^the tensors do not make a model; 1 missing: blocks\.1\.qkv\.k2$"):
        assemble(weights)
    for name in ("blocks.0.qkv.qq.weight", "blocks.0.qkv.k1"):
        with pytest.raises(
            InputError, match=r"qkv\.qq\.weight is missing" if "qq" in name else "unexpected: blocks.0.qkv"
        ):
            assemble({key: x for key, x in weights.items() if key != name})


@torch.no_grad()
@pytest.mark.parametrize(("format", "limit"), [("int8", 0.05), ("int4", 0.3)])
def test_quantized(weights, model, format, limit, tmp_path):
    packed = quantize(assemble(weights), format)
    logits, state = packed(TOKENS)
    assert 0 < (logits - model(TOKENS)[0]).abs().mean() < limit
    assert type(packed.blocks[0].qkv.v_emb_x).__name__ == "PackedLinear"
    assert packed.blocks[0].qkv.v_emb.weight.dtype == torch.float32  # looked up, so as exact as it was
    heronry.save(packed, tmp_path / "packed")
    again, other = heronry.load(tmp_path / "packed")(TOKENS)
    assert torch.equal(again, logits)
    assert_same(other, state, 0)
    model.float()(TOKENS, state)  # a state of the one fits the other


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(weights, model, dtype):
    small = assemble(weights, dtype=dtype)
    logits, state = small(TOKENS)
    assert (logits.float() - model(TOKENS)[0]).abs().mean() < 0.1
    assert {x.dtype for x in state.contexts[0][1:]} == {torch.float32}


def test_fingerprints_of_the_others_are_as_before(random_checkpoint):
    model = assemble(random_checkpoint("7"))
    old = {name: value for name, value in vars(model.config).items() if not name.startswith("dea_")}

    config = dataclasses.make_dataclass("OldConfig", old)(**old)
    assert compute_fingerprint("rwkv7", config, {})[:16] == model.fingerprint[:16]


def settings(weights, texts, folder, *more):
    path = folder / "base.pth"
    torch.save(weights, path)
    base = [f"model.path={path}", f"data.train={texts}", f"run.out={folder / 'out'}", "data.ctx_len=16", "run.batch=2"]
    steps = ["run.steps=12", "run.log_every=1", "run.sample_every=0", "optim.lr=3e-3", "optim.warmup=1"]
    return read_config(None, [*base, *steps, "run.precision=float32", "data.order=documents", *more])


@pytest.mark.parametrize("tune", ["all", "lora", "state"])
def test_training_from_a_checkpoint(weights, texts, tmp_path, tune):
    trainer = Trainer(settings(weights, texts, tmp_path, f"model.tune={tune}"))
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    changed = {name for name, x in trainer.model.state_dict().items() if not torch.equal(x, before[name])}
    trained = trainer.model.eval()(TOKENS % 64)[0]
    base, out = tmp_path / "base.pth", tmp_path / "out"
    if tune == "all":
        close(heronry.load(out)(TOKENS % 64)[0], trained, 1e-4)
        assert changed == before.keys()
        groups = trainer.model.param_groups(1.0, 0.1)
        assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    elif tune == "state":
        assert changed == {"blocks.0.att.time_state", "blocks.1.att.time_state"}
        model = heronry.load(base)
        close(model(TOKENS % 64, heronry.initial_state(out, model))[0], trained, 1e-4)
    else:
        assert any("qkv.qq.lora_A" in name for name in changed)
        model = heronry.load(base)
        apply_adapter(model, out)
        close(model(TOKENS % 64)[0], trained, 1e-4)


def test_what_is_refused_in_training(weights, texts, tmp_path, model):
    with pytest.raises(InputError, match=r"^no initialisation of RWKV-7b \(DeepEmbedAttention\) was published"):
        model.init_weights()
    with pytest.raises(InputError, match=r"data.order=carried is not for rwkv7b, whose state grows"):
        Trainer(settings(weights, texts, tmp_path, "data.order=carried"))
    assert not model.affine
    shard = SequenceShard.__new__(SequenceShard)
    shard.cu = (0, 33)
    with pytest.raises(InputError, match=r"rwkv7b cannot run with sequence parallelism"):
        model(TOKENS, cu_seqlens=shard)


def test_tables_are_not_counted_as_matrices(model):
    config = model.config
    c, f, v = config.n_embd, config.dim_ffn, config.vocab_size
    low = 5 + 6 + 8, 7  # ranks of w, a and g in every layer, of v in the second
    matrices = 2 * (4 * c * c + 2 * c * f + 2 * c * sum(low[:1])) + 2 * c * low[1] + v * c
    matrices += 2 * (2 * 32 * config.head_size // 32)  # r_k
    deep = 2 * (16 * c + 4 * c + 4 * f)
    attention = 2 * (15 * c + c * 6 + 6 * 15 + c * 6 + 6 * c + 15 * c + c * c)
    assert forward_flops_per_token(model) == 2 * (matrices + deep + attention)


@torch.no_grad()
def test_adapters_beside_packed_matrices(weights):
    model = inject_adapter(quantize(assemble(weights), "int8"), 2, 4)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.normal_(std=0.1)
    assert (model(TOKENS)[0] - assemble(weights)(TOKENS)[0]).abs().max() > 0.01


@pytest.mark.slow
def test_compiled(model):
    """As one graph, whatever the number of different tokens."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        first, state = compiled(TOKENS[:, :20])
        second, _ = compiled(TOKENS[:, 20:], state)
        close(torch.cat([first, second], 1), model(TOKENS)[0])


def test_in_transformers(weights, tmp_path):
    transformers = pytest.importorskip("heronry.integrations.transformers")
    model = transformers.RWKV7ForCausalLM.from_heronry(assemble({k: x.double() for k, x in weights.items()}))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    tokens = TOKENS[:, :12].view(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(both[0, 6:], model.generate(tokens[:1, 2:], **options)[0, 4:])
    assert torch.equal(both[1, 6:], model.generate(tokens[1:], **options)[0, 6:])
    beams = model.generate(tokens[1:], num_beams=3, **options)
    assert torch.equal(beams, model.generate(tokens[1:], num_beams=3, use_cache=False, **options))
    with pytest.raises(InputError, match=r"RWKV-7b \(DeepEmbedAttention\) has a matrix for each token id"):
        model(inputs_embeds=torch.zeros(1, 2, 64, dtype=torch.float64))
    with pytest.raises(InputError, match=r"the vocabulary of RWKV-7b \(DeepEmbedAttention\) cannot be resized"):
        model.resize_token_embeddings(128)
    with pytest.raises(InputError, match=r"Hugging Face's layouts of RWKV-7 have no place for .*7a and 7b"):
        model.save_pretrained(tmp_path / "saved")
