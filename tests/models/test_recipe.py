"""Initialisation and parameter groups are those of the training recipes."""

from __future__ import annotations

import math

import pytest
import torch

from rookery.models import RWKV4, RWKV5, RWKV6, RWKV7, Model

VOCAB, LAYERS, WIDTH = 100, 3, 64
LAST = LAYERS - 1  # rho = 1, tau = 1/3; layer 0 has rho = 0, tau = 1


def made(cls: type[Model], **options) -> Model:
    torch.manual_seed(0)
    model = cls(cls.Config.sized(VOCAB, LAYERS, WIDTH, **options)).requires_grad_(False)
    for p in model.parameters():
        p.fill_(float("nan"))  # whatever the recipe forgets stays visible
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    return model


def assert_orthogonal(weight: torch.Tensor, gain: float) -> None:
    small = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    torch.testing.assert_close(small @ small.mT, gain**2 * torch.eye(len(small)), rtol=1e-4, atol=1e-5 * gain**2)


def rates(model: Model) -> dict[str, tuple[float, float]]:
    """Parameter -> (factor of the learning rate, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.param_groups(lr=1.0, weight_decay=0.1)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


MATRIX, PLAIN, TWICE, THRICE = (1.0, 0.1), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0)


def test_rwkv4():
    model = made(RWKV4)
    first, last = model.blocks[0], model.blocks[LAST]
    channel = 10
    d = channel / WIDTH
    assert first.att.time_mix_k[0, 0, channel] == pytest.approx(d)
    assert last.att.time_mix_v[0, 0, channel] == pytest.approx(d ** (1 / 3) + 0.3)
    assert last.att.time_mix_r[0, 0, channel] == pytest.approx(d ** (1 / 6))
    assert last.ffn.time_mix_r[0, 0, channel] == pytest.approx(d ** (1 / 3))
    assert first.att.time_decay[channel] == pytest.approx(-5 + 8 * (channel / 63) ** 0.7)
    assert last.att.time_decay[channel] == pytest.approx(-5 + 8 * (channel / 63) ** 2)
    expected = [math.log(0.3) + x for x in (0, 0.5, -0.5, 0)]
    assert first.att.time_first[:4].tolist() == pytest.approx(expected)
    for zero in (last.att.key, last.att.receptance, last.att.output, last.ffn.receptance, last.ffn.value):
        assert not zero.weight.any()
    assert_orthogonal(last.att.value.weight, 1.0)
    assert_orthogonal(last.ffn.key.weight, 2.0)
    assert_orthogonal(model.head.weight, 0.5 * (VOCAB / WIDTH) ** 0.5)
    assert_orthogonal(model.emb.weight, 1e-4 * VOCAB**0.5)
    rate = rates(model)
    assert rate["emb.weight"] == rate["head.weight"] == rate["blocks.1.ffn.key.weight"] == MATRIX
    assert rate["blocks.1.att.time_mix_k"] == rate["blocks.1.ln1.weight"] == PLAIN
    assert rate["blocks.1.att.time_decay"] == TWICE
    assert rate["blocks.1.att.time_first"] == THRICE


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
def test_rwkv5(version):
    model = made(RWKV5, head_size=16, version=version)
    assert model.config.dim_ffn == (256 if version == "5.0" else 224)
    first, last = model.blocks[0], model.blocks[LAST]
    assert last.att.time_mix_v[0, 0, 10] == pytest.approx((10 / WIDTH) ** (1 / 3) + 0.3)
    assert first.att.ln_x.weight[0] == pytest.approx((1 / 3) ** 0.7)
    if version == "5.2":
        assert last.att.time_decay[2, 3] == pytest.approx(-6 + 5 * (35 / 63) ** 2)
        assert last.att.time_faaaa[2, 3] == pytest.approx(1 - 35 / 63 - 0.1)
        assert first.att.time_faaaa[2, 4] == pytest.approx(0, abs=1e-7)
    else:
        assert last.att.time_decay.tolist() == pytest.approx([-6 + 5 * (h / 3) ** 2 for h in range(4)])
    if version == "5.0":
        assert (last.att.time_first == -3).all()
    if version == "5.1":
        assert last.att.time_faaaa.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-7)
    assert_orthogonal(last.att.key.weight, 0.1 if version == "5.2" else 1.0)
    assert_orthogonal(last.att.receptance.weight, 1.0)
    if version != "5.0":
        assert last.att.time_mix_g[0, 0, 10] == pytest.approx((10 / WIDTH) ** (1 / 6))
        assert_orthogonal(last.att.gate.weight, 0.1 if version == "5.2" else 1.0)
    assert not last.att.output.weight.any()
    assert not last.ffn.value.weight.any()
    assert 0.9e-4 < model.emb.weight.abs().max() <= 1e-4
    rate = rates(model)
    assert rate["head.weight"] == rate["blocks.1.att.output.weight"] == MATRIX
    assert rate["blocks.1.att.ln_x.weight"] == PLAIN
    assert rate["blocks.1.att.time_decay"] == TWICE
    if version == "5.0":
        assert rate["blocks.1.att.time_first"] == THRICE
    else:
        assert rate["blocks.1.att.time_faaaa"] == PLAIN


def test_rwkv6():
    model = made(RWKV6, head_size=16)
    assert (model.config.dim_ffn, model.config.mix_rank, model.config.decay_rank) == (224, 32, 64)
    first, last = model.blocks[0], model.blocks[LAST]
    d = 10 / WIDTH
    assert first.att.time_maa_w[0, 0, 10] == pytest.approx(1 - d)
    assert last.att.time_maa_v[0, 0, 10] == pytest.approx(1 - (d ** (1 / 3) + 0.3), abs=1e-6)
    assert last.att.time_maa_g[0, 0, 10] == pytest.approx(1 - d ** (1 / 6), abs=1e-6)
    assert last.ffn.time_maa_r[0, 0, 10] == pytest.approx(1 - d ** (1 / 27), abs=1e-6)
    assert last.att.time_decay[0, 0, 35] == pytest.approx(-6 + 5 * (35 / 63) ** 2)
    assert last.att.time_faaaa[2, 3] == pytest.approx(1 - 35 / 63 - 0.1)
    assert not last.att.time_maa_w1.any()
    assert not last.att.time_decay_w1.any()
    assert 0.009 < last.att.time_maa_w2.abs().max() <= 0.01
    assert 0.009 < last.att.time_decay_w2.abs().max() <= 0.01
    for weight, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
        assert_orthogonal(getattr(last.att, weight).weight, gain)
    assert_orthogonal(last.ffn.key.weight, 1.0)
    rate = rates(model)
    assert rate["emb.weight"] == rate["blocks.1.att.gate.weight"] == MATRIX
    assert rate["blocks.1.att.time_maa_w1"] == rate["blocks.1.att.time_decay_w2"] == PLAIN
    assert rate["blocks.1.att.time_faaaa"] == PLAIN
    assert rate["blocks.1.att.time_decay"] == TWICE


def test_rwkv7():
    model = made(RWKV7, head_size=16)
    config = model.config
    assert (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank) == (32, 32, 32, 32)
    first, last = model.blocks[0], model.blocks[LAST]
    d, lin = 10 / WIDTH, 10 / 63 - 0.5
    s = (10 - 7.5) / 7.5
    zigzag = s * abs(s)
    assert first.att.x_r[0, 0, 10] == pytest.approx(1 - d**0.2)
    assert last.att.x_a[0, 0, 10] == pytest.approx(1 - d**0.3)
    assert last.att.x_v[0, 0, 10] == pytest.approx(1 - d ** (0.7 / 3))
    assert last.ffn.x_k[0, 0, 10] == pytest.approx(1 - d ** (1 / 81), abs=1e-6)
    assert first.att.w0[0, 0, 10] == pytest.approx(-6 + 6 * (10 / 63) + 0.5 + 2.5 * zigzag)
    assert last.att.w0[0, 0, 10] == pytest.approx(-6 + 6 * (10 / 63) ** 2 + 0.5 + 2.5 * zigzag)
    assert last.att.a0[0, 0, 10] == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * lin)
    assert last.att.v0[0, 0, 10] == pytest.approx(0.73 - 0.4 * lin)
    assert last.att.k_k[0, 0, 10] == pytest.approx(0.71 - 0.1 * lin)
    assert (last.att.k_a == torch.tensor(1.02)).all()
    assert (last.att.r_k == torch.tensor(-0.04)).all()
    assert not last.att.g1.any()
    assert_orthogonal(last.att.g2, 0.1)
    assert_orthogonal(last.att.key.weight, 0.1)
    assert_orthogonal(model.head.weight, 0.5 * (VOCAB / WIDTH) ** 0.5)
    assert not hasattr(first.att, "v1")
    rate = rates(model)
    assert rate["head.weight"] == rate["blocks.1.att.receptance.weight"] == MATRIX
    assert rate["blocks.1.att.w1"] == rate["blocks.1.att.r_k"] == rate["blocks.1.att.x_r"] == PLAIN
    assert rate["blocks.1.att.w0"] == TWICE
    ranks = RWKV7.Config.sized(65536, 12, 768)
    assert (ranks.decay_rank, ranks.iclr_rank, ranks.value_rank, ranks.gate_rank) == (64, 64, 32, 128)


@pytest.mark.parametrize("cls", [RWKV4, RWKV5, RWKV6, RWKV7])
def test_one_layer_and_one_head(cls):
    model = cls(cls.Config.sized(50, 1, 64))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    logits, _ = model(torch.arange(50)[None])
    assert logits.isfinite().all()
