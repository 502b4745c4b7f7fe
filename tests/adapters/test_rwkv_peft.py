"""Adapters in RWKV-PEFT's files: merged as its merge.py does, by hand here."""

from __future__ import annotations

import pytest
import torch

import heronry
from heronry import InputError
from heronry.adapters import merge_adapter, read_adapter
from heronry.checkpoint import assemble
from heronry.cli.app import app

SMALL = {"width": 32, "heads": 2, "ffn": 40, "rank": 3}
NAMES = ("att.key", "att.receptance", "ffn.value")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapter(weights, kind: str = "lora", seed: int = 0) -> dict[str, torch.Tensor]:
    """A and B of rank 5 for some matrices of both layers."""
    tensors = {}
    for i in range(2):
        for name in NAMES:
            rows, columns = weights[f"blocks.{i}.{name}.weight"].shape
            tensors[f"blocks.{i}.{name}.{kind}_A"] = normal(5, columns, seed=seed + 10 * i)
            tensors[f"blocks.{i}.{name}.{kind}_B"] = normal(rows, 5, seed=seed + 10 * i + 1)
    return tensors


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_lora_and_pissa(version, random_checkpoint, tmp_path):
    weights = random_checkpoint(version, **SMALL)
    trained = adapter(weights) | {"blocks.1.ln1.weight": normal(32, seed=3)}
    torch.save(trained, tmp_path / "lora.pth")
    initial = adapter(weights, "init_lora", seed=5)
    torch.save(initial, tmp_path / "init.pth")
    lora, pissa = assemble(dict(weights)), assemble(dict(weights))
    before = lora.fingerprint
    merge(lora, tmp_path / "lora.pth", alpha=20)
    merge(pissa, tmp_path / "lora.pth", pissa_init=tmp_path / "init.pth")
    assert lora.fingerprint != before
    for name, x in weights.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" not in trained:
            expected = {"lora": trained.get(name, x), "pissa": trained.get(name, x)}
        else:
            change = trained[f"{stem}.lora_B"] @ trained[f"{stem}.lora_A"]
            start = initial[f"{stem}.init_lora_B"] @ initial[f"{stem}.init_lora_A"]
            expected = {"lora": x + 20 / 5 * change, "pissa": x - start + change}
        for model, key in ((lora, "lora"), (pissa, "pissa")):
            found = dict(model.named_parameters())
            if name in found:
                torch.testing.assert_close(found[name].detach(), expected[key].reshape(found[name].shape))


def merge(model, file, **options) -> None:
    merge_adapter(model, read_adapter(file, model, **options))


def test_on_the_command_line(random_checkpoint, tmp_path):
    weights = random_checkpoint("7", **SMALL)
    torch.save(weights, tmp_path / "a.pth")
    torch.save(adapter(weights), tmp_path / "lora.pth")
    arguments = ["merge", str(tmp_path / "a.pth"), str(tmp_path / "lora.pth"), str(tmp_path / "out")]
    app([*arguments, "--alpha", "10"], standalone_mode=False)
    by_hand = assemble(dict(weights))
    merge(by_hand, tmp_path / "lora.pth", alpha=10)
    assert heronry.load(tmp_path / "out").fingerprint == by_hand.fingerprint


def test_bad_input(random_checkpoint, tmp_path):
    weights = random_checkpoint("7", **SMALL)
    trained = adapter(weights)
    model = assemble(dict(weights))
    before = {name: p.clone() for name, p in model.named_parameters()}

    def refusal(tensors, **options) -> str:
        torch.save(tensors, tmp_path / "lora.pth")
        with pytest.raises(InputError) as caught:
            merge(model, tmp_path / "lora.pth", **options)
        return str(caught.value)

    assert "give either alpha=" in refusal(trained)
    for part, other in ("AB", "BA"):
        half = {name: x for name, x in trained.items() if name != f"blocks.1.ffn.value.lora_{part}"}
        assert refusal(half, alpha=1).endswith(f": blocks.1.ffn.value.lora_{part} is missing"), other
    both = trained | {"blocks.0.att.key.weight": torch.ones(32, 32)}
    assert refusal(both, alpha=1).endswith("holds blocks.0.att.key.weight and also blocks.0.att.key.lora_A")
    more = adapter(weights, "init_lora") | {"blocks.0.att.value.init_lora_A": torch.ones(5, 32)}
    torch.save(more, tmp_path / "init.pth")
    assert "init.pth: blocks.0.att.value is only there" in refusal(trained, pissa_init=tmp_path / "init.pth")
    assert "not an adapter of peft, rwkv_lightning or RWKV-PEFT" in refusal(
        {"blocks.0.ln1.weight": torch.ones(32)}, alpha=1
    )
    assert "blocks.0.att.key.lora_B is missing" in refusal({"blocks.0.att.key.lora_A": torch.ones(5, 32)}, alpha=1)
    assert "an adapter of another model: it changes blocks.9.att.key" in refusal(
        {"blocks.9.att.key.lora_A": torch.ones(5, 32), "blocks.9.att.key.lora_B": torch.ones(32, 5)}, alpha=1
    )
    assert "for a matrix [32, 32]" in refusal(trained | {"blocks.0.att.key.lora_A": torch.ones(5, 31)}, alpha=1)
    assert "unexpected tensor blocks.0.att.w0" in refusal(trained | {"blocks.0.att.w0": torch.ones(31)}, alpha=1)
    turned = {"blocks.0.ffn.key.weight": weights["blocks.0.ffn.key.weight"].T}
    assert "unexpected tensor blocks.0.ffn.key.weight [32, 40]" in refusal(trained | turned, alpha=1)
    assert "contains NaN or infinity after merging" in refusal(trained, alpha=1e300)
    assert "MiSS has neither" in refusal({"blocks.0.att.key.disha": torch.ones(5, 32)}, alpha=1)
    assert "init_lora_A is missing" in refusal(trained, pissa_init=tmp_path / "lora.pth")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_overflows_the_weights_is_refused(random_checkpoint, tmp_path):
    """Finite in float32, in which it is computed, but not in float16."""
    weights = random_checkpoint("7", **SMALL)
    torch.save(adapter(weights), tmp_path / "lora.pth")
    model = assemble(dict(weights), dtype=torch.float16)
    before, fingerprint = {name: p.clone() for name, p in model.named_parameters()}, model.fingerprint
    with pytest.raises(InputError, match=r"blocks\.0\..*\.weight contains NaN or infinity after merging$"):
        merge(model, tmp_path / "lora.pth", alpha=1e8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.fingerprint == fingerprint
