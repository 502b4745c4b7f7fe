"""What others make of the files that are written here, and what is made here of theirs."""

from __future__ import annotations

import json

import pytest
import torch

import heronry
from heronry import InputError
from heronry.convert import convert

TOKENS = torch.randint(101, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def read(path) -> torch.Tensor:
    return heronry.load(path, dtype="float32")(TOKENS)[0][0]


def test_transformers_reads_rwkv4(random_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.save(random_checkpoint("4", layers=3), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface", shard=100_000)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rescale_every": 0}))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.inference_mode():
        expected = theirs(TOKENS).logits[0]
    torch.testing.assert_close(read(tmp_path / "hf"), expected, rtol=0, atol=2e-5)


def test_what_transformers_saves(tmp_path):
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=101, hidden_size=64, attention_hidden_size=64, intermediate_size=120)
    config.num_hidden_layers, config.rescale_every = 3, 0
    theirs = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    with torch.inference_mode():
        expected = theirs(TOKENS).logits[0]
    torch.testing.assert_close(read(tmp_path / "hf"), expected, rtol=0, atol=2e-5)
    convert(tmp_path / "hf", tmp_path / "a.pth")
    torch.testing.assert_close(read(tmp_path / "a.pth"), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.2), ("float16", 0.03), ("q8_0", 0.3)]
)
@pytest.mark.parametrize("version", ["6", "7"])
def test_llama_cpp_reads_what_is_written(random_checkpoint, tmp_path, version, dtype, tolerance):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-llama does)")
    # states that forget, or the rounding of one product would grow from token to token
    weights = random_checkpoint(version, width=128, heads=2, rank=32, ffn=256)
    torch.save(weights, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.gguf", dtype=dtype)
    peer = llama_cpp.Llama(
        str(tmp_path / "a.gguf"), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=1
    )
    peer.eval(TOKENS[0].tolist())
    theirs = torch.from_numpy(peer.scores[:40])
    largest = theirs.abs().max().item()
    away = (read(tmp_path / "a.gguf") - theirs).abs().max().item()
    assert away <= tolerance * (1 if dtype == "float32" else largest), (away, largest)


def test_llama_cpp_tokenizes_as_we_do(random_checkpoint, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-llama does)")
    torch.save(random_checkpoint("7", width=64, heads=1, rank=32, ffn=64, vocab=65536, layers=1), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.gguf")
    peer = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    ours = heronry.text.tokenizers.load_tokenizer("world")
    for text in ("Hello, world!", "Über 3 Äpfel\n\n\tund 'so' \"weiter\"", "我爱北京天安门 🐦 a\\b\x00\x7f"):
        assert peer.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text)


def test_gguf_refuses_what_llama_cpp_computes_wrongly(random_checkpoint, tmp_path):
    torch.save(random_checkpoint("7", width=96, heads=3), tmp_path / "a.pth")
    with pytest.raises(InputError, match="heads of 64"):
        convert(tmp_path / "a.pth", tmp_path / "a.gguf")
