"""`heronry chat` in a terminal."""

from __future__ import annotations

import re
import signal
import stat
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")

if sys.platform != "win32":
    from terminal import STYLE, Terminal


@pytest.fixture
def chat(tmp_path):
    """Starts a chat with the bundled model: chat(*options, columns=60)."""
    started = []

    def start(*options: str, **settings) -> Terminal:
        words = ("-m", "heronry", "chat", "--seed", "1", "--max-tokens", "40", *options)
        terminal = Terminal(*words, XDG_STATE_HOME=str(tmp_path), **settings)
        started.append(terminal)
        terminal.wait(">")
        return terminal

    yield start
    for terminal in started:
        terminal.kill()


def test_a_talk(chat, tmp_path):
    terminal = chat()
    assert "rwkv7, 3.82 M parameters, float32 on cpu; template story" in terminal.text.replace("\n", "")
    terminal.paste("Tell me a story\nabout a dog\nand a bird")
    terminal.wait("bird")
    terminal.type("\r")
    terminal.wait("40 tokens, ")
    terminal.wait(" tokens/s; cut at max_tokens, /set max_tokens")
    terminal.wait("80 allows more")
    terminal.wait(">")
    terminal.type("/hist\t")
    terminal.wait("ory")
    terminal.type("\r")
    shown = terminal.wait("assistant:")
    assert "user: Tell me a story\n  about a dog\n  and a bird" in shown  # one message
    assert shown.count("user:") == 1
    terminal.wait(">")

    terminal.type("/set temp\t")
    terminal.wait("erature")
    terminal.type(" 0\r")
    terminal.wait(">")
    terminal.type("/set\r")
    assert "temperature 0.0" in terminal.wait("max_tokens 40")
    terminal.wait(">")
    terminal.type("/set top_p much\r")
    terminal.wait("top_p must be a number, got 'much'")
    terminal.wait(">")

    terminal.type("/clear\r")
    terminal.wait("a new branch, 2; /switch main goes back")
    terminal.wait("2 >")
    terminal.type("/undo\r")
    terminal.wait("nothing was said yet")
    terminal.wait("2 >")
    terminal.type("/system Be kind.\r")
    terminal.wait(">")
    terminal.type("/history\r")
    terminal.wait("system: Be kind.")
    terminal.wait(">")
    terminal.type("/quit\r")
    assert terminal.end() == 0  # errors were seen

    history = tmp_path / "heronry" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+Tell me a story\n+about a dog\n+and a bird\n" in history.read_text()

    later = chat()
    later.type("\x1b[A")  # the last line of the session before
    later.wait("/quit")
    later.type("\x03")  # Ctrl-C discards the line
    later.wait("leave with Ctrl-D or /quit")
    later.wait(">")
    later.type("exit\r")
    assert later.end() == 0


@pytest.mark.slow
def test_an_answer_is_wrapped_between_words(chat):
    terminal = chat("--max-tokens", "120", columns=40)
    terminal.type("Tell me a story about a frog\r")
    terminal.wait("tokens/s", 120)
    terminal.wait(">")
    terminal.type("/history\r")
    terminal.wait("assistant: ")
    told = " ".join(terminal.wait(">").split())
    terminal.type("\x04")
    assert terminal.end() == 0
    rows = re.split(r"\r|\n|\x1b\[[0-9]*[A-K]", terminal.raw)  # the answer is drawn again with every piece
    lines = [STYLE.sub("", row).rstrip() for row in rows]
    words = set(told.split())
    answer = [line for line in lines if len(line) > 20 and set(line.split()) <= words]
    assert len(answer) > 4  # whole words only
    assert max(map(len, lines)) <= 40


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_not_the_talk(chat):
    terminal = chat("--max-tokens", "100000", "--temperature", "1.5", "--top-p", "1")
    terminal.type("Hello\r")
    terminal.wait("Hello")
    terminal.wait("t")  # of the answer
    terminal.type("\x03")
    terminal.wait("tokens/s")
    terminal.wait(">")
    terminal.type("/quit\r")
    assert terminal.end() == 0


@pytest.mark.slow
def test_what_is_typed_during_an_answer_does_not_disturb_it(chat):
    """Neither "^C" nor letters are shown by the terminal."""
    terminal = chat("--max-tokens", "100000", "--temperature", "1.5", "--top-p", "1")
    terminal.type("Hello\r")
    terminal.wait("Hello")
    terminal.wait("t")
    terminal.type("zqzqzq")
    terminal.wait("e")
    assert "zqzq" not in terminal.text
    terminal.type("\x03")
    terminal.wait("tokens/s")
    assert "^C" not in terminal.text
    terminal.wait(">")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_sigterm_at_the_prompt(chat):
    terminal = chat()
    terminal.signal(signal.SIGTERM)
    assert terminal.end() == 143
    assert "heronry: terminated" in terminal.text


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_talk(chat):
    terminal = chat()
    terminal.type("Hello\r")
    terminal.wait("tokens/s")
    terminal.wait(">")
    terminal.type("/save /dev/full\r")
    terminal.wait("/dev/full: already exists; choose another name")
    terminal.wait(">")
    terminal.type("/save /proc/talk\r")
    terminal.wait("No such file or directory")
    terminal.wait(">")
    terminal.type("/history\r")
    terminal.wait("user: Hello")
    terminal.wait(">")
    terminal.type("\x04")
    assert terminal.end() == 0
