"""Answers that were cut off and go on."""

from __future__ import annotations

import pytest
import torch
from chats import assert_same, last, talk

from heronry.engine.llm import LLM
from heronry.engine.options import DecodeOptions
from heronry.errors import InputError


@pytest.mark.parametrize("cut", range(10))
def test_an_answer_that_was_cut_off_goes_on(scripted, cut):
    """Wherever max_tokens cuts it, the parts make one answer, and the state is that of its text."""
    reply = [" Hi", " there", ".\n\n", "Us", "e", " it", "!", "\n\nU", "ser:"]
    chat, model = talk(scripted, reply)
    said = chat.say("x", max_tokens=cut).text
    before = last(chat).answer
    more = chat.go_on()
    assert chat.messages[0] == {"role": "user", "content": "x"}
    assert len(chat.messages) == 2
    turn = last(chat)
    said_for_good = before.removesuffix("\n\nU")  # which was the beginning of the stop string
    assert turn.answer == said_for_good + more.text if before else turn.answer.strip() == more.text
    assert model.read(turn.state) == turn.state.texts[0]
    assert turn.state.texts[0] + turn.owed == chat.text == "User: x\n\nAssistant:" + turn.answer + "\n\n"
    assert said == before.strip()
    assert more.usage.prompt_tokens == len(model.tokenizer.encode("User: x\n\nAssistant:")) + len(
        model.tokenizer.encode(before)
    )


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["presence", "repetition"])
def test_penalties_count_what_was_said_before(options):
    """The parts are what it would have said without the cut; what the caller says for the model does not count."""
    llm = LLM()
    whole = llm.chat(template="raven").say("Tell me about a frog", 30, temperature=0, **options).text
    chat = llm.chat(template="raven")
    said = chat.say("Tell me about a frog", 9, temperature=0, **options).text
    assert said + chat.go_on(21, temperature=0, **options).text == whole
    given = llm.chat(template="raven").say("Tell me about a frog", 21, beginning=said, temperature=0, **options).text
    assert said + given != whole


def test_going_on_undo_retry_and_branches(llm):
    letters = torch.tensor([chr(i).isascii() and chr(i).isalpha() for i in range(256)])
    best: DecodeOptions = {"temperature": 0, "mask": lambda ids: letters}  # half a character cannot be read again
    chat = llm.chat(template="story")
    chat.say("a", max_tokens=6, **best)
    cut = chat.messages
    chat.fork("other")
    more = chat.go_on(max_tokens=7, **best)
    assert chat.messages[1]["content"] == (cut[1]["content"] + more.text).strip()
    assert llm.chat(template="story").say("a", max_tokens=13, **best).text == chat.messages[1]["content"]
    assert_same(last(chat).state, llm.state(last(chat).state.texts[0]))
    chat.switch("main")
    assert chat.messages == cut
    chat.switch("other")
    assert chat.retry(max_tokens=6, **best).text == cut[1]["content"]
    assert chat.undo() == "a"
    with pytest.raises(InputError, match="there is no message whose answer could go on"):
        chat.go_on()


def test_going_on_that_is_broken_off(scripted):
    """Before anything new came the turn stays as it was; what came is kept."""
    chat, _ = talk(scripted, [" One", " two", " three"])
    chat.say("x", max_tokens=1)
    turn = last(chat)
    stream = chat.go_on(stream=True)
    stream.close()
    assert last(chat) is turn
    stream = chat.go_on(stream=True)
    assert next(stream).text == " two"
    stream.close()
    assert chat.messages[1]["content"] == "One two"
    assert chat.go_on(max_tokens=0).text == ""
    assert chat.messages[1]["content"] == "One two"


def test_a_stop_string_across_the_cut(scripted):
    """A beginning of one that was said because the answer ended there is taken back when its end comes."""
    chat, model = talk(scripted, [" Hi", "\n\nUs", "er:", " x"])
    assert chat.say("x", max_tokens=2).text == "Hi\n\nUs"
    assert chat.go_on().text == ""
    assert last(chat).answer == " Hi"
    assert chat.text == "User: x\n\nAssistant: Hi\n\n"
    assert model.read(last(chat).state) + last(chat).owed == chat.text


@pytest.mark.parametrize(
    ("template", "given", "asked"),
    [
        ("world", " The heron ", "User: x\n\nAssistant: The heron"),
        ("world", "The heron\n\nUser: y", "User: x\n\nAssistant: The heron\nUser: y"),
        ("raven-alpaca", "The heron", "# Instruction:\nx\n\n# Response:\nThe heron"),
        ("g1-think", "<think>hm", "User: x\n\nAssistant: <think>hm"),
        ("g1-think", "The heron", "User: x\n\nAssistant: The heron"),
        ("g1-fast-think", "The heron", "User: x\n\nAssistant: <think>\n</think>\nThe heron"),
        ("g1-fast-think", "<think>hm", "User: x\n\nAssistant: <think>hm"),
        ("g1", "", "User: x\n\nAssistant:"),
    ],
)
def test_messages_that_end_with_an_answer(scripted, template, given, asked):
    """The prompt ends in its text; only what follows is returned."""
    model, tokenizer = scripted([" flies", "."], cue=asked.rsplit("\n", 1)[-1])
    llm = LLM(model, tokenizer=tokenizer)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": given}]
    answer = llm.chat(talk, template=template)
    written = answer.reasoning + answer.text
    assert written == (" flies." if given else "flies.")
    assert bool(answer.reasoning) == given.startswith("<think>")
    assert answer.state.texts[0].endswith(f"{asked} flies.")
    assert model.read(answer.state) == answer.state.texts[0]
    chat = llm.chat(template=template)
    assert "".join(map(str, chat.say("x", beginning=given, stream=True))) == written
    begun = asked.rsplit("x\n\n", 1)[1].split(":", 1)[1].strip()
    assert chat.messages[1]["content"] == f"{begun} flies.".strip()
