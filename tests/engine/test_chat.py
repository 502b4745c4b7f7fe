"""Conversations: every move goes between kept states, and every state stands for exactly its text."""

from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch
from chats import assert_same, last, talk
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry.checkpoint import assemble
from heronry.engine import chat as chat_file
from heronry.engine.chat import Chat
from heronry.engine.completion import Completion
from heronry.engine.llm import LLM
from heronry.errors import InputError
from heronry.text.chat_templates import G1, STORY, TEMPLATES, WORLD, Template, usual_template
from heronry.text.conversations import render_conversation


def test_templates_as_the_models_know_them(scripted):
    for name, system, expected in [
        ("story", None, "User: Hello\n\nAssistant:"),
        ("world", None, "User: Hello\n\nAssistant:"),
        ("raven", "A talk.", "A talk.\n\nBob: Hello\n\nAlice:"),
        ("g1", "Be kind.", "System: Be kind.\n\nUser: Hello\n\nAssistant:"),
        ("g1-think", None, "User: Hello\n\nAssistant: <think"),
        ("g1-fast-think", None, "User: Hello\n\nAssistant: <think>\n</think"),
    ]:
        chat, model = talk(scripted, [" Hi", "."], template=name, system=system)
        assert chat.say("  Hello \n").text == "Hi."
        assert last(chat).state.texts == (expected + " Hi.",)
        assert model.read(last(chat).state) == expected + " Hi."
        assert chat.text == expected + " Hi.\n\n"
        first = [{"role": "system", "content": system}] if system else []
        assert chat.messages == [
            *first,
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": (chat.template.opening + " Hi.").strip()},
        ]


@pytest.mark.parametrize(
    ("name", "reply", "content"),
    [
        ("g1", " Hello", "Hello"),
        ("g1-think", ">hm</think>\nHello", "<think>hm</think>\nHello"),
        ("g1-fast-think", ">\nHello", "<think>\n</think>\nHello"),
    ],
)
def test_a_thought_stays_in_the_messages(scripted, name, reply, content):
    """What a chat says of itself is the same conversation again, as history and as training data."""
    chat, _ = talk(scripted, [reply], template=name)
    chat.say("Hi")
    assert chat.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    again = Chat(chat._llm, name, history=chat.messages)
    assert again.text == chat.text == f"User: Hi\n\nAssistant: {content}\n\n"
    pieces = render_conversation(chat.messages, TEMPLATES[name], has_end_of_text=True)
    assert "".join(piece.text for piece in pieces) == chat.text.rstrip()


def test_no_template_leaves_a_space_at_the_end():
    """Where the answer is on a line of its own, there is none in front of it."""
    assert all(template.turn == template.turn.rstrip(" ") for template in TEMPLATES.values())
    assert {name for name, template in TEMPLATES.items() if not template.space} == {"raven-alpaca", "bot"}


def test_braces_in_texts_stay_as_they_are(scripted):
    chat, _ = talk(scripted, [" Hi"], system="Answer {user} in JSON: {}")
    chat.say('{"a": {user}}')
    assert chat.text == 'Answer {user} in JSON: {}\n\nUser: {"a": {user}}\n\nAssistant: Hi\n\n'


def test_messages_are_cleaned():
    assert G1.clean(" a\r\n\r\n\n b\n ") == "a\n b"
    assert STORY.clean(" a\n\nb\n ") == "a\n\nb"
    for template in TEMPLATES.values():
        for empty in ("", " \n "):
            with pytest.raises(InputError, match="the message is empty"):
                template.clean(empty)


def test_the_default_template(scripted):
    model, tokenizer = scripted([])
    llm = LLM(model, tokenizer=tokenizer)
    assert llm.chat().template == WORLD
    llm.chat_template = "story"
    assert llm.chat().template == STORY
    assert llm.chat(template="g1").template == G1
    mine = Template("Q: {user}\nA:", separator="\n", stops=("\nQ:",))
    assert llm.chat(template=mine).template is mine
    with pytest.raises(InputError, match="unknown chat template 'llama'; choose from raven, world"):
        llm.chat(template="llama")
    for generation, world, expected in [
        ("rwkv4", False, "raven"),
        ("rwkv4", True, "world"),
        ("rwkv6", True, "world"),
        ("rwkv7", True, "g1"),
        ("rwkv7", False, "world"),
    ]:
        assert usual_template(generation, world) == expected


@pytest.mark.parametrize(
    ("template", "reply", "answer", "read", "owed"),
    [
        # ends by itself: only the separator is missing
        ("story", [" Hi", "."], " Hi.", " Hi.", "\n\n"),
        # a stop string in whole tokens: the separator was read with it
        ("story", [" Hi", ".", "\n\n", "User", ":", " x"], " Hi.", " Hi.\n\n", ""),
        ("story", [" Hi", ".", "\n", "\n", "User", ":"], " Hi.", " Hi.\n\n", ""),
        ("raven", [" Hi", ".", "\n\n", "x"], " Hi.", " Hi.\n\n", ""),
        ("raven", [" Hi", "\n", "there", "\n\n", "Bob:"], " Hi\nthere", " Hi\nthere\n\n", ""),
        # a token that ends with the separator stands for the conversation as it is
        ("story", [" Hi", ".\n\n", "User:"], " Hi.", " Hi.\n\n", ""),
        ("story", [" Hi", ".\n", "\nUser:"], " Hi.", " Hi.\n", "\n"),
        # tokens across the cut: go back to before them, owe their share
        ("story", [" Hi", ".\n\nU", "ser:"], " Hi.", " Hi", ".\n\n"),
        ("story", [" Hi", ".", "\n\nUser:"], " Hi.", " Hi.", "\n\n"),
        # white space at the end is not part of the answer
        ("story", [" Hi", ".", " ", "\n"], " Hi.", " Hi.", "\n\n"),
        ("story", [" Hi", ".", "\n"], " Hi.", " Hi.\n", "\n"),
        ("story", [" Hi", ".", " \n"], " Hi.", " Hi.", "\n\n"),
        ("story", [" Hi", ". ", "\n\n", "User:"], " Hi.", " Hi", ".\n\n"),
        ("story", [" Hi", ".", "\n", "\n", "\n", "\n", "\n"], " Hi.", " Hi.\n\n", ""),
        # white space and half stop strings inside of it are
        ("story", [" Hi", " \n\n", "\n\nUse", " it", "."], " Hi \n\n\n\nUse it.", " Hi \n\n\n\nUse it.", "\n\n"),
        ("story", [" Hi", "\n\nUse"], " Hi\n\nUse", " Hi\n\nUse", "\n\n"),
        # nothing at all
        ("story", [], "", "", "\n\n"),
        ("story", ["\n\n", "User:"], "", "\n\n", ""),
        ("story", ["\n\nUser:"], "", "", "\n\n"),
        ("story", [" ", " "], "", "", "\n\n"),
    ],
)
def test_where_an_answer_is_cut(scripted, template, reply, answer, read, owed):
    chat, model = talk(scripted, reply, reply, template=template)
    prompt = chat.template.turn.format(user="Hello")
    for turns in (1, 2):
        pieces = list(chat.say("Hello", stream=True))
        assert "".join(map(str, pieces)) == answer.strip()
        turn = last(chat)
        assert turn.answer == answer
        assert turn.owed == owed
        before = (prompt + answer + "\n\n") * (turns - 1) + prompt
        assert model.read(turn.state) == before + read
        assert turn.state.texts == (before + read,)
        assert chat.text == before + answer + "\n\n"


def test_half_a_character_is_no_part_of_an_answer(scripted):
    chat, model = talk(scripted, [" a"])
    bird = [model.tokenizer.table.index(bytes([byte])) for byte in "鳥".encode()]
    model.replies = [[*model.replies[0], *bird, *bird[:2]]]
    assert chat.say("x").text == "a鳥"
    assert model.read(last(chat).state) == "User: x\n\nAssistant: a鳥"


@pytest.mark.parametrize("cut", range(9))
def test_max_tokens_may_cut_anywhere(scripted, cut):
    reply = [" Hi", ".", " \n", "\n\nUs", "ed", "!", "\n\nU", "ser:"]
    chat, model = talk(scripted, reply)
    said = chat.say("x", max_tokens=cut).text
    raw = "".join(reply[:cut]) if cut < 8 else "".join(reply[:6])
    assert said == raw.strip()
    assert chat.text == "User: x\n\nAssistant:" + raw.rstrip() + "\n\n"
    assert model.read(last(chat).state) + last(chat).owed == chat.text


@settings(max_examples=150)
@given(
    reply=st.lists(
        st.sampled_from(["a", " ", "\n", "\n\n", " \n\n", "b\n", "\nU", "\n\nU", "U", "U:", ":"]), max_size=9
    ),
    tokens=st.integers(0, 9),
    stop_after=st.integers(1, 9),
)
def test_any_answer_stands_for_its_text(scripted, reply, tokens, stop_after):
    template = Template("Q: {user}\n\nA:", stops=("\n\nU:", "\nUU"))
    chat, model = talk(scripted, reply, template=template)
    shown = ""
    for i, piece in enumerate(chat.say("x", stream=True, max_tokens=tokens)):
        shown += piece.text
        if i + 1 == stop_after:
            break
    turn = last(chat)
    assert turn.answer.strip() == shown
    assert turn.answer == turn.answer.rstrip()
    assert "".join(reply).startswith(turn.answer)
    assert model.read(turn.state) == turn.state.texts[0]
    assert turn.state.texts[0] + turn.owed == "Q: x\n\nA:" + turn.answer + "\n\n"
    again = len(turn.owed) - len("\n\n")
    assert again < max(map(len, [*reply, "  "]))  # never more than a part of one token is read again


def test_nothing_is_read_twice(scripted):
    replies = [[" One", ".", "\n\n", "User", ":"], [" Two", "."], [" Three", ".\n\nU", "ser:"], [" Four"]]
    chat, model = talk(scripted, *replies, template="g1", system="Be kind.")
    count = len(chat._llm.tokenizer.encode("System: Be kind.\n\n"))
    assert model.reads == [count]

    def reads() -> list[int]:
        new, model.reads = model.reads, []
        return new

    def size(text: str) -> int:
        return len(chat._llm.tokenizer.encode(text))

    reads()
    chat.say("a")
    assert reads() == [size("User: a\n\nAssistant:"), 1, 1, 1, 1, 1]
    chat.say("b")
    assert reads() == [size("User: b\n\nAssistant:"), 1, 1]  # the separator was read with the stop string
    chat.retry()
    assert reads() == [size("User: b\n\nAssistant:"), 1, 1]  # the message alone
    chat.undo()
    chat.fork("other")
    chat.switch("main")
    assert reads() == []
    chat.say("c")
    assert reads() == [size("User: c\n\nAssistant:"), 1, 1]
    chat.say("d")
    assert reads() == [size("\n\nUser: d\n\nAssistant:"), 1, 1, 1]
    chat.say("e")
    assert reads() == [size(".\n\nUser: e\n\nAssistant:"), 1]  # "." is the share of the token ".\n\nU"
    chat.switch("other")
    chat.say("f")
    assert reads() == [size("User: f\n\nAssistant:"), 1, 1]


def test_states_are_those_of_the_text_read_at_once(llm):
    chat = llm.chat(template="story", system="A talk.")
    for i, message in enumerate(["Hello", "And then?", "鳥?"]):
        chat.say(message, max_tokens=25, seed=i)
        turn = last(chat)
        if "\ufffd" not in turn.state.texts[0]:
            assert_same(turn.state, llm.state(turn.state.texts[0]))
        assert turn.state.texts[0] + turn.owed == chat.text


def test_few_states_are_held_at_a_time(scripted, monkeypatch):
    held, real = [], chat_file.useful_marks

    def useful(*args):
        marks = real(*args)
        held.append(len(marks))
        return marks

    monkeypatch.setattr(chat_file, "useful_marks", useful)
    chat, _ = talk(scripted, [" Hi", *["\n"] * 200, "a", *[" ", "b"] * 50])
    chat.say("x")
    assert len(held) > 300
    assert max(held) <= 12


def test_undo_retry_fork_switch(llm):
    chat = llm.chat(template="story")
    one = chat.say("a", max_tokens=12, seed=1).text
    here = chat.messages
    two = chat.say("b", max_tokens=12, seed=2).text
    there = chat.messages
    assert chat.undo() == "b"
    assert chat.messages == here
    assert chat.say("b", max_tokens=12, seed=2).text == two
    assert chat.retry(max_tokens=12, seed=3).text != two
    assert chat.messages[:2] == here
    assert chat.retry(max_tokens=12, seed=2).text == two
    assert chat.messages == there
    chat.fork("other")
    assert (chat.branch, chat.branches) == ("other", ("main", "other"))
    chat.undo()
    chat.undo()
    assert chat.messages == []
    assert chat.text == ""
    chat.say("c", max_tokens=5)
    chat.switch("main")
    assert chat.messages == there
    chat.undo()
    assert chat.retry(max_tokens=12, seed=1).text == one


def test_moves_that_are_not_possible(llm):
    chat = llm.chat(template="story")
    for move in (chat.undo, chat.retry, lambda: chat.retry(stream=True)):
        with pytest.raises(InputError, match="nothing was said yet"):
            move()
    with pytest.raises(InputError, match="branch 'main' already exists"):
        chat.fork("main")
    with pytest.raises(InputError, match="unknown branch 'x'; choose from main"):
        chat.switch("x")
    for stream in (False, True):
        with pytest.raises(InputError, match="the message is empty"):
            chat.say(" ", stream=stream)
        with pytest.raises(InputError, match="unknown option 'heat'"):
            chat.say("a", stream=stream, heat=1)
    assert chat.messages == []


def test_a_reply_that_is_broken_off_keeps_what_was_said(scripted):
    reply = [" One", " two", ".", "\n\nUs", "e it", " three"]
    for count, kept, read in [(1, " One", " One"), (2, " One two", " One two"), (4, " One two.\n\nUse it", None)]:
        chat, model = talk(scripted, reply, [" Next"])
        stream = chat.say("x", stream=True)
        shown = "".join(next(stream).text for _ in range(count))
        stream.close()
        assert chat.messages[-1]["content"] == shown == kept.strip()
        assert model.read(last(chat).state) == "User: x\n\nAssistant:" + (read or kept)
        assert chat.say("y").text == "Next"
        assert chat.text == f"User: x\n\nAssistant:{kept}\n\nUser: y\n\nAssistant: Next\n\n"


@pytest.mark.parametrize("calls", range(5))
def test_ctrl_c_at_any_moment(scripted, calls):
    chat, model = talk(scripted, [" Hello"], [" One", " two", "."], [" Next"])
    chat.say("a")
    before = chat.messages
    left = [calls]

    def interrupt(module, inputs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    if calls < 4:
        pieces: list[Completion] = []
        with pytest.raises(KeyboardInterrupt):
            pieces.extend(chat.say("b", stream=True))
        shown = "".join(map(str, pieces))
    else:
        shown = chat.say("b").text
    hook.remove()
    assert shown == "One two."[: [0, 0, 3, 7, 8][calls]]
    if calls == 0:  # the message was not read
        assert chat.messages == before
        return
    assert chat.messages[:2] == before
    assert [m["content"] for m in chat.messages[2:]] == ["b", shown]
    assert model.read(last(chat).state) + last(chat).owed == chat.text
    assert chat.say("c").text == "Next"
    assert chat.messages[-4]["content"] == "b"


def test_an_error_leaves_the_conversation_as_it_was(random_checkpoint):
    weights = random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3)
    llm = LLM(assemble(weights))
    chat = llm.chat(template="story")
    chat.say("a", max_tokens=5)
    before = chat.messages
    for options, message in [
        ({"logit_bias": {999: 1.0}}, "a token in logit_bias must be below 256"),
        ({"max_tokens": -1}, "max_tokens must be"),
        ({"stop_token_ids": [10**6]}, "a token in stop_token_ids must be below 256"),
    ]:
        for move in (partial(chat.say, "b"), chat.retry):
            with pytest.raises(InputError, match=message):
                move(**options)
            assert chat.messages == before
    with torch.no_grad():
        llm.model.head.weight[0] = math.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        chat.say("b")
    assert chat.messages == before


def test_a_stream_left_open_ends_when_its_branch_moves_on(scripted):
    chat, _ = talk(scripted, [" One", " two", " three"], [" Next"])
    stream = chat.say("a", stream=True)
    assert next(stream).text == "One"
    assert chat.messages[-1]["content"] == "One"
    assert chat.say("b").text == "Next"
    assert list(stream) == []
    assert [m["content"] for m in chat.messages] == ["a", "One", "b", "Next"]
    idle = chat.say("c", stream=True)
    assert [m["content"] for m in chat.messages] == ["a", "One", "b", "Next"]  # not begun, so nothing was said
    idle.close()


def test_a_stream_goes_on_in_the_branch_it_began_in(scripted):
    chat, _ = talk(scripted, [" One", " two"])
    stream = chat.say("a", stream=True)
    next(stream)
    chat.fork("other")
    assert [piece.text for piece in stream] == [" two", ""]
    assert chat.messages[-1]["content"] == "One"
    chat.switch("main")
    assert chat.messages[-1]["content"] == "One two"


def test_retry_after_undo(llm):
    chat = llm.chat(template="story")
    chat.say("a", max_tokens=5, seed=1)
    chat.undo()
    with pytest.raises(InputError, match="all of it was taken back: there is no message to answer again"):
        chat.retry()
    with pytest.raises(InputError, match="there is no message to take back"):
        chat.undo()


def test_threads_in_one_conversation_get_a_clear_error(llm):
    chat = llm.chat(template="story")
    errors: list[Exception] = []
    begin = threading.Barrier(4)

    def talk() -> None:
        begin.wait()
        for _ in range(10):
            try:
                chat.say("Hello " * 20, max_tokens=30)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors
    assert all(isinstance(error, InputError) for error in errors), errors
    assert {str(error) for error in errors} <= {
        "this conversation is in use by another thread; give each thread its own",
        "the conversation moved on while this answer was written",
    }
    chat.say("and now?", max_tokens=3)
    assert len(chat.messages) % 2 == 0


def test_an_input_in_a_chat(scripted):
    model, tokenizer = scripted([" 3"], [" Bye"], cue="Response:")
    llm = LLM(model, tokenizer=tokenizer)
    chat = llm.chat(template="instruction")
    assert chat.say("Add", input="1 2").text == "3"
    assert chat.messages[0] == {"role": "user", "content": "Add", "input": "1 2"}
    chat.say("Bye")
    assert chat.text == "Instruction: Add\n\nInput: 1 2\n\nResponse: 3\n\nInstruction: Bye\n\nResponse: Bye\n\n"
    assert Chat(llm, "instruction", history=chat.messages).text == chat.text
    asked = [{"role": "user", "content": "Add", "input": "1 2"}]
    assert llm.chat(asked, template="instruction").state.texts == ("Instruction: Add\n\nInput: 1 2\n\nResponse: 3",)
