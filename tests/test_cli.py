"""The command line as a user meets it: output streams, exit codes, one line for an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from heronry import LLM, RWKV4, RWKV7, save
from heronry.models import RWKV4Config, RWKV7Config


def random_model(cls, config):
    torch.manual_seed(0)
    model = cls(config)
    model.init_weights()
    for p in model.parameters():
        torch.nn.init.normal_(p.data, mean=float(p.data.mean()), std=0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "bytes"
    save(random_model(RWKV7, RWKV7Config.sized(256, 2, 32, head_size=16)), path)
    return path


def test_generate_prints_only_the_text(command, folder):
    code, out, err = command("generate", "Hello", "-m", folder, "--max-tokens", 20, "--seed", 3)
    assert (code, err) == (0, "")
    again = command("generate", "Hello", "-m", folder, "--max-tokens", 20, "--seed", 3)
    assert again == (0, out, "")
    other = command("generate", "Hello", "-m", folder, "--max-tokens", 20, "--seed", 4)
    assert other[1] != out
    echoed = command("generate", "-", "-m", folder, "--max-tokens", 20, "--seed", 3, "--echo", stdin="Hello")
    assert echoed[1] == "Hello" + out


def test_generate_reports_its_speed_on_standard_error(command, folder):
    code, out, err = command("generate", "Hello", "-m", folder, "--max-tokens", 20, "--temperature", 0, "--speed")
    assert code == 0
    assert "tokens/s" in err
    assert "tokens/s" not in out


def test_options_reach_the_sampler(command, folder):
    greedy = command("generate", "Hello", "-m", folder, "--max-tokens", 8, "--temperature", 0)
    for options in (["--top-k", 1], ["--top-p", 0], ["--min-p", 1], ["--top-p", 0, "--order", "top-p-first"]):
        assert command("generate", "Hello", "-m", folder, "--max-tokens", 8, *options) == greedy


def test_every_option_reaches_the_engine(command, folder, monkeypatch, tmp_path):
    LLM(folder).state("Hi").save(tmp_path / "hi")
    seen = {}
    monkeypatch.setattr(LLM, "generate", lambda self, prompt, n, **options: seen.update(options, n=n) or iter(()))
    numbers = {"temperature": 0.5, "top_k": 7, "top_p": 0.6, "min_p": 0.1, "seed": 3}
    numbers |= {"presence_penalty": 0.2, "frequency_penalty": 0.3, "penalty_decay": 0.4, "repetition_penalty": 1.2}
    words = [word for name, x in numbers.items() for word in (f"--{name.replace('_', '-')}", x)]
    words += [
        "--no-penalize-digits",
        "--max-tokens",
        9,
        "--stop",
        "a",
        "--stop",
        "b",
        "--state",
        tmp_path / "hi",
        "--order",
        "top-p-first",
    ]
    assert command("generate", "x", "-m", folder, *words)[0] == 0
    assert seen.pop("state").texts == ("Hi",)
    assert callable(seen.pop("progress"))
    words = {"stop": ["a", "b"], "order": "top-p-first", "penalize_digits": False}
    assert seen == numbers | words | {"n": 9, "stream": True}


def test_every_chat_option_reaches_the_conversation(command, folder, monkeypatch):
    seen = []
    monkeypatch.setattr("heronry.cli.chat_loop.run_chat_loop", lambda *arguments: seen.extend(arguments))
    words = ["--template", "world", "--system", "Be kind.", "--session", "s", "--max-tokens", 9]
    assert command("chat", "-m", folder, *words, "--temperature", 0.5, "--top-p", 0.6, "--seed", 3)[0] == 0
    chat, session, max_tokens, seed, sampling = seen
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    assert (str(session), max_tokens, seed, sampling) == ("s", 9, 3, {"temperature": 0.5, "top_p": 0.6})


def test_chat_moves_between_saved_states(command, folder, tmp_path):
    common = ("chat", "-m", folder, "--template", "world", "--max-tokens", 8, "--seed", 1)
    session = tmp_path / "talk.safetensors"
    lines = ["Hello", "/fork other", "More", "/undo", "/switch main", "/switch", f"/save {session}", "/quit"]
    code, out, err = command(*common, stdin="\n".join(lines))
    assert code == 0
    assert "took back: More" in err
    assert "* main" in err
    assert "  other" in err
    assert f"saved to {session}" in err
    answer, _ = out.splitlines()  # nothing but the two answers

    # the same conversation, continued
    code, out, err = command(*common, "--session", session, stdin="/retry\n")
    assert code == 0
    assert "user: Hello" in err
    assert out == answer + "\n"  # the same seed, drawn from the saved logits


def test_retry_draws_another_answer(command, folder):
    words = ("chat", "-m", folder, "--template", "world", "--max-tokens", 12, "--seed", 1)
    once = command(*words, stdin="Hello\n")[1]
    both = command(*words, stdin="Hello\n/retry\n")[1]
    assert both.startswith(once)
    assert both != once + once
    assert both == command(*words, stdin="Hello\n/retry\n")[1]


def test_chat_prints_errors_and_continues(command, folder):
    lines = ["/undo", "/switch nowhere", "/load nothing.safetensors", "/fly", '/save "half', "Hello"]
    code, out, err = command(
        "chat", "-m", folder, "--template", "world", "--max-tokens", 4, "--seed", 1, stdin="\n".join(lines)
    )
    assert code == 2
    assert out.count("\n") == 1  # the answer
    for line, message in zip(
        err.splitlines(),
        (
            "nothing was said yet",
            "unknown branch 'nowhere'",
            "no such conversation file",
            "unknown command '/fly'",
            '/save "half: no closing quotation; see /help',
        ),
        strict=True,
    ):
        assert message in line


def test_info_reads_every_size(command, folder):
    code, out, _ = command("info", folder)
    assert code == 0
    assert command("info", "--model", folder) == (0, out, "")
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["generation"].strip() == "rwkv7"
    assert rows["n_layer"].strip() == "2"
    assert rows["vocab_size"].strip() == "256"
    assert rows["tokenizer"].strip() == "bytes"
    model = random_model(RWKV7, RWKV7Config.sized(256, 2, 32, head_size=16))
    assert rows["parameters"].strip() == f"{model.num_parameters():,}"
    # two layers of two vectors of 32 and two heads of 16 x 16, four bytes each
    assert rows["state"].startswith(f"{2 * (2 * 32 + 2 * 16 * 16) * 4 / 1024:.4g} KiB")


def test_bad_input_is_one_line_and_exit_code_2(command, folder, tmp_path):
    pile = tmp_path / "pile"
    save(random_model(RWKV4, RWKV4Config.sized(50277, 1, 8)), pile)
    nothing = tmp_path / "empty.pth"
    nothing.touch()
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(weights[: len(weights) // 2])
    for words, message in [
        (["generate", "x", "-m", tmp_path / "missing.pth"], "no such file"),
        (["generate", "x", "-m", nothing], "empty"),
        (["generate", "x", "-m", tmp_path / "half.safetensors"], "truncated"),
        (["generate", "x", "-m", pile], "20B_tokenizer.json"),
        (["generate", "x", "-m", folder, "--tokenizer", "world"], "but the model has 256"),
        (["generate", "", "-m", folder], "prompt is empty"),
        (["generate", "x", "-m", folder, "--temperature", "-1"], "heronry: --temperature must be"),
        (["generate", "x", "-m", folder, "--dtype", "int3"], "dtype int3"),
        (["generate", "x", "-m", folder, "--device", "moon"], "device moon"),
        (["generate", "x", "-m", folder, "--state", tmp_path / "none"], "no such state file"),
        (["generate", "x", "-m", folder, "--max-tokens", "-3"], "heronry: --max-tokens must be"),
        (["chat", "-m", folder, "--max-tokens", "-3"], "heronry: --max-tokens must be"),
        (["chat", "-m", folder, "--temperature", "-1"], "heronry: --temperature must be"),
        (["info", "e[/y]"], "no such file"),
        (["chat", "-m", folder, "--template", "klingon"], "unknown chat template 'klingon'"),
        (["info", tmp_path / "missing"], "no such file"),
    ]:
        code, out, err = command(*words)
        assert (code, out) == (2, ""), words
        assert message in err, words
        assert err.startswith("heronry: "), words
        assert err.count("\n") == 1, words


def test_unknown_options_exit_with_code_2(command):
    assert command("generate", "x", "--no-such-option")[0] == 2
    assert command("fly")[0] == 2


def test_a_real_process_ends_quietly_when_its_reader_is_gone(folder):
    words = [sys.executable, "-m", "heronry", "generate", "Hello", "-m", str(folder), "--max-tokens", "2000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_without_typer_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from heronry.__main__ import main; main()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "heronry: the command line needs typer: pip install 'heronry[cli]'\n"
    assert (process.returncode, process.stdout, process.stderr) == (2, "", message)


def test_the_library_needs_neither_typer_nor_rich(folder):
    code = (
        "import sys; sys.modules['typer'] = sys.modules['rich'] = sys.modules['peft'] = None\n"
        "import heronry, heronry.adapters, heronry.convert, heronry.data.tokenize_corpus, heronry.evaluate\n"
        "import heronry.integrations.lm_eval, heronry.train.config, heronry.view\n"
        f"llm = heronry.LLM({str(folder)!r})\n"
        "llm.generate('Hello', 2)\n"
        "heronry.quantize(heronry.load(" + repr(str(folder)) + "), 'int8')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
