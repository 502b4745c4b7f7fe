"""Files: what loads, what is refused and how, what loading costs, what saving leaves behind."""

from __future__ import annotations

import codecs
import json
import math
import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import heronry
from heronry import InputError, State
from heronry.cli.app import app
from heronry.convert import convert
from heronry.files import atomic_write
from heronry.models import RWKV7, detect

SMALL = {"width": 32, "heads": 2, "ffn": 40, "rank": 3}
TEXT = torch.tensor([[3, 1, 4, 1, 5, 92, 65]])


@pytest.fixture
def weights(random_checkpoint):
    """Those of a small RWKV-7."""
    return random_checkpoint("7", **SMALL)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT)[0]


def built(weights) -> RWKV7:
    """A model made without files."""
    model = RWKV7(RWKV7.Config.from_shapes({name: x.shape for name, x in weights.items()}))
    model.load_state_dict({name: x for name, x in weights.items() if name not in RWKV7.ignored_keys})
    return model.eval()


def refusal(path, **options) -> str:
    """The one line that `load` refuses a path with."""
    with pytest.raises(InputError) as caught:
        heronry.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_progress_is_reported_in_bytes(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    size = sum(x.nbytes for name, x in weights.items() if name not in RWKV7.ignored_keys)
    calls: list[tuple[int, int]] = []
    heronry.load(tmp_path / "a.pth", "bfloat16", progress=lambda *counts: calls.append(counts))
    assert calls == sorted(set(calls))
    assert calls[-1] == (size, size)


def test_every_kind_of_file_gives_the_same_model(version, random_checkpoint, tmp_path):
    weights = random_checkpoint(version, **SMALL)
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "a.safetensors")
    shuffled = dict(sorted(weights.items(), reverse=True))
    torch.save({f"_forward_module.{name}": x for name, x in shuffled.items()}, tmp_path / "shuffled.pth")
    squeezed = {name: x.squeeze() for name, x in weights.items()}
    torch.save(squeezed, tmp_path / "squeezed.pth")
    save_file(weights, tmp_path / "misnamed.pth")
    model = heronry.load(tmp_path / "a.pth")
    assert not model.training
    assert model.name == f"rwkv{version[0]}"
    if version[0] == "5":
        assert model.config.version == version[:3]
    heronry.save(model, tmp_path / "folder")
    expected = logits(model)
    for name in ("a.safetensors", "legacy.pth", "shuffled.pth", "squeezed.pth", "misnamed.pth", "folder"):
        other = heronry.load(str(tmp_path / name))
        assert other.config == model.config
        assert other.fingerprint == model.fingerprint
        assert torch.equal(logits(other), expected), name
    saved = load_file(tmp_path / "folder" / "model.safetensors")
    assert saved.keys() == weights.keys() - set(model.ignored_keys)
    assert all(torch.equal(x, weights[name]) for name, x in saved.items())


def test_a_file_in_the_other_byte_order(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    other = {"little": "big", "big": "little"}[sys.byteorder]
    with zipfile.ZipFile(tmp_path / "a.pth") as archive, zipfile.ZipFile(tmp_path / "b.pth", "w") as swapped:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("/byteorder"):
                content = other.encode()
            elif "/data/" in name:
                content = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 4).flip(1).numpy().tobytes()
            swapped.writestr(name, content)
    expected, found = heronry.load(tmp_path / "a.pth"), heronry.load(tmp_path / "b.pth")
    assert torch.equal(logits(found), logits(expected))
    assert found.fingerprint == expected.fingerprint


def test_dtypes(weights, tmp_path):
    path = tmp_path / "a.pth"
    # files keep the decay in float32 and the rest in 16 bits; most numbers decide
    torch.save({name: x if "w0" in name else x.bfloat16() for name, x in weights.items()}, path)
    for asked, dtype in (
        (None, torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
    ):
        model = heronry.load(path, dtype=asked)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(torch.tensor([[1, 2]]))[0].dtype == dtype
    for wrong in ("half", torch.int8, "int8"):
        with pytest.raises(InputError, match="choose one of float64, float32, bfloat16, float16"):
            heronry.load(path, dtype=wrong)
    with pytest.raises(InputError, match="device nowhere cannot be used"):
        heronry.load(path, device="nowhere")


def test_states_fit_every_dtype_of_one_file(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    single, half = (heronry.load(tmp_path / "a.pth", dtype=dtype) for dtype in ("float32", "bfloat16"))
    with torch.no_grad():
        _, state = half(TEXT)
        single(TEXT, state)
    heronry.save(half, tmp_path / "copy")
    heronry.load(tmp_path / "copy")(TEXT, state)
    weights["head.weight"] = weights["head.weight"] + 0.01
    torch.save(weights, tmp_path / "b.pth")
    with pytest.raises(InputError, match="another model"):
        heronry.load(tmp_path / "b.pth")(TEXT, state)


def test_home_folder(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    heronry.save(built(weights), "~/model")
    assert heronry.load("~/model").config.n_embd == 32


def test_loading_leaves_no_trace_on_random_numbers(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    heronry.load(tmp_path / "a.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_values_of_layer_0_are_ignored(weights, tmp_path):
    torch.save(weights, tmp_path / "with.pth")
    torch.save({k: x for k, x in weights.items() if k not in RWKV7.ignored_keys}, tmp_path / "without.pth")
    a, b = heronry.load(tmp_path / "with.pth"), heronry.load(tmp_path / "without.pth")
    assert a.fingerprint == b.fingerprint
    assert torch.equal(logits(a), logits(b))


def test_ln_x_eps(random_checkpoint, tmp_path):
    torch.save(random_checkpoint("5.2", **SMALL), tmp_path / "5.pth")
    plain, changed = heronry.load(tmp_path / "5.pth"), heronry.load(tmp_path / "5.pth", ln_x_eps=0.5)
    assert (plain.config.ln_x_eps, changed.config.ln_x_eps) == (64e-5, 0.5)
    assert not torch.allclose(logits(plain), logits(changed), atol=1e-2)
    assert plain.fingerprint != changed.fingerprint
    heronry.save(changed, tmp_path / "folder")
    assert torch.equal(logits(heronry.load(tmp_path / "folder")), logits(changed))
    assert "ln_x_eps must be a positive number" in refusal(tmp_path / "5.pth", ln_x_eps=-1.0)
    torch.save(random_checkpoint("4", **SMALL), tmp_path / "4.pth")
    assert "rwkv4 has no norm" in refusal(tmp_path / "4.pth", ln_x_eps=1e-5)


def test_a_file_of_a_folder_is_the_folder(random_checkpoint, tmp_path):
    torch.save(random_checkpoint("5.2"), tmp_path / "a.pth")
    heronry.save(heronry.load(tmp_path / "a.pth", ln_x_eps=1e-5), tmp_path / "folder")
    assert heronry.load(tmp_path / "folder" / "model.safetensors").config.ln_x_eps == 1e-5
    (tmp_path / "folder" / "config.json").write_text("{")  # which may say another epsilon
    assert refusal(tmp_path / "folder" / "model.safetensors").startswith("config.json cannot be read")
    (tmp_path / "folder" / "config.json").write_text("{}")  # of some other program: the tensors tell
    assert heronry.load(tmp_path / "folder" / "model.safetensors").config.ln_x_eps == 64e-5


def test_paths_and_damage(weights, tmp_path):
    assert refusal(tmp_path / "none.pth") == "no such file or folder"
    (tmp_path / "empty.pth").touch()
    assert refusal(tmp_path / "empty.pth") == "the file is empty"
    (tmp_path / "text.pth").write_text("these are not weights")
    assert refusal(tmp_path / "text.pth") == "not a .pth, .safetensors, GGUF or rwkv.cpp file"
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "a.safetensors")
    for name, kind in (("a.pth", ".pth"), ("legacy.pth", ".pth"), ("a.safetensors", "safetensors")):
        whole = (tmp_path / name).read_bytes()
        for size in (10, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:size])
            assert refusal(tmp_path / "cut").startswith(f"damaged or truncated {kind} file"), (name, size)
    torch.save([1, 2], tmp_path / "list.pth")
    assert refusal(tmp_path / "list.pth") == "holds a list, not a dictionary of named tensors"
    torch.save({"epoch": 3, "weights": weights}, tmp_path / "nested.pth")
    assert refusal(tmp_path / "nested.pth") == "not an RWKV checkpoint (it holds epoch, weights)"
    torch.save({**weights, "step": 7}, tmp_path / "step.pth")
    assert refusal(tmp_path / "step.pth").startswith("step is int, not a floating point tensor")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pth")
    (tmp_path / "a.pth").chmod(0)
    assert refusal(tmp_path / "a.pth") == "cannot be read (Permission denied)"


class Payload:
    """What unpickles into a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_pickle_is_refused_and_does_not_run(weights, tmp_path):
    evil = {**weights, "x": Payload(tmp_path / "it ran")}
    torch.save(evil, tmp_path / "zip.pth")
    torch.save(evil, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "cut.pth", "w") as archive:  # no storages: torch could not read it anyway
        archive.writestr("a/data.pkl", pickle.dumps(evil["x"]))
    names = ["zip.pth", "legacy.pth", "cut.pth"]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):  # torch reads no protocol above 2
        torch.save(evil, tmp_path / f"zip{protocol}.pth", pickle_protocol=protocol)
        (tmp_path / f"bare{protocol}.pth").write_bytes(pickle.dumps(evil["x"], protocol))
        names += [f"zip{protocol}.pth", f"bare{protocol}.pth"]
    for name in names:
        assert re.match(r"would run (posix|nt)\.mkdir; refused, because", refusal(tmp_path / name)), name
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert refusal(tmp_path / "module.pth").startswith("would run torch.nn.modules.linear.Linear; refused")
    torch.save(weights, tmp_path / "four.pth", pickle_protocol=4)
    assert refusal(tmp_path / "four.pth").startswith("written with pickle's protocol 4; save it with torch.save")
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert (tmp_path / "it ran").exists(), "the payload would not have run anyway"


def test_tensors_that_do_not_make_a_model(weights, tmp_path):
    def told(changed: dict) -> str:
        torch.save(changed, tmp_path / "a.pth")
        return refusal(tmp_path / "a.pth")

    lacking = {k: x for k, x in weights.items() if ".ln2." not in k}
    assert "4 missing: blocks.0.ln2.weight, blocks.0.ln2.bias, blocks.1.ln2.weight, ..." in told(lacking)
    assert "1 unexpected: blocks.1.att.more" in told({**weights, "blocks.1.att.more": torch.ones(3)})
    assert "1 of the wrong shape: head.weight [101, 31] instead of [101, 32]" in told(
        {**weights, "head.weight": weights["head.weight"][:, 1:].clone()}
    )
    # as many numbers, but others: a reshape would take them
    assert "of the wrong shape: blocks.1.ffn.key.weight [32, 40] instead of [40, 32]" in told(
        {**weights, "blocks.1.ffn.key.weight": weights["blocks.1.ffn.key.weight"].T.clone()}
    )
    assert "blocks.0.att.g1 is missing" in told({k: x for k, x in weights.items() if k != "blocks.0.att.g1"})
    assert "blocks.1 is missing" in told({k.replace("blocks.1.", "blocks.9999999999."): x for k, x in weights.items()})
    assert "32 attention channels do not divide into heads of 5" in told(
        {**weights, "blocks.0.att.r_k": torch.ones(6, 5)}
    )
    assert "emb.weight is torch.int8, not a floating point tensor" in told(
        {**weights, "emb.weight": torch.ones(101, 32, dtype=torch.int8)}
    )
    assert "emb.weight is a sparse, nested, meta or empty tensor" in told(
        {**weights, "emb.weight": weights["emb.weight"].to_sparse()}
    )
    assert "its tensors do not have the shapes of an rwkv7 checkpoint" in told(
        {**weights, "emb.weight": torch.ones(101)}
    )


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("blocks.0.qkv.kk.weight", "RWKV-8 rc00 with attention"),
        ("blocks.0.qkv.ennk.weight", "RWKV-8 rc00 with attention"),
        ("blocks.0.qkv.k_emb.0", "merged tables"),
        ("blocks.0.ffn.s_emb.0", "merged tables"),
        ("blocks.0.ffn.enn.weight", "RWKV-8 rc00"),
        ("blocks.0.rosa.q.weight", "RWKV-8 with ROSA"),
        ("blocks.0.rosa.rosa_qkv.emb", "RWKV-8 with ROSA"),
        ("rosa1.rosa_qkv.emb", "RWKV-8 with ROSA"),
        ("emb_rosa.emb.weight", "RWKV-8 with ROSA"),
        ("blocks.0.att.gate_w1", "RWKV-6a"),
        ("blocks.0.att.time_maa_rkvw_w1", "RWKV-6b or 6c"),
        ("blocks.0.ffnPre.key.weight", "ffnPre"),
        ("head_q.weight", "head_qk"),
        ("blocks.1.tiny_q.weight", "tiny attention"),
        ("blocks.0.pos_emb_x", "position embeddings"),
        ("moba.0.q.weight", "RWKV-X"),
        ("blocks.1.att.k0", "HRWKV .hxa079."),
        ("blocks.1.att.r_norm.weight", "HRWKV .hxa079."),
        ("blocks.0.ffn.down.weight", "cxa076"),
        ("blocks.0.att.key.disha", "adapter"),
        ("blocks.0.att.key.weight.D", "adapter"),
        ("base_model.model.blocks.0.att.key.miss_block", "adapter"),
        ("blocks.0.att.key.weight.qstate", "bitsandbytes"),
        ("model.layers.0.attn.r_proj.qweight", "sglang"),
        ("model.layers.0.self_attn.w0", "QRWKV7"),
    ],
)
def test_relatives_are_refused_by_name(weights, key, name):
    for shapes in ({**weights, key: ()}, {key: (), **weights}):
        with pytest.raises(InputError, match=f"^this checkpoint is .*{name}"):
            detect(shapes)


def test_config_must_agree(weights, tmp_path):
    heronry.save(built(weights), tmp_path)
    file = tmp_path / "config.json"
    right = json.loads(file.read_text())
    assert right["model"] == "rwkv7"

    def told(**changes) -> str:
        file.write_text(json.dumps({**right, **changes}))
        return refusal(tmp_path)

    assert told(n_layers=2).startswith(
        "config.json has an unknown key 'n_layers'; the keys of rwkv7 are model, vocab_size"
    )
    assert told(n_layer=3) == "config.json says n_layer = 3, but the tensors say 2"
    assert told(n_layer="2") == "config.json says n_layer = '2', but the tensors say 2"
    assert told(model="rwkv6") == "config.json says model = 'rwkv6', but the tensors say 'rwkv7'"
    assert told(model="gpt2").startswith('config.json: "model" must be one of rwkv4')
    assert told(ln_x_eps="small").startswith("ln_x_eps must be a positive number")
    file.write_text("{")
    assert refusal(tmp_path).startswith("config.json cannot be read")
    file.unlink()
    assert refusal(tmp_path) == "no config.json in the folder"
    file.write_text(json.dumps({"model": "rwkv7", "n_layer": 2}))  # what is not said, the tensors say
    assert heronry.load(tmp_path).config.head_size == 16
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path) == "no model.safetensors in the folder"


def test_a_head_that_is_the_embedding_is_saved(weights, tmp_path):
    model = built(weights)
    model.head.weight = model.emb.weight
    heronry.save(model, tmp_path / "tied")
    torch.testing.assert_close(logits(heronry.load(tmp_path / "tied")), logits(model))


def test_saving_again_and_failing(weights, tmp_path, monkeypatch):
    model = built(weights)
    (tmp_path / "vocabulary.txt").write_text("a b c")
    heronry.save(model, tmp_path / "m", tokenizer_file=tmp_path / "vocabulary.txt")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "tokenizer.txt"}
    assert before["tokenizer.txt"] == b"a b c"

    def fails(tensors, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError("No space left on device")

    with torch.no_grad():
        model.head.weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(heronry.checkpoint.saving, "save_file", fails)
        with pytest.raises(OSError, match="No space left"):
            heronry.save(model, tmp_path / "m")
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    heronry.save(model, tmp_path / "m")
    assert torch.equal(logits(heronry.load(tmp_path / "m")), logits(model))
    mask = os.umask(0)
    os.umask(mask)
    for file in (tmp_path / "m").iterdir():  # safetensors makes its files readable for their owner alone
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file
    with pytest.raises(InputError, match="is a file; give the name of a folder"):
        heronry.save(model, tmp_path / "vocabulary.txt")
    with pytest.raises(InputError, match="tokenizer file not found"):
        heronry.save(model, tmp_path / "n", tokenizer_file=tmp_path / "none.json")
    assert not (tmp_path / "n").exists()


def test_files_are_replaced_whole_and_with_usual_permissions(tmp_path):
    target = tmp_path / "new folder" / "file"
    mask = os.umask(0o027)
    try:
        with atomic_write(target) as part:
            part.write_text("first")
            assert not target.exists()
    finally:
        os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640

    def interrupted() -> None:
        with atomic_write(target) as part:
            part.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "first"
    assert [file.name for file in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("version", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("4", "5.2", "6")), "7"])
def test_descriptions_of_wrong_types(version, random_checkpoint, tmp_path):
    """In config.json of both kinds of folder and in the index of shards: a line, or the same model."""
    torch.save(random_checkpoint(version, width=64, heads=1, ffn=64, rank=32), tmp_path / "a.pth")
    for kind in ("heronry", "huggingface"):
        folder = tmp_path / kind
        convert(tmp_path / "a.pth", folder, to=kind)
        file = folder / "config.json"
        right, model = file.read_bytes(), heronry.load(folder)
        config = json.loads(right)

        def try_text(text: str, folder=folder, model=model) -> None:
            (folder / "config.json").write_text(text)
            with suppress(InputError):  # else it is the same model
                assert heronry.load(folder).fingerprint[:16] == model.fingerprint[:16]

        for text in ("[" * 100_000, "{", "", "null", "3", "[]"):
            try_text(text)
        for key in (*config, "quantization", "fingerprint", "chat_template", "opening_tokens", "heronry", "labels"):
            for value in (None, "x", [1], {"a": 1}, math.nan, -1, [None]):
                try_text(json.dumps(config | {key: value}))
        file.write_bytes(codecs.BOM_UTF8 + right)  # as editors on Windows write it
        assert heronry.load(folder).fingerprint == model.fingerprint
        (folder / "model.safetensors").unlink()
        for text in (
            "[" * 100_000,
            "[]",
            '{"weight_map": 3}',
            '{"weight_map": {"a": 3}}',
            '{"weight_map": {"a": [1]}}',
        ):
            (folder / "model.safetensors.index.json").write_text(text)
            with pytest.raises(InputError, match=r"model\.safetensors\.index\.json (cannot be|is not|has no)"):
                heronry.load(folder)


def test_a_model_without_weights_is_said_to_be_one(random_checkpoint, tmp_path):
    torch.save(random_checkpoint("7", vocab=256, width=64, heads=1, ffn=64), tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth", device="meta")
    for use in (
        lambda: heronry.save(model, tmp_path / "b"),
        lambda: heronry.quantize(model, "int8"),
        lambda: heronry.LLM(model),
    ):
        with pytest.raises(InputError, match="on the device meta, so it has no weights"):
            use()
    assert not (tmp_path / "b").exists()


def test_what_is_interrupted_leaves_no_new_folder(random_checkpoint, tmp_path, monkeypatch):
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heronry.checkpoint.saving.save_file", interrupted)
    (tmp_path / "old").mkdir()
    model = heronry.checkpoint.assemble(random_checkpoint("7"))
    for folder in ("old", "old/new", "a/b/c"):
        with pytest.raises(KeyboardInterrupt):
            heronry.save(model, tmp_path / folder)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["old"]


@torch.no_grad()
def test_states_as_files(version, random_checkpoint, tmp_path):
    torch.save(random_checkpoint(version, **SMALL), tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth")
    _, state = model(TEXT.repeat(2, 1))
    state = state.with_texts(["one", "a ★"])
    state.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    assert (loaded.texts, loaded.fingerprint) == (state.texts, state.fingerprint)
    for a, b in zip(state.layers, loaded.layers, strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
    assert torch.equal(model(TEXT[:, :2].repeat(2, 1), loaded)[0], model(TEXT[:, :2].repeat(2, 1), state)[0])

    model.initial_state(3).save(tmp_path / "start")
    assert torch.equal(model(TEXT, State.load(tmp_path / "start")[1])[0], model(TEXT)[0])

    with pytest.raises(InputError, match="no such state file"):
        State.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged or truncated state file"):
        State.load(tmp_path / "cut")
    heronry.save(model, tmp_path / "m")
    with pytest.raises(InputError, match="not a heronry state file"):
        State.load(tmp_path / "m" / "model.safetensors")


def test_files_that_are_no_states(version, random_checkpoint, tmp_path):
    """Shapes, dtypes, numbers and texts that no state has; nothing is left to the model that gets it."""
    torch.save(random_checkpoint(version, **SMALL), tmp_path / "a.pth")
    heronry.load(tmp_path / "a.pth").initial_state(2).save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        about, right = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def refusal(tensors: dict[str, torch.Tensor], **changes: str) -> str:
        save_file(tensors, tmp_path / "x", metadata=about | changes)
        with pytest.raises(InputError, match=f"^{tmp_path / 'x'}: damaged or truncated state file") as caught:
            State.load(tmp_path / "x")
        return str(caught.value)

    for texts in ("3", "[1, 2]", "null", "[]", '["a"]', '{"a": 1, "b": 2}', "[" * 100_000, "[null, null]", '"ab"'):
        assert "\n" not in refusal(right, texts=texts)
    for key, x in right.items():
        assert f"{key} contains NaN or infinity" in refusal(right | {key: torch.full_like(x, math.nan)})
        assert f"{key} is int32" in refusal(right | {key: x.int()})
        assert f"{key} is float8_e4m3fn" in refusal(right | {key: x.to(torch.float8_e4m3fn)})
        assert "no part of a state of " in refusal(right | {key: torch.cat([x, x])})
        assert "its tensors are not those of a state" in refusal({name: x for name, x in right.items() if name != key})
    for name in ("more", "blocks.99999999.wkv", "blocks.x.wkv"):
        assert "its tensors are not those of a state" in refusal(right | {name: torch.ones(2, 2)})


MEASURE = """
import gc, sys, threading
import heronry

def resident():  # bytes of memory, those mapped from files included
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

path, small, dtype = sys.argv[1:]
heronry.load(small, dtype=dtype)  # what a first call allocates for good
gc.collect()
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
model = heronry.load(path, dtype=dtype)
done.set()
watcher.join()
size = sum(p.nbytes for p in model.parameters())
largest = max(p.numel() for p in model.parameters()) * 4  # in the file
print(size, (max(peak, resident()) - before - largest) / size)
"""


@pytest.fixture(scope="module")
def large(random_checkpoint, tmp_path_factory) -> Path:
    """A folder with a model of about 200 MB in float32."""
    folder = tmp_path_factory.mktemp("large")
    weights = random_checkpoint("7", vocab=8000, width=1024, heads=16, layers=3, ffn=4096, rank=32)
    torch.save(weights, folder / "large.pth")
    save_file(weights, folder / "large.safetensors")
    torch.save(random_checkpoint("7", **SMALL), folder / "small.pth")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("file", ["large.pth", "large.safetensors"])
def test_loading_costs_the_model_and_no_more(large, file, dtype):
    command = [sys.executable, "-c", MEASURE, str(large / file), str(large / "small.pth"), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, share = (float(x) for x in done.stdout.split())
    print(f"{file} as {dtype}: {size / 1e6:.0f} MB, resident {share:.3f} of it beside the largest tensor of the file")
    assert 90e6 < size < 300e6
    assert share <= 1.2


@pytest.mark.parametrize("wide", [torch.float32, torch.float16])
def test_a_file_of_several_dtypes_says_what_is_rounded(random_checkpoint, wide, tmp_path, caplog):
    """Only what has other numbers then: many files have vectors in float32 that were 16 bits long."""
    numbers = random_checkpoint("7")
    tensors = {name: x.bfloat16() for name, x in numbers.items()}
    torch.save(tensors, tmp_path / "one.pth")
    names = ("blocks.0.att.r_k", "blocks.1.att.w0", "blocks.1.att.a0")
    torch.save(tensors | {name: tensors[name].to(wide) for name in names}, tmp_path / "same.pth")
    tensors |= {name: (numbers if i < 2 else tensors)[name].to(wide) for i, name in enumerate(names)}
    torch.save(tensors, tmp_path / "two.pth")
    assert heronry.load(tmp_path / "one.pth").dtype == torch.bfloat16
    assert heronry.load(tmp_path / "same.pth").dtype == torch.bfloat16
    assert heronry.load(tmp_path / "two.pth", dtype="float32").dtype == torch.float32
    assert heronry.load(tmp_path / "two.pth", device="meta").dtype == torch.bfloat16
    assert not caplog.messages
    assert heronry.load(tmp_path / "two.pth").dtype == torch.bfloat16
    assert caplog.messages == [
        f"heronry: 2 tensors of the file in {str(wide).removeprefix('torch.')} rounded to bfloat16, the dtype of most "
        "weights, because a model has one dtype; give dtype (--dtype) to choose another"
    ]
    caplog.clear()
    for suffix in ("gguf", "st"):  # what heronry writes
        convert("bundled", tmp_path / f"a.{suffix}")
        heronry.load(tmp_path / f"a.{suffix}")
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_float8_is_named(random_checkpoint, dtype, kind, tmp_path):
    name = str(dtype).removeprefix("torch.")
    tensors = {key: x.to(dtype) for key, x in random_checkpoint("7", ffn=192).items()}
    path = tmp_path / f"small.{kind}"
    torch.save(tensors, path) if kind == "pth" else save_file(tensors, path)
    with pytest.raises(InputError, match=rf"its weights are {name}, in which models cannot compute; give a dtype"):
        heronry.load(path)
    described = heronry.load(path, device="meta")
    assert described.dtype == dtype
    assert f"dtype       {name}" in CliRunner().invoke(app, ["info", str(path)]).stdout
    model = heronry.load(path, dtype="bfloat16")
    assert torch.equal(model.head.weight, tensors["head.weight"].bfloat16())
    assert heronry.load(path, dtype="bfloat16", quantize="int8").quantization == "int8"
