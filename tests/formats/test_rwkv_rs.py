"""rwkv-rs' layouts: the same bits as the .pth, and models whose embedding holds ln0 already."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file
from torch.nn import functional as F

import heronry
from heronry import InputError
from heronry.convert import convert
from heronry.models import RWKV7

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 92, 65]])
SIZES = {"width": 128, "heads": 2, "ffn": 200, "rank": 3}
CONFIG = {
    "model_type": "rwkv",
    "architecture_version": "rwkv7",
    "vocab_size": 101,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 200,
    "head_size": 64,
    "num_attention_heads": 2,
    "layer_norm_epsilon": 1e-5,
    "group_norm_epsilon": 64e-5,
    "decay_low_rank_dim": 3,
    "a_low_rank_dim": 4,
    "v_low_rank_dim": 5,
    "gate_low_rank_dim": 6,
    "tie_word_embeddings": False,
    "embedding_layer_norm_fused": False,
    "wkv_mode": "fp32io16",
}
B_WORDS = {
    "emb": "embed_tokens",
    "blocks": "layers",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "att": "linear_attn",
    "ffn": "mlp",
    "receptance": "r_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
    "ln_out": "norm",
}


def named(layout, weights):
    """BlinkDL's tensors under the names of one of rwkv-rs' layouts, by the table of its specification."""
    result = {}
    for name, x in weights.items():
        if layout != "a" and name.startswith("blocks.0.att.v") and name[-1] in "012":
            continue
        if layout == "b":
            parts = [B_WORDS.get(word, word) for word in name.split(".")]
            if ".att." in name:
                parts = [{"key": "k_proj", "value": "v_proj"}.get(word, word) for word in parts]
            key = "model." + ".".join(parts)
            key = key.replace("model.layers.0.ln0.", "model.embedding_norm.")
            result["lm_head.weight" if name == "head.weight" else key] = x.squeeze() if x.ndim == 3 else x
            continue
        if layout == "d" and name[-2:] in [f"{x}{i}" for x in "wavg" for i in (1, 2)]:
            name, x = f"{name}.weight", x.T.contiguous()
        if layout in "cd" and name == "emb.weight":
            name = "embeddings.weight"
        prefix = "rwkv7." if layout == "c" else "model."
        result["head.weight" if name == "head.weight" else prefix + name] = x
    return result


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint("7", **SIZES)


@pytest.fixture
def plain(weights, tmp_path):
    """The model of BlinkDL's file, and its logits."""
    torch.save(weights, tmp_path / "plain.pth")
    model = heronry.load(tmp_path / "plain.pth")
    with torch.no_grad():
        return model, model(TOKENS)[0]


def write(folder, tensors, **changes):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.parametrize("layout", "abcd")
def test_the_same_bits_as_blinkdls_file(layout, weights, plain, tmp_path, caplog):
    model, expected = plain
    tensors = named(layout, weights)
    kind = {"model_type": "rwkv7" if layout in "cd" else "rwkv"}
    folder = write(tmp_path / "folder", tensors, **kind)
    save_file(tensors, tmp_path / "alone.safetensors")
    for path in (folder, folder / "model.safetensors", tmp_path / "alone.safetensors"):
        again = heronry.load(path)
        assert again.config == model.config
        assert again.fingerprint == model.fingerprint
        assert torch.equal(logits(again), expected)
    tied = {name: x for name, x in tensors.items() if name not in ("head.weight", "lm_head.weight")}
    again = heronry.load(write(tmp_path / "tied", tied, tie_word_embeddings=True, **kind))
    assert torch.equal(again.head.weight, again.emb.weight)
    caplog.clear()
    assert torch.equal(
        logits(heronry.load(write(tmp_path / "both", tensors, tie_word_embeddings=True, **kind))), expected
    )
    assert "tie_word_embeddings is set, but the weights have a head of their own" in caplog.text


def folded_weights(weights):
    """The embedding with ln0 applied, as rwkv-rs' converter folds it, and everything else without ln0."""
    table = F.layer_norm(weights["emb.weight"], (128,), *(weights[f"blocks.0.ln0.{x}"] for x in ("weight", "bias")))
    return {name: x for name, x in weights.items() if ".ln0." not in name} | {"emb.weight": table}


@pytest.mark.parametrize("layout", "abcd")
def test_ln0_in_the_embedding(layout, weights, plain, tmp_path):
    _, expected = plain
    folded = named(layout, folded_weights(weights))
    if layout == "a":  # its class keeps ln0, and ignores it
        folded |= {f"model.blocks.0.ln0.{x}": weights[f"blocks.0.ln0.{x}"] for x in ("weight", "bias")}
    model = heronry.load(write(tmp_path / "folder", folded, embedding_layer_norm_fused=True))
    assert model.config.ln0_folded
    for native in (True, False):
        model.native_step_enabled = native
        assert (logits(model) - expected).abs().max() <= 2e-5
    if layout in "cd":
        save_file(folded, tmp_path / "alone.safetensors")
        assert heronry.load(tmp_path / "alone.safetensors").config == model.config


def test_a_folded_model_everywhere(weights, tmp_path):
    source = write(tmp_path / "source", named("b", folded_weights(weights)), embedding_layer_norm_fused=True)
    model = heronry.load(source)
    expected = logits(model)
    heronry.save(model, tmp_path / "saved")
    convert(source, tmp_path / "ours")
    convert(source, tmp_path / "fla", "fla")
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["norm_first"] is False
    for name in ("saved", "ours", "fla"):
        again = heronry.load(tmp_path / name)
        assert again.config.ln0_folded
        assert again.fingerprint == model.fingerprint
        assert torch.equal(logits(again), expected)
    for name in ("a.pth", "a.safetensors", "a.st", "a.gguf", "a.bin"):
        with pytest.raises(InputError, match="always applies ln0, which this model's embedding already holds"):
            convert(source, tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(InputError, match="the format huggingface always applies ln0"):
        convert(source, tmp_path / "official", "huggingface")
    unfolded = RWKV7(heronry.load(write(tmp_path / "b", named("b", weights))).config)
    assert unfolded.fingerprint[:16] != model.fingerprint[:16]
    model.train()
    model(TOKENS)[0].sum().backward()
    assert model.emb.weight.grad is not None
    model.init_weights()
    packed = heronry.load(
        write(tmp_path / "again", named("b", folded_weights(weights)), embedding_layer_norm_fused=True)
    )
    assert "blocks.0.ln0.weight" not in packed.state_dict()


def test_contradictions(weights, tmp_path):
    tensors = named("b", weights)

    number = count()

    def told(tensors=tensors, **changes):
        return refusal(write(tmp_path / str(next(number)), tensors, **changes))

    assert told(head_size=32) == "config.json says head_size = 32, but the tensors say 64"
    assert told(num_attention_heads=3) == "config.json says dim_att = 192, but the tensors say 128"
    assert told(num_hidden_layers=3) == "config.json says n_layer = 3, but the tensors say 2"
    assert told(v_low_rank_dim=9) == "config.json says value_rank = 9, but the tensors say 5"
    assert told(layer_norm_epsilon=1e-6) == (
        "config.json has layer norms with epsilon 1e-06; all RWKV models have 1e-5"
    )
    assert told(embedding_layer_norm_fused="yes") == (
        "config.json says embedding_layer_norm_fused = 'yes'; expected true or false"
    )
    without = {name: x for name, x in tensors.items() if "embedding_norm" not in name}
    assert told(tensors=without).startswith("the tensors do not make a model; 2 missing: blocks.0.ln0.weight")
    assert heronry.load(write(tmp_path / "eps", tensors, group_norm_epsilon=1e-4)).config.ln_x_eps == 1e-4
    saved = tmp_path / "saved"
    heronry.save(heronry.load(write(tmp_path / "b", tensors)), saved)
    for value, message in ((True, "2 unexpected: blocks.0.ln0."), (1, "ln0_folded must be true or false, got 1")):
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(config | {"ln0_folded": value}))
        assert message in refusal(saved)


def test_in_transformers(weights, tmp_path):
    """The Auto classes take its model_type, "rwkv", for RWKV-4."""
    transformers = pytest.importorskip("transformers")
    from heronry.integrations.transformers import register

    register()
    folder = write(tmp_path / "b", named("b", folded_weights(weights)), embedding_layer_norm_fused=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "RWKV7ForCausalLM"
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(heronry.load(folder)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(heronry.load(tmp_path / "saved")), logits(heronry.load(folder)))
