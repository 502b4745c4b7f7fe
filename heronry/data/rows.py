"""Rows as people have them: what a row holds is told by its keys.

- a row is a text, a conversation, or a prompt with its completion; `SHAPES` has the fields of each shape
- a field that is null is not there: in a table every row has every column
- what cannot be read as it was meant is refused, never left out: tools, parts that are no text, preference data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import InputError, show, unknown_name

Messages = list[dict[str, Any]]  # {"role", "content"}, perhaps "weight" and "input", see text/conversations.py


class PromptCompletion(NamedTuple):
    """A text whose beginning is given."""

    prompt: str
    completion: str

    def messages(self) -> Messages:
        """The same as a conversation of one turn."""
        return _turn(self.prompt, self.completion)


Content = str | Messages | PromptCompletion

# the fields of each shape, in one or several spellings
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "messages": (("messages",),),
    "sharegpt": (("conversations",), ("conversation",)),
    "alpaca": (("instruction", "output"), ("instruction", "response")),
    "prompt-completion": (("prompt", "completion"),),
    "question-answer": (
        ("question", "answer"),
        ("question", "response"),
        ("query", "response"),
        ("prompt", "response"),
    ),
    "chosen": (("chosen", "rejected"),),
}
INPUTS = ("input", "context")  # what a question is about
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
PROMPTS = ("prompt", "question", "instruction")  # of preference data
OTHERS = (*INPUTS, *SYSTEM, *TOOLS, *PROMPTS, "history", "label")
FIELDS = frozenset([*OTHERS, *(field for ways in SHAPES.values() for fields in ways for field in fields)])

WAYS = [(name, fields, frozenset(fields)) for name, ways in SHAPES.items() for fields in ways]

ROLES = {"system": "system", "developer": "system", "human": "user", "user": "user"}
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant")
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")


def check_options(key: str | None, shape: str | None) -> None:
    """InputError for an unknown shape, or for both."""
    if shape is not None and shape not in SHAPES:
        raise unknown_name("shape", shape, SHAPES)
    if key is not None and shape is not None:
        raise InputError("--key names the one field to read, so it cannot be combined with --shape")


def read_row(row: Any, key: str | None = None, shape: str | None = None) -> Content:
    """What a row holds.

    Args:
        row: an object of JSON, or a row of a table as a dict.
        key: the field that holds the text or the messages; None: told by the keys.
        shape: of SHAPES, for rows that have the keys of several; "chosen" takes the chosen answer of preference data.

    Raises:
        InputError: a row of no shape or of several, or a value that cannot be read. The message does not say where
            the row is. Details that differ from row to row are in parentheses.
    """
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    if key is not None:
        if key not in row:
            raise InputError(f"has no {key!r} ({_keys(row)})")
        return _text_or_messages(row, key)
    known = row.keys() & FIELDS
    found = [(name, fields) for name, fields, needed in WAYS if needed <= known and shape in (None, name)]
    names = list(dict.fromkeys(name for name, _ in found))
    if not found:
        fault = "does not have a known shape" if shape is None else f"does not have the shape {shape}"
        if others := dict.fromkeys(name for name, _, needed in WAYS if needed <= known):
            fault = f"has the shape {' or '.join(others)}, not {shape}"
        raise InputError(f"{fault} ({_keys(row)}); name the field of its text with --key")
    if len(names) > 1:
        raise InputError(f"can be read as {' or '.join(names)} ({_keys(row)}); choose one with --shape")
    if len(found) > 1:
        raise InputError(f"can be read as {names[0]} in two ways ({_keys(row)}); rename or remove a field")
    [(name, fields)] = found
    if shape is None and (name == "chosen" or (name == "prompt-completion" and isinstance(row.get("label"), bool))):
        advice = f"--shape {name} reads " + ("the chosen answer" if name == "chosen" else "all answers alike")
        raise InputError(f"is preference data, for which there is no training yet; {advice}")
    return _read_shape(row, name, fields)


def _read_shape(row: dict[str, Any], name: str, fields: tuple[str, ...]) -> Content:
    """A row of a known shape. fields: those of the shape in the spelling of the row."""
    if len(fields) == 1:
        return _text_or_messages(row, fields[0])
    if name == "chosen":
        prompt = next((field for field in PROMPTS if field in row), None)
        answers = (row["chosen"], row["rejected"])
        if prompt is None or all(_begins_with(answer, row[prompt]) for answer in answers):  # the whole conversation
            return _text_or_messages(row, "chosen")
        fields = (prompt, "chosen")
    prompt, answer = fields
    if isinstance(row[prompt], list) or isinstance(row[answer], list):
        return _with_system(row, _joined_messages(row, prompt, answer))
    question, reply = _string(row, prompt), _string(row, answer)
    plain = name in ("prompt-completion", "chosen") and prompt == "prompt"
    if plain and not any(_is_set(row.get(field)) for field in (*SYSTEM, *TOOLS)):
        return PromptCompletion(question, reply)
    parts = [question, *(_string(row, field) for field in INPUTS if field in row)]
    asked, *about = [part for part in parts if part.strip()] or [""]
    messages = _turn(asked, reply)
    if about:
        messages[0]["input"] = "\n".join(about)
    return _with_system(row, [*_history(row), *messages])


def _text_or_messages(row: dict[str, Any], field: str) -> str | Messages:
    """The value of a field that is a text or a list of messages."""
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        if not value:
            raise InputError(f"{field!r} has no messages")
        return _with_system(row, _messages(value, field))
    raise InputError(f"{field!r} is neither a string nor a list of messages")


def _joined_messages(row: dict[str, Any], prompt: str, answer: str) -> Messages:
    """A conversation in two fields, each a list of messages or the text of one; only the second is learned."""
    halves = []
    for field, role in ((prompt, "user"), (answer, "assistant")):
        value = row[field]
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise InputError(f"{field!r} is neither a string nor a list of messages")
        halves.append(_messages(messages, field))
    return [*({**message, "weight": 0} for message in halves[0]), *halves[1]]


def _begins_with(answer: Any, prompt: Any) -> bool:
    """Whether the answer of preference data repeats the prompt."""
    if isinstance(answer, list) and isinstance(prompt, str):
        return len(answer) > 1
    return bool(prompt) and type(answer) is type(prompt) and answer[: len(prompt)] == prompt


def _messages(messages: list[Any], field: str) -> Messages:
    """Messages of any spelling as {"role", "content"}."""
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One of them: {"role", "content"} or {"from", "value"}. name: of the message, for errors."""
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise InputError(f"a message has no role ({name})")
    if role.lower() in TOOL_ROLES or any(_is_set(message.get(field)) for field in ("tool_calls", "function_call")):
        raise InputError(f"has tool calls or their results, which no chat template here renders ({name})")
    if role.lower() not in ROLES:
        raise InputError(f"unknown role {show(role)} ({name})")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise InputError(f"a message has no text ({name})")
    thought = message.get("reasoning_content")
    if isinstance(thought, str) and thought.strip():
        content = f"<think>{thought}</think>\n{content}"
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise InputError(f"the weight of a message must be 0 or 1 ({name})")
    read = {"role": ROLES[role.lower()], "content": content}
    return read if weight in (None, 1) else {**read, "weight": 0}


def _part(part: Any, name: str) -> str:
    """The text of a part of a content."""
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        kind = show(part.get("type")) if isinstance(part, Mapping) else show(part)
        raise InputError(f"a message has a part of type {kind}, where only text can be read ({name})")
    return str(part["text"])


def _with_system(row: dict[str, Any], messages: Messages) -> Messages:
    """The conversation of a row, with the system text that has a field of its own."""
    if any(_is_set(row.get(field)) for field in TOOLS):
        raise InputError("has tools, which no chat template here renders")
    texts = [_string(row, field) for field in SYSTEM if row.get(field)]
    if not texts:
        return messages
    if len(texts) > 1 or (messages and messages[0]["role"] == "system"):
        raise InputError("has several system texts")
    return [{"role": "system", "content": texts[0]}, *messages]


def _history(row: dict[str, Any]) -> Messages:
    """The earlier turns of an Alpaca row, pairs of question and answer."""
    turns = row.get("history", [])
    if not isinstance(turns, list) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise InputError("'history' is not a list of pairs of strings")
    return [message for turn in turns for message in _turn(*turn)]


def _turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(row: dict[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise InputError(f"{field!r} is not a string")
    return str(row[field])


def _is_set(value: Any) -> bool:
    """Whether a list of tools, perhaps as JSON, has any."""
    return bool(value) and value != "[]"


def _keys(row: dict[str, Any]) -> str:
    """The keys of a row, for errors."""
    names = [show(name) for name in row]
    return "keys: " + ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]) if names else "no keys"
