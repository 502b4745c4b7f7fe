"""What people expect of a command line: --json, --force, one line for a typing error, lines in a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import refused

import heronry
from heronry import LLM, State, catalog
from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_adapter
from heronry.bench.topics import TOPICS
from heronry.cli import app as app_file
from heronry.cli.chat_loop import SETTINGS, Loop
from heronry.cli.info import describe
from heronry.cli.signals import Terminated
from heronry.convert import target_formats
from heronry.engine.chat import Chat
from heronry.engine.completion import Usage
from heronry.errors import unknown_name
from heronry.text import jinja_process
from heronry.text.chat_templates import TEMPLATES
from heronry.text.terminal import printable

pytestmark = pytest.mark.usefixtures("own_folders")


# Typing


def test_nothing_at_all_shows_the_help(command):
    assert command() == command("--help")
    assert command()[1].count("\n") > 20


def test_version_and_short_help(command):
    assert command("--version") == (0, f"heronry {heronry.__version__}\n", "")
    assert command("-h") == command("--help")
    assert "--install-completion" in command("-h")[1]
    assert command("generate", "-h")[1] == command("generate", "--help")[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --hlp", "No such option"),
        ("generate x --max-tokens many", "--max-tokens"),
        ("generate x --threads 0", "--threads"),
        ("generate a b", "unexpected extra argument"),
        ("convert a", "Missing argument"),
        ("gnerate x", "No such command 'gnerate'; did you mean generate? See heronry --help\n"),
        ("quit", "No such command 'quit'; see heronry --help\n"),
        (
            "generate x --temprature 2",
            "option: --temprature; did you mean --temperature? See heronry generate --help\n",
        ),
        ("generate x --zzz", "No such option: --zzz; see heronry generate --help\n"),
        ("generate", "give a PROMPT, - to read it from standard input, or --prompt-file"),
        ("generate x --prompt-file y", "give a PROMPT or --prompt-file, not both"),
        ("info a --model b", "give FILE or --model, not both"),
        ("generate x --model bundled --max-tokens -3", "heronry: --max-tokens must be a whole number"),
        ("generate x --top-p 2", "heronry: --top-p must be"),
        ("generate x --order up", "heronry: --order must be"),
        ("generate x --threads 1025", "--threads"),
        ("generate x --threads 999999999999999999999999", "--threads"),
        ("convert a b --shard nan", "--shard must be a number of GB from 1e-9 to 1e9, got nan"),
        ("convert a b --shard inf", "--shard must be a number of GB from 1e-9 to 1e9, got inf"),
        ("convert a b --shard -1", "--shard must be a number of GB from 1e-9 to 1e9, got -1.0"),
        ("see p.png", "heronry: name a model of pictures with --model; docs/vision.md says which there are"),
    ],
)
def test_a_typing_error_is_one_line(command, line, message):
    refused(command(*line.split()), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --state ''", "Invalid value for '--state': a path must not be empty; see heronry generate --help"),
        ("generate x --adapter ''", "Invalid value for '--adapter': a path must not be empty"),
        ("generate --prompt-file ''", "Invalid value for '--prompt-file': a path must not be empty"),
        ("generate x -m ''", "the name of a model must not be empty"),
        ("generate x -m bundled --tokenizer ''", "tokenizer must be a name, a path or a Tokenizer, got ''"),
        ("chat --session ''", "Invalid value for '--session': a path must not be empty"),
        ("chat --template ''", "unknown chat template ''"),
        ("info ''", "the name of a model must not be empty"),
        ("info --model ''", "the name of a model must not be empty"),
        ("convert bundled ''", "a path must not be empty"),
        ("convert '' x", "the name of a model must not be empty"),
        ("quantize bundled ''", "a path must not be empty"),
        ("merge bundled '' x", "a path must not be empty"),
        ("eval ''", "Invalid value for 'FILES': a path must not be empty"),
        ("eval x ''", "Invalid value for 'FILES': a path must not be empty"),
        ("see '' -m v", "Invalid value for 'PICTURES': a path must not be empty"),
        ("data '' -o x", "the name of a text must not be empty"),
        ("data x -o ''", "Invalid value for '--out' / '-o': a path must not be empty"),
        ("data x -o x --tokenizer ''", "the name of a tokenizer must not be empty"),
        ("bench machine --json ''", "Invalid value for '--json': a path must not be empty"),
    ],
)
def test_an_empty_name_is_not_the_current_folder(command, line, message):
    """A variable of the shell that is not set."""
    refused(command(*shlex.split(line)), message)
    assert not list(Path().iterdir())


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_control_characters_on_a_terminal(command, folder, monkeypatch):
    """What a model writes and how files are called can neither move the cursor nor set a title; a pipe gets all."""
    evil = "a\x1b]0;owned\x07b\x9b2Jc\rd\n\te\x7f"
    piece = heronry.Completion(evil, [1], "stop", None, Usage(1, 1), make_state=lambda: None)
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: iter([piece]))
    words = ("generate", "x", "-m", folder / "m.pth")
    assert command(*words) == (0, evil + "\n", "")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert command(*words)[0] == 0
    assert screen.getvalue() == "a␛]0;owned␇b\ufffd2Jcd\n\te␡\n"
    Path("evil\x1b[2J").mkdir()
    monkeypatch.undo()
    refused(command("info", f"{Path().resolve()}/evil\x1b[2J"), "evil␛[2J: ")


def test_messages_speak_of_options():
    names = ("max_tokens", "tokenizer", "stop", "alpha")
    for message, expected in [
        (
            "its weights are float8; give a dtype (--dtype)",
            "its weights are float8; give a dtype (`heronry convert --dtype`)",
        ),
        ("max_tokens must be 3", "--max-tokens must be 3"),
        ("supply one with tokenizer=", "supply one with --tokenizer"),
        ("trained with (tokenizer= or --tokenizer)", "trained with (--tokenizer)"),
        ("give alpha (alpha=)", "give alpha (--alpha)"),
        ("x: reads pictures, not text; load it with kind=VisionModel", "x: reads pictures, not text"),
        ("/a/tokenizer=b/c: no such file", "/a/tokenizer=b/c: no such file"),
        ("a stop string must not be empty", "a stop string must not be empty"),
    ]:
        assert app_file._as_typed(message, names) == expected
    message = "choose the tokenizer it was trained with (tokenizer= or --tokenizer)"
    assert app_file._as_typed(message, ["settings"]).endswith("(`heronry data --tokenizer`)")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_in_any_width(columns):
    """No Python types, no line that is too long, no word that is cut."""
    environment = os.environ | {"COLUMNS": str(columns)}
    for name in ["", *app_file.COMMAND_NAMES] if columns == 80 else ["generate", "train"]:
        words = [sys.executable, "-m", "heronry", *name.split(), "--help"]
        text = subprocess.run(words, capture_output=True, text=True, env=environment).stdout
        text = re.sub(r"\{user\}|\[\{path=.*?\]", "", text, flags=re.DOTALL)  # to be typed so
        assert not re.search(r"<\w+|[{}]|list\[|\.{4}|[a-z]\.\.\.$", text, re.MULTILINE), text
        assert max(map(len, text.splitlines())) <= max(columns, 60)


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["fly"], ["generate", "x", "--hlp"], ["--version"], ["list"]]
)
def test_what_needs_no_model_imports_nothing_heavy(words):
    code = (
        "import atexit, sys\n"
        f"sys.argv[1:] = {words!r}\n"
        "from heronry.__main__ import main\n"
        "heavy = {'torch', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub', 'safetensors', 'tokenizers'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("gen", ["generate"]),
        ("pull world-1", ["world-1.5b"]),
        ("rm m", ["mine"]),
        ("chat --template g1-t", ["g1-think"]),
        ("data x --template g1-f", ["g1-fast-think"]),
        ("generate x --model bun", ["bundled"]),
        ("eval x -m m", ["mine", "model.pth"]),
        ("train optim.l", ["optim.lr=", "optim.lr_final=", "optim.l2wrap="]),
        ("train run", ["run.out=", "run.toml"]),
    ],
)
def test_completion(line, completed):
    code = "import sys; sys.argv = ['heronry']; from heronry.__main__ import main; main()"
    for file in ("model.pth", "run.toml", catalog.models_folder() / "mine.pth"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("")
    environment = os.environ | {"_HERONRY_COMPLETE": "complete_bash", "COMP_WORDS": f"heronry {line}"}
    environment["COMP_CWORD"] = str(len(line.split()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert set(done.stdout.split()) >= set(completed)
    assert all(word.startswith(line.split()[-1]) for word in done.stdout.split())


def test_help_lists_what_there_is(command):
    def listed(name: str, option: str) -> set[str]:
        text = " ".join(command(name, "--help")[1].split())
        return set(re.findall(r"[\w-]+", re.search(rf"{option} (.*?)( --|\[default|$)", text)[1]))

    for line in ("chat", "data"):
        assert set(TEMPLATES) <= listed(line, "--template")
    assert set(target_formats.ALL) <= listed("convert", "--to")
    assert set(TOPICS) <= listed("bench", r"Arguments: \S+")


# generate


def test_json_prompt_file_and_saved_state(command, folder):
    words = ("-m", folder / "m.pth", "--max-tokens", 6, "--temperature", 0)
    text = command("generate", "Hello", *words)[1].removesuffix("\n")
    Path("prompt.txt").write_text("Hello\n")
    code, out, err = command("generate", "--prompt-file", "prompt.txt", *words, "--json", "--save-state", "s")
    assert (code, err, out.count("\n")) == (0, "", 1)
    about = json.loads(out)
    assert about["prompt"] == "Hello"
    assert about["text"] == LLM(folder / "m.pth").generate("Hello", 6, temperature=0).text
    assert about["text"].encode(errors="replace") == text.encode(errors="replace")
    assert about["finish_reason"] == "length"
    assert about["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert len(about["token_ids"]) == 6
    state = State.load("s")
    assert state.texts[0].startswith("Hello")
    llm = LLM(folder / "m.pth")
    more = command("generate", "!", *words, "--state", "s")
    assert more[1] == str(llm.generate("!", 6, temperature=0, state=state)) + "\n"
    before = Path("s").read_bytes()
    refused(command("generate", "x", *words, "--save-state", "s"), "s: already exists; replace it with --force")
    assert Path("s").read_bytes() == before
    assert command("generate", "x", *words, "--save-state", "s", "--force")[0] == 0
    assert State.load("s").texts[0].startswith("x")
    Path("latin").write_bytes(b"caf\xe9")
    refused(command("generate", "--prompt-file", "latin", *words), "latin: byte 3 is not UTF-8")
    refused(command("generate", "", *words), "heronry: the prompt is empty\n")
    refused(command("generate", "", *words, "--state", "s"), "a state alone does not say what comes next")


def test_a_pipe_is_the_prompt(command, folder):
    words = ("-m", folder / "m.pth", "--max-tokens", 4, "--seed", 1)
    expected = command("generate", "Hello", *words)
    assert expected[0] == 0
    for prompt in ([], ["-"]):
        assert command("generate", *prompt, *words, stdin="Hello\n") == expected


def test_a_stop_may_be_a_line_break(command, monkeypatch):
    seen = {}
    monkeypatch.setattr(LLM, "generate", lambda self, prompt, n, **options: seen.update(options) or iter(()))
    assert command("generate", "x", "--stop", r"\n", "--stop", r"a\\n", "--stop", r"\tü\x")[0] == 0
    assert seen["stop"] == ["\n", r"a\n", "\tü\\x"]


@pytest.mark.slow
def test_nothing_comes_between_the_prompt_and_the_text(tmp_path):
    """The first step may say that it compiles."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "heronry", "generate", "Once", "--echo", "--max-tokens", "3", "--seed", "1"]
    both = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment).stdout
    assert both.splitlines()[-1].startswith("Once ")


# What commands say


def test_quiet_and_verbose(command, folder):
    words = ("quantize", folder / "m.pth")
    assert "of the original" in command(*words, "a")[2]
    assert command(*words, "b", "--quiet") == (0, "", "")
    assert command(*words, "c", "-q") == (0, "", "")
    code, _, err = command("info", "nothing", "-v")
    assert code == 2
    assert "Traceback" in err
    assert (
        err.splitlines()[-1]
        == "heronry: nothing: no such file or folder; `heronry list` shows the short names of models"
    )
    refused(command("info", "nothing"), "nothing: no such file")


@pytest.mark.parametrize(
    "line", ["convert m.pth o.st -q", "convert m.pth o.pth", "quantize m.pth q -f int4", "eval t.txt -m m.pth"]
)
def test_no_bar_without_a_terminal(command, folder, monkeypatch, line):
    monkeypatch.setattr("heronry.cli.progress.PATIENCE", -1)
    words = [str(folder / word) if (folder / word).exists() else word for word in line.split()]
    code, _, err = command(*words)
    assert code == 0
    assert err.count("\n") <= 1
    assert "\x1b" not in err


# What exists


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("convert m.pth OUT", "o.pth"),
        ("convert m.pth OUT", "o"),
        ("convert m.pth OUT --to huggingface", "o"),
        ("quantize m.pth OUT", "o"),
        ("merge m.pth adapter OUT", "o"),
    ],
)
def test_one_rule_for_what_exists(command, folder, line, target):
    save_adapter(inject_adapter(heronry.load(folder / "m.pth"), 2, 2), folder / "adapter")
    words = [str(folder / word) if (folder / word).exists() else word for word in line.replace("OUT", target).split()]
    assert command(*words)[0] == 0
    refused(command(*words), f"{target}: already exists; replace it with --force")
    if target == "o":
        Path("o", "old.txt").write_text("of before")
    again = command(*words, "--force")
    assert again[0] == 0, again
    assert heronry.load(target).num_parameters() == heronry.load(folder / "m.pth").num_parameters()
    assert sorted(path.name for path in Path().iterdir()) == [target]
    # a folder that is no model is never replaced
    Path("photos").mkdir()
    Path("photos", "a.jpg").write_text("a")
    words = [word.replace(target, "photos") if word == target else word for word in words]
    if target == "o":
        refused(command(*words, "--force"), "photos: is a folder with other files; choose another name")
    assert Path("photos", "a.jpg").read_text() == "a"


def test_a_model_is_not_replaced_by_itself(command, folder):
    heronry.save(heronry.load(folder / "m.pth"), "m")
    for line in ("convert m m --force", "quantize m m --force"):
        refused(command(*line.split()), "m: is the original itself")
    assert heronry.load("m").num_parameters() == heronry.load(folder / "m.pth").num_parameters()


# chat without a terminal


def test_settings_and_branches_of_a_pipe(command, folder):
    lines = [
        "/set max_tokens 2",
        "/set temperature 0",
        "/set",
        "Hi",
        "/clear",
        "/history",
        "/system Be brief.",
        "/system",
    ]
    code, out, err = command("chat", "-m", folder / "m.pth", "--template", "world", stdin="\n".join(lines))
    assert (code, out.count("\n")) == (0, 1)  # the answer alone
    assert "max_tokens 2\n" in err
    assert "temperature 0.0\n" in err
    assert "a new branch, 2; /switch main goes back" in err
    assert err.endswith("Be brief.\n")
    lines = ["/set heat 3", "/set top_k x", "/set top_p 2", "/set order up"]
    code, out, err = command("chat", "-m", folder / "m.pth", stdin="\n".join(lines))
    assert (code, out) == (2, "")
    assert [line.partition(" ")[0] for line in err.splitlines()] == ["heronry:"] * 4


def test_one_setting_and_its_default(command, folder):
    lines = [
        "/set top_p",
        "/set seed",
        "/set seed 3",
        "/set seed",
        "/set seed none",
        "/set top_p 0.5",
        "/set top-p",
        "/set top_p none",
    ]
    lines += ["/set top_p", "/set seed", "/set max_tokens 3", "/set max_tokens none", "/set max_tokens", "/set nothing"]
    _, out, err = command("chat", "-m", folder / "m.pth", "--template", "world", stdin="\n".join(lines))
    assert out == ""
    usual = f"top_p {TEMPLATES['world'].sampling['top_p']}"
    assert err.splitlines() == [
        *(usual, "seed None", "seed 3", "top_p 0.5", usual, "seed None", "max_tokens 512"),
        f"heronry: {unknown_name('setting', 'nothing', SETTINGS)}",
    ]


def test_a_mistyped_command_of_a_chat_is_told_how_it_is_written(command, folder):
    lines = ["/fork", "/undo 2", "/save a b", "/hlep", "/"]
    code, out, err = command("chat", "-m", folder / "m.pth", "--template", "world", stdin="\n".join(lines))
    assert (code, out) == (2, "")
    assert err.splitlines()[:4] == [
        "heronry: /fork: usage is /fork NAME",
        "heronry: /undo 2: usage is /undo",
        "heronry: /save a b: usage is /save FILE",
        "heronry: unknown command '/hlep'; did you mean '/help'?",
    ]
    assert err.splitlines()[4].startswith("heronry: unknown command '/'; choose from /undo, /retry, ")


def test_errors_name_what_was_typed(command, folder):
    """Not the temporary file beside it, nor the prompt around the message."""
    lines = ["/save file/talk", "a \udce9"]
    Path("file").write_text("")
    code, _, err = command("chat", "-m", folder / "m.pth", "--template", "world", stdin="\n".join(lines))
    assert (code, err) == (
        2,
        "heronry: file/talk: Not a directory\nheronry: the text is not UTF-8: byte 0xe9 (U+DCE9) after 2 characters\n",
    )


def test_a_session_stays_in_its_file(command, folder):
    words = ("chat", "-m", folder / "m.pth", "--template", "world", "--session", "s", "--max-tokens", 3)
    code, _, err = command(*words, stdin="Hi\n/save other\nBye\n")
    assert (code, err) == (2, "heronry: this conversation is saved in s after every answer; copy that file\n")
    assert not Path("other").exists()
    chat = LLM(folder / "m.pth").chat()
    chat.load("s")
    assert [x["content"] for x in chat.messages[::2]] == ["Hi", "Bye"]


def test_a_preset_is_replaced_by_what_is_typed(command, folder, monkeypatch, tmp_path):
    """Not by the defaults of config.toml, which are for all calls."""
    generate = ("generate", "a", "-m", folder / "m.pth", "--max-tokens", 9, "--seed", 1)
    llm = LLM(folder / "m.pth")
    maths = llm.generate("a", 9, seed=1, sampling="maths").text
    hot = llm.generate("a", 9, seed=1, sampling="maths", temperature=2.0).text
    assert maths != hot
    (tmp_path / "heronry").mkdir()
    (tmp_path / "heronry" / "config.toml").write_text("temperature = 2.0\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert command(*generate, "--preset", "maths")[1] == f"{maths}\n"
    assert command(*generate, "--preset", "maths", "--temperature", 2)[1] == f"{hot}\n"
    code, _, err = command(*generate, "--preset", "math")
    assert (code, err) == (2, "heronry: unknown sampling preset 'math'; did you mean 'maths'?\n")
    code, _, err = command("chat", "-m", folder / "m.pth", "--preset", "fixed", stdin="/set temperature\n")
    assert (code, err) == (0, "temperature 0\n")


def test_an_answer_goes_on(command, folder):
    lines = ["/continue", "Hi", "/continue", "/history"]
    words = ("chat", "-m", folder / "m.pth", "--template", r"Bob: {user}\n\nAlice:", "--temperature", 0)
    code, out, err = command(*words, "--max-tokens", 4, stdin="\n".join(lines))
    assert code == 2
    assert err.count("there is no message whose answer could go on") == 1
    chat = LLM(folder / "m.pth").chat(template="Bob: {user}\n\nAlice:")
    assert (chat.template.turn, chat.template.stops) == ("Bob: {user}\n\nAlice:", ("\n\nBob:",))
    first = chat.say("Hi", 4, temperature=0).text
    more = chat.go_on(4, temperature=0).text
    assert [printable(line) for line in out.splitlines()] == [printable(text) for text in (first, more)]
    assert f"assistant: {printable(chat.messages[1]['content'])}" in err


@pytest.mark.parametrize(
    ("source", "patience", "said"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            1.0,
            "takes longer than 1 seconds",
        ),
        ("{% if %}", 60.0, "line 1: Expected an expression, got 'end of statement block'"),
        ("{% include '/etc/passwd' %}", 60.0, "line 1: a chat template cannot read other files"),
    ],
    ids=["hangs", "damaged", "reads a file"],
)
def test_a_template_that_hangs_or_is_damaged(source, patience, said, command, folder, monkeypatch):
    monkeypatch.setattr(jinja_process, "PATIENCE", patience)
    Path("mine.jinja").write_text(source)
    result = command("chat", "-m", folder / "m.pth", "--template", "mine.jinja", stdin="Hi\n")
    assert result == (2, "", f"heronry: mine.jinja: {said}\n")


def test_many_lines_are_one_message(command, folder):
    text = '/history\n"""\none\n\n/two\n"""\n/history\n'
    _, _, err = command("chat", "-m", folder / "m.pth", "--template", "story", "--max-tokens", 2, stdin=text)
    assert err.startswith("nothing was said yet\n")
    assert "user: one\n\n  /two\n" in err


def test_a_session_cannot_be_left_by_accident(command, folder):
    words = ("chat", "-m", folder / "m.pth", "--template", "world", "--max-tokens", 2, "--session", "talk")
    assert command(*words, stdin="Hello\n")[0] == 0
    code, out, err = command(*words, stdin="/load talk\n/clear\n")
    assert code == 2
    assert err.count("this conversation is saved in talk: leave it") == 1
    _, out, err = command(*words, stdin="/switch main\n")
    assert (out, "user: Hello" in err) == ("", True)


def test_a_new_system_text_keeps_the_conversation(command, folder):
    """In a branch, also in the file of a session."""
    words = ("chat", "-m", folder / "m.pth", "--template", "world", "--max-tokens", 2)
    for session in ([], ["--session", "talk"]):
        code, _, err = command(*words, *session, stdin="Hello\n/system Be kind.\n/history\nHi\n/switch main\n")
        assert code == 0
        assert "a new branch, 2; /switch main goes back\nsystem: Be kind.\n" in err
        assert "user: Hello" in err.partition("system: Be kind.")[2]
    assert describe("talk")["branches"] == {"main": 1, "2": 1}
    err = command(*words, "--session", "talk", stdin="/switch 2\n")[2]
    assert "system: Be kind.\nuser: Hi\n" in err


def test_what_is_not_saved_is_not_loaded_over(command, folder):
    words = ("chat", "-m", folder / "m.pth", "--template", "world", "--max-tokens", 2)
    LLM(folder / "m.pth").chat().save("other")
    code, out, err = command(
        *words, stdin="/load other\nHello\n/load other\n/history\n/save talk\n/load other\n/history\n"
    )
    assert (code, out.count("\n")) == (2, 1)
    said = "nothing was said yet\nheronry: this conversation is not saved, and would be lost: /save FILE first\n"
    assert err.startswith(said)
    assert (err.count("heronry:"), err.count("user: Hello")) == (1, 1)


def test_a_stopped_command_begins_a_line(command, folder, monkeypatch):
    """Behind the "^C" of a terminal."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", stop)
    assert command("generate", "x", "-m", folder / "m.pth") == (130, "", "heronry: stopped\n")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert command("generate", "x", "-m", folder / "m.pth", "-q")[0] == 130
    assert screen.getvalue() == "\nheronry: stopped\n"


def test_standard_input_stays_as_it_is(command, folder, monkeypatch):
    """Bytes that are not UTF-8 are reported, not dropped."""
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["heronry", "generate", "-", "-m", str(folder / "m.pth"), "--max-tokens", "1"])
    monkeypatch.setattr(sys, "stdin", raw)
    with pytest.raises(SystemExit) as end:
        app_file.main()
    assert end.value.code == 2


def test_a_file_that_exists_is_not_saved_over(command, folder):
    """Neither by /save nor by a session that another chat has begun in the meantime."""
    words = ("chat", "-m", folder / "m.pth", "--max-tokens", 2)
    Path("kept").write_text("kept")
    code, _, err = command(*words, stdin="Hello\n/save kept\n/save mine\nMore\n/save mine\n/save other\n/save mine\n")
    assert code == 2
    assert err.splitlines() == [
        "heronry: kept: already exists; choose another name",
        "saved to mine",
        "saved to mine",
        "saved to other",
        "heronry: mine: already exists; choose another name",
    ]
    assert Path("kept").read_text() == "kept"
    for name, turns in (("mine", 2), ("other", 2)):
        chat = LLM(folder / "m.pth").chat()
        chat.load(name)
        assert len(chat.messages) == 2 * turns


def test_a_session_that_cannot_be_saved_does_not_hide_the_end(folder, monkeypatch):
    """A full disk while SIGTERM ends the chat."""

    def fail(*_):
        raise OSError(28, "No space left on device", "talk")

    llm = LLM(folder / "m.pth")
    loop = Loop(llm.chat(), Path("talk"), 5, None, {})
    monkeypatch.setattr(Chat, "save", fail)
    monkeypatch.setattr(Loop, "_stream", lambda *_: (_ for _ in ()).throw(Terminated(15)))
    with pytest.raises(Terminated):
        loop._answer_or_obey("Hello")
    assert loop.failed
