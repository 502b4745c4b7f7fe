"""Our models in transformers' own hands: generate, pipelines, Trainer, peft, saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import heronry
from heronry import InputError
from heronry.adapters import adaptable_matrices
from heronry.convert import convert

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    RwkvForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from heronry.integrations.transformers import (  # noqa: E402
    RwkvPreTrainedModel,
    RwkvTokenizer,
    chat_template,
    register,
)
from heronry.text.chat_templates import TEMPLATES  # noqa: E402

register()
SIZES = {"width": 64, "heads": 2, "ffn": 96, "rank": 8, "vocab": 256}
TEXTS = ["Once upon a time", "The", "A little bird said that it was going"]


@pytest.fixture
def folder(version, random_checkpoint, tmp_path) -> Path:
    """Of every version, in the hub's layout, over bytes."""
    torch.save(random_checkpoint(version, **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    return tmp_path / "hf"


def loaded(folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or "\x00"
    return AutoModelForCausalLM.from_pretrained(folder, **options), tokenizer


def test_the_auto_classes(folder, version):
    model, tokenizer = loaded(folder)
    assert isinstance(model, RwkvPreTrainedModel)
    assert model.rwkv.name == f"rwkv{version[0]}"
    assert isinstance(tokenizer, RwkvTokenizer)
    ours = heronry.load(folder)
    tokens = torch.tensor([list(b"The rook")])
    with torch.inference_mode():
        output = model(tokens, output_hidden_states=True)
        head = model.rwkv.head(model.rwkv.ln_out(output.hidden_states[-1]))
        logits, _ = ours(tokens)
        again = model(tokens[:, 5:], state=model(tokens[:, :5]).state).logits
        torch.testing.assert_close(output.logits, logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(again, logits[:, 5:], rtol=0, atol=5e-5)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(head, logits, rtol=0, atol=2e-5)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_alone(folder, side):
    """Greedy texts and every logit, also those of the first pass."""
    model, tokenizer = loaded(folder, dtype="float64")
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = model(**batch).logits
    for i, text in enumerate(TEXTS):
        alone = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**alone).logits[0]
        places = batch.attention_mask[i].bool()
        torch.testing.assert_close(logits[i][places], expected, rtol=0, atol=1e-9)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options["eos_token_id"] = None
    together = model.generate(**batch, **options)
    for i, text in enumerate(TEXTS):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert torch.equal(alone.sequences[0, -12:], together.sequences[i, -12:])
        for a, b in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=1e-9)


def test_generate_is_what_our_engine_says(folder):
    model, tokenizer = loaded(folder)
    llm = heronry.LLM(heronry.load(folder), tokenizer="bytes")
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[
        0, inputs.input_ids.shape[1] :
    ]
    with torch.inference_mode():
        state, said = None, []
        logits, state = llm.model(inputs.input_ids, last_only=True)
        for _ in range(20):
            said.append(int(logits[0, -1].argmax()))
            logits, state = llm.model(torch.tensor([said[-1:]]), state)
    assert tokens.tolist() == said


def test_without_a_cache_the_same(folder):
    model, tokenizer = loaded(folder, dtype="float64")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, use_cache=False, **options))


def test_beams_and_sampling(folder):
    model, tokenizer = loaded(folder, dtype="float64")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 8, "eos_token_id": None}
    cached = model.generate(**batch, num_beams=3, do_sample=False, **options)
    whole = model.generate(**batch, num_beams=3, do_sample=False, use_cache=False, **options)
    assert torch.equal(cached, whole)
    single = [model.generate(**tokenizer(text, return_tensors="pt"), num_beams=3, **options)[0, -8:] for text in TEXTS]
    assert torch.equal(cached[:, -8:], torch.stack(single))
    several = model.generate(**batch, do_sample=True, num_return_sequences=2, top_p=0.9, temperature=0.7, **options)
    assert several.shape[0] == 6
    torch.manual_seed(3)
    first = model.generate(**batch, do_sample=True, **options)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(**batch, do_sample=True, **options))


def test_loss_and_gradients(folder):
    model, tokenizer = loaded(folder)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    loss = model(**batch, labels=labels).loss
    single, count = torch.zeros(()), 0
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        logits, _ = model.rwkv(tokens)
        single = single + torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
        count += tokens.shape[1] - 1
    torch.testing.assert_close(loss, single / count)
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.rwkv.gradient_checkpointing
    model.train()
    model(**batch, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-6)


def test_saved_and_read_again(folder, tmp_path):
    model, tokenizer = loaded(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, words = loaded(tmp_path / "saved")
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    assert heronry.load(tmp_path / "saved").config == heronry.load(folder).config
    assert words("The rook").input_ids == list(b"The rook")
    original = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == original.keys()
    other = type(model)(model.config)
    assert other.load_state_dict(original).missing_keys == []
    assert all(torch.equal(other.state_dict()[name].flatten(), x.flatten()) for name, x in original.items())


def test_a_new_model_begins_as_the_recipe_says(folder):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    assert model.rwkv.config.n_layer == 2
    output = model.rwkv.blocks[0].att.output.weight
    assert not output.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_new_model_in_16_bits(folder, dtype):
    """What the recipe gives in float32, rounded; PyTorch has no QR decomposition of 16 bits on a CPU."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config, dtype="float32").state_dict()
    for auto in (AutoModelForCausalLM, AutoModel):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype)
        assert model.dtype == getattr(torch, dtype)
        assert all(x.isfinite().all() for x in model.state_dict().values())
    torch.manual_seed(0)
    for name, x in AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict().items():
        if "receptance" in name or "r_proj" in name:
            torch.testing.assert_close(x.float(), exact[name], rtol=0.01, atol=1e-6)


def test_the_configuration_that_is_asked_for(folder, caplog):
    """By keys, as a configuration, or as the name of one; what fits of the weights is taken."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    changed = AutoConfig.from_pretrained(folder)
    changed.num_hidden_layers = 1
    tokens = torch.tensor([list(b"the rook")])
    for options in ({"num_hidden_layers": 1}, {"config": changed}):
        for auto in (AutoModelForCausalLM, type(whole)):
            caplog.clear()
            model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
            assert model.config.num_hidden_layers == len(model.rwkv.blocks) == 1
            assert model(tokens).logits.shape == (1, 8, 256)
            assert torch.equal(model.rwkv.blocks[0].att.key.weight, whole.rwkv.blocks[0].att.key.weight)
            assert any(name.startswith("blocks.1.") for name in info["unexpected_keys"])
            assert not info["missing_keys"]
            assert "tensors are not used: blocks.1." in caplog.text
    model, info = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=3, output_loading_info=True)
    assert {name.split(".")[1] for name in info["missing_keys"]} == {"2"}
    with pytest.raises(InputError, match=r"is \[256, 64\] instead of \[300, 64\]; see ignore_mismatched_sizes=True"):
        AutoModelForCausalLM.from_pretrained(folder, vocab_size=300)
    model = AutoModelForCausalLM.from_pretrained(folder, vocab_size=300, ignore_mismatched_sizes=True)
    assert model.rwkv.emb.weight.shape == (300, 64)
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False, output_hidden_states=True)
    output = model(tokens)
    assert (output.state, len(output.hidden_states)) == (None, 3)
    assert torch.equal(output.logits, whole(tokens).logits)
    body = AutoModel.from_pretrained(folder, num_hidden_layers=1)
    assert body(tokens).last_hidden_state.shape == (1, 8, 64)


def test_a_state_dict_in_place_of_the_file(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    doubled = {name: 2 * x for name, x in whole.state_dict().items()}
    for path, options in ((folder, {}), (None, {"config": whole.config})):
        model, info = type(whole).from_pretrained(path, state_dict=doubled, output_loading_info=True, **options)
        assert not any(info.values())
        assert all(torch.equal(x, doubled[name]) for name, x in model.state_dict().items())
    half = {name: x.bfloat16() for name, x in whole.state_dict().items()}
    assert type(whole).from_pretrained(folder, state_dict=half).dtype == torch.bfloat16
    assert type(whole).from_pretrained(folder, state_dict=half, dtype="float32").dtype == torch.float32


def test_a_subfolder(folder, random_checkpoint, version, tmp_path):
    torch.save(random_checkpoint(version, **SIZES, seed=1), tmp_path / "b.pth")
    convert(tmp_path / "b.pth", folder / "inner", to="huggingface")
    inner = AutoModelForCausalLM.from_pretrained(folder, subfolder="inner")
    assert inner.rwkv.fingerprint == heronry.load(tmp_path / "b.pth").fingerprint
    with pytest.raises(InputError, match="outer: no such file or folder"):
        type(inner).from_pretrained(folder, subfolder="outer")


def test_a_tied_head_that_is_none(folder, caplog):
    """By an option or in config.json: the head of the weights stays, as in transformers, and that is said."""
    said = ["heronry: tie_word_embeddings is set, but the weights have a head of their own, which is used"]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for options in ({}, {"state_dict": whole.state_dict()}):
        caplog.clear()
        tied = type(whole).from_pretrained(folder, tie_word_embeddings=True, **options)
        assert torch.equal(tied.rwkv.head.weight, whole.rwkv.head.weight)
        assert caplog.messages == said
    caplog.clear()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(heronry.load(folder).head.weight, whole.rwkv.head.weight)
    assert caplog.messages == said
    caplog.clear()
    without = {name: x for name, x in whole.state_dict().items() if "head" not in name}
    tied = type(whole).from_pretrained(folder, state_dict=without)
    assert torch.equal(tied.rwkv.head.weight, whole.rwkv.emb.weight)
    assert caplog.messages == ["the head is tied to the embedding; here it is a copy, trained and saved apart"]


def test_unknown_options_are_refused(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=True)
    for options in ({"variant": "fp16"}, {"num_layers_": 3}, {"key_mapping": {"a": "b"}}):
        with pytest.raises(InputError, match=f"from_pretrained has no option '{next(iter(options))}'"):
            type(whole).from_pretrained(folder, **options)
    with pytest.raises(InputError, match="gguf_file is not supported; give the path of the file itself"):
        type(whole).from_pretrained(folder, gguf_file="a.gguf")
    with pytest.raises(InputError, match="give a folder, or config= and state_dict="):
        type(whole).from_pretrained(None)


@pytest.mark.parametrize("scale", [1.5, 0.5])
def test_classifier_free_guidance(folder, scale):
    """With a cache and without it the same text, which two passes over whole texts give."""
    model, tokenizer = loaded(folder, dtype="float64")
    prompt = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    for negative in (None, tokenizer("It was", return_tensors="pt").input_ids):
        first = prompt[:, -1:] if negative is None else negative
        tokens, others = prompt, first
        for _ in range(8):
            with torch.inference_mode():
                log_p, log_q = (model(x).logits[:, -1].log_softmax(-1) for x in (tokens, others))
            best = (log_q + scale * (log_p - log_q)).argmax(-1, keepdim=True)
            tokens, others = torch.cat([tokens, best], 1), torch.cat([others, best], 1)
        for cache in (True, False):
            found = model.generate(
                prompt,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                guidance_scale=scale,
                negative_prompt_ids=negative,
                use_cache=cache,
            )
            assert torch.equal(found, tokens), (cache, negative)


@pytest.mark.slow
def test_trainer(folder, tmp_path):
    """Learns, stops, goes on from its checkpoint as if it had not stopped."""
    rows = [{"input_ids": list(f"the rook has {n} eggs".encode()), "labels": None} for n in range(10, 42)]
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]

    def run(name: str, **options):
        arguments = TrainingArguments(
            tmp_path / name, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], save_strategy="steps",
            save_steps=4, logging_steps=1, max_steps=8, seed=0, use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        return Trainer(AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=rows)

    whole = run("whole")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    second = run("second")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, x in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], x, rtol=0, atol=1e-6)


def test_peft(folder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([list(b"the rook")])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["key", "value", "receptance"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.inference_mode():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, expected)
    merged = again.merge_and_unload()
    with torch.inference_mode():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-4)
    assert again.generate(input_ids=tokens, max_new_tokens=3, eos_token_id=None).shape == (1, 11)


def test_what_peft_trains_with_its_defaults_is_merged(folder, tmp_path, command):
    """All large matrices are adapted, and the adapter fits the model that the folder was made from."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    adapted = {
        name.split(".lora_")[0].split("blocks.0.")[1]
        for name, _ in model.named_parameters()
        if "s.0." in name and "lora_" in name
    }
    matrices = {
        name.removeprefix("blocks.0.")
        for name in adaptable_matrices(model.base_model.model.rwkv)
        if "blocks.0." in name
    }
    assert adapted == matrices
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([list(b"the rook")])
    with torch.inference_mode():
        expected = model.eval()(tokens).logits
    for base in (folder, tmp_path / "a.pth"):
        code, _, err = command("merge", base, tmp_path / "adapter", tmp_path / f"merged-{base.stem}")
        assert code == 0, err
        with torch.inference_mode():
            found = heronry.load(tmp_path / f"merged-{base.stem}")(tokens)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_pipeline_with_the_bundled_model(tmp_path):
    convert(Path(heronry.__file__).parent / "bundled", tmp_path / "hf", to="huggingface")
    generator = pipeline("text-generation", model=str(tmp_path / "hf"), dtype="float32")
    text = generator("Once upon a time", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    ours = heronry.LLM(dtype="float32").generate("Once upon a time", 20, temperature=0).text
    assert text.startswith("Once upon a time, there was")
    assert ours.startswith(", there was")


def test_a_transposed_matrix_is_not_loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    name = next(name for name, x in state.items() if x.ndim == 2 and x.shape[0] != x.shape[1] and "key" in name)
    with pytest.raises(RuntimeError, match="size mismatch for"):
        model.load_state_dict(state | {name: state[name].T})


def test_more_tokens(folder):
    model, _ = loaded(folder)
    model.resize_token_embeddings(260)
    tokens = torch.tensor([[1, 259]])
    assert model(tokens).logits.shape == (1, 2, 260)
    assert model.config.vocab_size == 260


def test_packed_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantize="int8")
    assert model.rwkv.quantization == "int8"
    exact = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([list(b"the rook")])
    with torch.inference_mode():
        assert (model(tokens).logits - exact(tokens).logits).abs().mean() < 0.1


def test_bad_input(folder):
    model, _ = loaded(folder)
    with pytest.raises(InputError, match="row 1 of the batch is nothing but padding"):
        model(torch.ones(2, 3).long(), attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(InputError, match="quantize='int8'"):
        AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    for wrong in ("disk", "cuda:99", 99):
        with pytest.raises(InputError, match=rf"^device .*{wrong} cannot be used"):
            type(model).from_pretrained(folder, device_map=wrong)
    with pytest.raises(InputError, match="cannot be split over devices"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"rwkv.emb": "cpu", "rwkv.head": "cpu"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(InputError, match="says n_embd = 128, but the tensors say 64"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_world_as_a_tokenizer():
    words = RwkvTokenizer()
    ours = heronry.text.tokenizers.load_tokenizer("world")
    text = "Über 我爱 🐦 and \n\n so <s>"
    assert words(text).input_ids == ours.encode(text)
    assert words.decode(words(text).input_ids) == text
    assert words.decode(ours.encode("🐦")[:1]) == "\ufffd"
    assert words.decode([*ours.encode("end"), 0], skip_special_tokens=True) == "end"
    assert words("a<|endoftext|>b").input_ids == [98, 0, 99]
    assert words.eos_token_id == 0


@pytest.mark.parametrize("vocabulary", ["world", "bytes"])
def test_added_tokens(vocabulary, tmp_path):
    """They are read, and decode to themselves, whatever characters they are made of."""
    words = RwkvTokenizer(vocabulary)
    words.add_tokens(["<tool>", "我们说", "é!"])
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    text = "a <tool> 我们说 é! b é <|im_end|>我"
    ids = words(text).input_ids
    assert [words.vocab_size + i for i in range(4)] == [i for i in ids if i >= words.vocab_size]
    assert words.decode(ids) == text
    assert words.decode(ids, skip_special_tokens=True) == text.replace("<|im_end|>", "")
    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids
    assert again.decode(ids) == text


def test_special_tokens_and_padding(tmp_path):
    """Folders with a tokenizer.json name their end of text, by the name that its id has there."""
    convert(Path(heronry.__file__).parent / "bundled", tmp_path / "story", to="huggingface")
    words = AutoTokenizer.from_pretrained(tmp_path / "story")
    assert words.eos_token == words.bos_token == words.pad_token == "<|endoftext|>"
    batch = words(["One day", "One"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.attention_mask.sum(1).tolist()[0] > batch.attention_mask.sum(1).tolist()[1]
    tokenizer = json.loads((tmp_path / "story" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary |= {"</s>": vocabulary.pop(last), "zero": vocabulary.pop("<|endoftext|>")}
    tokenizer["model"]["merges"].pop()
    tokenizer["added_tokens"] = [tokenizer["added_tokens"][0] | {"id": vocabulary["</s>"], "content": "</s>"}]
    (tmp_path / "story" / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(tmp_path / "story", tmp_path / "other", to="huggingface")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").eos_token_id == vocabulary["</s>"]
    assert AutoConfig.from_pretrained(tmp_path / "other").eos_token_id == vocabulary["</s>"]


@pytest.mark.slow
def test_the_harness_own_way_to_models(tmp_path):
    """lm-evaluation-harness's `--model hf` over a folder, with its padding and its rolling likelihoods."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    convert(Path(heronry.__file__).parent / "bundled", tmp_path / "story", to="huggingface")
    model = HFLM(str(tmp_path / "story"), dtype="float32", device="cpu", batch_size=2)
    pairs = [Instance("loglikelihood", {}, ("One day", f" {word}"), i) for i, word in enumerate(("a", "they went"))]
    for value, _ in model.loglikelihood(pairs):
        assert -30 < value < 0
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(("One day.", "The end"))]
    for value in model.loglikelihood_rolling(texts):
        assert -60 < value < 0
    until = {"until": ["."], "max_gen_toks": 5}
    requests = [Instance("generate_until", {}, (text, until), i) for i, text in enumerate(("One", "Once upon"))]
    assert all(model.generate_until(requests))


PARTS = [*" \r\n\tab<>{}'\"\\:é", "\n\n", "User:", "<think>", "{user}"]
TURN = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@pytest.mark.parametrize("name", list(TEMPLATES))
@settings(max_examples=60)
@given(system=st.none() | TURN, turns=st.lists(st.tuples(TURN, TURN), max_size=3), last=TURN, about=st.none() | TURN)
@example(
    system="Be  kind.\n",
    turns=[(" Hi\r\n\n\nthere ", "<think>hm</think>\nHello")],
    last='it\'s "so"?',
    about=" 1\r\n\r\n2 ",
)
@example(system=None, turns=[("a" + "\n" * 600 + "b", "c\n\nUser: d\n\n\ne")], last="x", about=None)
def test_chat_templates(name, system, turns, last, about):
    """Byte for byte what a chat of the same messages reads, with or without an input."""
    template = TEMPLATES[name]
    assume(last.strip() and all(user.strip() for user, _ in turns) and (system is None or system.strip()))
    messages = [{"role": "system", "content": system}] * (system is not None)
    for user, answer in turns:
        messages += [{"role": "user", "content": user, "input": about}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": last} | ({} if about is None else {"input": about}))
    expected = template.extend(template.render_history(messages[:-1]), messages)
    words = RwkvTokenizer("bytes", chat_template=chat_template(name))
    assert words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    open_end = words.apply_chat_template(messages, tokenize=False)
    assert expected.startswith(open_end)
    assert open_end.endswith(template.clean(about if about and about.strip() else last))


def test_a_chat_template_gives_ids():
    words = RwkvTokenizer("bytes", chat_template=chat_template("g1-think"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>hm</think>\nHello"}]
    messages.append({"role": "user", "content": "More"})
    ids = words.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = "User: Hi\n\nAssistant: <think>hm</think>\nHello\n\nUser: More\n\nAssistant: <think"
    assert bytes(ids).decode() == expected


def test_a_template_that_does_not_exist():
    with pytest.raises(InputError, match="unknown chat template 'llama'"):
        chat_template("llama")


def test_registering_twice_and_importing_light():
    register()
    code = "import sys, heronry; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "False\n"


class TestWhatTheirOwnClassGetsWrong:
    """RWKV-4: transformers' RwkvForCausalLM and ours from the same folder."""

    @pytest.fixture
    def both(self, random_checkpoint, tmp_path):
        torch.save(random_checkpoint("4", **SIZES, layers=8), tmp_path / "a.pth")
        convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
        from transformers import RwkvConfig

        config = RwkvConfig.from_pretrained(tmp_path / "hf")
        theirs = RwkvForCausalLM.from_pretrained(tmp_path / "hf", config=config)
        return theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "hf"

    def test_equal_with_its_rescaling_off(self, both):
        theirs, ours, _ = both
        theirs.config.rescale_every = 0
        tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=2e-5)

    def test_evaluating_changes_its_weights(self, both):
        theirs, ours, _ = both
        tokens = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            before = theirs.state_dict()["rwkv.blocks.7.attention.output.weight"].clone()
            theirs.eval()(tokens)
            assert torch.equal(theirs.state_dict()["rwkv.blocks.7.attention.output.weight"], before / 2)
            before = ours.state_dict()["rwkv.blocks.7.attention.output.weight"].clone()
            ours.eval()(tokens)
            assert torch.equal(ours.state_dict()["rwkv.blocks.7.attention.output.weight"], before)

    def test_a_cached_step_of_a_batch(self, both):
        theirs, ours, _ = both
        theirs.config.rescale_every = 0
        tokens = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            for model, right in ((theirs, False), (ours, True)):
                whole = model(tokens).logits[:, -1]
                state = model(tokens[:, :-1], use_cache=True).state
                last = model(tokens[:, -1:], state=state, use_cache=True).logits[:, -1]
                assert torch.allclose(last, whole, atol=1e-4) == right

    def test_padding(self, both):
        theirs, ours, _ = both
        tokens = torch.tensor([[0, 0, 7, 8, 9]])
        mask = torch.tensor([[0, 0, 1, 1, 1]])
        with torch.inference_mode():
            for model, right in ((theirs, False), (ours, True)):
                padded = model(tokens, attention_mask=mask).logits[:, -1]
                assert torch.allclose(padded, model(tokens[:, 2:]).logits[:, -1], atol=1e-4) == right

    def test_a_new_one(self, both):
        theirs, ours, _ = both
        fresh = RwkvForCausalLM(theirs.config)
        assert fresh.rwkv.blocks[0].attention.output.weight.any()  # the recipe begins with zeros
        assert not AutoModelForCausalLM.from_config(ours.config).rwkv.blocks[0].att.output.weight.any()
