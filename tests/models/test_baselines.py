"""The models that RWKV is compared with do what their names say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from heronry import InputError
from heronry.models.baselines import GPT, LSTM, GPTConfig, LSTMConfig, rotate

MODELS = [GPT(GPTConfig(31, 2, 32, 48, 16)), LSTM(LSTMConfig(31, 2, 24, 20))]


@pytest.fixture(params=MODELS, ids=["gpt", "lstm"])
def model(request):
    torch.manual_seed(0)
    request.param.init_weights()
    return request.param.double()


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
    torch.testing.assert_close(attention(x)[0], y @ attention.output.weight.T, rtol=0, atol=1e-5)  # float32 angles


def test_rotation_sees_distances_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    q, k = (rotate(x.repeat(1, 1, 12, 1)) for x in (q, k))
    scores = (q @ k.transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:], rtol=0, atol=1e-5)


def test_lstm_in_one_pass_and_in_two():
    torch.manual_seed(0)
    lstm = LSTM(LSTMConfig(31, 2, 24, 20)).double()
    lstm.init_weights()
    x = tokens()
    whole, end = lstm(x)
    first, state = lstm(x[:, :5])
    second, state = lstm(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, end)
    open_gates = lstm.lstm.bias_ih_l1[20:40] + lstm.lstm.bias_hh_l1[20:40]
    assert open_gates.unique().tolist() == [1]


def test_every_parameter_is_in_one_group(model):
    groups = model.param_groups(1e-3, 0.1)
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in groups[1]["params"])
    assert groups[0]["weight_decay"] == 0


def test_packed_documents_are_refused(model):
    with pytest.raises(InputError, match="windows"):
        model(tokens()[:1], cu_seqlens=[0, 5, 17])


def test_the_example_makes_them_as_large_as_rwkv7():
    path = Path(__file__).parents[2] / "examples" / "enwik8.py"
    spec = importlib.util.spec_from_file_location("enwik8", path)
    assert spec is not None
    assert spec.loader is not None
    enwik8 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(enwik8)
    sizes = {name: enwik8.count(lambda name=name: enwik8.make(name, 3, 128)) for name in enwik8.NAMES}
    assert all(abs(n / sizes["rwkv7"] - 1) < 0.015 for n in sizes.values()), sizes
