"""MiSS in rwkv_lightning's files, written here as its source does, and the files of RWKV-PEFT."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path

import pytest
import torch

from heronry import InputError
from heronry.adapters import Adapter, describe_adapter, merge_adapter, read_adapter, write_lightning, write_peft
from heronry.adapters.lora import LoRA
from heronry.adapters.miss import MiSS
from heronry.checkpoint import assemble

SIZES = {"width": 64, "heads": 2, "ffn": 96}
RANK = 5  # divides neither 64 nor 96
TARGETS = ["att.key", "ffn.key", "ffn.value"]


@pytest.fixture
def weights(random_checkpoint, tmp_path) -> dict[str, torch.Tensor]:
    """Those of an RWKV-7, also in base.pth."""
    weights = random_checkpoint("7", **SIZES)
    torch.save(weights, tmp_path / "base.pth")
    return weights


def blocks(weights, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """D [out, r] by the name of its matrix."""
    random = torch.Generator().manual_seed(0)
    names = [f"blocks.{i}.{target}" for i in range(2) for target in TARGETS]
    return {
        name: torch.randn(len(weights[f"{name}.weight"]), RANK, generator=random).mul(0.1).to(dtype) for name in names
    }


def manifest(weights, found, base: Path, alpha: float = 10, dtype: str = "bfloat16") -> dict:
    """What rwkv_lightning writes beside them: jsoncpp's compact JSON, with sorted keys."""
    targets = [
        {
            "name": f"{name}.weight.D",
            "layer": int(name.split(".")[1]),
            "target": name.split(".", 2)[2] + ".weight",
            "in_features": weights[f"{name}.weight"].shape[1],
            "shape": list(x.shape),
        }
        for name, x in found.items()
    ]
    about = {"format_version": 1, "kind": "inference_adapter", "method": "miss", "layout": "modulo_rank_zero_pad"}
    about |= {"dtype": dtype, "rank": RANK, "alpha": alpha, "scale": alpha / RANK, "targets": targets}
    about["base_fingerprint"] = hashlib.sha256(base.read_bytes()).hexdigest()
    text = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
    numbers = b"".join(x.view(torch.int16).numpy().tobytes() for x in found.values())
    about["content_version"] = hashlib.sha256(text + numbers).hexdigest()
    return about


def save_single(file: Path, tensors, about) -> None:
    """One .pth with the JSON inside."""
    with open(file, "wb") as opened:
        torch.save(tensors, opened)
    if about is not None:
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("archive/miss.json", json.dumps(about))


def by_hand(weights, found, scale: float) -> dict[str, torch.Tensor]:
    """Every weight after merging, by loops."""
    merged = {name: x.clone() for name, x in weights.items()}
    for name, d in found.items():
        w = merged[f"{name}.weight"]
        for i in range(w.shape[1]):
            w[:, i] += scale * d.float()[:, i % RANK]
    return merged


@pytest.mark.parametrize("kind", ["single", "folder", "beside", "training", "old training"])
def test_every_layout_merges_to_the_same(kind, weights, tmp_path, caplog):
    base = tmp_path / "base.pth"
    found = blocks(weights, torch.float32 if "training" in kind else torch.bfloat16)
    about = manifest(weights, {name: x.bfloat16() for name, x in found.items()}, base)
    tensors = {f"{name}.weight.D": x for name, x in found.items()}
    path = tmp_path / "adapter-final.pth"
    if kind == "single":
        save_single(path, tensors, about)
    elif kind in ("folder", "beside"):
        path = tmp_path / "adapter"
        path.mkdir()
        torch.save(tensors, path / "adapter.pth")
        (path / "adapter.json").write_text(json.dumps(about))
        path = path if kind == "folder" else path / "adapter.pth"
    else:
        tensors = {f"{name}.master": x for name, x in tensors.items()}
        for name, x in found.items():
            tensors |= {f"{name}.weight.D.{part}": torch.full_like(x, torch.nan) for part in ("grad", "m", "v")}
        tensors["initial_state"] = torch.zeros(3)
        path = tmp_path / "checkpoint-7"
        path.mkdir()
        save_single(path / "training.pth", tensors, None if "old" in kind else about | {"tensor_source": "master"})
        if "old" in kind:
            config = {"rank": RANK, "alpha": 10, "base_fingerprint": about["base_fingerprint"]}
            (path / "checkpoint.json").write_text(json.dumps({"kind": "miss_training_checkpoint", "config": config}))
    model = assemble(dict(weights))
    adapter = read_adapter(path, model, base_file=base)
    assert caplog.text == ""
    merge_adapter(model, adapter)
    expected = by_hand(weights, found, 2.0)
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.detach(), expected[name].reshape(x.shape), rtol=0, atol=1e-6)
    summary = describe_adapter(path)
    assert summary["layout"].startswith("rwkv_lightning")
    assert (summary["method"], summary["rank"], summary["alpha"], summary["matrices"]) == ("MiSS", RANK, 10, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_written_as_rwkv_lightning_does(dtype, weights, tmp_path):
    """The JSON and every number are equal to those of the file that was read; as peft it has the same product."""
    base, model = tmp_path / "base.pth", assemble(dict(weights))
    found = blocks(weights, dtype)
    about = manifest(weights, found, base, dtype=str(dtype).removeprefix("torch."))
    save_single(tmp_path / "a.pth", {f"{name}.weight.D": x for name, x in found.items()}, about)
    adapter = read_adapter(tmp_path / "a.pth", model)
    write_lightning(adapter, model, tmp_path / "b.pth", base, dtype)
    write_lightning(adapter, model, tmp_path / "c", base, dtype)
    for tensors in (
        torch.load(tmp_path / "b.pth", weights_only=True, mmap=True),
        torch.load(tmp_path / "c" / "adapter.pth", weights_only=True),
    ):
        assert list(tensors) == [f"{name}.weight.D" for name in found]
        assert all(torch.equal(x, found[name.removesuffix(".weight.D")]) for name, x in tensors.items())
    with zipfile.ZipFile(tmp_path / "b.pth") as archive:
        entry = archive.getinfo("archive/miss.json")
        assert entry.compress_type == zipfile.ZIP_STORED
        text = archive.read(entry).decode()
    assert text == (tmp_path / "c" / "adapter.json").read_text()
    again = json.loads(text)
    hashed = json.dumps(
        {k: x for k, x in again.items() if k != "content_version"}, sort_keys=True, separators=(",", ":")
    )
    numbers = b"".join(x.view(torch.int16).numpy().tobytes() for x in found.values())
    assert again["content_version"] == hashlib.sha256(hashed.encode() + numbers).hexdigest()
    assert {k: x for k, x in again.items() if k != "content_version"} == {
        k: x for k, x in about.items() if k != "content_version"
    }
    write_peft(adapter, model, tmp_path / "d")
    other = read_adapter(tmp_path / "d", model)
    for name, d in found.items():
        assert torch.equal(other.changes[name].block, 2 * d.T)  # the scale of 2 is exact


def test_from_training_to_rwkv_lightning_and_back(command, weights, tmp_path):
    """On the command line; a block of mini is spread over the outputs."""
    base, model = tmp_path / "base.pth", assemble(dict(weights))
    block = torch.randn(RANK, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    write_peft(Adapter({"blocks.1.att.key": MiSS(block)}), model, tmp_path / "ours")
    assert describe_adapter(tmp_path / "ours")["method"] == "MiSS, mini"
    final = tmp_path / "adapter-final.pth"
    assert command("convert", tmp_path / "ours", final, "--model", base) == (0, f"{final}\n", "")
    d = torch.load(final, weights_only=True)["blocks.1.att.key.weight.D"]
    assert torch.equal(d.float(), block.T.repeat(16, 1))
    assert command("convert", final, tmp_path / "back", "-m", base)[0] == 0
    assert torch.equal(read_adapter(tmp_path / "back", model).changes["blocks.1.att.key"].block, d.T)
    folder = tmp_path / "adapter"
    assert command("convert", tmp_path / "ours", folder, "-m", base, "--to", "rwkv_lightning")[0] == 0
    assert command("info", folder)[1].split("\n")[1].split()[-1] == "rwkv_lightning"
    assert "name its model with --model" in command("convert", final, tmp_path / "x")[2]
    assert (
        "written as peft or rwkv_lightning, not as gguf"
        in command("convert", final, tmp_path / "x.gguf", "--to", "gguf", "-m", base)[2]
    )
    assert "--model is for adapters" in command("convert", base, tmp_path / "x.st", "-m", base)[2]


def test_what_rwkv_lightning_cannot_read(weights, tmp_path):
    model, base = assemble(dict(weights)), tmp_path / "base.pth"

    def refused(*changes, at=base, dtype=torch.bfloat16) -> str:
        named = {f"blocks.{i}.att.key": change for i, change in enumerate(changes)}
        with pytest.raises(InputError) as error:
            write_lightning(Adapter(named), model, tmp_path / "x.pth", at, dtype)
        assert not (tmp_path / "x.pth").exists()
        return str(error.value)

    block = torch.ones(RANK, 64)
    reads = "rwkv_lightning reads MiSS of one rank only, without bat; merge this adapter instead"
    assert refused(LoRA(torch.ones(2, 64), torch.ones(64, 2), 1.0)) == reads
    assert refused(MiSS(torch.ones(8, 8, 8))) == reads
    assert refused(MiSS(block), MiSS(block[:3])) == reads
    assert refused(MiSS(block * 1e5)) == "the adapter of blocks.0.att.key has numbers that are too large for float16"
    assert refused(MiSS(block), at=tmp_path).endswith(
        "give the .pth that rwkv_lightning loads: the adapter names its sha256"
    )
    assert "in float16 and bfloat16, not in torch.float32" in refused(MiSS(block), dtype=torch.float32)


def test_damaged_and_foreign_files(weights, tmp_path, caplog):
    base, model, file = tmp_path / "base.pth", assemble(dict(weights)), tmp_path / "a.pth"
    found = blocks(weights)
    about = manifest(weights, found, base)
    tensors = {f"{name}.weight.D": x for name, x in found.items()}
    first = next(iter(tensors))

    def told(changed=None, missing=(), **settings) -> str:
        caplog.clear()
        kept = {name: x for name, x in {**tensors, **(changed or {})}.items() if name not in missing}
        save_single(file, kept, about | settings)
        with pytest.raises(InputError) as error:
            read_adapter(file, model)
        line = str(error.value)
        assert "\n" not in line
        return line.removeprefix(f"{file}: ")

    assert told(format_version=2) == "format_version in its JSON is 2; only 1 is supported"
    assert told(layout="blocks") == "layout in its JSON is 'blocks'; only 'modulo_rank_zero_pad' is supported"
    assert told(missing=(first,)) == f"{first} is missing"
    assert told({"blocks.1.att.value.weight.D": tensors[first].clone()}) == (
        "blocks.1.att.value.weight.D is not among the targets in its JSON"
    )
    assert told(scale=3.0) == "scale in its JSON is 3.0, but alpha / rank is 2.0"
    assert told(rank=0).startswith("rank in its JSON must be a whole number from 1 to 1024, got 0")
    assert told(alpha="2").startswith("alpha in its JSON must be a number, got '2'")
    assert told(targets=3).startswith("targets in its JSON must be a list of objects with names")
    assert told({first: tensors[first][:7].clone()}).startswith(f"{first} has shape [7, 5], but [64, 5] in its JSON")
    assert told({first: tensors[first] * torch.nan}) == "the adapter of blocks.0.att.key contains NaN or infinity"
    other = dict(found)
    other["blocks.0.att.key"] = found["blocks.0.ffn.key"]
    wide = manifest(weights, other, base)
    assert told({first: other["blocks.0.att.key"]}, targets=wide["targets"]) == (
        "an adapter of another model: blocks.0.att.key has a MiSS block [5, 96] for a matrix [64, 64]"
    )
    save_single(file, tensors, None)
    with pytest.raises(InputError, match=r"the JSON of the adapter is missing: miss\.json in its archive, or adapter"):
        read_adapter(file, model)
    caplog.set_level(logging.WARNING, "heronry")
    save_single(file, tensors | {first: tensors[first] + 1}, about)
    read_adapter(file, model, base_file=file)
    assert "not what its content_version says" in caplog.text
    assert "a.pth is not the file that the adapter was trained on (its sha256 differs)" in caplog.text


@pytest.mark.parametrize("part", ["disha", "bone"])
def test_rwkv_peft_and_openmose(part, weights, tmp_path):
    """Two axes as peft's default, three with a matrix for each column of blocks; other parameters beside."""
    random = torch.Generator().manual_seed(0)
    plain, bat = torch.randn(RANK, 64, generator=random), 0.1 * torch.randn(12, 8, 8, generator=random)
    norm = torch.rand(64, generator=random)
    tensors = {f"blocks.0.att.key.{part}": plain, f"blocks.1.ffn.value.{part}": bat, "blocks.1.ln1.weight": norm}
    torch.save(tensors, tmp_path / "a.pth")
    model = assemble(dict(weights))
    merge_adapter(model, read_adapter(tmp_path / "a.pth", model))
    key, value = (weights[f"blocks.{name}.weight"].clone() for name in ("0.att.key", "1.ffn.value"))
    for i in range(64):
        key[:, i] += plain[i % RANK]
    original = value.clone()
    for a in range(8):
        for b in range(12):
            at = slice(8 * a, 8 * a + 8), slice(8 * b, 8 * b + 8)
            value[at] += original[at] @ bat[b] + bat[b]
    torch.testing.assert_close(model.blocks[0].att.key.weight.detach(), key)
    torch.testing.assert_close(model.blocks[1].ffn.value.weight.detach(), value)
    assert torch.equal(model.blocks[1].ln1.weight, norm)
    assert describe_adapter(tmp_path / "a.pth")["layout"] == "RWKV-PEFT"
    torch.save({f"blocks.0.att.key.{part}": bat}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"blocks.0.att.key has a MiSS block \[12, 8, 8\] for a matrix \[64, 64\]$"):
        read_adapter(tmp_path / "b.pth", model)
    with pytest.raises(InputError, match="which peft has not; merge it instead"):
        write_peft(Adapter({"blocks.1.ffn.value": MiSS(bat, axis="in")}), model, tmp_path / "x")
