"""From the prompts of one call to its completions: tokens in, pieces of text out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import InputError, show
from ..models import State
from ..text.stop_strings import StopStringBuffer
from ..text.tokenizers import Tokenizer
from .completion import Completion, Pieces, TokenLogprob, Usage
from .decode_batch import Event
from .generate import Generation
from .options import Prompt, Prompts, whole_number


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one call, and in which shape its completions are wanted."""

    prompts: list[Prompt]
    single: bool  # one prompt, not in a list of prompts
    n: int
    listed: bool  # n was given, so that each prompt gets a list

    @classmethod
    def parse(cls, prompt: Prompt | Prompts, n: int | None) -> PromptBatch:
        """From the arguments of `LLM.generate`; InputError where they are of another type or out of range."""
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InputError(f"a prompt must be a text or a list of token ids, got {show(prompt)}")
        n = n if n is None else whole_number("n", n, least=1)
        single = isinstance(prompt, str) or (len(prompt) > 0 and not isinstance(prompt[0], Sequence))
        prompts: list[Any] = [prompt] if single else list(prompt)
        return cls(prompts, single, n or 1, n is not None)


class BatchCollector:
    """Puts the completions of a batch together from their pieces."""

    def __init__(self, batch: PromptBatch):
        self.batch = batch
        self.rows = [Pieces() for _ in range(len(batch.prompts) * batch.n)]

    def add(self, piece: Completion) -> None:
        """Takes the next piece of one of them."""
        self.rows[piece.index * self.batch.n + piece.choice].add(piece)

    def result(self) -> Completion | list[Completion] | list[list[Completion]]:
        """The completions in the shape that `LLM.generate` returns."""
        batch, completions = self.batch, [row.joined() for row in self.rows]
        if batch.listed:
            lists = [completions[i : i + batch.n] for i in range(0, len(completions), batch.n)]
            return lists[0] if batch.single else lists
        return completions[0] if batch.single else completions


class Row:
    """One completion while it is generated: takes events, gives pieces of text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        text: str,
        stops: Sequence[str],
        logprobs: bool,
        index: int,
        choice: int,
        keep_stop: bool = False,
    ):
        """text: what the state stands for before the completion. keep_stop: the stop string is part of it."""
        self.tokenizer, self.prompt, self.text, self.keep_stop = tokenizer, prompt, text, keep_stop
        self.index, self.choice = index, choice
        self.decoder = tokenizer.stream()
        self.buffer = StopStringBuffer(stops)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self.passed_on = 0  # tokens that a piece was made of
        self.decoded = ""  # what the last event brought, before stop strings were looked for

    def replay(self, token: int) -> str:
        """Takes a token that was drawn earlier; returns what is certain of its text."""
        self.token_ids.append(token)
        self.passed_on = len(self.token_ids)
        self.decoded = self.decoder.push(token)
        return self.buffer.push(self.decoded)

    def push(self, event: Event, min_tokens: int) -> Completion | None:
        """Takes an event; returns the next piece, if there is one."""
        finish_reason = event.finish_reason
        if event.token is None:
            self.decoded = self.decoder.finish()
            text = self.buffer.push(self.decoded) + self.buffer.finish()
        else:
            self.token_ids.append(event.token)
            if self.logprobs is not None and event.logprob is not None:
                self.logprobs.append(event.logprob)
            text = self.decoded = self.decoder.push(event.token)
            if len(self.token_ids) > min_tokens:
                text = self.buffer.push(text)
        if self.buffer.found is not None:
            finish_reason = "stop"
            text += self.buffer.found if self.keep_stop else ""
        if not text and finish_reason is None:
            return None
        begin, self.passed_on = self.passed_on, len(self.token_ids)
        return Completion(
            text=text,
            token_ids=self.token_ids[begin:],
            finish_reason=finish_reason,
            logprobs=None if self.logprobs is None else self.logprobs[begin:],
            usage=Usage(len(self.prompt), len(self.token_ids)),
            index=self.index,
            choice=self.choice,
            make_state=self._state_of(event, last=finish_reason is not None),
        )

    def _state_of(self, event: Event, last: bool) -> Callable[[], State]:
        """The state after an event, cut out of the batch's when it is asked for; the last is cut at once, for the batch
        holds the memory of all rows."""
        count = len(self.token_ids)

        def with_text(state: State) -> State:
            return state.with_texts([self.text + self.tokenizer.decode(self.token_ids[:count])])

        if last:
            return partial(with_text, event.state)
        return lambda: with_text(event.state)


def stream_pieces(generation: Generation, rows: list[Row], min_tokens: int) -> Generator[Completion, None, None]:
    """The pieces of all rows, as they are decoded."""
    for event in generation:
        row = rows[event.index]
        piece = row.push(event, min_tokens)
        if row.buffer.stopped:
            generation.drop(event.index)
        if piece is not None:
            yield piece


def alternate(streams: Sequence[Generator[Completion, None, None]]) -> Generator[Completion, None, None]:
    """The pieces of several batches, one of each in turn. Closing it closes them all."""
    running = list(streams)
    try:
        while running:
            for stream in list(running):
                piece = next(stream, None)
                if piece is None:
                    running.remove(stream)
                else:
                    yield piece
    finally:
        for stream in running:
            stream.close()
