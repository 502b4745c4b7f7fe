"""The native draw is the one in Python, to the bit, at every level of the processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heronry import build
from heronry.engine import Sampler, Sampling, draw, probabilities
from heronry.engine.draw import draw_in_python
from heronry.errors import InputError

SIZES = (1, 2, 15, 16, 17, 255, 256, 257, 3000, 65536)
RANDOMS = (0.0, 0.37, 0.9, 1 - 2**-53)


def random_case(rng: np.random.Generator) -> tuple[torch.Tensor, Sampling]:
    size = int(rng.choice(SIZES))
    logits = torch.from_numpy(rng.standard_normal(size).astype(np.float32) * rng.choice([0, 0.1, 1, 4, 20]))
    if rng.random() < 0.3:  # many that are equal
        logits = (logits * 4).round() / 4
    if rng.random() < 0.3:
        logits[torch.from_numpy(rng.integers(0, size, size // 2))] = -torch.inf
        logits[0] = 0
    return logits.float(), Sampling(
        temperature=float(rng.choice([0, 1e-30, 0.3, 0.8, 1, 1, 2, 1e30])),
        top_k=int(rng.choice([0, 0, 1, 5, 50, 300, 70000])),
        top_p=float(rng.choice([0, 0.1, 0.5, 0.85, 0.99, 0.9999999, 1, 1])),
        min_p=float(rng.choice([0, 0, 0.05, 1])),
        order=str(rng.choice(["temperature-first", "top-p-first"])),
    )


@pytest.fixture
def native(monkeypatch):
    def use(level: str | None) -> None:
        monkeypatch.setattr(build, "level", level)
        draw._native.cache_clear()
        if draw._native() is None:
            pytest.skip("there is no compiler")

    yield use
    monkeypatch.undo()
    draw._native.cache_clear()


@pytest.mark.parametrize(
    "level", [None, *(pytest.param(level, marks=pytest.mark.slow) for level in ("avx512", "avx2", "sse4", "neon"))]
)
def test_native_and_python_draw_the_same(level, native):
    if level not in (None, *build.levels()):
        pytest.skip(f"this processor does not run {level}")
    native(level)
    rng = np.random.default_rng(20)
    for _ in range(60):
        logits, sampling = random_case(rng)
        for random in RANDOMS:
            drawn = draw.draw(logits, sampling, random)
            assert drawn == draw_in_python(logits, sampling, random), (len(logits), sampling, random)
            assert probabilities(logits, sampling)[drawn] > 0


@pytest.mark.parametrize("size", [300, 65536])
def test_rows_are_drawn_as_each_alone(size):
    """Few logits on one thread, many on several; what cannot be drawn from is no matter to the others."""
    rng = np.random.default_rng(4)
    rows = torch.from_numpy(rng.standard_normal((9, size)).astype(np.float32))
    rows[3, 5], rows[7] = torch.nan, -torch.inf
    samplings, randoms = [random_case(rng)[1] for _ in rows], rng.random(9)
    drawings = [draw.Drawing(*x, draw.Options.of(x[1])) for x in zip(rows, samplings, randoms, strict=True)]
    found = draw.draw_rows(drawings)
    assert "NaN or infinity" in str(found[3])
    assert "no token is left" in str(found[7])
    for i in {*range(9)} - {3, 7}:
        assert found[i] == draw_in_python(rows[i], samplings[i], randoms[i])
    assert draw.draw_rows([]) == []


def test_the_weights_are_the_distribution():
    """Against the exponential in float64; what is drawn is as likely as it should be to 2^-34."""
    rng = np.random.default_rng(3)
    for spread in (0.1, 1, 5):
        logits = torch.from_numpy(rng.standard_normal(65536).astype(np.float32) * np.float32(spread))
        weights, stays = draw._weights_and_cut(logits, Sampling())
        expected = np.exp(logits.double().numpy() - float(logits.max()))
        assert stays.all()
        assert np.abs(weights / 2**34 - expected).max() < 1.5e-7
        assert (weights == np.round(weights)).all()


def test_the_edges_of_a_draw():
    logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    assert [draw.draw(logits, Sampling(), x) for x in (0, 0.49, 0.5, 1 - 2**-53)] == [0, 0, 2, 2]
    assert draw.draw(torch.tensor([1.0, 3.0, 3.0]), Sampling(temperature=0), 0) == 1


@pytest.mark.parametrize("body", [draw.draw, draw_in_python])
def test_logits_that_nothing_can_be_drawn_from(body):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="the logits contain NaN or infinity"):
            body(torch.tensor([0.0, bad]), Sampling(), 0.5)
    with pytest.raises(InputError, match="no token is left to choose"):
        body(torch.full((20,), -torch.inf), Sampling(), 0.5)


def test_penalties_are_those_of_the_whole_vocabulary():
    """The formula over all tokens, as it is written; a hundred draws, so that counts fade and repeat."""
    options = {"presence_penalty": 0.4, "frequency_penalty": 0.7, "penalty_decay": 0.9, "repetition_penalty": 1.3}
    sampling = Sampling(temperature=0, logit_bias={3: 0.5, 7: -torch.inf}, **options)
    prompt, earlier = [1, 5, 5], [2, 9]
    sampler = Sampler(sampling, prompt, earlier=earlier)
    counts, drawn = np.zeros(20), np.zeros(20, bool)
    repeated = np.isin(np.arange(20), prompt + earlier)

    def count(token: int) -> None:
        counts[:] *= 0.9
        counts[token] += 1
        drawn[token] = repeated[token] = True

    for token in earlier:
        count(token)
    rng = np.random.default_rng(1)
    for _ in range(100):
        logits = rng.standard_normal(20).astype(np.float32)
        x = np.where(repeated, np.where(logits > 0, logits / 1.3, logits * 1.3), logits).astype(np.float64)
        x[3] += 0.5
        x[7] = -np.inf
        x -= np.where(drawn, 0.4 + 0.7 * counts, 0)
        token = sampler.pick(torch.from_numpy(logits))
        assert token == x.argmax()
        count(token)


def test_the_callers_logits_stay_as_they_are():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sampler = Sampler(Sampling(presence_penalty=1, repetition_penalty=2, logit_bias={1: 3}), prompt=[4])
    for _ in range(3):
        sampler.pick(logits, banned=[9])
    assert torch.equal(logits, before)
