"""Vectors in place of token ids: in forward, in generate, and as the prompts that peft trains.

What they must give is told by a model with a longer vocabulary, in which the same vectors are rows of the embedding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from heronry import InputError
from heronry.checkpoint import assemble
from heronry.convert import convert
from heronry.models import Model

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from heronry.integrations.transformers import RwkvPreTrainedModel, register

register()
SIZES = {"width": 64, "heads": 2, "ffn": 96, "rank": 8, "vocab": 256}
TOKENS = torch.tensor([list(b"the rook"), list(b"has eggs")])
GREEDY = {"do_sample": False, "eos_token_id": None}
TOLD = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def weights(version, random_checkpoint) -> dict[str, Tensor]:
    return random_checkpoint(version, **SIZES)


@pytest.fixture
def folder(weights, tmp_path) -> Path:
    torch.save(weights, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    return tmp_path / "hf"


def longer(weights: dict[str, Tensor], vectors: Tensor) -> Model:
    """In float64, with the vectors [N, C] as the tokens 256 ... in the embedding."""
    more = {"emb.weight": vectors, "head.weight": torch.zeros_like(vectors)}
    return assemble({name: torch.cat([x, more[name]]) if name in more else x for name, x in weights.items()}).double()


@torch.inference_mode()
def by_hand(model: Model, ids: list[int], count: int) -> list[int]:
    """What it writes after these ids, greedily and read anew for every token."""
    said: list[int] = []
    for _ in range(count):
        said.append(int(model(torch.tensor([ids + said]))[0][0, -1, :256].argmax()))
    return said


def test_rows_of_the_embedding_are_its_tokens(folder):
    """In float32 without gradients too, where tokens are read by the C++ step."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    embeds = model.get_input_embeddings()(TOKENS).detach()
    with torch.inference_mode():
        expected = model(TOKENS, output_hidden_states=True)
        found = model(inputs_embeds=embeds, output_hidden_states=True)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5)
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(TOKENS).logits, rtol=0, atol=5e-5)
        state = model(inputs_embeds=embeds[:, :5]).state
        rest = model(inputs_embeds=embeds[:, 5:], state=state, logits_to_keep=1).logits
        torch.testing.assert_close(rest, expected.logits[:, -1:], rtol=0, atol=5e-5)
    assert not model.rwkv.emb._forward_hooks


def test_any_vectors(folder, weights):
    vectors = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    ids = [256, 257, *b"a rook", 258, 259, 260]
    embeds = torch.cat([model.get_input_embeddings().weight, vectors])[ids][None]
    with torch.inference_mode():
        expected = longer(weights, vectors)(torch.tensor([ids]))[0][..., :256]
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, rtol=0, atol=1e-9)
        # a number in the weights' dtype is made of it
        torch.testing.assert_close(model(inputs_embeds=embeds.float()).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(folder, side):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    embeds = model.get_input_embeddings()(TOKENS).detach()
    embeds[mask == 0] = torch.nan  # nobody looks at it
    with torch.inference_mode():
        found = model(inputs_embeds=embeds, attention_mask=mask).logits
        expected = model(TOKENS, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        alone = model(TOKENS[1:][mask[1:] == 1][None]).logits
    torch.testing.assert_close(found[1][mask[1] == 1], alone[0], rtol=0, atol=1e-9)


def test_gradients_reach_them(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    labels = TOKENS.masked_fill(mask == 0, -100)
    model(TOKENS, attention_mask=mask, labels=labels).loss.backward()
    expected = model.rwkv.emb.weight.grad
    model.zero_grad()
    embeds = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model.gradient_checkpointing_enable()
    model.train()
    model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
    assert model.rwkv.emb.weight.grad is None
    assert not embeds.grad[mask == 0].any()
    found = torch.zeros_like(expected).index_add(0, TOKENS.flatten(), embeds.grad.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_who_reads_at_the_same_time_reads_its_own(folder):
    """As another thread may: here from inside of the embedding's call."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    embeds = model.get_input_embeddings()(TOKENS).detach()
    expected = model(TOKENS.flip(0)).logits
    seen = []

    def meanwhile(module, given, output):
        if not seen:
            seen.append(None)
            seen[0] = model(TOKENS.flip(0)).logits

    model.rwkv.emb.register_forward_hook(meanwhile)
    model(inputs_embeds=embeds)
    assert torch.equal(seen[0], expected)


def test_generate(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    embed = model.get_input_embeddings()
    embeds = embed(TOKENS).detach()
    expected = model.generate(TOKENS, max_new_tokens=9, **GREEDY)[:, 8:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=9, **GREEDY), expected)
    uncached = model.generate(inputs_embeds=embeds, max_new_tokens=9, use_cache=False, **GREEDY)
    assert torch.equal(uncached, expected)
    both = model.generate(TOKENS, inputs_embeds=embeds, max_new_tokens=9, **GREEDY)
    assert torch.equal(both[:, 8:], expected)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    padded = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=9, **GREEDY)
    assert torch.equal(padded[0], expected[0])
    assert padded[1].tolist() == by_hand(model.rwkv, TOKENS[1, 3:].tolist(), 9)
    beams = model.generate(inputs_embeds=embeds, max_new_tokens=5, num_beams=3, **GREEDY)
    assert torch.equal(beams, model.generate(TOKENS, max_new_tokens=5, num_beams=3, **GREEDY)[:, 8:])


def test_prompt_tuning(folder, weights, tmp_path):
    """peft's: the loss falls, nothing but the prompt moves, and generate() reads the prompt once, at the beginning."""
    from peft import PeftModel, PromptTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    torch.manual_seed(0)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["prompt_encoder.default.embedding.weight"]
    prompt = trained["prompt_encoder.default.embedding.weight"]
    assert prompt.shape == (4, 64)
    before = prompt.detach().clone()
    optimizer = torch.optim.Adam([prompt], lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert (prompt - before).abs().min() > 0
    assert all(torch.equal(p, weights[name].double().reshape(p.shape)) for name, p in base.rwkv.named_parameters())
    assert all(p.grad is None for p in base.parameters())

    model.eval()
    oracle = longer(weights, prompt.detach())
    virtual = [256, 257, 258, 259]
    texts = [list(b"the rook"), list(b"eggs")]
    batch = torch.tensor([texts[0], [0] * 4 + texts[1]])
    mask = torch.tensor([[1] * 8, [0] * 4 + [1] * 4])
    with torch.inference_mode():
        found = model(input_ids=batch, attention_mask=mask).logits
        for i, text in enumerate(texts):
            expected = oracle(torch.tensor([virtual + text]))[0][0, :, :256]
            torch.testing.assert_close(found[i, -len(text) :], expected[-len(text) :], rtol=0, atol=1e-9)
    expected = [by_hand(oracle, virtual + text, 9) for text in texts]
    written = model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=9, **GREEDY, **TOLD)
    assert written.sequences[:, 8:].tolist() == expected
    for i, text in enumerate(texts):
        with torch.inference_mode():
            said = oracle(torch.tensor([virtual + text + expected[i]]))[0][0, -10:-1, :256]
            without = base(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(torch.stack(written.logits)[:, i], said.float(), rtol=0, atol=1e-6)
        assert (said[0] - without).abs().max() > 1e-4
    first = {"input_ids": batch[:1], "max_new_tokens": 9, **GREEDY}
    assert model.generate(**first)[0, 8:].tolist() == expected[0]
    assert model.generate(**first, use_cache=False)[0, 8:].tolist() == expected[0]
    beams = model.generate(**first, num_beams=2)
    assert torch.equal(beams, model.generate(**first, num_beams=2, use_cache=False))

    model.save_pretrained(tmp_path / "prompt")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    again = PeftModel.from_pretrained(again, tmp_path / "prompt", autocast_adapter_dtype=False)
    assert torch.equal(again.generate(**first), model.generate(**first))


@pytest.fixture
def goose(random_checkpoint, tmp_path) -> Path:
    torch.save(random_checkpoint("7", **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    return tmp_path / "hf"


def test_p_tuning_in_the_trainer(goose, tmp_path):
    """A prompt that a small network makes, trained by transformers."""
    from peft import PromptEncoderConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(goose)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    rows = [{"input_ids": list(text), "labels": list(text)} for text in (b"the rook", b"has eggs") for _ in range(8)]
    arguments = TrainingArguments(
        tmp_path / "run", per_device_train_batch_size=4, learning_rate=0.02, report_to=[], save_strategy="no",
        logging_steps=1, max_steps=12, seed=0, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())
    model.eval()
    cached = model.generate(input_ids=TOKENS, max_new_tokens=6, **GREEDY)
    assert torch.equal(cached, model.generate(input_ids=TOKENS, max_new_tokens=6, use_cache=False, **GREEDY))


def test_prefix_tuning_is_refused(goose):
    """It trains keys and values of attention, which are not here."""
    from peft import PrefixTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(goose)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InputError, match=r"RWKV has no past_key_values \(peft's prefix tuning is not supported\)"):
        model(input_ids=TOKENS, labels=TOKENS)
    with pytest.raises(InputError, match="RWKV has no past_key_values"):
        model.generate(input_ids=TOKENS, max_new_tokens=2)


def test_bad_input(goose, random_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(goose)
    embeds = model.get_input_embeddings()(TOKENS)
    with pytest.raises(InputError, match="give either input_ids or inputs_embeds"):
        model(TOKENS, inputs_embeds=embeds)
    with pytest.raises(InputError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(InputError, match=r"floating point numbers \[B, T, 64\], got float32 \[2, 8, 63\]"):
        model(inputs_embeds=embeds[..., 1:])
    with pytest.raises(InputError, match=r"got int64 \[2, 8\]"):
        model(inputs_embeds=TOKENS)
    with pytest.raises(InputError, match="row 1 of the batch is nothing but padding"):
        model(inputs_embeds=embeds, attention_mask=torch.tensor([[1] * 8, [0] * 8]))
    assert not model.rwkv.emb._forward_hooks
    with pytest.raises(InputError, match="RWKV has no cache"):
        model(TOKENS, cache=DynamicCache())
    deep = RwkvPreTrainedModel.from_heronry(assemble(random_checkpoint("7", **SIZES, deep=4)))
    with pytest.raises(InputError, match=r"RWKV-7a \(DeepEmbed\) has a matrix for each token id"):
        deep(inputs_embeds=embeds)
