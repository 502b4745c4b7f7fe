"""`heronry compare`: equal sizes, the same bytes for all, states of the right size, one page."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from heronry import InputError
from heronry.bench import comparison
from heronry.bench.comparison import compare, pictures, table
from heronry.bench.equal_models import NAMES, build_model, count_parameters, equal_configs, with_positions
from heronry.bench.learning import HELD_OUT, check_text, compare_learning, standard_library
from heronry.bench.plan import QUICK, Plan
from heronry.bench.speed import Decoder, Decoding, Learner, Training, compare_decoding, compare_training, state_bytes

TINY = Plan(1, 64, (16, 64), 2, (16, 32), 64, 1, 32, 2, 3, eval_rows=2)
CONFIGS = equal_configs(TINY.layers, TINY.width, TINY.context)
TEXT = b"To be, or not to be, that is the question. " * 200


@pytest.mark.parametrize("plan", [Plan(), QUICK])
def test_equal_parameters(plan):
    configs = equal_configs(plan.layers, plan.width, plan.context)
    sizes = {name: count_parameters(name, config) for name, config in configs.items()}
    assert tuple(sizes) == NAMES
    assert all(abs(n / sizes["RWKV-7"] - 1) < 0.03 for n in sizes.values()), sizes
    assert all(abs(n / sizes["RWKV-7"] - 1) < 0.005 for name, n in sizes.items() if name != "LSTM"), sizes


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_state(name):
    """In floats of 4 bytes. That of the others does not depend on the position."""
    decoder = Decoder(name, with_positions(CONFIGS[name], 100))
    decoder.load()
    for position in TINY.positions:
        decoder.decode(position, 3)()
    width, layers = TINY.width, TINY.layers
    floats = {
        "RWKV-7": lambda _: layers * (2 * width + width * 64),
        "RWKV-6": lambda _: layers * (2 * width + width * 64),
        "RWKV-5.2": lambda _: layers * (2 * width + width * 64),
        "RWKV-4": lambda _: layers * (2 * width + 3 * width),
        "GPT": lambda position: layers * 2 * position * width,
        "AFT-full": lambda position: layers * 2 * position * width,
        "AFT-simple": lambda _: layers * 3 * width,
        "LSTM": lambda _: 2 * 2 * CONFIGS["LSTM"].hidden,
    }[name]
    assert decoder.own_sizes == {f"state at {position}": 4 * floats(position) for position in TINY.positions}


@torch.inference_mode()
def test_the_state_of_a_position_has_read_so_many_tokens(monkeypatch):
    """RWKV's is what reading them at once gives; a GPT's cache gives its token the right position."""
    seen = []
    monkeypatch.setattr("heronry.bench.speed.PIECE", 7)
    monkeypatch.setattr(torch, "randint", lambda high, size: seen.append(torch.ones(size).long()) or seen[-1])
    decoder = Decoder("RWKV-7", CONFIGS["RWKV-7"])
    decoder.load()
    decoder.decode(16, 1)
    decoder.decode(40, 1)
    _, expected = decoder.model(torch.ones(1, 40).long())
    for x, y in zip(decoder.state.layers[0], expected.layers[0], strict=True):
        torch.testing.assert_close(x, y)
    gpt = Decoder("GPT", CONFIGS["GPT"])
    gpt.load()
    (cache,) = gpt._state_at(40, 3)
    assert (cache.length, cache.written, cache.buffers[0].shape) == (40, [40], (1, 1, 43, 64))


@torch.inference_mode()
def test_every_block_reads_at_the_same_position(monkeypatch):
    """The cache is neither copied nor longer after a block."""
    decoder = Decoder("GPT", CONFIGS["GPT"])
    decoder.load()
    lengths = []
    job = decoder.decode(16, 3)
    model = decoder.model

    def spy(step, state):
        logits, after = model(step, state)
        lengths.append((state[0].length, after[0].buffers[0].data_ptr()))
        return logits, after

    decoder.model = spy
    job()
    job()
    assert [length for length, _ in lengths] == [16, 17, 18] * 2
    assert len({place for _, place in lengths}) == 1


def test_workers_time_and_weigh_every_position():
    configs = {"GPT": CONFIGS["GPT"]}
    calls = []
    found = compare_decoding(TINY, configs, lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 10) for i in range(10)]  # 2 positions: loading, 2 + 2 blocks
    assert found.state_bytes["GPT"].tolist() == [2 * 4 * 64 * 16, 2 * 4 * 64 * 64]
    assert (found.seconds["GPT"] > 0).all()
    assert 0 < found.slowdown["GPT"] < 100
    assert found.plain_seconds == {}


@pytest.mark.slow
def test_a_step_of_training_weighs_its_activations():
    found = compare_training(TINY, {"GPT": CONFIGS["GPT"]})
    assert found.contexts.tolist() == [16, 32]
    assert (found.seconds["GPT"] > 0).all()
    if sys.platform == "linux":
        gradients = 4 * count_parameters("GPT", CONFIGS["GPT"])
        assert (found.peak_bytes["GPT"] > gradients / 2).all()
        assert (found.peak_bytes["GPT"] < 1e8).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_has_all_gradients(name):
    learner = Learner(name, with_positions(CONFIGS[name], 16))
    learner.load()
    learner.model.zero_grad = lambda: None  # keeps them
    learner.step(2, 16)()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.model.parameters())


@pytest.mark.slow
def test_a_model_that_fails_is_named():
    broken = replace(CONFIGS["GPT"], head_size=48)
    with pytest.raises(InputError, match=r"^decoding, GPT 16: .*divide into heads of 48$"):
        compare_decoding(TINY, {"GPT": broken})


def test_all_learn_from_the_same_bytes(tmp_path):
    """The same model under two names learns the same; the first loss is that of a guess."""
    configs = {"a": CONFIGS["GPT"], "b": CONFIGS["GPT"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heronry.bench.learning.build_model", lambda name, config: build_model("GPT", config))
        found = compare_learning(TINY, configs, TEXT, tmp_path)
    assert found.tokens.tolist() == [64, 128, 192]
    assert found.bits["a"].tolist() == found.bits["b"].tolist()
    assert found.held_out["a"] == found.held_out["b"]
    assert found.bits["a"][0] == pytest.approx(8, abs=0.2)
    assert found.held_out["a"] < found.bits["a"][0]
    assert min(found.seconds.values()) > 0
    cut = len(TEXT) - len(TEXT) // HELD_OUT
    assert (tmp_path / "train.bin").read_bytes() == TEXT[:cut]
    assert (tmp_path / "eval.bin").read_bytes() == TEXT[cut:]


def test_held_out_bits_are_those_of_its_windows(tmp_path):
    """Against cross entropies of all windows of the end, which is one window long."""
    text = TEXT[: 20 * 33]
    found = compare_learning(TINY, {"LSTM": CONFIGS["LSTM"]}, text, tmp_path)
    from heronry.bench.learning import _settings
    from heronry.train.trainer import Trainer

    files = {name: tmp_path / name for name in ("train", "eval")}
    trainer = Trainer(
        _settings(TINY, files, tmp_path / "again"), quiet=True, model=build_model("LSTM", CONFIGS["LSTM"])
    )
    for _ in range(TINY.steps):
        trainer.train_step()
    window = torch.tensor(list(text[-33:]))
    with torch.no_grad():
        log_probabilities = trainer.model(window[None, :-1])[0][0].double().log_softmax(-1)
    bits = -log_probabilities[torch.arange(32), window[1:]].mean().item() / math.log(2)
    assert found.held_out["LSTM"] == pytest.approx(bits, rel=1e-5)


def test_the_standard_library():
    text = standard_library()
    assert 2e6 < len(text) < 3e7
    places = [text.index(words) for words in (b"class ArgumentParser(", b"class JSONDecoder(", b"class ZipFile:")]
    assert places == sorted(places)
    assert b"CYRILLIC CAPITAL LETTER IO" not in text  # the tables of encodings
    assert b"class BaseTaskTests" not in text  # the tests of asyncio


def test_a_text_that_is_too_short():
    assert check_text(b"x" * 20 * 33, TINY, "x.txt")
    with pytest.raises(InputError, match=r"^x.txt: 659 bytes are too few to train on; give a text of 660$"):
        check_text(b"x" * 659, TINY, "x.txt")


def measured(monkeypatch) -> comparison.Comparison:
    """A comparison with numbers that are made up; two models really learn."""
    two = {"RWKV-7": CONFIGS["RWKV-7"], "GPT": CONFIGS["GPT"]}
    monkeypatch.setattr(comparison, "equal_configs", lambda *_: two)

    def numbers(first, last):
        return {"RWKV-7": np.array([first, first]), "GPT": np.array([first, last])}

    monkeypatch.setattr(
        comparison,
        "compare_decoding",
        lambda plan, *_: Decoding(
            np.array(plan.positions),
            numbers(1e-3, 50e-3),
            numbers(2000, 8_000_000),
            {"RWKV-7": 1.0, "GPT": 49.9},
            {"RWKV-7": 3e-3},
        ),
    )
    monkeypatch.setattr(
        comparison,
        "compare_training",
        lambda plan, *_: Training(np.array(plan.contexts), numbers(1e-5, 4e-5), numbers(1e6, math.nan)),
    )
    return compare(TINY, TEXT, "</script> & a te\udcfft")  # a name that is not UTF-8


def test_the_report(monkeypatch):
    found = measured(monkeypatch)
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))
    assert figures["decoding"]["slowdown"] == {"RWKV-7": 1.0, "GPT": 49.9}
    assert figures["training"]["peak_bytes"]["GPT"] == [1e6, None]
    assert figures["models"]["GPT"]["parameters"] == count_parameters("GPT", CONFIGS["GPT"])
    assert figures["models"]["GPT"]["dim_ffn"] == CONFIGS["GPT"].dim_ffn
    assert figures["text"]["bytes"] == len(TEXT)
    head, *rows = table(found)
    assert {len(row) for row in rows} == {len(head)}
    assert rows[1][:8] == ["GPT", "95,616", "2", "8,000", "1", "50", "49.90", ""]
    assert rows[0][:8] == ["RWKV-7", "95,616", "2", "2", "1", "1", "1.00", "3"]
    drawn = pictures(found)
    assert [picture.figure.get_size_inches()[0] for picture in drawn] == [12, 12, 12]  # 1200 pixels
    titles = [axis.get_title() for picture in drawn for axis in picture.figure.axes]
    assert titles[0] == "Time for a token, position 64 over position 16:\nRWKV 1.00, GPT 50"
    assert titles[1] == "Memory, position 64 over position 16:\nRWKV 1.00, GPT 4,000"
    assert all(axis.get_xlabel() for picture in drawn for axis in picture.figure.axes)


def test_the_command(monkeypatch, tmp_path, command, one_thread):
    found = measured(monkeypatch)
    monkeypatch.setattr(comparison, "compare", lambda *_: found)
    monkeypatch.chdir(tmp_path)
    code, out, err = command("compare", "--quick")
    assert (code, out) == (0, ""), err
    assert err == (
        "compare.html: at position 8,192 a token takes RWKV at most 1.00 times as long as at 64, GPT 49.90 times\n"
    )
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<img ") == 3
    assert page.count("<tr>") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data) == found.figures()
    assert "&lt;/script&gt; &amp; a te?t" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.png"], "x.png: a comparison is an .html page"),
        (["--out", "x.pdf"], "x.pdf: unknown ending"),
        (["--out", "there.html"], "there.html: already exists; replace it with --force"),
        (["--text", "short.txt"], "short.txt: 9 bytes are too few to train on; give a text of 5,140"),
        (["--out", "short.txt/x.html"], "short.txt"),
        (["--text", "missing.txt"], "missing.txt: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input(words, message, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short")
    (tmp_path / "there.html").write_text("what was here before")
    code, out, err = command("compare", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"heronry: {message}")
    assert err.count("\n") == 1
    assert (tmp_path / "there.html").read_text() == "what was here before"


def test_no_matplotlib(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command("compare") == (2, "", "heronry: drawings need matplotlib: pip install 'heronry[plots]'\n")


@pytest.mark.slow
def test_every_part_of_every_model():
    found = compare(TINY, TEXT, "a text")
    assert json.dumps(found.figures(), allow_nan=False)
    assert [row[0] for row in table(found)[1:]] == list(NAMES)
    assert len(pictures(found)) == 3
    model = build_model("RWKV-7", CONFIGS["RWKV-7"])
    assert found.decoding.state_bytes["RWKV-7"].tolist() == [state_bytes(model.initial_state())] * 2


@pytest.mark.slow
def test_the_quick_comparison(command, monkeypatch, tmp_path):
    """Of RWKV nothing grows, of the GPT the memory does; times are not judged on a machine that does other things."""
    monkeypatch.chdir(tmp_path)
    code, _, err = command("compare", "--quick")
    assert code == 0, err
    page = (tmp_path / "compare.html").read_text()
    figures = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    for name, size in figures["decoding"]["state_bytes"].items():
        assert size[-1] == size[0] * (128 if name in ("GPT", "AFT-full") else 1)
    held_out = figures["learning"]["held_out"]
    assert all(2 < bits < 5 for bits in held_out.values()), held_out
    assert held_out["RWKV-7"] < held_out["LSTM"]
