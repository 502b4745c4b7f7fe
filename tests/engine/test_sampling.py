"""Distributions by hand, by brute force, and by the PyPI package rwkv."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry.engine import Sampler, Sampling, probabilities
from heronry.errors import InputError
from heronry.text.tokenizers import load_tokenizer

HAND = torch.tensor([0.25, 0.5, 0.1, 0.15]).log()


def expected(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The definition, token by token: a token stays if those strictly before it do not fill the set."""
    raw = logits.double().softmax(0)
    tempered = (logits.double() / sampling.temperature).softmax(0)
    first = sampling.order == "temperature-first"
    p = tempered if first else raw
    k = sampling.top_k or len(p)
    by_k = [int((p > x).sum()) < k for x in p]
    left = torch.where(torch.tensor(by_k), p, 0) if first else p
    left = left / left.sum()
    by_p = [sampling.top_p == 1 or float(left[left > x].sum()) < max(sampling.top_p, 1e-300) for x in left]
    by_min = (p >= sampling.min_p * p.max()).tolist()
    stays = torch.tensor([all(three) for three in zip(by_k, by_p, by_min, strict=True)])
    kept = torch.where(stays, tempered, 0)
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("options", "p"),
    [
        ({}, [0.25, 0.5, 0.1, 0.15]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.0625 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0225 / 0.345]),
        ({"top_k": 3}, [0.25 / 0.9, 0.5 / 0.9, 0, 0.15 / 0.9]),
        ({"top_k": 9}, [0.25, 0.5, 0.1, 0.15]),
        ({"top_p": 0.6}, [1 / 3, 2 / 3, 0, 0]),
        ({"top_p": 0}, [0, 1, 0, 0]),
        ({"min_p": 0.25}, [0.25 / 0.9, 0.5 / 0.9, 0, 0.15 / 0.9]),
        ({"min_p": 1}, [0, 1, 0, 0]),
        # 0.6 of the 0.75 that top_k leaves is filled by the best token alone
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.6, "order": "top-p-first"}, [1 / 3, 2 / 3, 0, 0]),
        # tempered, the best has 0.25 / 0.345 = 0.72; untempered 0.5
        ({"temperature": 0.5, "top_p": 0.6}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.6, "order": "top-p-first"}, [0.2, 0.8, 0, 0]),
    ],
)
def test_by_hand(options, p):
    torch.testing.assert_close(probabilities(HAND, Sampling(**options)), torch.tensor(p) * 1.0, rtol=1e-5, atol=1e-7)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([2, 7, 300, 1000]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 280]),
    top_p=st.sampled_from([0.0, 0.317, 0.8531, 0.9977, 1.0]),
    min_p=st.sampled_from([0.0, 0.0513]),
    order=st.sampled_from(["temperature-first", "top-p-first"]),
)
def test_the_definition(seed, size, spread, temperature, top_k, top_p, min_p, order):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, order=order)
    p = probabilities(logits, sampling)
    q = expected(logits, sampling)
    if torch.equal(p > 0, q > 0):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-6)
    else:  # only a token at the very edge, within rounding, may differ
        raw = (logits / temperature if order == "temperature-first" else logits).double().softmax(0)
        differs = ((p > 0) != (q > 0)).nonzero().flatten()
        assert len(differs) == 1
        mass = raw / raw[raw >= raw.topk(top_k or size).values[-1]].sum() if order == "temperature-first" else raw
        above = float(mass[raw > raw[differs[0]]].sum())
        assert above == pytest.approx(top_p, abs=1e-5)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("size", [50, 1000, 65536])
def test_as_the_package_rwkv(monkeypatch, size, spread):
    utils = pytest.importorskip("rwkv.utils", reason="the PyPI package rwkv is the reference here")
    drawn = []
    monkeypatch.setattr(utils.np.random, "choice", lambda a, p: drawn.append(p) or 0)
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    # the package adds up in float32: at top_p = 1 it turns greedy where the sum ends below 1, and in sets of
    # thousands a few tokens at the edge are off
    top_ps = [0.0, 0.1, 0.3, 0.5, 0.85] + [0.99] * (size <= 1000)
    for top_p, top_k, temperature in product(top_ps, (0, 1, 5, 40), (0.5, 1.0, 1.7)):
        utils.PIPELINE.sample_logits(None, logits, temperature, top_p, top_k)
        theirs = torch.from_numpy(np.asarray(drawn.pop()))
        options = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, order="top-p-first")
        ours = probabilities(logits, options)
        assert torch.equal(ours > 0, theirs > 0), (top_p, top_k, temperature)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


def test_top_p_1_keeps_everything_and_equal_tokens_stay_together():
    logits = torch.randn(65536, generator=torch.Generator().manual_seed(0))
    for order in ("temperature-first", "top-p-first"):
        assert (probabilities(logits, Sampling(order=order)) > 0).all()
    tied = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(probabilities(tied, Sampling(top_p=0.1)), torch.tensor([0.5, 0.5, 0]))
    torch.testing.assert_close(probabilities(tied, Sampling(top_k=1)), torch.tensor([0.5, 0.5, 0]))


@pytest.mark.parametrize("order", ["temperature-first", "top-p-first"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(temperature, order):
    logits = torch.tensor([-300.0, 200.0, 199.0, 0.0, -math.inf])
    p = probabilities(logits, Sampling(temperature=temperature, top_p=0.9, order=order))
    assert p.isfinite().all()
    assert float(p.sum()) == pytest.approx(1)
    assert float(p[-1]) == 0


def test_draws_follow_the_distribution():
    sampling = Sampling(temperature=1.3, top_k=5, min_p=0.02, seed=7)
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, -2.0, 0.9, 1.4])
    sampler, count = Sampler(sampling), 8000
    drawn = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(count)]), minlength=8)
    p = probabilities(logits, sampling)
    assert (drawn[p == 0] == 0).all()
    assert (p > 0).sum() == 5
    kept = p > 0
    chi_square = float(((drawn[kept] - count * p[kept]) ** 2 / (count * p[kept])).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand


def test_the_same_seed_draws_the_same_and_none_does_not():
    logits = torch.zeros(1000)
    draws = [[Sampler(Sampling(seed=seed)).pick(logits) for _ in range(1)] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    first, second = Sampler(Sampling()), Sampler(Sampling())
    assert [first.pick(logits) for _ in range(5)] != [second.pick(logits) for _ in range(5)]
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    Sampler(Sampling(seed=1)).pick(logits)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are used up


def test_penalties_by_hand():
    """presence 0.2, frequency 0.5, decay 0.5 on the logits 1.0, 0.9, 0.2, greedily:

    1.0   0.9   0.2  -> 0   counts 1, 0, 0
    0.3   0.9   0.2  -> 1   counts 0.5, 1, 0
    0.55  0.2   0.2  -> 0   counts 0.25 + 1, 0.5, 0
    0.175 0.45  0.2  -> 1   counts 0.625, 0.25 + 1, 0
    0.4875 0.075 0.2 -> 0   counts 0.3125 + 1, 0.625, 0
    0.14375 0.3875 0.2 -> 1
    """
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.2, frequency_penalty=0.5, penalty_decay=0.5))
    logits = torch.tensor([1.0, 0.9, 0.2])
    assert [sampler.pick(logits) for _ in range(6)] == [0, 1, 0, 1, 0, 1]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.2])


def test_presence_does_not_fade():
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, penalty_decay=0.0))
    assert [sampler.pick(torch.tensor([0.6, 0.5, 0.4])) for _ in range(4)] == [0, 1, 2, 0]


def test_negative_penalties_repeat():
    sampler = Sampler(Sampling(temperature=0, presence_penalty=-1))
    picks = [sampler.pick(torch.tensor(logits)) for logits in ([1.0, 0.0], [0.0, 0.5], [0.0, 1.5])]
    assert picks == [0, 0, 1]


def test_logit_bias():
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert Sampler(Sampling(temperature=0, logit_bias={2: -math.inf})).pick(logits) == 1
    assert Sampler(Sampling(temperature=0, logit_bias={0: 2.5})).pick(logits) == 0
    assert Sampler(Sampling(temperature=0, logit_bias={0: 10**30})).pick(logits) == 0
    assert {Sampler(Sampling(seed=i, logit_bias={0: 100})).pick(logits) for i in range(20)} == {0}
    with pytest.raises(InputError, match="bans them all"):
        Sampler(Sampling(logit_bias=dict.fromkeys(range(3), -math.inf))).pick(logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad, temperature):
    with pytest.raises(InputError, match=r"NaN or infinity.*float32"):
        Sampler(Sampling(temperature=temperature)).pick(torch.tensor([0.0, bad, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_dtype(dtype):
    assert Sampler(Sampling(top_p=0.1)).pick(torch.tensor([0.0, 3.0, 1.0], dtype=dtype)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a number .* got nan"),
        ({"temperature": "hot"}, "temperature must be a number .* got 'hot'"),
        ({"top_p": 1.01}, "top_p must be a number from 0 to 1, got 1.01"),
        ({"top_p": -0.1}, "top_p must be"),
        ({"min_p": 2}, "min_p must be a number from 0 to 1, got 2"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a number, got inf"),
        ({"frequency_penalty": None}, "frequency_penalty must be a number, got None"),
        ({"penalty_decay": 1.5}, "penalty_decay must be a number from 0 to 1"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**64}, "seed must be a whole number from 0 to"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"order": "random"}, "order must be one of temperature-first, top-p-first, got 'random'"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 must be a number, got nan"),
        ({"logit_bias": {5: math.inf}}, "logit_bias of token 5"),
        ({"topp": 0.5}, "unknown sampling option 'topp'; did you mean 'top_p'?"),
    ],
)
def test_what_is_out_of_range_is_named(options, message):
    with pytest.raises(InputError, match=message):
        Sampling().replace(**options)


@pytest.mark.slow
def test_digits_may_be_left_out_of_the_counts():
    """Token for token what the PyPI package rwkv generates with penalties, from logits that never change."""
    utils = pytest.importorskip("rwkv.utils", reason="the PyPI package rwkv is the reference here")
    world = load_tokenizer("world")
    logits = torch.full((65536,), -1e9)
    for i, text in enumerate(["a", "\n", "0", "b", " ", "7", " 1"]):
        logits[world.encode(text)[0]] = 5 - i / 10

    class Fixed:
        def forward(self, tokens: list[int], state: None) -> tuple[torch.Tensor, None]:
            return logits.clone(), None

    arguments = utils.PIPELINE_ARGS(temperature=0, alpha_presence=0.2, alpha_frequency=0.2)
    expected = utils.PIPELINE(Fixed(), "rwkv_vocab_v20230424").generate("x", 40, arguments)
    options = {"temperature": 0, "presence_penalty": 0.2, "frequency_penalty": 0.2}
    sampling = Sampling(**options, penalize_digits=False)
    sampler = Sampler(sampling, decode=lambda token: world.decode([token]))
    assert world.decode([sampler.pick(logits) for _ in range(40)]) == expected
    assert len(set(expected)) > 3  # digits, and what the penalties leave a place for
    counted = Sampler(Sampling(**options))
    assert world.decode([counted.pick(logits) for _ in range(40)]) != expected
    with pytest.raises(InputError, match="penalize_digits=False needs a tokenizer"):
        Sampler(sampling)


def test_every_seed_draws_its_own_tokens():
    logits = torch.zeros(1000)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63 + 1, 2**64 - 1]
    draws = []
    for seed in seeds:
        sampler = Sampler(Sampling(seed=seed))
        draws.append(tuple(sampler.pick(logits) for _ in range(5)))
    assert len(set(draws)) == len(seeds)
