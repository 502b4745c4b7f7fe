"""What a response consists of, and the events that tell of it while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from .answers import AnswerPiece
from .tokens import TokenNames, chat_logprob

Event = dict[str, Any]
EMPTY_TEXT = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


class ResponseOutput:
    """The items of one response: a thought, a text, calls.

    items: those that were begun.
    """

    def __init__(self, response: str, names: TokenNames, with_logprobs: bool):
        """response: its id, which is part of those of its items: see `kept_responses.resolve`."""
        self.response = response.removeprefix("resp_")
        self.names, self.with_logprobs = names, with_logprobs
        self.items: list[dict[str, Any]] = []
        self._numbers = count()

    def event(self, kind: str, **fields: Any) -> Event:
        """One event; each has the next number."""
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers)} | fields

    def add(self, piece: AnswerPiece) -> Iterator[Event]:
        """The events of the next piece of the answer."""
        if piece.reasoning:
            if not self._is_open("reasoning"):
                yield from self._begin("rs", "reasoning", summary=[], content=[{"type": "reasoning_text", "text": ""}])
            self.items[-1]["content"][0]["text"] += piece.reasoning
            yield self._of_part("reasoning_text.delta", delta=piece.reasoning)
        if piece.content:
            if not self._is_open("message"):
                yield from self._begin_message()
            logprobs = [chat_logprob(self.names, x) for x in piece.logprobs] if self.with_logprobs else []
            part = self.items[-1]["content"][0]
            part["text"] += piece.content
            part["logprobs"] += logprobs
            yield self._of_part("output_text.delta", delta=piece.content, logprobs=logprobs)
        for call in piece.calls:
            yield from self._end("completed")
            fields = {"call_id": call.id, "name": call.name}
            yield from self._begin("fc", "function_call", **fields, arguments=call.arguments)
            yield self._of_item("function_call_arguments.delta", delta=call.arguments)

    def finish(self, status: str) -> Iterator[Event]:
        """The events at the end of the answer; one without anything is an empty text."""
        if not self.items:
            yield from self._begin_message()
        yield from self._end(status)

    def _is_open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind

    def _begin_message(self) -> Iterator[Event]:
        yield from self._begin("msg", "message", role="assistant", content=[EMPTY_TEXT | {"logprobs": []}])
        yield self._of_part("content_part.added", part=EMPTY_TEXT)

    def _begin(self, prefix: str, kind: str, **fields: Any) -> Iterator[Event]:
        yield from self._end("completed")
        item = {"id": f"{prefix}_{self.response}_{len(self.items)}", "type": kind, "status": "in_progress"} | fields
        self.items.append(item)
        empty: dict[str, Any] = {"content": []} if "content" in item else {"arguments": ""}
        yield self.event("output_item.added", output_index=len(self.items) - 1, item=item | empty)

    def _end(self, status: str) -> Iterator[Event]:
        """Ends the last item, if it is open."""
        item = self.items[-1] if self.items else {}
        if item.get("status") != "in_progress":
            return
        item["status"] = "completed" if item["type"] == "function_call" else status
        if item["type"] == "reasoning":
            yield self._of_part("reasoning_text.done", text=item["content"][0]["text"])
        elif item["type"] == "message":
            [part] = item["content"]
            yield self._of_part("output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._of_part("content_part.done", part=part)
        else:
            fields = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("function_call_arguments.done", **fields)
        yield self.event("output_item.done", output_index=len(self.items) - 1, item=item)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return self.event(kind, **place, **fields)

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)


def usage(read: int, cached: int, written: int, thought: int) -> dict[str, Any]:
    """Numbers of tokens."""
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": read + written,
    }
