"""Conversations whose template is in Jinja."""

from __future__ import annotations

import pytest
from chats import last, talk

from heronry.engine.llm import LLM
from heronry.errors import InputError
from heronry.text.chat_templates import TEMPLATES
from heronry.text.jinja_templates import JinjaTemplate, chat_template

KEEPS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'Assistant: ' + m.content + '\n\n' }}"
    "{% else %}{{ m.role | title + ': ' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' + opening }}{% endif %}"
)
OFFICIAL = "{% set opening = ' <think></think>\n' %}" + KEEPS
DROPS = OFFICIAL.replace(
    "m.content + '\n\n' }}{% else %}", "m.content.split('</think>')[-1].strip() + '\n\n' }}{% else %}"
)


def test_a_jinja_template_goes_on_from_the_last_state(scripted, tmp_path):
    model, tokenizer = scripted(["Hi", "."], ["Yes", "\n\nUser:"], ["No"], ["Again"], cue="</think>\n")
    llm = LLM(model, tokenizer=tokenizer)
    chat = llm.chat(template=OFFICIAL, system="Be  kind.")
    assert chat.say("a\n\nb").text == "Hi."
    first = "System: Be  kind.\n\nUser: a\n\nb\n\nAssistant: <think></think>\nHi."
    assert last(chat).state.texts == (first,)
    assert chat.messages[-1] == {"role": "assistant", "content": "<think></think>\nHi."}
    model.reads.clear()
    assert chat.say("c").text == "Yes"
    assert model.reads[0] == len(tokenizer.encode("\n\nUser: c\n\nAssistant: <think></think>\n"))
    second = first + "\n\nUser: c\n\nAssistant: <think></think>\nYes"
    assert chat.text == second + "\n\n"
    chat.save(tmp_path / "talk")
    again = llm.chat()
    again.load(tmp_path / "talk")
    assert (again.template, again.messages, again.text) == (chat.template, chat.messages, chat.text)
    assert again.say("d").text == "No"
    assert again.text == second + "\n\nUser: d\n\nAssistant: <think></think>\nNo\n\n"
    assert again.undo() == "d"
    assert again.retry().text == "Yes"
    assert again.text == second + "\n\n"


def test_a_jinja_template_that_drops_thoughts(scripted, tmp_path):
    """The model always sees what the template shows of the messages, as in transformers."""
    model, tokenizer = scripted(["Hi"], ["Yes"], ["No"], cue="</think>\n")
    llm = LLM(model, tokenizer=tokenizer)
    chat = llm.chat(template=DROPS)
    chat.say("a")
    model.replies = model.replies[1:]  # the thought is not read again, so the script counts from here
    assert chat.say("b").text == "Yes"
    shown = "User: a\n\nAssistant: Hi\n\nUser: b\n\nAssistant: <think></think>\nYes"
    assert model.read(last(chat).state) == shown
    assert last(chat).state.texts == (shown,)
    assert chat.messages[1]["content"] == "<think></think>\nHi"
    chat.save(tmp_path / "talk")
    again = llm.chat()
    again.load(tmp_path / "talk")
    assert again.text == chat.text == shown + "\n\n"
    assert again.messages == chat.messages
    answer = llm.chat(chat.messages[:3], template=DROPS)
    assert answer.state.texts == (shown,)
    chat.retry(max_tokens=0)
    assert chat.go_on().text == "Yes"
    assert chat.text == shown + "\n\n"
    begun = llm.chat([*chat.messages[:3], {"role": "assistant", "content": "Yes"}], 0, template=DROPS)
    assert begun.state.texts == ("User: a\n\nAssistant: Hi\n\nUser: b\n\nAssistant: Yes",)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_jinja_template_as_ours(scripted, name):
    """The same texts as of the template that it was made from, and nothing is read twice either."""
    space = TEMPLATES[name].space if not TEMPLATES[name].opening else ""
    replies = [[f"{space}Hi", "\n\n", "Use it."], [f"{space}Yes", *TEMPLATES[name].stops[0]], [f"{space}No"]]
    source = JinjaTemplate(chat_template(name), stop_strings=TEMPLATES[name].stops)
    ours, model = talk(scripted, *replies, template=name, system="Be kind.")
    theirs = ours._llm.chat(template=source, system="Be kind.")
    for message in ("Hello", "And\n\nthen?", "x"):
        extra = len(model.tokenizer.encode(ours.text)) if message == "Hello" else 0  # the system text
        model.reads.clear()
        ours.say(message)
        reads = list(model.reads)
        model.reads.clear()
        theirs.say(message)
        assert sum(model.reads) == sum(reads) + extra
        assert theirs.text == ours.text
        assert [m["content"] for m in theirs.messages[2::2]] == [m["content"] for m in ours.messages[2::2]]


def test_jinja_templates_that_are_damaged(llm):
    for template, said in [
        ("{% if %}", "chat template: line 1: Expected an expression"),
        ("{{ 1 }}", "chat template: does not show the messages"),
    ]:
        with pytest.raises(InputError, match=said):
            llm.chat(template=template)
