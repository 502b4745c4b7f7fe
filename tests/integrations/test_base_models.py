"""AutoModel: every generation without its head, against the model that has one and against transformers' own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import heronry
from heronry import InputError
from heronry.convert import convert
from heronry.models.layers import PackedLinear

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers import RwkvConfig as TheirConfig
from transformers import RwkvModel as TheirModel

from heronry.integrations.transformers import RwkvModel, RwkvPreTrainedModel, register

register()
SIZES = {"width": 64, "heads": 2, "ffn": 96, "rank": 8, "vocab": 256}
TEXTS = ["Once upon a time", "The", "A little bird said that it was going"]


def written(random_checkpoint, version: str, folder: Path) -> Path:
    torch.save(random_checkpoint(version, **SIZES), folder / "a.pth")
    convert(folder / "a.pth", folder / "hf", to="huggingface")
    return folder / "hf"


@pytest.fixture
def folder(version, random_checkpoint, tmp_path) -> Path:
    return written(random_checkpoint, version, tmp_path)


@pytest.fixture
def dove(random_checkpoint, tmp_path) -> Path:
    return written(random_checkpoint, "4", tmp_path)


@torch.inference_mode()
def test_the_head_makes_logits_of_it(folder, version):
    body = AutoModel.from_pretrained(folder, dtype="float64")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="float64")
    assert type(body).__name__ == {"4": "Rwkv", "5": "Rwkv5", "6": "Rwkv6", "7": "RWKV7"}[version[0]] + "Model"
    assert not body.training
    tokens = torch.tensor([list(b"The rooks"), list(b"are black")])
    a, b = body(tokens, output_hidden_states=True), whole(tokens, output_hidden_states=True)
    assert a.last_hidden_state.shape == (2, 9, 64)
    torch.testing.assert_close(a.last_hidden_state @ whole.rwkv.head.weight.T, b.logits, rtol=0, atol=1e-9)
    assert len(a.hidden_states) == 3
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    rest = body(tokens[:, 4:], state=body(tokens[:, :4]).state).last_hidden_state
    torch.testing.assert_close(rest, a.last_hidden_state[:, 4:], rtol=0, atol=1e-9)
    assert body(tokens, use_cache=False).state is None
    assert torch.equal(body(tokens, return_dict=False)[0], a.last_hidden_state)
    with pytest.raises(InputError, match="this state belongs to another model"):
        whole(tokens, state=a.state)
    from_vectors = body(inputs_embeds=body.get_input_embeddings()(tokens)).last_hidden_state
    assert torch.equal(from_vectors, a.last_hidden_state)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_padded_batch_is_its_rows_alone(folder, side):
    body = AutoModel.from_pretrained(folder, dtype="float64")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, pad_token="\x00")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    together = body(**batch)
    for i, text in enumerate(TEXTS):
        alone = body(**tokenizer(text, return_tensors="pt"))
        places = batch.attention_mask[i].bool()
        torch.testing.assert_close(together.last_hidden_state[i][places], alone.last_hidden_state[0], rtol=0, atol=1e-9)
        # what is taken for a sentence's vector: the last place, be it padding
        torch.testing.assert_close(together.last_hidden_state[i, -1], alone.last_hidden_state[0, -1], rtol=0, atol=1e-9)
        torch.testing.assert_close(together.state[i].layers[1].wkv, alone.state.layers[1].wkv, rtol=0, atol=1e-9)


def test_saved_and_read_again(folder, tmp_path):
    body = AutoModel.from_pretrained(folder)
    original = load_file(folder / "model.safetensors")
    head = "lm_head.weight" if "lm_head.weight" in original else "head.weight"
    assert body.state_dict().keys() == original.keys() - {head}
    with torch.no_grad():
        body.rwkv.ln_out.bias += 1
    body.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        type(body).__name__.replace("RWKV7", "Rwkv7")  # as the official class is called
    ]
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert again.state_dict().keys() == body.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], x) for name, x in body.state_dict().items())
    with pytest.raises(InputError, match=r"saved: the tensors do not make a model; 1 missing: head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    # as transformers writes base models: without the name that they have in a model with a head
    bare = {re.sub(r"^(rwkv7?|model)\.", "", name): x.contiguous() for name, x in body.state_dict().items()}
    assert not bare.keys() & body.state_dict().keys()
    save_file(bare, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.tensor([list(b"The rooks")])
    with torch.inference_mode():
        found = AutoModel.from_pretrained(tmp_path / "saved")(tokens).last_hidden_state
        assert torch.equal(found, body(tokens).last_hidden_state)
    other = type(body)(body.config)
    assert str(other.load_state_dict(bare)) == "<All keys matched successfully>"
    assert all(torch.equal(other.state_dict()[name], x) for name, x in body.state_dict().items())


def test_transformers_own_reads_and_writes_the_same(dove, tmp_path):
    ours = AutoModel.from_pretrained(dove)
    ours.save_pretrained(tmp_path / "ours")
    config = TheirConfig.from_pretrained(dove, rescale_every=0)
    theirs = TheirModel.from_pretrained(tmp_path / "ours", config=config)
    with torch.no_grad():
        theirs.ln_out.bias += 1
    theirs.save_pretrained(tmp_path / "theirs")
    assert "embeddings.weight" in load_file(tmp_path / "theirs" / "model.safetensors")
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(tokens).last_hidden_state
        torch.testing.assert_close(ours(tokens).last_hidden_state + 1, expected, rtol=0, atol=1e-5)
        again = AutoModel.from_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(again(tokens).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_gradients(folder):
    """The same as through a head; with blocks computed again they are the same."""
    body, whole = (cls.from_pretrained(folder) for cls in (AutoModel, AutoModelForCausalLM))
    tokens = torch.tensor([list(b"The rooks"), list(b"are black")])
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))
    norm = whole.rwkv.ln_out
    (norm(whole(tokens, output_hidden_states=True).hidden_states[-1]) @ weight).sum().backward()
    body.gradient_checkpointing_enable()
    body.train()
    (body(tokens).last_hidden_state @ weight).sum().backward()
    expected = dict(whole.rwkv.named_parameters())
    for name, p in body.rwkv.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_of_a_model_that_is_there(dove):
    ours = heronry.load(dove)
    body = RwkvModel.from_heronry(ours)
    assert type(body) is RwkvModel
    assert body.rwkv.emb.weight is ours.emb.weight
    tokens = torch.tensor([list(b"The rooks")])
    with torch.inference_mode():
        last = body(tokens).last_hidden_state
        torch.testing.assert_close(ours(tokens)[0], last @ ours.head.weight.T, rtol=0, atol=2e-5)
    assert type(RwkvPreTrainedModel.from_heronry(ours)).__name__ == "RwkvForCausalLM"


def test_a_new_model_and_more_tokens(dove):
    body = AutoModel.from_config(AutoConfig.from_pretrained(dove))
    assert not body.rwkv.blocks[0].att.output.weight.any()  # as the recipe begins
    body.resize_token_embeddings(260)
    assert body(torch.tensor([[1, 259]])).last_hidden_state.shape == (1, 2, 64)


def test_features(dove):
    """transformers' pipeline over it."""
    tokenizer = AutoTokenizer.from_pretrained(dove)
    found = pipeline("feature-extraction", model=str(dove), tokenizer=tokenizer)("The rooks")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(dove)(**tokenizer("The rooks", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-6)


def test_packed_weights(dove):
    packed, exact = AutoModel.from_pretrained(dove, quantize="int8"), AutoModel.from_pretrained(dove)
    assert packed.rwkv.quantization == "int8"
    assert isinstance(packed.rwkv.blocks[0].att.key, PackedLinear)
    tokens = torch.tensor([list(b"the rook")])
    with torch.inference_mode():
        difference = packed(tokens).last_hidden_state - exact(tokens).last_hidden_state
    assert 0 < difference.abs().mean() < 0.05


def test_bad_input(dove):
    with pytest.raises(InputError, match="dtype int8 is not supported; choose one of float64"):
        AutoModel.from_pretrained(dove, dtype="int8")
    with pytest.raises(InputError, match="RWKV has no past_key_values"):
        AutoModel.from_pretrained(dove)(torch.ones(1, 2).long(), past_key_values=((torch.ones(1),),))
    save_file({"ln_out.weight": torch.ones(64)}, dove / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="hf: not an RWKV checkpoint"):
        AutoModel.from_pretrained(dove)
