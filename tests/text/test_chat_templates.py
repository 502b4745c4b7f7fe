"""How templates show a conversation, byte by byte, and which one a model's name means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heronry import InputError
from heronry.text.chat_templates import TEMPLATES, Template, parse_template, read_messages, template_by_name
from heronry.text.conversations import encode_conversation, render_conversation
from heronry.text.tokenizers import load_tokenizer

BELOW = "Below is an instruction that describes a task"
COMPLETE = "Write a response that appropriately completes the request."
TALK = [
    {"role": "user", "content": "Add\n\nthem", "input": "1\n\n2"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "alpaca",
            "### Instruction: Add\nthem\n### Input: 1\n2\n### Response: 3\n\n### Instruction: Thanks\n### Response:",
        ),
        (
            "raven-alpaca",
            f"{BELOW}, paired with an input that provides further context. {COMPLETE}\n\n"
            "# Instruction:\nAdd\nthem\n\n# Input:\n1\n2\n\n# Response:\n3\n\n"
            f"{BELOW}. {COMPLETE}\n\n# Instruction:\nThanks\n\n# Response:\n",
        ),
        ("instruction", "Instruction: Add\nthem\n\nInput: 1\n2\n\nResponse: 3\n\nInstruction: Thanks\n\nResponse:"),
        ("qa", "Question: Add\nthem\n1\n2\n\nAnswer: 3\n\nQuestion: Thanks\n\nAnswer:"),
        ("raven", "Bob: Add\nthem\n1\n2\n\nAlice: 3\n\nBob: Thanks\n\nAlice:"),
        ("g1-think", "User: Add\nthem\n1\n2\n\nAssistant: 3\n\nUser: Thanks\n\nAssistant: <think"),
    ],
)
def test_bytes_of_instructions(name, text):
    """A template with a place for the input has it there, the others on the next line of the message."""
    template = TEMPLATES[name]
    assert template.render_history(TALK[:2]) + template.ask(TALK[2]) == text


@pytest.mark.parametrize("name", ["alpaca", "raven-alpaca", "instruction", "qa"])
def test_what_instructions_teach(name):
    """The answers with their stop text, for that ends an answer in a chat."""
    template = TEMPLATES[name]
    talk = [*TALK, {"role": "assistant", "content": "Bye"}]
    ids, mask = encode_conversation(talk, template, load_tokenizer("bytes"))
    lead = "" if name == "raven-alpaca" else " "
    learned = bytes(i for i, counts in zip(ids, mask, strict=True) if counts).decode()
    assert learned == f"{lead}3{template.stops[0]}{lead}Bye{template.stops[0]}"


def test_braces_in_messages_and_inputs():
    asked = {"role": "user", "content": "{input}", "input": "{user}"}
    assert TEMPLATES["instruction"].ask(asked) == "Instruction: {input}\n\nInput: {user}\n\nResponse:"
    with pytest.raises(InputError, match=r"turn_with_input must contain \{user\} and \{input\}, got 'x'"):
        Template("{user}:", turn_with_input="x")


def test_inputs_of_messages():
    assert read_messages(TALK[:1]) == TALK[:1]
    assert read_messages([{"role": "user", "content": "a", "input": "", "name": "x"}]) == [
        {"role": "user", "content": "a"}
    ]
    with pytest.raises(InputError, match=r"messages\[0\]: input must be a text, got 3"):
        read_messages([{"role": "user", "content": "a", "input": 3}])


def test_a_turn_of_ones_own():
    bob = parse_template("Bob: {user}\n\nAlice:")
    assert bob == Template("Bob: {user}\n\nAlice:", "{system}\n\n", "\n\n", ("\n\nBob:",))
    ours = parse_template("Rules: {system}\n\nQ: {user}\nA: ")
    assert ours == Template("Q: {user}\nA:", "Rules: {system}\n\n", "\n", ("\nQ:",))
    talk = [{"role": "system", "content": "Be kind."}, *TALK[2:], {"role": "assistant", "content": "Hi"}]
    pieces = render_conversation(talk, ours, has_end_of_text=False)
    assert "".join(text for text, _ in pieces) == "Rules: Be kind.\n\nQ: Thanks\nA: Hi\nQ:"
    assert parse_template("{user}\n").stops == ("\n",)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("RWKV-4-Pile-169M-20220807-8023.pth", None),
        ("RWKV-4-Raven-7B-v12-Eng98%-Other2%-20230521-ctx8192.pth", "raven"),
        ("RWKV-4-World-7B-v1-20230626-ctx4096.pth", "world"),
        ("RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth", "world"),
        ("RWKV-x070-World-2.9B-v3-20250211-ctx4096.pth", "world"),
        ("RWKV7-Goose-World3-2.9B-HF", "world"),
        ("RWKV7-Goose-World2.8-0.1B-HF", "world"),
        ("rwkv7-g0-7.2b-20250722-ctx4096.pth", "world"),
        ("rwkv7-g0a3-7.2b-20251029-ctx8192.pth", "world"),
        ("rwkv7-g1-0.1b-20250307-ctx4096.pth", "g1"),
        ("rwkv7a-g1d-0.1b-20260101-ctx8192.pth", "g1"),
        ("rwkv7-g1a2-2.9b.pth", "g1"),
        ("RWKV7-G1k-1.5B-20260805", "g1"),
        ("models--RWKV--RWKV7-G1k-1.5B-20260805", "g1"),
        ("model.safetensors", None),
        ("big1-g12345.pth", "g1"),
        ("underworld.pth", None),
    ],
)
def test_the_template_by_the_name_of_the_file(name, template):
    assert template_by_name(name) == template


def test_others_who_speak():
    named = TEMPLATES["g1-think"].with_names(user="Tom", assistant="Old Frog", system="Rules")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "User: who?"}]
    assert named.extend(named.render_history(messages[:1]), messages[1:]) == (
        "Rules: Be brief.\n\nTom: User: who?\n\nOld Frog: <think"
    )
    assert named.stops == ("\n\nTom:", "\n\nRules:", "\n\nOld Frog:")
    assert TEMPLATES["raven"].with_names(user="Tom") == replace(TEMPLATES["raven"], turn="Tom: {user}\n\nAlice:")
    assert TEMPLATES["world"].with_names() == TEMPLATES["world"]
    for template in ("bot", "raven-alpaca"):
        with pytest.raises(InputError, match="does not name who speaks; 'Tom' has no place in it"):
            TEMPLATES[template].with_names(user="Tom")
