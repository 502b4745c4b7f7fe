"""Which template a name, a text, a file or a model's folder means."""

from __future__ import annotations

import json

import pytest

from heronry import InputError
from heronry.text.chat_templates import TEMPLATES, Template
from heronry.text.jinja_templates import JinjaTemplate, chat_template
from heronry.text.template_choice import describe_template, find_template, model_template, read_folder, template_text

JINJA = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def test_what_a_text_means(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("\ufeff" + JINJA)
    for text, template, described, kept in [
        ("world", TEMPLATES["world"], "world", "world"),
        (JINJA, JinjaTemplate(JINJA), "Jinja (chat template)", JINJA),
        (str(file), JinjaTemplate(JINJA, str(file)), f"Jinja ({file})", JINJA),
        ("A: {user}\n\nB:", Template("A: {user}\n\nB:", stops=("\n\nA:",)), "of its own", "A: {user}\n\nB:"),
        ("User: {user}\n\nAssistant:", TEMPLATES["world"], "world", "User: {user}\n\nAssistant:"),
    ]:
        assert find_template(text) == template
        assert find_template(template) is template
        assert describe_template(text) == described
        assert template_text(text) == kept
    for text, said in [
        ("wrold", "unknown chat template 'wrold'; did you mean 'world'"),
        (str(tmp_path / "none.jinja"), r"none\.jinja: cannot be read \(No such file or directory\)"),
        (3, "template must be a Template or the name of one, got 3"),
    ]:
        with pytest.raises(InputError, match=said):
            find_template(text)
    file.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"mine\.jinja: byte 2 is not UTF-8"):
        find_template(str(file))
    file.write_text("x" * 2_000_000)
    with pytest.raises(InputError, match=r"mine\.jinja: too large for a chat template"):
        find_template(str(file))


def test_a_folder(tmp_path):
    assert read_folder(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "old", "bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert read_folder(tmp_path) == JinjaTemplate("old", str(settings), (), tokens)
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": JINJA}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert read_folder(tmp_path) == JinjaTemplate(JINJA, str(settings))
    file = tmp_path / "chat_template.jinja"
    file.write_text(JINJA)
    (tmp_path / "generation_config.json").write_text('{"stop_strings": ["x", "y"]}')
    assert read_folder(tmp_path) == JinjaTemplate(JINJA, str(file), ("x", "y"))
    (tmp_path / "generation_config.json").write_text('{"stop_strings": "x"}')
    assert read_folder(tmp_path).stops == ("x",)
    for name, content, said in [
        (
            "generation_config.json",
            '{"stop_strings": [3]}',
            r"generation_config.json: stop_strings must be texts, got \[3\]",
        ),
        ("generation_config.json", '{"stop_strings": 3}', "generation_config.json: stop_strings must be texts, got 3"),
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=said):
            read_folder(tmp_path)
        (tmp_path / name).unlink()
    file.unlink()
    settings.write_text('{"chat_template": 3}')
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template must be a text, got 3"):
        read_folder(tmp_path)


def test_the_template_of_a_model(tmp_path):
    """Its own in Jinja, then its notes, then its name."""
    folder = tmp_path / "rwkv7-g1a-0.1b"
    folder.mkdir()
    assert model_template(folder, {}) == "g1"
    assert model_template(folder, {"chat_template": "story"}) == "story"
    file = folder / "chat_template.jinja"
    file.write_text(JINJA)
    own = JinjaTemplate(JINJA, str(file))
    assert model_template(folder, {"chat_template": "story"}) == own
    file.write_text(chat_template("raven"))  # as `heronry convert` writes it
    assert model_template(folder, {}) == "raven"
    stored = tmp_path / "RWKV-4-Raven.gguf"
    assert model_template(stored, {}, JINJA) == JinjaTemplate(JINJA, str(stored))
    assert model_template(stored, {}, "rwkv-world") == "raven"
    snapshot = tmp_path / "models--BlinkDL--rwkv-4-raven" / "snapshots" / "0a1b"
    assert model_template(snapshot, {}) == "raven"
    assert model_template(tmp_path / "x.pth", {}) is None
