"""Templates in Jinja from outside: what they show, and what they cannot do."""

from __future__ import annotations

import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from official_template import OFFICIAL

from heronry import InputError
from heronry.text import jinja_process
from heronry.text.chat_templates import TEMPLATES
from heronry.text.conversations import encode_conversation, render_conversation
from heronry.text.jinja_templates import JinjaTemplate, chat_template
from heronry.text.tokenizers import load_tokenizer

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def test_bytes():
    official = JinjaTemplate(OFFICIAL)
    assert official.extend("", TALK[:4]) == (
        "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant: <think></think>\n"
    )
    assert (official.opening, official.separator, official.stops) == (" <think></think>\n", "\n\n", ("\n\nUser:",))
    assert official.begin_answer(" Hello! ") == ("", " Hello!")
    assert official.begin_answer("<think></think>\nHello!") == (" <think></think>\n", "Hello!")
    chatml = JinjaTemplate(CHATML)
    assert chatml.extend("", TALK[1:4]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (chatml.opening, chatml.separator) == ("", "<|im_end|>\n")
    assert chatml.stops == ("<|im_end|>\n<|im_start|>user",)
    assert JinjaTemplate(CHATML, stop_strings=("<|im_end|>",)).stops == ("<|im_end|>",)
    with_tokens = JinjaTemplate("{{ bos_token }}" + CHATML, tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert with_tokens.extend("", TALK[1:2]) == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert with_tokens.text == "{% set bos_token = '<s>' %}\n{{ bos_token }}" + CHATML
    assert JinjaTemplate(with_tokens.text).extend("", TALK[1:2]) == with_tokens.extend("", TALK[1:2])


def test_what_transformers_adds():
    source = "{{ messages | tojson }} {{ strftime_now('%Y') | length }} {% for m in messages %}{% break %}{% endfor %}é"
    assert JinjaTemplate(source).render([{"role": "user", "content": "<é>"}], True) == (
        '[{"role": "user", "content": "<é>"}] 4 é'
    )


def test_an_input_without_a_place_for_it():
    asked = [{"role": "user", "content": "Add", "input": "1 2"}]
    assert JinjaTemplate("{{ messages[0].content }}").render(asked, True) == "Add\n1 2"
    assert JinjaTemplate("{{ messages[0].input }}").render(asked, True) == "1 2"


TURN = st.lists(st.sampled_from([*" \r\nab:{}é", "\n\n", "User:", "<think>"]), min_size=1, max_size=9).map("".join)


@pytest.mark.quick_for("world", "g1", "alpaca")
@pytest.mark.parametrize("name", ["raven", "world", "g1", "story", "alpaca", "raven-alpaca", "instruction", "qa"])
@settings(max_examples=40)
@given(turns=st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3), weight=st.sampled_from([0, 1]))
@example(turns=[("a", "b\n\n\n### Instruction: x"), ("c", "d")], weight=1)
def test_the_same_pieces_as_of_our_templates(name, turns, weight):
    """What counts in the loss is told from what a template shows, and is what we know of ours."""
    messages = [{"role": "system", "content": "Be kind."}]
    for user, answer in turns:
        messages.append({"role": "user", "content": f"x{user}", "input": "1\n\n2"})
        messages.append({"role": "assistant", "content": f"{answer}y", "weight": weight})
    messages[2]["weight"] = 1
    stops = TEMPLATES[name].stops
    for marked in (True, False):
        ours = render_conversation(messages, TEMPLATES[name], marked)
        theirs = render_conversation(messages, JinjaTemplate(chat_template(name), stop_strings=stops), marked)

        def marks(pieces):
            return [(character, i < n) for text, n in pieces for i, character in enumerate(text)]

        assert marks(theirs) == marks(ours)


@pytest.mark.parametrize(
    "source", [OFFICIAL, OFFICIAL.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")]
)
def test_ids_and_mask_of_a_marked_template(source):
    ids, mask = encode_conversation(TALK, JinjaTemplate(source), load_tokenizer("bytes"))
    learned = bytes(i for i, counts in zip(ids, mask, strict=True) if counts).decode()
    assert bytes(ids).decode() == (
        "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant: See you.\n\nUser:"
    )
    assert learned == " Hello!\n\nUser: See you.\n\nUser:"


def test_marks_in_the_texts_of_messages():
    talk = [TALK[1], {"role": "assistant", "content": "\x020\x03 and \x021\x03"}]
    text, [answer] = JinjaTemplate(OFFICIAL).find_answers(talk)
    assert text[answer.begin : answer.end] == " \x020\x03 and \x021\x03\n\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", r"mine.jinja: line 1: Expected an expression, got 'end of statement block'"),
        ("a\n{% for m in messages %}", r"mine.jinja: line 2: Unexpected end of template"),
        ("{% include '/etc/hostname' %}", "mine.jinja: line 1: a chat template cannot read other files"),
        ("{% import '/etc/hostname' as x %}", "mine.jinja: line 1: a chat template cannot read other files"),
        ("{% from 'a' import b %}", "mine.jinja: line 1: a chat template cannot read other files"),
        ("\n\n{% extends 'a' %}", "mine.jinja: line 3: a chat template cannot read other files"),
        ("{{ ''.__class__.__mro__ }}", "mine.jinja: access to attribute '__class__' of 'str' object is unsafe"),
        (
            "{{ cycler.__init__.__globals__.os }}",
            "mine.jinja: access to attribute '__init__' of 'type' object is unsafe",
        ),
        ("{{ namespace(__class__=1) }}", "mine.jinja: the name '__class__' is not allowed"),
        ("{{ messages.append(1) }}", "mine.jinja: access to attribute 'append' of 'list' object is unsafe"),
        ("{{ raise_exception('no\nsystem text') }}", "mine.jinja: no system text"),
        ("{{ messages[9].content.x }}", "mine.jinja: list object has no element 9"),
        ("{{ 'a' * 10 ** 11 }}", "mine.jinja: needs too much memory"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "mine.jinja: maximum recursion depth exceeded"),
        (
            "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
            "mine.jinja: writes more than 67,108,864 characters",
        ),
        ("{{ raise_exception('x' * 9999999) }}", "mine.jinja: x{300} ...$"),
        ("hello", "mine.jinja: does not show the messages of a conversation"),
    ],
)
def test_templates_that_are_damaged_or_hostile(source, said):
    with pytest.raises(InputError, match=said) as error:
        _ = JinjaTemplate(source, "mine.jinja").separator
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**9) }}",
        "{% set x = 9 ** (9 ** 9) %}",
    ],
)
def test_loops_that_do_not_end(source, monkeypatch):
    started = []
    running = jinja_process.JinjaProcess._running
    monkeypatch.setattr(jinja_process.JinjaProcess, "_running", lambda self: started.append(1) or running(self))
    monkeypatch.setattr(jinja_process, "PATIENCE", 1.0)
    with pytest.raises(InputError, match=r"x\.jinja: takes longer than 1 seconds"):
        _ = JinjaTemplate(source, "x.jinja").separator
    with pytest.raises(InputError, match=r"y\.jinja: takes longer than 1 seconds"):  # refused from now on
        JinjaTemplate(source, "y.jinja").render(TALK, True)
    assert started == [1]
    monkeypatch.setattr(jinja_process, "PATIENCE", 60.0)
    assert JinjaTemplate(CHATML).separator == "<|im_end|>\n"  # the next one has a process again


def test_a_template_that_has_rendered_is_not_refused(monkeypatch):
    """One conversation that takes too long does not lock it."""
    loops = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}"
    many = JinjaTemplate("{% set n = messages[0].content | int %}" + loops + "{{ n }}")
    monkeypatch.setattr(jinja_process, "PATIENCE", 60.0)
    assert many.render([{"role": "user", "content": "3"}], False) == "3"
    monkeypatch.setattr(jinja_process, "PATIENCE", 1.0)
    with pytest.raises(InputError, match="takes longer than 1 seconds"):
        many.render([{"role": "user", "content": "99999"}], False)
    monkeypatch.setattr(jinja_process, "PATIENCE", 60.0)
    assert many.render([{"role": "user", "content": "4"}], False) == "4"


def test_how_a_template_looks_is_one_request(monkeypatch):
    """So the limit of time is that of all renders together."""
    requests = []
    render = jinja_process.JinjaProcess.render

    def count(process, source, mark, *variables):
        requests.append(len(variables))
        return render(process, source, mark, *variables)

    monkeypatch.setattr(jinja_process.JinjaProcess, "render", count)
    template = JinjaTemplate(CHATML)
    assert (template.separator, template.stops, template.opening) == (
        "<|im_end|>\n",
        ("<|im_end|>\n<|im_start|>user",),
        "",
    )
    assert requests == [3]


def test_threads_share_the_process():
    texts = {}

    def render(i: int) -> None:
        template = JinjaTemplate(f"{{{{ messages[0].content }}}}{i}")
        texts[i] = {template.render([{"role": "user", "content": str(i)}], True) for _ in range(20)}

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: {f"{i}{i}"} for i in range(8)}
