"""The examples of Hugging Face's blog on RWKV (huggingface.co/blog/rwkv), call for call after register(), on a folder
like those of RWKV/rwkv-4-*: the texts are those that our own engine writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bpe import END, train_bpe
from tokenizers import normalizers

import heronry
from heronry.convert import convert

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers import RwkvConfig as TheirConfig
from transformers import RwkvForCausalLM as TheirModel

from heronry.integrations.transformers import RwkvForCausalLM, register

register()


@pytest.fixture
def model_id(random_checkpoint, tmp_path, monkeypatch) -> str:
    """The name of a repository, which is a folder here: RWKV-4 over a vocabulary in the manner of GPT-NeoX's."""
    monkeypatch.chdir(tmp_path)
    text = "### Instruction: What is a rook?\n### Response: A bird in a heronry."
    special = (END, "<|padding|>")
    words = train_bpe(Path("tokenizer.json"), text, size=320, special=special, normalizer=normalizers.NFC())
    torch.save(random_checkpoint("4", vocab=words.get_vocab_size(), width=64, ffn=96), "a.pth")
    convert("a.pth", "RWKV/rwkv-4-169m-pile", to="huggingface", tokenizer="tokenizer.json")
    config = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False}
    config |= {"bos_token": END, "eos_token": END, "unk_token": END}
    (tmp_path / "RWKV/rwkv-4-169m-pile/tokenizer_config.json").write_text(json.dumps(config))
    return "RWKV/rwkv-4-169m-pile"


def test_text_generation(model_id):
    model = AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)

    prompt = "\nIn a shocking finding, rooks were seen in Göttingen."

    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=40)
    text = tokenizer.decode(output[0].tolist())

    assert isinstance(model, RwkvForCausalLM)
    assert type(tokenizer).__name__ == "GPTNeoXTokenizer"
    assert output.shape == (1, inputs["input_ids"].shape[1] + 40)
    assert text == prompt + heronry.LLM(model_id).generate(prompt, 40, temperature=0).text
    theirs = TheirModel.from_pretrained(model_id, config=TheirConfig.from_pretrained(model_id, rescale_every=0))
    assert torch.equal(output, theirs.generate(inputs["input_ids"], max_new_tokens=40, do_sample=False))


def test_sampled(model_id):
    """The same random numbers, drawn by hand from what our own model says."""
    model = AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    prompt = "\nIn a shocking finding"
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(inputs["input_ids"], max_new_tokens=30, top_p=0.8, do_sample=True)
    assert output[0].tolist() == sampled(model_id, inputs["input_ids"], 30, temperature=1.0, top_p=0.8)


@torch.inference_mode()
def sampled(model_id: str, ids: torch.Tensor, count: int, temperature: float, top_p: float) -> list[int]:
    model, state = heronry.load(model_id), None
    torch.manual_seed(0)
    said, read = ids[0].tolist(), ids
    for _ in range(count):
        logits, state = model(read, state, last_only=True)
        most, order = (logits[0, -1] / temperature).topk(50)  # what transformers keeps unless it is told
        shares = torch.softmax(most, -1)
        kept = torch.zeros_like(logits[0, -1])
        nucleus = int((shares.cumsum(-1) < top_p).sum()) + 1
        kept[order[:nucleus]] = shares[:nucleus] / shares[:nucleus].sum()
        read = torch.multinomial(kept, 1)[None]
        said.append(int(read))
    return said


def test_pipeline(model_id):
    prompt = "\nIn a shocking finding"
    pipe = pipeline("text-generation", model=model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]

    greedy = pipe(prompt, max_new_tokens=20, do_sample=False)
    assert greedy == [{"generated_text": prompt + heronry.LLM(model_id).generate(prompt, 20, temperature=0).text}]
    torch.manual_seed(0)
    said = pipe(prompt, max_new_tokens=20, do_sample=True, temperature=0.9, top_p=0.8)
    assert said == [{"generated_text": tokenizer.decode(sampled(model_id, ids, 20, 0.9, 0.8))}]
    # a pipeline that is told nothing of it samples at 0.7 in transformers 5
    torch.manual_seed(0)
    plain = pipe(prompt, max_new_tokens=20)
    assert plain == [{"generated_text": tokenizer.decode(sampled(model_id, ids, 20, 0.7, 1.0))}]


def test_raven(model_id):
    model = AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)

    question = "Tell me about ravens"
    prompt = f"### Instruction: {question}\n### Response:"

    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=100)
    text = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)

    assert text == prompt + heronry.LLM(model_id).generate(prompt, 100, temperature=0).text
    assert len(text) > len(prompt) + 50
