"""`heronry view`: files with pictures in them, and one line for what cannot be drawn."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from heronry import LLM, save
from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_miss
from heronry.checkpoint import assemble
from heronry.cli.view import NAMES, PLACE, STORY
from heronry.view.text_figures import _shown, draw_cascade, draw_decay_curves, draw_difference, draw_reads
from heronry.view.views import VIEWS, Look, view_memory


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, one_thread):
    """Files are written beside the user."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)


@pytest.mark.parametrize("name", ["decay", "reads", "state", "knockout", "lens"])
def test_a_picture_beside_you(name, here, command):
    code, out, err = command("view", name)
    assert (code, out) == (0, ""), err
    assert err.startswith(f"{name}.png: ")
    drawn = picture((here / f"{name}.png").read_bytes())
    assert drawn.shape[1] == 1200
    assert drawn.std() > 20  # not one colour
    code, _, err = command("view", name)
    assert (code, err) == (2, f"heronry: {name}.png: already exists; replace it with --force\n")


def test_two_states_are_compared(here, command):
    code, _, err = command("view", "state", "--prompt", "A cat.", "--against", "A dog.", "--out", "two.png")
    assert (code, err) == (0, "two.png: How far apart the states after “A cat.” and “A dog.” are, head by head.\n")
    assert picture((here / "two.png").read_bytes()).std() > 20


def test_what_is_quoted_stays_on_one_line(here, command):
    code, _, err = command("view", "state", "--prompt", "A\ncat. " * 30, "--against", "A\tdog.", "--out", "two.html")
    assert code == 0
    assert (
        err == f"two.html: How far apart the states after “…{('A⏎cat. ' * 30)[-99:]}” and “A⇥dog.” are, head by head.\n"
    )


def test_flow_finds_the_hero(here, command):
    """Noise on the name takes the answer away; the token of the name brings it back."""
    code, _, err = command("view", "flow", "--out", "flow.svg")
    assert code == 0, err
    before, after = (float(x) for x in re.search(r"“ Tim” from (\S+)% to (\S+)%", err).groups())
    assert before > 40 > 5 > after
    assert (here / "flow.svg").read_text().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cascade", "memory"])
def test_long_texts(name, here, command):
    assert command("view", name, "--out", f"{name}.html")[0] == 0
    page = (here / f"{name}.html").read_text()
    assert page.count("<img ") == (2 if name == "cascade" else 1)


def test_one_page_with_everything(here, command, random_checkpoint):
    """The report of a model without heads leaves out what it lacks; nothing is loaded from elsewhere."""
    save(assemble(random_checkpoint("4", vocab=256)), here / "four")
    (here / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    options = ("--model", "four", "--tokenizer", "bytes", "--text", "text.txt")
    code, _, err = command("view", "report", *options)
    assert code == 0, err
    page = (here / "report.html").read_text()
    assert page.count("<figure><div>") == len(VIEWS) - 1  # each scrolls sideways on a phone
    assert "without state: RWKV-4 keeps two sums a channel" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_a_model_of_bytes_writes_its_own_texts(here, command, random_checkpoint, monkeypatch):
    """No token starts its texts, so they go on from the prompt. All are different."""
    monkeypatch.setattr("heronry.cli.view.LENGTH", 64)
    seen = []
    monkeypatch.setitem(VIEWS, "memory", lambda look: seen.extend(look.texts) or view_memory(look))
    save(assemble(random_checkpoint("5.2", vocab=256)), here / "five")
    code, _, err = command("view", "memory", "--model", "five", "--tokenizer", "bytes", "--out", "p.html")
    assert code == 0, err
    page = (here / "p.html").read_text()
    assert "the loss at every position of 16 texts of 64 tokens" in page
    assert "\ntext: what the model writes itself" in page
    assert len({tuple(text) for text in seen}) == 16
    assert "prompt:" not in page  # which memory does not read


def test_noise_that_changes_nothing(here, command):
    code, _, err = command("view", "flow", "--prompt", "Once upon a time", "--subject", "Once", "--answer", " zebra")
    assert code == 0
    assert "The answer does not rest on the subject: there is little to put back." in err


def test_a_model_with_an_adapter(here, command, random_checkpoint):
    """Merged, or beside packed weights; the page says that it is there."""
    model = assemble(random_checkpoint("7", vocab=256, width=64, heads=2, ffn=64))
    save(model, here / "seven")
    inject_miss(model, rank=4)
    for name, p in model.named_parameters():
        if "miss" in name:
            torch.nn.init.ones_(p)
    save_adapter(model, here / "adapter")
    words = ("view", "knockout", "--model", "seven", "--tokenizer", "bytes", "--prompt", "To be")
    pages = []
    for i, options in enumerate(((), ("--adapter", "adapter"), ("--adapter", "adapter", "--quantize", "int8"))):
        code, _, err = command(*words, *options, "--out", f"{i}.html")
        assert code == 0, err
        page = (here / f"{i}.html").read_text()
        assert ("\nadapter: adapter" in page) == (i > 0)
        pages.append(re.findall(r"base64,([^\"]+)", page)[0])
    assert len({*pages}) == 3


@pytest.mark.slow
def test_a_report_of_a_prompt_without_a_subject(here, command, random_checkpoint):
    """It has no causal tracing, which needs one, and no cascade, which needs a longer text, and says so."""
    save(assemble(random_checkpoint("7", vocab=256)), here / "seven")
    (here / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    words = ("report", "--model", "seven", "--tokenizer", "bytes", "--text", "text.txt", "--prompt", "To be")
    code, _, err = command("view", *words)
    assert code == 0, err
    page = (here / "report.html").read_text()
    assert page.count("<figure>") == len(VIEWS) - 2
    for text in (err, page):
        assert "without flow: name the part of the prompt that gets noise with --subject" in text
        assert "without cascade: cascade needs a text of 1024 tokens, got 860" in text


@pytest.mark.slow
def test_an_animation(here, command):
    (here / "text.txt").write_text("Once there was a cat. " * 200)
    assert command("view", "cascade", "--text", "text.txt", "--out", "c.gif")[0] == 0
    assert Image.open(here / "c.gif").n_frames > 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reeds"], "unknown view 'reeds'"),
        (["flow", "--subject", "Sue"], "the prompt does not contain the subject 'Sue'"),
        (["flow", "--prompt", "Hello there"], "name the part of the prompt that gets noise with --subject"),
        (
            ["memory", "--text", "short.txt", "--recalled", ""],
            "memory needs a --fact, a --question and what should be --recalled",
        ),
        (["memory", "--text", "short.txt", "--fact", ""], "memory needs a --fact"),
        (["state", "--against", ""], "--against is too short: it needs at least two tokens"),
        (["reads", "--prompt", ""], "the prompt is too short: it needs at least two tokens"),
        (["reads", "--out", "reads.pdf"], "reads.pdf: unknown ending; pictures are written as .png, .svg, .html, .gif"),
        (["reads", "--out", "reads.gif"], "nothing moves in this picture"),
        (["report", "--out", "all.png"], "all.png: a report is an .html page"),
        (["cascade", "--text", "short.txt"], "cascade needs a text of 1024 tokens"),
        (["memory", "--text", "missing.txt"], "missing.txt"),
        (["memory", "--text", "short.txt"], "memory needs a text of 64 tokens, got 5: give a longer --text"),
        (["lens", "--subject", "Tim"], "--subject is for flow; lens does not look at it"),
        (["reads", "--text", "short.txt"], "--text is for memory and cascade; reads does not look at it"),
        (["reads", "--out", "/proc/heronry/x.png"], "/proc/heronry"),
        (["state", "--model", "four", "--tokenizer", "bytes"], "RWKV-4 keeps two sums a channel"),
    ],
)
def test_bad_input(words, message, here, command, random_checkpoint):
    (here / "short.txt").write_text("Too short.")
    if "four" in words:
        save(assemble(random_checkpoint("4", vocab=256)), here / "four")
    if "seven" in words:
        save(assemble(random_checkpoint("7", vocab=256)), here / "seven")
    code, out, err = command("view", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not any(path.suffix in (".png", ".html", ".svg", ".gif") for path in here.iterdir())


def test_words_that_fonts_lack_are_shown(here, command, recwarn):
    """Parts of characters, formulas, invisible characters and pictographs: no warning, and nothing lost."""
    text = "你 $a$ \\ \x1b\r\n 🙂𝄞 <b>"
    code, _, err = command("view", "reads", "--prompt", text, "--out", "r.html")
    assert (code, err.count("\n")) == (0, 1), err
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]
    assert _shown("\x1b\n") == "U+001B⏎"
    assert _shown("  ") == "␣␣"
    assert _shown("a$b$") == r"a\$b\$"
    assert _shown("\U0010fffd") == "U+10FFFD"


def test_the_subject_is_found_by_characters():
    """A pictograph is four tokens here; with the noise on a part of them, the rest would still say what it was."""
    bundled = LLM()
    look = Look(bundled.model, bundled.tokenizer, [0], "é 🙂 Tim 🙂Tim", subject="🙂")
    assert look.labels[:3] == ["", "é 1/2", "é 2/2"]
    assert [look.labels[i] for i in look.subject_positions()] == [f"🙂 {i}/4" for i in (1, 2, 3, 4)] * 2
    assert len(look.labels) == len(look.tokens)
    look = Look(bundled.model, bundled.tokenizer, [0], "One day, Tim", subject="im")
    assert look.subject_positions() == [len(look.tokens) - 1]
    look = Look(bundled.model, bundled.tokenizer, [0], "One day, Tim", subject="One")
    assert look.subject_positions() == [1]


@pytest.mark.slow
def test_a_large_model_stays_readable():
    """48 layers, many heads, and more tokens than an axis has room for."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(61), (48, 2, 61)).astype(np.float32)
    top, *_ = draw_reads(shares, ["a"] * 61).findobj(Axes)
    assert len(top.get_yticklabels()) == 48  # layers, not heads
    assert top.images[0].norm.vmin == 1e-4
    steps = np.arange(48)[:, None] + np.arange(8)
    grid, _ = draw_cascade(steps, [32], [1.0], [0.5]).axes
    assert "Cells of the same colour" in grid.get_title()
    assert not grid.texts
    assert draw_difference(np.zeros((48, 64)), "a", "b").get_figwidth() == 12
    curves = draw_decay_curves(np.full((2, 8), 2.3), None, None, {"ffn k": np.zeros((2, 8))}).axes[0]
    assert curves.get_ylim() == (1, 10)
    curves.figure.draw_without_rendering()
    assert not any(label.get_text() for label in curves.get_yticklabels(minor=True))  # "3e-1" on "4e-1"


def test_no_matplotlib(here, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command("view", "reads") == (2, "", "heronry: drawings need matplotlib: pip install 'heronry[plots]'\n")


def test_names_and_defaults():
    assert {*NAMES} == {*VIEWS, "report"}
    assert STORY.keys() == PLACE.keys()
