"""From every format to every other: the same numbers, the same logits, or a refusal by name; whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from conversions import TEXT, read, refusal
from safetensors.torch import load_file, save_file

import heronry
from heronry import LLM, InputError, formats
from heronry.cli.app import app
from heronry.convert import FOLDERS, SUFFIXES, convert, language_models
from heronry.convert.streamed_logits import compute_logits
from heronry.formats import safetensors_file
from heronry.text.pack_world_vocabulary import pack
from heronry.text.world import FILE

ALL = (*SUFFIXES.values(), *FOLDERS)
# what a format has no place for
REFUSED = {
    **{(version, "gguf"): "GGUF files are for RWKV-6 and RWKV-7" for version in ("4", "5.0", "5.0 r2", "5.1", "5.2")},
    **{(version, "webrwkv"): "web-rwkv does not support RWKV-5.0" for version in ("5.0", "5.0 r2")},
    **{(version, "fla"): "fla is a layout of RWKV-7" for version in ("4", "5.0", "5.0 r2", "5.1", "5.2", "6")},
    ("5.1", "ggml"): "rwkv.cpp does not support RWKV-5.1",
}


def name_of(format: str, folder: Path, stem: str = "out") -> Path:
    suffix = next((suffix for suffix, known in SUFFIXES.items() if known == format), "")
    return folder / f"{stem}-{format}{suffix}"


@pytest.mark.quick_for("4", "7")
def test_every_format_and_back(version, weights, tmp_path):
    original = weights(version)
    torch.save(original, tmp_path / "a.pth")
    expected = read(tmp_path / "a.pth")
    for format in ALL:
        target = name_of(format, tmp_path)
        if (version, format) in REFUSED:
            assert REFUSED[version, format] in refusal(tmp_path / "a.pth", target, to=format)
            assert not target.exists()
            continue
        done = convert(tmp_path / "a.pth", target, to=format)
        assert done.format == format
        assert done.difference <= 1e-6 * done.largest
        torch.testing.assert_close(read(target), expected, rtol=0, atol=1e-5)
        found = formats.read(target)
        assert format in (found.format, found.layout) or found.format in ("safetensors", "blinkdl")
        convert(target, tmp_path / f"back-{format}.pth")
        back = torch.load(tmp_path / f"back-{format}.pth", weights_only=True)
        ignored = set(heronry.load(tmp_path / "a.pth").ignored_keys)
        assert back.keys() - ignored == original.keys() - ignored
        if (version, format) == ("5.1", "webrwkv"):  # a number a head has become a number a channel
            continue
        for name in back.keys() - ignored:
            assert torch.equal(back[name].float().flatten(), original[name].flatten()), (format, name)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.quick_for("7")
def test_from_every_format_to_every_other(version, weights, tmp_path):
    torch.save(weights(version), tmp_path / "a.pth")
    expected = read(tmp_path / "a.pth")
    chain = [format for format in ALL if (version, format) not in REFUSED]
    at = tmp_path / "a.pth"
    for number, (_, format) in enumerate(pairwise([*chain, *reversed(chain)])):
        convert(at, name_of(format, tmp_path, str(number)), to=format)
        at = name_of(format, tmp_path, str(number))
        torch.testing.assert_close(read(at), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype, weights, tmp_path):
    torch.save({name: x.bfloat16() for name, x in weights("7").items()}, tmp_path / "a.pth")
    for format in ("blinkdl", "safetensors", "heronry", "huggingface", "gguf"):
        target = name_of(format, tmp_path)
        convert(tmp_path / "a.pth", target, to=format, dtype=dtype)
        held = formats.read(target).tensors["head.weight"]
        assert str(held.dtype) == f"torch.{dtype}"
    kept = convert(tmp_path / "a.pth", tmp_path / "same.pth")
    assert kept.difference == 0
    assert torch.load(tmp_path / "same.pth", weights_only=True)["emb.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6", "7"])
def test_one_head(version, weights, tmp_path):
    """Where a dimension of size 1 could be taken for another."""
    torch.save(weights(version, width=64, heads=1), tmp_path / "a.pth")
    expected = read(tmp_path / "a.pth")
    for format in ALL:
        if (version, format) not in REFUSED:
            convert(tmp_path / "a.pth", name_of(format, tmp_path), to=format)
            torch.testing.assert_close(read(name_of(format, tmp_path)), expected, rtol=0, atol=1e-5)


def test_square_low_rank_matrices(weights, tmp_path):
    """RWKV-7 in web-rwkv's layout is told by the shapes of its low-rank matrices: one that is not square is enough."""
    random = weights("7", width=32, heads=1, rank=29)  # ranks 29, 30, 31 and 32
    torch.save(random, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.st")
    assert formats.read(tmp_path / "a.st").format == "webrwkv"
    torch.testing.assert_close(read(tmp_path / "a.st"), read(tmp_path / "a.pth"), rtol=0, atol=1e-5)
    for name, x in random.items():
        if name[:-1].endswith(("att.w", "att.a", "att.v", "att.g")) and name[-1] in "12":
            random[name] = torch.randn(32, 32, generator=torch.Generator().manual_seed(len(name))).half().float()
            assert x.shape != (32, 32) or ".g" in name
    torch.save(random, tmp_path / "a.pth")
    assert "BlinkDL's layout or web-rwkv's" in refusal(tmp_path / "a.pth", tmp_path / "b.st")
    assert "BlinkDL's layout or web-rwkv's" in refusal(tmp_path / "a.pth", tmp_path / "b.safetensors", dtype="float16")
    convert(tmp_path / "a.pth", tmp_path / "c.safetensors", dtype="bfloat16")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "a.st", "c.safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
@pytest.mark.parametrize("format", ALL)
def test_a_wrong_file_is_not_left(format, dtype, weights, tmp_path, monkeypatch):
    """A matrix that is written transposed, or a vector a little off, is found whatever the format rounds."""
    allowed = {
        "gguf": ("float32", "bfloat16", "float16", "q8_0"),
        "ggml": ("float32", "float16"),
        "webrwkv": ("float16",),
    }
    if dtype not in allowed.get(format, ("float32", "bfloat16", "float16")):
        pytest.skip("not a dtype of this format")
    torch.save({name: x + 1e-4 for name, x in weights("7").items()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", name_of(format, tmp_path, "right"), to=format, dtype=dtype)
    left = {path.name for path in tmp_path.iterdir()}
    cast = language_models._cast
    for part, change in (("1.att.key.weight", lambda x: x.T), ("1.att.x_k", lambda x: x * 1.01)):

        def wrong(tensors, *rest, part=part, change=change):
            tensors = cast(tensors, *rest)
            return tensors | {f"blocks.{part}": tensors[f"blocks.{part}"].map(change)}

        monkeypatch.setattr(language_models, "_cast", wrong)
        assert "not written: read again it is another model" in refusal(
            tmp_path / "a.pth", name_of(format, tmp_path), to=format, dtype=dtype
        )
        assert {path.name for path in tmp_path.iterdir()} == left


def test_what_rwkv_cpp_multiplies_elementwise_is_float32(weights, tmp_path):
    torch.save(weights("7"), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.bin", dtype="float16")
    kinds = {name: x.dtype for name, x in formats.read(tmp_path / "a.bin").tensors.items()}
    half = {re.sub(r"^blocks\.\d+\.", "", name) for name, dtype in kinds.items() if dtype == torch.float16}
    low_rank = {f"att.{name}{i}" for name in "wavg" for i in (1, 2)}
    matrices = {f"att.{name}.weight" for name in ("receptance", "key", "value", "output")}
    assert half == low_rank | matrices | {"ffn.key.weight", "ffn.value.weight", "emb.weight", "head.weight"}


def test_streamed_logits_are_those_of_the_model(version, weights, tmp_path):
    """What a conversion verifies itself with."""
    torch.save(weights(version), tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth")
    found = formats.read(tmp_path / "a.pth")
    tokens = torch.arange(1, 25)[None] * 7919 % 101
    with torch.inference_mode():
        expected = model(tokens)[0]
    torch.testing.assert_close(compute_logits(type(model), model.config, found.tensors), expected, rtol=0, atol=2e-5)


def test_a_tuned_state_stays_or_is_refused(weights, tmp_path):
    torch.save(weights("7", tuned=True), tmp_path / "a.pth")
    expected = read(tmp_path / "a.pth")
    for format in ("blinkdl", "safetensors", "heronry", "huggingface", "webrwkv"):
        convert(tmp_path / "a.pth", name_of(format, tmp_path), to=format)
        torch.testing.assert_close(read(name_of(format, tmp_path)), expected, rtol=0, atol=1e-5)
    for format in ("ggml", "gguf"):
        assert "tuned initial state" in refusal(tmp_path / "a.pth", name_of(format, tmp_path), to=format)


def test_a_constant_of_the_norm_stays(weights, tmp_path, caplog):
    for version in ("5.2", "6", "7"):
        torch.save(weights(version), tmp_path / "a.pth")
        heronry.save(heronry.load(tmp_path / "a.pth", ln_x_eps=1e-5), tmp_path / version)
        for format in (format for format in FOLDERS if (version, format) not in REFUSED):
            convert(tmp_path / version, tmp_path / f"{version}-{format}", to=format)
            assert heronry.load(tmp_path / f"{version}-{format}").config.ln_x_eps == pytest.approx(1e-5)
    assert caplog.messages == [  # RWKV-5 and 6 have a place for it
        f"heronry: {tmp_path / f'7-{format}'}: only heronry reads its ln_x_eps; for other programs it is another model"
        for format in ("huggingface", "fla")
    ]


def test_that_constant_on_the_command_line(weights, command, tmp_path):
    """--ln-x-eps goes into folders; what cannot hold it is not written."""
    torch.save(weights("7"), tmp_path / "a.pth")
    expected = heronry.load(tmp_path / "a.pth", ln_x_eps=1e-5)(TEXT)[0]
    for words in (("convert",), ("convert", "--to", "huggingface"), ("quantize",)):
        out = tmp_path / "-".join(words)
        code, _, err = command(words[0], tmp_path / "a.pth", out, *words[1:], "--ln-x-eps", "1e-5")
        assert code == 0, err
        assert heronry.load(out).config.ln_x_eps == pytest.approx(1e-5)
    assert (read(tmp_path / "convert") - expected).abs().max() < 1e-5
    left = {path.name for path in tmp_path.iterdir()}
    for suffix in ("pth", "safetensors", "st", "bin", "gguf"):
        code, _, err = command("convert", tmp_path / "a.pth", tmp_path / f"b.{suffix}", "--ln-x-eps", "1e-5")
        assert code == 2
        assert "not written: read again it is another model" in err or "ln_x_eps = 64e-5" in err
    assert {path.name for path in tmp_path.iterdir()} == left
    text = command("generate", "a", "-m", tmp_path / "a.pth", "--tokenizer", "bytes", "--ln-x-eps", "-1")[2]
    assert "ln_x_eps must be a positive number" in text


def test_notes_and_tokenizer_come_along(tmp_path):
    """The bundled model through every format that can hold them."""
    text = LLM().generate("Once upon a time", 20, temperature=0).text
    bundled = Path(heronry.__file__).parent / "bundled"
    for format in FOLDERS:
        convert(bundled, tmp_path / format, to=format)
        llm = LLM(tmp_path / format, dtype="float32")
        assert llm.generate("Once upon a time", 20, temperature=0).text == text
        assert (llm.chat_template, llm.opening) == ("story", [0])
    convert(bundled, tmp_path / "a.pth")
    with pytest.raises(InputError) as caught:
        LLM(tmp_path / "a.pth")
    assert str(caught.value) == (
        "no known tokenizer has 2048 ids: supply one with tokenizer= (for a copy of the bundled model: bundled)"
    )
    assert LLM(tmp_path / "a.pth", tokenizer="bundled").tokenizer.vocab_size == 2048
    assert LLM(tmp_path / "a.pth", tokenizer=bundled, dtype="float32").generate("One day", 5, temperature=0).text


def test_world_folders_have_the_vocabulary_as_llama_cpp_wants_it(weights, tmp_path):
    torch.save(weights("7", vocab=65536), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    text = (tmp_path / "hf" / "rwkv_vocab_v20230424.txt").read_text(encoding="utf-8")
    assert zlib.decompress(pack(text)) == zlib.decompress(FILE.read_bytes())
    lines = text.splitlines()
    assert lines[0] == "1 '\\x00' 1"
    assert lines[260] == "261 '\\n\\n' 2"
    assert "129 b'\\x80' 1" in lines
    torch.save(weights("7"), tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "other", to="huggingface")
    assert not (tmp_path / "other" / "rwkv_vocab_v20230424.txt").exists()


def test_shards(weights, tmp_path):
    torch.save(weights("7"), tmp_path / "a.pth")
    expected = read(tmp_path / "a.pth")
    for format in FOLDERS:
        folder = tmp_path / format
        convert(tmp_path / "a.pth", folder, to=format, shard=200_000)
        names = sorted(path.name for path in folder.glob("model-*.safetensors"))
        assert len(names) > 3
        assert all((folder / name).stat().st_size < 250_000 for name in names)
        assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(names)
        assert torch.equal(read(folder), expected)
        (folder / names[1]).rename(folder / "elsewhere")
        with pytest.raises(InputError, match=rf"{names[1]} is missing, one of {len(names)} files"):
            heronry.load(folder)
        (folder / names[1]).write_bytes((folder / "elsewhere").read_bytes()[:-100])
        with pytest.raises(InputError, match=rf"{names[1]}: damaged or truncated"):
            heronry.load(folder)


def test_broken_off_it_goes_on_with_what_is_finished(weights, tmp_path, monkeypatch):
    torch.save(weights("7"), tmp_path / "a.pth")
    written: list[str] = []
    write = safetensors_file.write

    def third_fails(tensors, path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(tensors, path, *rest)
        written.append(path.name)

    monkeypatch.setattr(safetensors_file, "write", third_fails)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.pth", tmp_path / "out", shard=200_000)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(safetensors_file, "write", lambda *args: (written.append(args[1].name), write(*args)))
    first = list(written)
    convert(tmp_path / "a.pth", tmp_path / "out", shard=200_000)
    assert not set(first) & set(written[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "out"]
    assert torch.equal(read(tmp_path / "out"), read(tmp_path / "a.pth"))


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_whole(weights, tmp_path):
    torch.save(weights("7", width=512, heads=8, ffn=2048, layers=6), tmp_path / "a.pth")
    command = [sys.executable, "-m", "heronry", "convert", str(tmp_path / "a.pth"), str(tmp_path / "out")]
    command += ["--shard", "0.004"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob(".out.part/model-*")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(read(tmp_path / "out"), read(tmp_path / "a.pth"))


@pytest.mark.parametrize("format", SUFFIXES.values())
def test_a_disk_that_is_full_in_the_middle_is_named(format, weights, tmp_path, monkeypatch):
    """At the end of a large file too, where torch and numpy say nothing of what the system has told them."""
    torch.save(weights("7", width=256, heads=4), tmp_path / "a.pth")
    whole, target = name_of(format, tmp_path, "whole"), name_of(format, tmp_path)
    size = convert(tmp_path / "a.pth", whole, dtype="float16").bytes
    kept, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (size // 2, size - 1000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
            with pytest.raises(InputError, match=rf"^{re.escape(str(target))}: cannot be written \(File too large\)$"):
                convert(tmp_path / "a.pth", target, dtype="float16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", whole.name}


@pytest.mark.slow
def test_memory_is_that_of_a_matrix(weights, tmp_path):
    """The whole is 40 MB; what is private to the process grows by less than a third."""
    torch.save(weights("7", width=384, heads=6, ffn=1536, layers=6), tmp_path / "a.pth")
    size = (tmp_path / "a.pth").stat().st_size
    convert(tmp_path / "a.pth", tmp_path / "warm.safetensors")
    process = psutil.Process()

    def private() -> int:
        return sum(region.anonymous for region in process.memory_maps(grouped=True))

    for format in ("safetensors", "huggingface", "gguf", "ggml"):
        before, most, last = private(), 0, 0

        def look(done: int, total: int) -> None:
            nonlocal most, last
            if done - last > 1 << 20:  # looking takes longer than writing
                most = max(most, private())
            last = done

        convert(tmp_path / "a.pth", name_of(format, tmp_path), to=format, progress=look)
        assert 0 < most < before + size / 3, (format, most - before, size)


def test_progress_adds_up(weights, tmp_path):
    torch.save(weights("6"), tmp_path / "a.pth")
    for format in ("blinkdl", "safetensors", "heronry"):
        calls: list[tuple[int, int]] = []
        convert(
            tmp_path / "a.pth", name_of(format, tmp_path), to=format, progress=lambda *x, calls=calls: calls.append(x)
        )
        assert calls == sorted(calls)
        assert {total for _, total in calls} == {calls[-1][0]}


def test_bad_input(weights, tmp_path, monkeypatch):
    torch.save(weights("7"), tmp_path / "a.pth")
    assert "no such file" in refusal(tmp_path / "none.pth", tmp_path / "b.pth")
    assert "no known format has the suffix .onnxx" in refusal(tmp_path / "a.pth", tmp_path / "b.onnxx")
    assert "unknown format 'zip'" in refusal(tmp_path / "a.pth", tmp_path / "b", to="zip")
    assert "is the source itself" in refusal(tmp_path / "a.pth", tmp_path / "a.pth")
    assert "dtype int8 is not supported" in refusal(tmp_path / "a.pth", tmp_path / "b.pth", dtype="int8")
    assert "web-rwkv's files are float16" in refusal(tmp_path / "a.pth", tmp_path / "b.st", dtype="float32")
    assert refusal(tmp_path / "a.pth", tmp_path / "b.gguf", dtype="q4_0") == (
        "GGUF files are written as float32, float16, bfloat16, q8_0, not q4_0; give one of them (--dtype)"
    )
    assert refusal(tmp_path / "a.pth", tmp_path / "b.bin", dtype="q8_0") == (
        "rwkv.cpp's files are float32 or float16, not q8_0; give one of them (--dtype)"
    )
    for dtype, message in ((torch.bfloat16, "float32 or float16, not bfloat16"), (torch.float8_e4m3fn, "give a dtype")):
        torch.save({name: x.to(dtype) for name, x in weights("7").items()}, tmp_path / "narrow.pth")
        assert message in refusal(tmp_path / "narrow.pth", tmp_path / "b.bin")
    for name in ("b.pth", "b.safetensors", "b.gguf", "b"):
        assert refusal(tmp_path / "narrow.pth", tmp_path / name) == (
            "its weights are float8_e4m3fn, in which models cannot compute; give a dtype (--dtype)"
        )
    (tmp_path / "narrow.pth").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "already exists" in refusal(tmp_path / "a.pth", tmp_path / "full")
    heronry.save(heronry.quantize(heronry.load(tmp_path / "a.pth"), "int8"), tmp_path / "packed")
    assert "its matrices are quantized" in refusal(tmp_path / "packed", tmp_path / "b.pth")
    huge = weights("7")
    huge["blocks.0.ffn.key.weight"] = huge["blocks.0.ffn.key.weight"] * 1e30
    torch.save(huge, tmp_path / "huge.pth")
    assert "float16 is too small" in refusal(tmp_path / "huge.pth", tmp_path / "b.pth", dtype="float16")
    monkeypatch.setattr(heronry.files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "has only 0 MB left" in refusal(tmp_path / "a.pth", tmp_path / "b.pth")
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("heronry.formats.safetensors_file.write", full)
    assert "cannot be written (No space left on device)" in refusal(tmp_path / "a.pth", tmp_path / "b.safetensors")
    for to in FOLDERS:
        assert "a model is saved as a folder; give a name without .pth" in refusal(
            tmp_path / "a.pth", tmp_path / "b.pth", to=to
        )
    left = {"a.pth", "full", "packed", "huge.pth"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_damage_is_named(weights, tmp_path):
    torch.save(weights("7"), tmp_path / "a.pth")
    for name in ("a.gguf", "a.bin", "a.st"):
        convert(tmp_path / "a.pth", tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for size in (12, 40, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:size])
            with pytest.raises(InputError) as caught:
                heronry.load(tmp_path / "cut")
            assert "truncated" in str(caught.value), (name, size)
            assert "\n" not in str(caught.value)
    header = bytearray((tmp_path / "a.bin").read_bytes())
    header[4:8] = (99).to_bytes(4, "little")
    (tmp_path / "b.bin").write_bytes(header)
    with pytest.raises(InputError, match="of version 99"):
        heronry.load(tmp_path / "b.bin")
    header[4:12] = (101).to_bytes(4, "little") + (102).to_bytes(4, "little")
    (tmp_path / "b.bin").write_bytes(header)
    with pytest.raises(InputError, match=r"its header says \(102, 128, 3\)"):
        heronry.load(tmp_path / "b.bin")
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "b.bin").write_bytes(whole + whole[24:])  # all tensors behind the header once more
    with pytest.raises(InputError, match=r"damaged rwkv\.cpp file \(emb\.weight occurs twice\)"):
        heronry.load(tmp_path / "b.bin")


def test_another_architecture(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="a GGUF file of the architecture 'llama'; supported are rwkv6, rwkv7"):
        heronry.load(tmp_path / "a.gguf")


def test_a_mislabelled_file_is_what_it_is(weights, tmp_path):
    torch.save(weights("7"), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model.bin", to="gguf")
    assert formats.read(tmp_path / "model.bin").format == "gguf"
    assert read(tmp_path / "model.bin").shape == (1, 9, 101)


def test_on_the_command_line(weights, tmp_path, capfd):
    torch.save(weights("7"), tmp_path / "a.pth")
    app(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.gguf"), "--dtype", "float16"], standalone_mode=False)
    assert "gguf, " in (message := capfd.readouterr().err)
    assert "logits of both: equal" in message
    app(["convert", str(tmp_path / "b.gguf"), str(tmp_path / "b")], standalone_mode=False)
    assert "heronry, " in capfd.readouterr().err
    assert load_file(tmp_path / "b" / "model.safetensors")["emb.weight"].dtype == torch.float16


def test_shapes_must_fit_what_a_file_says(weights, tmp_path):
    torch.save(weights("7"), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value, ours in (
        ("hidden_size", 256, "n_embd"),
        ("num_hidden_layers", 2, "n_layer"),
        ("vocab_size", 100, "vocab_size"),
        ("gate_low_rank_dim", 8, "gate_rank"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=rf"says {ours} = {value}, but the tensors say"):
            heronry.load(tmp_path / "hf")
    for change, complaint in (
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"norm_eps": 1e-6}, "epsilon 1e-06"),
        ({"hidden_act": "relu"}, "no other activation than sqrelu"),
        ({"sparse_channel_mix": True}, "a sparse channel mix is not supported"),
        ({"num_heads": 4}, "says dim_att = 256, but the tensors say 128"),
        ({"use_deep_embed": True}, "says deep_rank = 32, but the tensors say 0"),
        ({"attn": {"layers": [1]}}, "attention in some layers"),
        ({"model_type": "rwkv6"}, "rwkv"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=complaint):
            heronry.load(tmp_path / "hf")


def test_old_bin_folders_and_single_files_of_theirs(weights, tmp_path):
    """What the hub holds: pytorch_model.bin, one or several, and a file without its config.json."""
    torch.save(weights("4"), tmp_path / "a.pth")
    expected = read(tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    assert torch.equal(read(tmp_path / "alone.safetensors"), expected)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    assert torch.equal(read(tmp_path / "hf"), expected)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    places = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == file}, tmp_path / "hf" / file)
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(read(tmp_path / "hf"), expected)
    outside = dict.fromkeys(names, "../a.pth")
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(InputError, match="which is not a file of this folder"):
        heronry.load(tmp_path / "hf")


def test_tied_embeddings(weights, tmp_path):
    original = weights("4")
    original["head.weight"] = original["emb.weight"].clone()
    torch.save(original, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match=r"head\.weight"):
        heronry.load(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(read(tmp_path / "hf"), read(tmp_path / "a.pth"))


def test_the_mixes_of_early_goose_repositories(weights, tmp_path):
    """attn.x_x holds all six."""
    torch.save(weights("7"), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="fla")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for i in range(3):
        mixes = [tensors.pop(f"model.layers.{i}.attn.x_{name}").flatten() for name in "rwkvag"]
        tensors[f"model.layers.{i}.attn.x_x"] = torch.stack(mixes)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert torch.equal(read(tmp_path / "hf"), read(tmp_path / "a.pth"))
