"""The models that RWKV is compared with do what their names say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from heronry import InputError
from heronry.models.baselines import (
    GPT,
    LSTM,
    AFTFull,
    AFTFullConfig,
    AFTSimple,
    AFTSimpleConfig,
    Cache,
    GPTConfig,
    LSTMConfig,
)
from heronry.models.baselines.aft import BLOCK, aft_full
from heronry.models.baselines.gpt import rotary_positions, rotate

MODELS = [
    GPT(GPTConfig(31, 2, 32, 48, 16)),
    AFTFull(AFTFullConfig(31, 2, 32, 48, 100, 8)),
    AFTSimple(AFTSimpleConfig(31, 2, 32, 48)),
    LSTM(LSTMConfig(31, 2, 24, 20)),
]


@pytest.fixture(params=MODELS, ids=[model.name for model in MODELS])
def model(request):
    torch.manual_seed(0)
    request.param.init_weights()
    return request.param.double()


def means_by_formula(k, v, w):
    """AFT's weighted means, as the paper writes them: k, v [S, A], w [T, S] of the last T tokens."""
    rows = []
    for i, bias in enumerate(w):
        seen = len(k) - len(w) + i + 1
        weights = torch.stack([torch.exp(k[s] + bias[s]) for s in range(seen)])
        rows.append((weights * v[:seen]).sum(0) / weights.sum(0))
    return torch.stack(rows)


def tokens(length: int = 17) -> torch.Tensor:
    return torch.randint(31, (3, length), generator=torch.Generator().manual_seed(1))


def test_no_token_sees_what_comes_after_it(model):
    x = tokens()
    changed = x.clone()
    changed[:, 9] = (x[:, 9] + 1) % 31
    a, b = model(x)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-14)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(-1).min() > 1e-9


def test_attention_is_the_formula():
    torch.manual_seed(0)
    attention = GPT(GPTConfig(31, 1, 32, 48, 16)).double().blocks[0].att
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    q, k, v = (x[0] @ f.weight.T for f in (attention.query, attention.key, attention.value))
    y = torch.zeros(7, 32, dtype=torch.float64)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)

        def turned(row: torch.Tensor, t: int) -> torch.Tensor:
            pairs = torch.complex(row[:8], row[8:])
            angles = torch.tensor([t * 10000 ** (-i / 8) for i in range(8)], dtype=torch.float64)
            pairs = pairs * torch.polar(torch.ones_like(angles), angles)
            return torch.cat([pairs.real, pairs.imag])

        for t in range(7):
            scores = [turned(q[t, part], t) @ turned(k[s, part], s) / math.sqrt(16) for s in range(t + 1)]
            y[t, part] = torch.stack(scores).softmax(0) @ v[: t + 1, part]
    found, cache = attention(x, None, *rotary_positions(0, 7, x, 16))
    torch.testing.assert_close(found[0], y @ attention.output.weight.T, rtol=0, atol=1e-5)  # float32 angles
    torch.testing.assert_close(cache.values[0].transpose(0, 1).flatten(1), v, rtol=0, atol=1e-12)


def test_rotation_sees_distances_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    q, k = (rotate(x.repeat(1, 1, 12, 1), *rotary_positions(5, 12, x, 16)) for x in (q, k))
    scores = (q @ k.transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [0, 1, BLOCK + 9])
def test_aft_full_is_the_formula(before):
    """In one block and in several, after nothing and after a cache."""
    torch.manual_seed(0)
    n = before + 2 * BLOCK + 5
    k, v = torch.randn(2, 2, n, 6, dtype=torch.float64)
    u, w = torch.randn(2, n, 4, dtype=torch.float64)
    found = aft_full(3 * k, v, u[before:], w)
    for row in range(2):
        expected = means_by_formula(3 * k[row], v[row], u[before:] @ w.T)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)


def test_aft_full_has_the_gradients_of_the_formula(monkeypatch):
    monkeypatch.setattr("heronry.models.baselines.aft.BLOCK", 2)
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 6, 2, dtype=torch.float64)
    u, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(aft_full, [x.requires_grad_() for x in (k, v, u, w)])


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_aft_with_keys_whose_exponentials_overflow(size):
    """The mean of softmax weights, which float64 computes from differences; no token sees a later, larger key."""
    torch.manual_seed(0)
    n = 2 * BLOCK + 5
    k, v = torch.randn(2, 1, n, 3, dtype=torch.float64)
    k[:, BLOCK + 3 :] += size
    u, w = torch.randn(2, n, 4, dtype=torch.float64) / 2
    z = (k[0] + (u @ w.T)[:, :, None]).masked_fill(torch.ones(n, n).triu(1).bool()[..., None], -torch.inf)
    expected = (z.softmax(1) * v[0]).sum(1)
    found = aft_full(*(x.float() for x in (k, v, u, w)))
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=2e-4)


def test_aft_simple_is_the_formula():
    torch.manual_seed(0)
    attention = AFTSimple(AFTSimpleConfig(31, 1, 8, 16)).double().blocks[0].att
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    q, k, v = (x[0] @ f.weight.T for f in (attention.query, attention.key, attention.value))
    y = torch.sigmoid(q) * means_by_formula(k, v, torch.zeros(9, 9, dtype=torch.float64))
    torch.testing.assert_close(attention(x, None)[0][0], y @ attention.output.weight.T, rtol=0, atol=1e-12)


def test_aft_full_ends_with_its_biases():
    model = AFTFull(AFTFullConfig(31, 1, 8, 16, 5, 2))
    state = model(tokens(5))[1]
    with pytest.raises(InputError, match="has biases for 5 positions, not for 6"):
        model(tokens(1), state)


@pytest.mark.parametrize("gradients", [True, False])
def test_one_pass_is_steps_with_a_state(model, gradients):
    x = tokens()
    with torch.set_grad_enabled(gradients):
        whole, _ = model(x)
        logits, state = model(x[:, :5])
        parts = [logits]
        for begin, end in ((5, 6), (6, 7), (7, 13), (13, 14), (14, 17)):
            logits, state = model(x[:, begin:end], state)
            parts.append(logits)
        last = model(x[:, 14:], model(x[:, :14])[1], last_only=True)[0]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)  # float32 angles
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_state_is_a_snapshot(model):
    """Two continuations of one state do not disturb each other, though they may share buffers."""
    x = tokens()
    state = model(x[:, :9])[1]
    state = model(x[:, 9:10], state)[1]
    logits = [model(x[:, t : t + 1], state)[0] for t in (10, 11, 10)]
    assert logits[0].equal(logits[2])
    longer = model(x[:, 10:11], state)[1]
    before = model(x[:, 11:12], longer)[0]
    model(x[:, 12:14], state)
    assert model(x[:, 11:12], longer)[0].equal(before)


@torch.no_grad()
def test_a_cache_is_copied_only_when_it_doubles():
    cache = Cache.of(*torch.randn(2, 1, 2, 3, 4))
    places = []
    for _ in range(60):
        cache = cache.append(*torch.randn(2, 1, 2, 1, 4))
        places.append((cache.buffers[0].data_ptr(), cache.buffers[0].shape[-2]))
    assert [room for _, room in dict(places).items()] == [6, 12, 24, 48, 96]
    assert cache.length == 63
    assert cache.nbytes == 2 * 2 * 63 * 4 * 4


def test_forget_gates_are_open():
    lstm = MODELS[-1]
    lstm.init_weights()
    open_gates = lstm.lstm.bias_ih_l1[20:40] + lstm.lstm.bias_hh_l1[20:40]
    assert open_gates.unique().tolist() == [1]


def test_every_parameter_is_in_one_group(model):
    groups = model.param_groups(1e-3, 0.1)
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in groups[1]["params"])
    assert groups[0]["weight_decay"] == 0


def test_packed_documents_are_refused(model):
    message = f"the {model.name} of the comparisons reads windows"
    with pytest.raises(InputError, match=message):
        model(tokens()[:1], cu_seqlens=[0, 5, 17])
    with pytest.raises(InputError, match=message):  # what training with data.order=carried asks for
        model.initial_state()


def test_the_example_makes_them_as_large_as_rwkv7():
    path = Path(__file__).parents[2] / "examples" / "enwik8.py"
    spec = importlib.util.spec_from_file_location("enwik8", path)
    assert spec is not None
    assert spec.loader is not None
    enwik8 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(enwik8)
    sizes = {name: enwik8.count(lambda name=name: enwik8.make(name, 3, 128)) for name in enwik8.NAMES}
    assert all(abs(n / sizes["rwkv7"] - 1) < 0.015 for n in sizes.values()), sizes
