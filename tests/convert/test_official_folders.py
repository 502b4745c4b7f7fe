"""RWKV-7 in the official repositories' layout, written here by the names and fields of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe import train_bpe
from official_template import OFFICIAL
from safetensors.torch import load_file, save_file
from torch import Tensor

import heronry
from heronry.convert import convert
from heronry.data.token_file import TokenFile
from heronry.errors import InputError
from heronry.text.chat_templates import TEMPLATES
from heronry.text.jinja_templates import chat_template
from heronry.text.tokenizers import WorldTokenizer
from heronry.text.world_files import world_json
from heronry.train.build import build_model
from heronry.train.config import read_config

TEXT = torch.tensor([[5, 17, 100, 3, 3, 99, 0, 42]])
RANKS = {"decay": 16, "a": 24, "v": 8, "gate": 40}


@pytest.fixture
def weights(random_checkpoint) -> Callable[..., dict[str, Tensor]]:
    def made(**options: Any) -> dict[str, Tensor]:
        sizes: dict[str, Any] = {"width": 128, "heads": 2, "ffn": 192, "layers": 3} | options
        return {name: x.bfloat16() for name, x in random_checkpoint("7", **sizes).items()}

    return made


def official(tensors: dict[str, Tensor], folder: Path, **changes: Any) -> Path:
    """Writes what the repositories hold, for a checkpoint of BlinkDL's."""
    vocab, width = tensors["emb.weight"].shape
    heads, size = tensors["blocks.0.att.r_k"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    ranks = {
        f"{theirs}_low_rank_dim": tensors[f"blocks.1.att.{x}1"].shape[1]
        for x, theirs in zip("wavg", RANKS, strict=True)
    }
    config = {
        "architectures": ["Rwkv7ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_rwkv7.Rwkv7ForCausalLM"},
        "model_type": "rwkv7",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "head_dim": size,
        "num_heads": heads,
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        **ranks,
        "norm_eps": 1e-5,
        "norm_bias": True,
        "wkv_state_dtype": "float32",
        "wkv_implementation": "eager",
        "use_cache": True,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        **changes,
    }
    renamed = {("" if name == "head.weight" else "rwkv7.") + name: x for name, x in tensors.items()}
    for name in ("v0", "v1", "v2"):
        renamed[f"rwkv7.blocks.0.att.{name}"] = torch.zeros_like(tensors[f"blocks.1.att.{name}"])
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: heronry.Model) -> Tensor:
    with torch.inference_mode():
        return model(TEXT)[0]


def test_the_same_model(weights, tmp_path):
    tensors = weights()
    torch.save(tensors, tmp_path / "a.pth")
    folder = official(tensors, tmp_path / "hf")
    expected = heronry.load(tmp_path / "a.pth", dtype="float32")
    for path in (folder, folder / "model.safetensors"):
        model = heronry.load(path, dtype="float32")
        assert torch.equal(logits(model), logits(expected))
        assert model.fingerprint == expected.fingerprint
        assert model.config == expected.config
    (folder / "config.json").unlink()  # the weights alone
    (folder / "model.safetensors").rename(tmp_path / "b.safetensors")
    assert torch.equal(logits(heronry.load(tmp_path / "b.safetensors", dtype="float32")), logits(expected))


def test_written_and_back(weights, tmp_path):
    """The names, shapes, dtypes and numbers of a folder survive, the layout is told from the names."""
    folder = official(weights(), tmp_path / "hf")
    convert(folder, tmp_path / "a.pth")
    for to in ("huggingface", "fla"):
        convert(tmp_path / "a.pth", tmp_path / to, to=to, shard=100_000)
        convert(tmp_path / to, tmp_path / f"{to}-back", to="huggingface")
        back, original = (load_file(path / "model.safetensors") for path in (tmp_path / f"{to}-back", folder))
        assert back.keys() == original.keys()
        assert all(torch.equal(back[name], original[name]) for name in original)
        assert all(
            back[name].dtype == original[name].dtype and back[name].shape == original[name].shape for name in back
        )
    written, config = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "huggingface", folder))
    same = config.keys() - {"auto_map"}
    assert {key: written.get(key) for key in same} == {key: config[key] for key in same}
    fla = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert fla["architectures"] == ["RWKV7ForCausalLM"]
    assert fla["norm_first"] is True
    assert json.loads((tmp_path / "huggingface" / "generation_config.json").read_text())["eos_token_id"] == 0


def test_a_tied_head(weights, tmp_path):
    tensors = weights()
    tensors["head.weight"] = tensors["emb.weight"].clone()
    expected = logits(heronry.load(official(tensors, tmp_path / "whole")))
    del tensors["head.weight"]
    model = heronry.load(official(tensors, tmp_path / "tied", tie_word_embeddings=True))
    assert torch.equal(logits(model), expected)
    with pytest.raises(InputError, match=r"head\.weight"):
        heronry.load(official(tensors, tmp_path / "without"))


def test_a_tied_head_is_trained_apart_and_says_so(weights, tmp_path, caplog):
    tensors = weights(vocab=256)
    del tensors["head.weight"]
    folder = official(tensors, tmp_path / "tied", tie_word_embeddings=True)
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 20)
    settings = [f"data.train={tmp_path / 'text.txt'}", f"model.path={folder}", "data.ctx_len=8"]
    build_model(read_config(None, settings), 256, "float32")
    assert caplog.messages == [f"heronry: {folder}: the head is tied to the embedding; training keeps the two apart"]
    # in transformers: what is saved says that the head is another
    transformers = pytest.importorskip("transformers")
    from heronry.integrations.transformers import register

    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.rwkv.head.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    caplog.clear()
    again = heronry.load(tmp_path / "saved")
    assert torch.equal(again.head.weight, again.emb.weight * 2)
    assert not caplog.messages


def test_norms_without_biases(weights, tmp_path):
    """`norm_bias: false`; the norm after the recurrence keeps its own."""
    tensors = weights()
    biases = [name for name in tensors if name.endswith(".bias") and ".ln_x." not in name]
    plain = {name: x for name, x in tensors.items() if name not in biases}
    zeros = tensors | {name: torch.zeros_like(tensors[name]) for name in biases}
    expected = logits(heronry.load(official(zeros, tmp_path / "zeros")))
    folder = official(plain, tmp_path / "plain", norm_bias=False)
    assert len(biases) == 8
    assert torch.equal(logits(heronry.load(folder)), expected)
    (folder / "config.json").unlink()
    assert torch.equal(logits(heronry.load(folder / "model.safetensors")), expected)
    some = {name: x for name, x in tensors.items() if name != biases[0]}  # damaged, not without biases
    with pytest.raises(InputError, match=rf"1 missing: {biases[0]}"):
        heronry.load(official(some, tmp_path / "damaged"))


def test_the_epsilon_of_small_heads(weights, tmp_path):
    """norm_eps times head_dim: 32e-5 here."""
    tensors = weights(heads=4)
    torch.save(tensors, tmp_path / "a.pth")
    model = heronry.load(official(tensors, tmp_path / "hf"))
    assert model.config.ln_x_eps == pytest.approx(32e-5)
    assert torch.equal(logits(model), logits(heronry.load(tmp_path / "a.pth", ln_x_eps=32e-5)))


def test_sizes_that_config_leaves_to_the_rule(weights, tmp_path):
    nulls: dict[str, Any] = dict.fromkeys(("intermediate_size", *(f"{name}_low_rank_dim" for name in RANKS)))
    tensors = weights()
    expected = heronry.load(official(tensors, tmp_path / "a"))
    assert torch.equal(logits(heronry.load(official(tensors, tmp_path / "b", **nulls))), logits(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 256}, "config.json says n_embd = 256, but the tensors say 128"),
        ({"num_heads": 3}, "config.json says dim_att = 192, but the tensors say 128"),
        ({"head_dim": 32}, "config.json says head_size = 32, but the tensors say 64"),
        ({"v_low_rank_dim": 99}, "config.json says value_rank = 99, but the tensors say"),
        ({"norm_eps": 1e-6}, "config.json has layer norms with epsilon 1e-06"),
        ({"use_deep_embed": True}, "config.json says deep_rank = 32, but the tensors say 0"),
        ({"sparse_channel_mix": True}, "a sparse channel mix is not supported"),
    ],
)
def test_a_config_that_contradicts_the_tensors(change, message, weights, tmp_path):
    folder = official(weights(), tmp_path / "hf", **change)
    with pytest.raises(InputError) as caught:
        heronry.load(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deep_embed_that_config_denies(weights, tmp_path):
    folder = official(weights(deep=4), tmp_path / "hf", use_deep_embed=False)
    with pytest.raises(InputError, match=r"config\.json says deep_rank = 0, but the tensors say 4"):
        heronry.load(folder)
    official(weights(), tmp_path / "plain", use_deep_embed=False)
    assert heronry.load(tmp_path / "plain").config.deep_rank == 0


def test_the_auto_classes(weights, tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from heronry.integrations.transformers import register

    register()
    tensors = {name: x.float() for name, x in weights().items()}
    folder = official(tensors, tmp_path / "hf")
    expected = logits(heronry.load(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        assert torch.equal(model(TEXT).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["Rwkv7ForCausalLM"]
    assert torch.equal(logits(heronry.load(tmp_path / "saved")), expected)
    base = {name.removeprefix("rwkv7."): x for name, x in saved.items() if name != "head.weight"}
    save_file(base, tmp_path / "saved" / "model.safetensors")  # as the official class without a head saves itself
    body, whole = (AutoModel.from_pretrained(path) for path in (tmp_path / "saved", folder))
    with torch.inference_mode():
        assert torch.equal(body(TEXT).last_hidden_state, whole(TEXT).last_hidden_state)
    assert AutoConfig.from_pretrained(folder).wkv_state_dtype == "float32"
    convert(folder, tmp_path / "fla", to="fla")  # which stays as it is
    AutoModelForCausalLM.from_pretrained(tmp_path / "fla").save_pretrained(tmp_path / "again")
    original, again = (load_file(path / "model.safetensors") for path in (tmp_path / "fla", tmp_path / "again"))
    assert again.keys() == original.keys()
    assert "model.embeddings.weight" in again
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["RWKV7ForCausalLM"]


def test_text(weights, tmp_path, command):
    """The whole folder with its tokenizer: World in disguise."""
    folder = official(weights(vocab=65536, width=64, heads=1, ffn=64), tmp_path / "hf")
    (folder / "tokenizer.json").write_text(json.dumps(world_json()))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = heronry.LLM(folder)
    assert isinstance(llm.tokenizer, WorldTokenizer)
    expected = llm.generate("User: hi\n\nAssistant:", 5, temperature=0).token_ids
    convert(folder, tmp_path / "a.pth")
    assert heronry.LLM(tmp_path / "a.pth").generate("User: hi\n\nAssistant:", 5, temperature=0).token_ids == expected
    code, out, err = command("generate", "--model", folder, "hello", "--max-tokens", "2")
    assert code == 0, err
    code, out, err = command("info", folder)
    assert code == 0, err
    assert "world" in out


def test_the_folders_own_template(weights, tmp_path, command):
    """Used in chats, for training data and in transformers alike, kept by copies and folders, lost by no option."""
    folder = official(weights(vocab=256), tmp_path / "hf")
    (folder / "chat_template.jinja").write_text(OFFICIAL)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "use_cache": true}')
    llm = heronry.LLM(folder, dtype="float32")
    assert llm.chat().template.stops == ("\n\nUser:",)
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    asked = "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant: <think></think>\n"
    assert llm.chat(talk, 0).state.texts == (asked,)
    assert llm.chat(talk, 0, template="g1").state.texts[0].endswith("User: Bye\n\nAssistant:")
    # copies
    assert command("quantize", folder, tmp_path / "int8")[0] == 0
    convert(folder, tmp_path / "own")
    convert(folder, tmp_path / "again", to="huggingface")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == OFFICIAL
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["stop_strings"] == ["\n\nUser:"]
    for copy in ("int8", "own", "again"):
        assert heronry.LLM(tmp_path / copy).chat(talk, 0).state.texts == (asked,), copy
    # data
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert command("data", tmp_path / "a.jsonl", "-o", tmp_path / "made", "--tokenizer", folder)[0] == 0
    file = TokenFile(tmp_path / "made")
    assert bytes(file.tokens.tolist()).decode() == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser:"
    assert bytes(file.tokens[file.mask.astype(bool)].tolist()).decode() == " Hello!\n\nUser:"
    assert file.notes["chat_template"] == OFFICIAL
    # transformers
    transformers = pytest.importorskip("transformers")
    from heronry.integrations.transformers import register

    register()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == asked


def test_a_template_inside_a_gguf(weights, tmp_path):
    """It is that of the folder; an empty line ends a turn only where the template says so."""
    import gguf

    def metadata(path: Path) -> dict[str, Any]:
        return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}

    sharp = OFFICIAL.replace("\\n\\n", "#")
    train_bpe(tmp_path / "tokenizer.json", "User: Hi Assistant: Hello!\n\n")  # an empty line is a token
    size = heronry.text.tokenizers.HFTokenizer(tmp_path / "tokenizer.json").vocab_size
    for source, ends in ((OFFICIAL, True), (sharp, False)):
        folder = official(weights(vocab=size), tmp_path / f"hf-{ends}")
        (folder / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text())
        (folder / "chat_template.jinja").write_text(source)
        convert(folder, tmp_path / "a.gguf")
        fields = metadata(tmp_path / "a.gguf")
        assert fields["tokenizer.chat_template"] == source
        assert ("tokenizer.ggml.eot_token_id" in fields) is ends
        talk = [{"role": "user", "content": "Hi"}]
        expected = heronry.LLM(folder).chat(talk, 0).state.texts
        assert heronry.LLM(tmp_path / "a.gguf").chat(talk, 0).state.texts == expected
        (tmp_path / "a.gguf").unlink()
    (folder / "chat_template.jinja").write_text("{% if %}")  # damaged: no matter where nothing shows it
    convert(folder, tmp_path / "a.pth")


@pytest.mark.slow
def test_the_name_of_a_file_is_not_lost(weights, tmp_path, command):
    """What it says of the template goes into folders and GGUF files of any name."""
    torch.save(weights(vocab=65536), tmp_path / "rwkv7-g0-0.1b.pth")
    assert heronry.LLM(tmp_path / "rwkv7-g0-0.1b.pth").chat_template == "world"
    for name in ("a", "a.gguf"):
        convert(tmp_path / "rwkv7-g0-0.1b.pth", tmp_path / name)
        assert heronry.LLM(tmp_path / name, dtype="float32").chat_template == "world"
    convert(tmp_path / "rwkv7-g0-0.1b.pth", tmp_path / "hf", to="huggingface")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == chat_template("world")
    assert heronry.LLM(tmp_path / "hf").chat_template == "world"
    assert command("quantize", tmp_path / "rwkv7-g0-0.1b.pth", tmp_path / "int8")[0] == 0
    assert heronry.LLM(tmp_path / "int8").chat_template == "world"
    (tmp_path / "rwkv7-g0-0.1b.pth").rename(tmp_path / "a.pth")
    llm = heronry.LLM(tmp_path / "a.pth")
    assert (llm.chat_template, llm.chat().template) == (None, TEMPLATES["g1"])
