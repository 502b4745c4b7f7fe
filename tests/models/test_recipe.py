"""Initialisation and parameter groups are those of the training recipes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from heronry.models import RWKV4, RWKV5, RWKV6, RWKV7, Model

VOCAB, LAYERS, WIDTH, HEAD_SIZE = 100, 3, 64, 16
N = torch.arange(WIDTH).double()  # channels
D, PLACE = N / WIDTH, N / (WIDTH - 1)
HEAD_PLACE = torch.tensor([0, 1 / 3, 2 / 3, 1]).double()
Z3 = torch.tensor([0.0, 1.0, -1.0]).repeat(WIDTH)[:WIDTH].double()


class Orthogonal(NamedTuple):
    gain: float


class Uniform(NamedTuple):
    bound: float


Expected = float | torch.Tensor | Orthogonal | Uniform  # a number fills the parameter


def made(cls: type[Model], vocab: int = VOCAB, width: int = WIDTH, time_state: bool = False, **options) -> Model:
    torch.manual_seed(0)
    config = cls.Config.sized(vocab, LAYERS, width, **options)
    model = cls(replace(config, time_state=True) if time_state else config).requires_grad_(False)
    for p in model.parameters():
        p.fill_(float("nan"))  # whatever the recipe forgets stays visible
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    return model


def check(name: str, p: torch.Tensor, expected: Expected) -> None:
    p = p.double()
    if isinstance(expected, Orthogonal):
        small = p if p.shape[0] <= p.shape[1] else p.mT
        gram = expected.gain**2 * torch.eye(len(small)).double()
        atol = 1e-5 * expected.gain**2
        torch.testing.assert_close(small @ small.mT, gram, rtol=1e-4, atol=atol, msg=lambda m: f"{name}: {m}")
        assert p.count_nonzero() > 0.9 * p.numel(), name  # drawn at random, not an identity
    elif isinstance(expected, Uniform):
        q = p / expected.bound
        assert -1 <= q.min() < -0.95, name
        assert 0.95 < q.max() <= 1, name
        assert q.mean().abs() < 0.05, name
        assert abs(q.abs().mean() - 0.5) < 0.03, name
    elif isinstance(expected, float) and expected == 0:
        assert not p.any(), name
    else:
        want = torch.as_tensor(expected).double().expand(p.numel())
        torch.testing.assert_close(p.flatten(), want, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


def assert_recipe(model: Model, emb: Expected, block: Callable[[int, float, float], dict[str, Expected]]) -> None:
    """Each parameter of every block (called with its index, rho and tau) has its value; none may be left out."""
    expected: dict[str, Expected] = {"emb.weight": emb, "head.weight": Orthogonal(0.5 * (VOCAB / WIDTH) ** 0.5)}
    for norm in ("ln_out", "blocks.0.ln0", *(f"blocks.{i}.{ln}" for i in range(LAYERS) for ln in ("ln1", "ln2"))):
        expected |= {f"{norm}.weight": 1.0, f"{norm}.bias": 0.0}
    for i, (rho, tau) in enumerate([(0.0, 1.0), (0.5, 2 / 3), (1.0, 1 / 3)]):
        expected |= {f"blocks.{i}.{name}": value for name, value in block(i, rho, tau).items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, p in parameters.items():
        check(name, p, expected[name])


def norm_x(i: int) -> dict[str, Expected]:
    return {"att.ln_x.weight": ((i + 1) / 3) ** 0.7, "att.ln_x.bias": 0.0}


def matrices(receptance: float, key: float, value: float, gate: float | None, hidden: float) -> dict[str, Expected]:
    """Gains of the orthogonal matrices, 0 for a zero matrix; those that are zero in every generation."""
    gains = {"att.receptance": receptance, "att.key": key, "att.value": value, "ffn.key": hidden}
    if gate is not None:
        gains["att.gate"] = gate
    drawn = {f"{name}.weight": Orthogonal(gain) if gain else 0.0 for name, gain in gains.items()}
    return drawn | {"att.output.weight": 0.0, "ffn.value.weight": 0.0}


def rates(model: Model) -> dict[str, tuple[float, float]]:
    """Parameter -> (factor of the learning rate, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.param_groups(lr=1.0, weight_decay=0.1)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


MATRIX, PLAIN, TWICE, THRICE = (1.0, 0.1), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0)


def test_rwkv4():
    def block(i, rho, tau):
        mixes = {"att.time_mix_k": D**tau, "att.time_mix_v": D**tau + 0.3 * rho, "att.time_mix_r": D ** (tau / 2)}
        mixes |= {"ffn.time_mix_k": D**tau, "ffn.time_mix_r": D**tau}
        decay = {"att.time_decay": -5 + 8 * PLACE ** (0.7 + 1.3 * rho), "att.time_first": math.log(0.3) + Z3 / 2}
        return mixes | decay | matrices(0, 0, 1, None, hidden=2) | {"ffn.receptance.weight": 0.0}

    model = made(RWKV4)
    assert_recipe(model, Orthogonal(1e-4 * VOCAB**0.5), block)
    rate = rates(model)
    assert rate["emb.weight"] == rate["head.weight"] == rate["blocks.1.ffn.key.weight"] == MATRIX
    assert rate["blocks.1.att.time_mix_k"] == rate["blocks.1.ln1.weight"] == PLAIN
    assert rate["blocks.1.att.time_decay"] == TWICE
    assert rate["blocks.1.att.time_first"] == THRICE


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
def test_rwkv5(version):
    def block(i, rho, tau):
        mixes = {"att.time_mix_k": D**tau, "att.time_mix_v": D**tau + 0.3 * rho, "att.time_mix_r": D ** (tau / 2)}
        mixes |= {"ffn.time_mix_k": D**tau, "ffn.time_mix_r": D**tau}
        if version != "5.0":
            mixes["att.time_mix_g"] = D ** (tau / 2)
        place = PLACE if version == "5.2" else HEAD_PLACE
        decay = {"att.time_decay": -6 + 5 * place ** (0.7 + 1.3 * rho)}
        match version:
            case "5.0":
                decay["att.time_first"] = -3.0
                drawn = matrices(1, 1, 1, None, hidden=2)
            case "5.1":
                decay["att.time_faaaa"] = rho * (1 - place)
                drawn = matrices(1, 1, 1, 1, hidden=3.5**0.5)
            case "5.2":
                decay["att.time_faaaa"] = rho * (1 - place) + 0.1 * Z3
                drawn = matrices(1, 0.1, 1, 0.1, hidden=1)
        return mixes | decay | drawn | norm_x(i) | {"ffn.receptance.weight": 0.0}

    model = made(RWKV5, head_size=HEAD_SIZE, version=version)
    assert model.config.dim_ffn == (256 if version == "5.0" else 224)
    assert_recipe(model, Uniform(1e-4), block)
    rate = rates(model)
    assert rate["head.weight"] == rate["blocks.1.att.output.weight"] == MATRIX
    assert rate["blocks.1.att.ln_x.weight"] == PLAIN
    assert rate["blocks.1.att.time_decay"] == TWICE
    if version == "5.0":
        assert rate["blocks.1.att.time_first"] == THRICE
    else:
        assert rate["blocks.1.att.time_faaaa"] == PLAIN


def test_rwkv6():
    def block(i, rho, tau):
        mixes = {f"att.time_maa_{x}": 1 - D**tau for x in "xwk"}
        mixes |= {f"att.time_maa_{x}": 1 - D ** (tau / 2) for x in "rg"}
        mixes |= {f"ffn.time_maa_{x}": 1 - D ** (tau**3) for x in "kr"}
        mixes["att.time_maa_v"] = 1 - D**tau - 0.3 * rho
        lora = {"att.time_maa_w1": 0.0, "att.time_maa_w2": Uniform(0.01)}
        lora |= {"att.time_decay_w1": 0.0, "att.time_decay_w2": Uniform(0.01)}
        decay = {"att.time_decay": -6 + 5 * PLACE ** (0.7 + 1.3 * rho)}
        decay["att.time_faaaa"] = rho * (1 - PLACE) + 0.1 * Z3
        drawn = matrices(1, 0.1, 1, 0.1, hidden=1)
        return mixes | lora | decay | drawn | norm_x(i) | {"ffn.receptance.weight": 0.0}

    model = made(RWKV6, head_size=HEAD_SIZE)
    assert (model.config.dim_ffn, model.config.mix_rank, model.config.decay_rank) == (224, 32, 64)
    assert_recipe(model, Uniform(1e-4), block)
    rate = rates(model)
    assert rate["emb.weight"] == rate["blocks.1.att.gate.weight"] == MATRIX
    assert rate["blocks.1.att.time_maa_w1"] == rate["blocks.1.att.time_decay_w2"] == PLAIN
    assert rate["blocks.1.att.time_faaaa"] == PLAIN
    assert rate["blocks.1.att.time_decay"] == TWICE


def test_rwkv7():
    def block(i, rho, tau):
        powers = {"r": 0.2, "g": 0.2, "w": 0.9, "a": 0.9, "k": 0.7, "v": 0.7}
        mixes = {f"att.x_{x}": 1 - D ** (power * tau) for x, power in powers.items()} | {"ffn.x_k": 1 - D ** (tau**4)}
        lin, s = PLACE - 0.5, (N % HEAD_SIZE - 7.5) / 7.5
        zigzag = s.sign() * s**2
        vectors = {"att.w0": -6 + 6 * PLACE ** (1 + rho**0.3) + 0.5 + 2.5 * zigzag}
        vectors |= {"att.a0": -0.19 + 0.3 * zigzag + 0.4 * lin, "att.k_k": 0.71 - 0.1 * lin}
        vectors |= {"att.k_a": 1.02, "att.r_k": -0.04}
        ranks = "wag"
        if i > 0:  # the first layer makes the values that the others mix in
            vectors["att.v0"] = 0.73 - 0.4 * lin
            ranks = "wavg"
        lora = {f"att.{x}1": 0.0 for x in ranks} | {f"att.{x}2": Orthogonal(0.1) for x in ranks}
        return mixes | vectors | lora | matrices(1, 0.1, 1, None, hidden=1) | norm_x(i)

    model = made(RWKV7, head_size=HEAD_SIZE)
    config = model.config
    assert (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank) == (32, 32, 32, 32)
    assert_recipe(model, Uniform(1e-4), block)
    rate = rates(model)
    assert rate["head.weight"] == rate["blocks.1.att.receptance.weight"] == MATRIX
    assert rate["blocks.1.att.w1"] == rate["blocks.1.att.r_k"] == rate["blocks.1.att.x_r"] == PLAIN
    assert rate["blocks.1.att.w0"] == TWICE
    ranks = RWKV7.Config.sized(65536, 12, 768)
    assert (ranks.decay_rank, ranks.iclr_rank, ranks.value_rank, ranks.gate_rank) == (64, 64, 32, 128)


@pytest.mark.parametrize("cls", [RWKV4, RWKV5, RWKV6, RWKV7])
def test_gains_of_other_shapes(cls):
    """A vocabulary smaller than the width does not shrink the head; ranks above the width widen the low-rank gain."""
    model = made(cls, vocab=40)
    check("head", model.head.weight, Orthogonal(0.5))
    if cls is RWKV4:
        check("emb", model.emb.weight, Orthogonal(1e-4 * WIDTH**0.5))
    if cls is RWKV7:
        for x in "wavg":
            up = getattr(made(cls, width=16, head_size=8).blocks[LAYERS - 1].att, f"{x}2")
            check(f"{x}2", up, Orthogonal(0.1 * 2**0.5))


@pytest.mark.parametrize("cls", [RWKV5, RWKV6, RWKV7])
def test_trained_state_starts_at_zero(cls):
    for block in made(cls, head_size=HEAD_SIZE, time_state=True).blocks:
        assert not block.att.time_state.any()


@pytest.mark.parametrize("cls", [RWKV4, RWKV5, RWKV6, RWKV7])
def test_one_layer_and_one_head(cls):
    model = cls(cls.Config.sized(50, 1, 64))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    decay = "w0" if cls is RWKV7 else "time_decay"  # rho = 0, as in the first of several layers
    assert torch.equal(getattr(model.blocks[0].att, decay), getattr(made(cls).blocks[0].att, decay))
    logits, _ = model(torch.arange(50)[None])
    assert logits.isfinite().all()
