"""RWKV-7a: what holds of every model holds with DeepEmbed; test_against_pip.py has its logits."""

from __future__ import annotations

import pytest
import torch

import heronry
from heronry import InputError
from heronry.checkpoint import assemble
from heronry.convert import convert
from heronry.models import RWKV7, RWKV7Config

SMALL = {"width": 64, "heads": 2, "ffn": 96, "rank": 5, "deep": 4}
TOKENS = torch.randint(101, (1, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint("7", **SMALL)


@pytest.fixture
def model(weights):
    return assemble({name: x.double() for name, x in weights.items()})


@torch.no_grad()
def test_whole_halves_steps_and_packed(model):
    whole, end = model(TOKENS)
    first, state = model(TOKENS[:, :14])
    second, last = model(TOKENS[:, 14:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-10)
    steps, state = [], None
    for t in range(TOKENS.shape[1]):
        logits, state = model(TOKENS[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-10)
    packed, _ = model(TOKENS, cu_seqlens=[0, 5, 33])
    apart = torch.cat([model(TOKENS[:, :5])[0], model(TOKENS[:, 5:])[0]], 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-10)
    for a, b in zip(end.layers[-1], last.layers[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_every_parameter_moves_the_loss(model):
    model.train()
    logits, _ = model(TOKENS)
    torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    s1, eps = model.blocks[1].ffn.s1, 1e-6
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            s1[3, 2] += sign * eps
            logits, _ = model(TOKENS)
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:]).item())
            s1[3, 2] -= sign * eps
    assert s1.grad[3, 2].item() == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)


@torch.no_grad()
def test_files(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth")
    assert model.config.deep_rank == 4
    heronry.save(model, tmp_path / "saved")
    again = heronry.load(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert torch.equal(heronry.load(tmp_path / "a.safetensors")(TOKENS)[0], model(TOKENS)[0])
    for name, to in (("hf", "huggingface"), ("a.gguf", "gguf"), ("a.bin", "ggml"), ("a.st", "webrwkv")):
        with pytest.raises(InputError, match=r"does not support RWKV-7a \(DeepEmbed\)"):
            convert(tmp_path / "a.pth", tmp_path / name, to=to)
    packed = heronry.load(tmp_path / "a.pth", quantize="int8")
    assert 0 < (packed(TOKENS)[0] - model(TOKENS)[0]).abs().mean() < 0.1


def test_is_not_taken_for_a_plain_one(random_checkpoint):
    plain = assemble(random_checkpoint("7", **(SMALL | {"deep": 0})))
    assert plain.native_step_enabled
    deep = assemble(random_checkpoint("7", **SMALL))
    assert not deep.native_step_enabled
    assert plain.fingerprint[:16] != deep.fingerprint[:16]


def test_a_new_one_begins_as_a_plain_one():
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config(101, 2, 64, 64, 96, 32, 8, 8, 8, 8, deep_rank=4))
    model.init_weights()
    torch.manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.value.weight.normal_()
        plain = RWKV7(RWKV7Config(101, 2, 64, 64, 96, 32, 8, 8, 8, 8))
        plain.load_state_dict({k: x for k, x in model.state_dict().items() if ".ffn.s" not in k})
        torch.testing.assert_close(model(TOKENS)[0], plain(TOKENS)[0], rtol=0, atol=1e-5)
    groups = model.param_groups(1.0, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
