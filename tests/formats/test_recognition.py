"""Which file is this: layouts that are read and said, relatives and foreign files that are named in one line."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file

import heronry
from heronry import formats
from heronry.convert import convert
from heronry.formats.reader import DESCRIPTIONS

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 92, 65]])
SMALL = {"width": 32, "heads": 2, "ffn": 40, "rank": 3}


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint("7", **SMALL)


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0]


WRAPPED = {
    "lightning": lambda w: {
        "state_dict": {f"model.{name}": x for name, x in w.items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.1.0",
        "callbacks": {},
        "lr_schedulers": [],
    },
    "deepspeed": lambda w: {
        "module": {f"_forward_module.{name}": x for name, x in w.items()},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: x.shape for name, x in w.items()}],
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.12.6",
    },
    "both": lambda w: {"model": {"state_dict": w}, "optimizer": {"state": {}}, "step": 7},
    "accelerate": lambda w: {f"module._orig_mod.{name}": x for name, x in w.items()},
}


@pytest.mark.parametrize("trainer", WRAPPED)
def test_checkpoints_of_trainers(trainer, weights, tmp_path):
    torch.save(weights, tmp_path / "plain.pth")
    torch.save(WRAPPED[trainer](weights), tmp_path / "wrapped.pth")
    expected = heronry.load(tmp_path / "plain.pth")
    model = heronry.load(tmp_path / "wrapped")  # a name without its .pth
    assert torch.equal(logits(model), logits(expected))
    assert model.fingerprint == expected.fingerprint


def test_code_beside_the_weights_is_not_run(weights, tmp_path):
    settings = {"state_dict": weights, "hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(settings, tmp_path / "a.ckpt")
    assert refusal(tmp_path / "a.ckpt") == (
        "would run argparse.Namespace; refused, because a checkpoint holds tensors and no code (save its state_dict())"
    )


def test_a_folder_of_deepspeed(tmp_path):
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert refusal(tmp_path) == (
        "no config.json in the folder: a checkpoint of DeepSpeed's, whose script zero_to_fp32.py, inside, writes the "
        "weights as one file"
    )


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"SQLite format 3\0" + bytes(84), "a database, such as rwkv_lightning keeps of its sessions"),
        (b"\xa5\x67context\xf6\x64info\xa2\x67version\x62V7", "a prefab of web-rwkv or Ai00"),
        (b"\xbf\x64info\xbf\x67version\x62V7", "a prefab of web-rwkv or Ai00"),
        (b'{"shape": [2048, 66, 24, 1], "data": [0.1, 0.2', "a state as Ai00 answers it in JSON"),
        (b"\xa4\x64name\x61a\x62id\x61b\x67default\xf4\x64data\xa2", "a state prefab of Ai00's"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS, not the file itself; "),
        (b"\n<!DOCTYPE html>\n<html>", "a web page, not a model; download the file itself"),
        (b"\xa5something else", "not a .pth, .safetensors, GGUF or rwkv.cpp file"),
    ],
)
def test_files_of_servers_are_named(head, message, tmp_path):
    (tmp_path / "a.prefab").write_bytes(head)
    assert refusal(tmp_path / "a.prefab").startswith(message)


def test_what_is_only_written_is_named(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    assert (
        refusal(tmp_path / "a.onnx")
        == "an ONNX graph, which is written, not read; give the model that it was made from"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv7qwen2", "architectures": ["RWKV7Qwen2ForCausalLM"]}, "the folder holds QRWKV7 (RADLADS)"),
        ({"architectures": ["RWKV6Qwen2ForCausalLM"]}, "the folder holds QRWKV6, a converted Qwen2"),
        ({"model_type": "rwkv_hybrid", "architectures": ["RwkvHybridForCausalLM"]}, "the folder holds ARWKV"),
        ({"architectures": ["RwkvHybridForCausalLM"]}, "the folder holds ARWKV"),
        ({"model_type": "rwkv7", "rwkv_architecture": "hxa079"}, "the folder holds HRWKV (hxa079)"),
        ({"model_type": "hrwkv", "rwkv_architecture": "hxa07A"}, "the folder holds HRWKV (hxa07A)"),
        ({"rwkv_architecture": "cxa076"}, "the folder holds cxa076, RWKV-7 with a Qwen channel mix"),
        ({"model_type": "any2rwkv_qwen3"}, "the folder holds an Any2RWKV conversion"),
        (
            {"model_type": "rwkv9", "architectures": ["RWKV9ForCausalLM"]},
            "the folder holds a relative of RWKV (model_type 'rwkv9') that heronry does not run",
        ),
        (
            {"model_type": "pigeon", "architectures": ["PigeonRWKVForCausalLM"]},
            "the folder holds a relative of RWKV (model_type 'pigeon') that heronry does not run",
        ),
        (
            {"architectures": ["SomeRwkvModel"]},
            "the folder holds a relative of RWKV (architectures ['SomeRwkvModel']) that heronry does not run",
        ),
        ({"model_type": "llama"}, "config.json has the model_type 'llama'; supported are rwkv,"),
        (
            {"model_type": "rwkv7", "quantization_config": {"quant_method": "compressed-tensors"}},
            "the weights are quantized (compressed-tensors); use the original model",
        ),
        (
            {"model_type": "rwkv7", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "the weights are quantized (bitsandbytes)",
        ),
        ({"model_type": "rwkv7", "quantization_config": "w8a8"}, "the weights are quantized (quantization_config)"),
        ({"model_type": "rwkv7", "rwkv7_w4_info": {"bits": 4}}, "the weights are quantized for sglang"),
        ({"model_type": ["rwkv7"], "architectures": 3}, "config.json has the model_type ['rwkv7']; expected a name"),
    ],
)
def test_folders_of_relatives_are_named(config, message, weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(tmp_path).startswith(message)


def test_files_of_relatives_are_named(weights, tmp_path):
    path = tmp_path / "a.pth"

    def told(contents):
        torch.save(contents, path)
        return refusal(path)

    x = torch.ones(3)
    rwkv_x = {f"rwkv.{name}": x for name, x in weights.items()} | {"moba.0.q_proj.weight": x}
    assert told(rwkv_x).startswith("this checkpoint is RWKV-X, RWKV-7 with layers of sparse attention (moba)")
    assert told(weights | {"_strategy": "cpu fp32", "_version": 0.7, "_rescale_layer": 0}) == (
        "converted by the rwkv package for one strategy; use the original"
    )
    qwen = {f"model.layers.0.self_attn.{name}": x for name in ("q_proj.weight", "w0", "k_k")}
    assert told(qwen | {"model.embed_tokens.weight": x}).startswith("this checkpoint is QRWKV7 (RADLADS)")
    draft = {"rwkv7.embeddings.weight": x, "rwkv7.blocks.0.attention.receptance.weight": x}
    assert told(draft).startswith("a draft of RWKV-7 for transformers with .attention. in its names")
    assert told(weights | {"s_emb.0": x}).startswith("this checkpoint is an RWKV-7a or 7b with merged tables")
    assert told({f"blocks.{i}.att.time_state": torch.ones(2, 3, 3) for i in range(2)}) == (
        "a tuned initial state without its model; give the model, and this to `heronry generate --state`"
    )
    adapter = {"base_model.model.blocks.0.att.key.lora_A.weight": x, "blocks.0.ln1.weight": x}
    assert told(adapter) == (
        "this checkpoint is an adapter without its model; give the model, and this with --adapter, or to "
        "`heronry merge`"
    )


FLA6 = {
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn.r_proj.linear": "att.receptance",
    "attn.k_proj.linear": "att.key",
    "attn.v_proj.linear": "att.value",
    "attn.g_proj.linear": "att.gate",
    "attn.o_proj": "att.output",
    "attn.g_norm": "att.ln_x",
    "ffn.key.linear": "ffn.key",
    "ffn.receptance.linear": "ffn.receptance",
    "ffn.value": "ffn.value",
}


def fla_rwkv6(w, layers):
    """BlinkDL's RWKV-6 as flash-linear-attention's conversion arranges it."""
    result = {"model.embeddings.weight": w["emb.weight"], "lm_head.weight": w["head.weight"]}
    for x in ("weight", "bias"):
        result[f"model.norm.{x}"] = w[f"ln_out.{x}"]
        result[f"model.layers.0.pre_norm.{x}"] = w[f"blocks.0.ln0.{x}"]
    for i in range(layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        for key, value in FLA6.items():
            for x in ("weight", "bias"):
                if f"{ours}{value}.{x}" in w:
                    result[f"{theirs}{key}.{x}"] = w[f"{ours}{value}.{x}"]
        att = f"{ours}att.time_"
        rank = w[f"{att}maa_w2"].shape[1]
        down = dict(zip("wkvrg", w[f"{att}maa_w1"].view(-1, 5, rank).unbind(1), strict=True))
        up = dict(zip("wkvrg", w[f"{att}maa_w2"], strict=True))
        result |= {
            f"{theirs}attn.x_proj.0.mu": w[f"{att}maa_x"].flatten(),
            f"{theirs}attn.x_proj.0.linear.weight": torch.cat([down[x] for x in "rwkvg"], 1).T.contiguous(),
            f"{theirs}attn.x_proj.2.weight": torch.cat([up[x] for x in "rwkvg"], 0).T.contiguous(),
            f"{theirs}attn.x_bias": torch.stack([w[f"{att}maa_{x}"].flatten() for x in "rwkvg"]),
            f"{theirs}attn.w_proj.linear.lora.0.weight": w[f"{att}decay_w1"].T.contiguous(),
            f"{theirs}attn.w_proj.linear.lora.2.weight": w[f"{att}decay_w2"].T.contiguous(),
            f"{theirs}attn.w_proj.linear.lora.2.bias": w[f"{att}decay"].flatten(),
            f"{theirs}attn.bonus": w[f"{att}faaaa"],
            f"{theirs}ffn.key.mu": w[f"{ours}ffn.time_maa_k"].flatten(),
            f"{theirs}ffn.receptance.mu": w[f"{ours}ffn.time_maa_r"].flatten(),
        }
    return result


def test_rwkv6_of_flash_linear_attention(random_checkpoint, tmp_path):
    weights = random_checkpoint("6", **SMALL)
    torch.save(weights, tmp_path / "plain.pth")
    expected = heronry.load(tmp_path / "plain.pth", ln_x_eps=1e-5)
    config = {"model_type": "rwkv6", "architectures": ["RWKV6ForCausalLM"], "vocab_size": 101, "hidden_size": 32}
    config |= {"num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 40, "expand_k": 1.0, "expand_v": 1.0}
    config |= {"proj_low_rank_dim": 3, "gate_low_rank_dim": 6, "norm_eps": 1e-5, "hidden_act": "sqrelu", "attn": None}
    tensors = fla_rwkv6(weights, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    model = heronry.load(tmp_path)
    assert model.config == expected.config
    assert torch.equal(logits(model), logits(expected))
    assert formats.read(tmp_path).description == "RWKV-6 in flash-linear-attention's layout"
    save_file(tensors, tmp_path / "alone.safetensors")
    assert heronry.load(tmp_path / "alone.safetensors").config == expected.config
    for change, message in (
        ({"expand_k": 0.5}, "config.json says expand_k = 0.5; supported is only 1"),
        ({"num_heads": 4}, "config.json says head_size = 8, but the tensors say 16"),
        ({"attn": {"layers": [1]}}, "config.json says attn = {'layers': [1]}; supported is only None"),
        ({"proj_low_rank_dim": 4}, "config.json says mix_rank = 4, but the tensors say 3"),
    ):
        file.write_text(json.dumps(config | change))
        assert refusal(tmp_path) == message


def test_every_format_says_what_it_is(random_checkpoint, tmp_path):
    weights = random_checkpoint("7", vocab=256, **SMALL)
    torch.save(weights, tmp_path / "a.pth")
    said = {}
    for target, to in (("a.pth", None), ("b.safetensors", None), ("c", None), ("d", "fla"), ("e.bin", None)):
        if target != "a.pth":
            convert(tmp_path / "a.pth", tmp_path / target, to)
        said[target] = formats.read(tmp_path / target).description
    assert said == {
        "a.pth": DESCRIPTIONS["blinkdl"],
        "b.safetensors": DESCRIPTIONS["safetensors"],
        "c": DESCRIPTIONS["heronry"],
        "d": DESCRIPTIONS["fla"],
        "e.bin": DESCRIPTIONS["ggml"],
    }
