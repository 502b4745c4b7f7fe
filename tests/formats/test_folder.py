"""The files of a folder: which of them are the model, and that its config.json counts whichever of them is given."""

from __future__ import annotations

import json

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file

import heronry

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 92, 65]])
SMALL = {"width": 32, "heads": 2, "ffn": 40, "rank": 3}  # heads of 16: an epsilon of 16e-5 in transformers' layouts
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint("7", **SMALL)


@pytest.fixture
def expected(weights, tmp_path):
    """The logits of the class of the official folders."""
    torch.save(weights, tmp_path / "plain.pth")
    return logits(heronry.load(tmp_path / "plain.pth", ln_x_eps=16e-5))


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0]


def official(weights, folder, **changes):
    """A folder in the official layout without its weights, and their names there."""
    folder.mkdir()
    config = {"model_type": "rwkv7", "head_dim": 16, "num_heads": 2, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return {("" if name == "head.weight" else "rwkv7.") + name: x for name, x in weights.items()}


def write_shards(folder, tensors):
    """Writes every other tensor into one of two files, and their index."""
    file_of = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: x for name, x in tensors.items() if file_of[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": file_of}))


def test_every_file_of_a_folder_is_the_folder(weights, expected, tmp_path):
    tensors = official(weights, tmp_path / "shards")
    write_shards(tmp_path / "shards", tensors)
    official(weights, tmp_path / "bin")
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    for path in ("shards", f"shards/{INDEX}", *(f"shards/{name}" for name in SHARDS), "bin", "bin/pytorch_model.bin"):
        model = heronry.load(tmp_path / path)
        assert model.config.ln_x_eps == 16e-5, path
        assert torch.equal(logits(model), expected), path


@pytest.mark.parametrize("config", [{"head_dim": None}, None])
def test_the_epsilon_without_a_head_size(config, weights, expected, tmp_path):
    """In config.json; or without a config.json, where the names show the layout."""
    tensors = official(weights, tmp_path / "hf", **(config or {}))
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    if config is None:
        (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    path = tmp_path / ("alone.safetensors" if config is None else "hf")
    assert torch.equal(logits(heronry.load(path)), expected)


def test_a_tensor_is_read_from_the_file_that_the_index_names(weights, expected, tmp_path):
    folder = tmp_path / "hf"
    tensors = official(weights, folder)
    write_shards(folder, tensors)
    both = {name: x * 2 for name, x in tensors.items()}
    file_of = json.loads((folder / INDEX).read_text())["weight_map"]
    save_file(both | {name: x for name, x in tensors.items() if file_of[name] == SHARDS[1]}, folder / SHARDS[1])
    assert torch.equal(logits(heronry.load(folder)), expected)
    moved = file_of | {"head.weight": next(name for name in SHARDS if name != file_of["head.weight"])}
    write_shards(folder, tensors)
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert refusal(folder) == f"head.weight is not in {moved['head.weight']}, where {INDEX} says it is"


def test_a_model_saved_over_shards_is_the_one_read(weights, random_checkpoint, tmp_path):
    folder = tmp_path / "hf"
    write_shards(folder, official(weights, folder))
    torch.save(random_checkpoint("7", seed=1, **SMALL), tmp_path / "new.pth")
    new = heronry.load(tmp_path / "new.pth")
    heronry.save(new, folder)
    assert torch.equal(logits(heronry.load(folder)), logits(new))


def test_biases_that_config_denies(weights, tmp_path):
    tensors = official(weights, tmp_path / "with", norm_bias=False)
    save_file(tensors, tmp_path / "with" / "model.safetensors")
    assert refusal(tmp_path / "with") == "config.json says norm_bias = False, but the layer norms have biases"
    plain = {name: x for name, x in tensors.items() if not name.endswith(".bias") or ".ln_x." in name}
    official(weights, tmp_path / "without", norm_bias=True)
    save_file(plain, tmp_path / "without" / "model.safetensors")
    assert refusal(tmp_path / "without") == "config.json says norm_bias = True, but the layer norms have no biases"


def test_a_folder_of_single_files_names_them(weights, tmp_path):
    for name in ("b.st", "a.pth", "notes.txt"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == "no config.json in the folder; give one of its files: a.pth, b.st"
