"""What a GGUF holds besides the weights, and what is wrong in one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from bpe import train_bpe
from conversions import refusal

import heronry
from heronry import LLM, InputError, formats
from heronry.convert import convert


def test_q8_0_is_near(tmp_path):
    bundled = Path(heronry.__file__).parent / "bundled"
    done = convert(bundled, tmp_path / "a.gguf", dtype="q8_0")
    assert 0 < done.difference < 0.02 * done.largest
    assert done.bytes < 0.6 * (bundled / "model.safetensors").stat().st_size
    model = heronry.load(tmp_path / "a.gguf")
    assert model.emb.weight.dtype == torch.float32


def test_a_gguf_holds_its_tokenizer(weights, tmp_path):
    tokenizer = train_bpe(tmp_path / "tokenizer.json", "she had her hat on her hand and his hat in her head")
    size = tokenizer.get_vocab_size()
    torch.save(weights("7", vocab=size), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "elsewhere" / "a.gguf")
    llm = LLM(tmp_path / "elsewhere" / "a.gguf")
    assert llm.tokenizer.encode("her hat") == tokenizer.encode("her hat").ids
    convert(tmp_path / "elsewhere" / "a.gguf", tmp_path / "again")
    assert LLM(tmp_path / "again").tokenizer.encode("her hat") == tokenizer.encode("her hat").ids


@pytest.mark.slow
def test_a_gguf_says_how_to_chat(weights, tmp_path):
    """As llama.cpp's own converter: its template for World, in which two newlines end a turn."""
    import gguf

    torch.save(weights("7", vocab=65536), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert fields["tokenizer.chat_template"] == "rwkv-world"
    assert fields["tokenizer.ggml.eot_token_id"] == 261
    assert fields["tokenizer.ggml.tokens"][261] == r"\n\n"
    assert fields["tokenizer.ggml.eos_token_id"] == 0


def test_gguf_metadata_of_wrong_types(weights, tmp_path, monkeypatch):
    import gguf

    torch.save(weights("7"), tmp_path / "a.pth")

    def told(method: str, *arguments) -> str:
        write = gguf.GGUFWriter.write_header_to_file

        def add_more(self, *rest):
            self.kv_data[0].pop(arguments[0], None)
            getattr(self, method)(*arguments)
            write(self, *rest)

        monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", add_more)
        message = refusal(tmp_path / "a.pth", tmp_path / "a.gguf")
        monkeypatch.undo()
        return message

    assert "rwkv7.block_count = 'two'; expected a number" in told("add_string", "rwkv7.block_count", "two")
    assert "rwkv7.wkv.head_size = [64]; expected a number" in told("add_array", "rwkv7.wkv.head_size", [64])
    assert "rwkv7.embedding_length = 1.5; expected a number" in told("add_float32", "rwkv7.embedding_length", 1.5)
    key = "rwkv7.attention.layer_norm_epsilon"
    assert f"{key} = 'small'; expected a number" in told("add_string", key, "small")
    assert "have epsilon nan" in told("add_float32", key, float("nan"))
    assert "a tensor of the shape [128] is in the place" in told("add_uint32", "rwkv7.wkv.head_size", 7)
    for notes in ("[1]", "{", "3"):
        assert f"heronry.notes = '{notes}'; expected a JSON object" in told("add_string", "heronry.notes", notes)
    assert "heronry.notes = 5; expected a JSON object" in told("add_uint32", "heronry.notes", 5)
    assert "huggingface.json = 5; expected a text" in told("add_uint32", "tokenizer.huggingface.json", 5)
    assert "the note opening_tokens is 'a'" in told("add_string", "heronry.notes", '{"opening_tokens": "a"}')
    assert "a GGUF file of the architecture 5" in told("add_uint32", "general.architecture", 5)
    assert "the file holds QRWKV6, a converted Qwen2" in told("add_string", "general.architecture", "rwkv6qwen2")
    assert "one of 3 parts of a GGUF file; join them first" in told("add_uint16", "split.count", 3)


def test_layers_that_a_gguf_divides(weights, tmp_path, monkeypatch):
    """Of RWKV-6, as its metadata say; of RWKV-7 llama.cpp divides none."""
    import gguf

    torch.save(weights("6"), tmp_path / "6.pth")
    convert(tmp_path / "6.pth", tmp_path / "6.gguf")
    whole, key = (tmp_path / "6.gguf").read_bytes(), b"rwkv6.rescale_every_n_layers"
    zero, one, less = (struct.pack("<Ii", *x) for x in ((4, 0), (4, 1), (5, -1)))  # the type, the value
    (tmp_path / "halved.gguf").write_bytes(whole.replace(key + zero, key + one))
    plain, halved = (formats.read(tmp_path / name).tensors for name in ("6.gguf", "halved.gguf"))
    for name in plain:
        times = int(name.split(".")[1]) if name.endswith((".att.output.weight", ".ffn.value.weight")) else 0
        assert torch.equal(halved[name].read(), plain[name].read() * 2**times), name
    (tmp_path / "less.gguf").write_bytes(whole.replace(key + zero, key + less))
    with pytest.raises(InputError, match=r"rwkv6\.rescale_every_n_layers = -1; expected 0 or more"):
        formats.read(tmp_path / "less.gguf")
    odd = whole.replace(key + zero, key + one).replace(b"blk.1.time_mix_output", b"blk.x.time_mix_output")
    (tmp_path / "odd.gguf").write_bytes(odd)
    assert "unexpected: blk.x.time_mix_output.weight" in refusal(tmp_path / "odd.gguf", tmp_path / "a.pth")
    torch.save(weights("7"), tmp_path / "7.pth")
    write = gguf.GGUFWriter.write_header_to_file

    def add_more(self, *rest):
        self.add_uint32("rwkv7.rescale_every_n_layers", 1)
        write(self, *rest)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", add_more)
    convert(tmp_path / "7.pth", tmp_path / "7.gguf")  # which compares the logits
