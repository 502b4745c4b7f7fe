"""Answers to lists of messages: rendered, generated and taken apart into thought, text and calls of tools."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..text.chat_templates import AnyTemplate, Template, prepare
from ..text.tool_calls import AnswerParser
from .chat import Chat, choose_template
from .completion import Completion, TokenLogprob
from .options import ChatOptions, check_names, flag, read_stops
from .text_model import TextModel


def answer_messages(
    llm: TextModel,
    messages: Sequence[Mapping[str, Any]],
    max_tokens: int,
    template: str | AnyTemplate | None,
    system: str | None,
    options: ChatOptions,
) -> Generator[Completion, None, None]:
    """The pieces of the answer; see `LLM.chat`."""
    check_names(options, ["max_tokens", "stream", *ChatOptions.__annotations__])
    decoding: dict[str, Any] = {**options}
    style = decoding.pop("tool_style", None)
    only_one = not flag("parallel_tool_calls", decoding.pop("parallel_tool_calls", True))
    stops = read_stops(decoding.pop("stop", None))
    if system:
        if messages and isinstance(messages[0], Mapping) and messages[0].get("role") in ("system", "developer"):
            raise InputError("a system text was given twice: by system= and in messages[0]")
        messages = [{"role": "system", "content": system}, *messages]
    chosen = choose_template(llm, template)
    if style is None and template is None and isinstance(chosen, Template):
        style = llm.tool_style
    prompt = prepare(
        messages,
        chosen,
        tools=decoding.pop("tools", None),
        tool_style=style,
        think=decoding.pop("think", None),
        opening=decoding.pop("opening", None),
        preserve_reasoning=flag("preserve_reasoning", decoding.pop("preserve_reasoning", False)),
    )
    parser = AnswerParser(prompt.tools, opening=prompt.opening, beginning=prompt.beginning, stops=stops)
    return _take_apart(Chat(llm, prompt.template).answer(prompt, max_tokens, decoding), parser, only_one)


def _take_apart(
    pieces: Generator[Completion, None, None], parser: AnswerParser, only_one: bool
) -> Generator[Completion, None, None]:
    """only_one: the answer ends with its first call."""
    any_call = False
    token_ids: list[int] = []  # since the last piece
    logprobs: list[TokenLogprob] = []
    try:
        for piece in pieces:
            new = parser.feed(piece.text)
            reason = piece.finish_reason
            if parser.stopped or (only_one and parser.has_called):
                reason = "stop"
            if reason is not None:
                rest = parser.finish()
                new = new._replace(
                    reasoning=new.reasoning + rest.reasoning,
                    content=new.content + rest.content,
                    calls=new.calls + rest.calls,
                )
            calls = new.calls[: 0 if any_call else 1] if only_one else new.calls
            any_call |= bool(calls)
            token_ids += piece.token_ids
            logprobs += piece.logprobs or ()
            if new.reasoning or new.content or calls or reason is not None:
                yield replace(
                    piece,
                    text=new.content,
                    reasoning=new.reasoning,
                    tool_calls=calls,
                    token_ids=token_ids,
                    logprobs=None if piece.logprobs is None else logprobs,
                    finish_reason="tool_calls" if any_call and reason is not None else reason,
                )
                token_ids, logprobs = [], []
            if reason is not None:
                return
    finally:
        pieces.close()
