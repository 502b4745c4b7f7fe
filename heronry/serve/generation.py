"""From a request's prompt to pieces of text, across the border between the scheduler's thread and asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from ..engine.batch import Row
from ..engine.completion import Completion, Pieces, TokenLogprob
from ..engine.decode_batch import Event, SequenceDecoder
from ..engine.options import Decoding
from ..engine.requests import Request
from ..models import State
from .models import ServedModel
from .server import Server

T = TypeVar("T")


class Generation:
    """The completions of one prompt. Iterate over `pieces` once; leaving it early frees the rows before the next step.

    cached_tokens: of the prompt, that were not read again.
    prompt_logprobs: of the prompt's tokens but the first, once the first piece is there, where they were asked for.
    stopped_by: the stop string or stop id that ended a completion, by its number, once its last piece is there; the end
        of text is none.
    begun, read: when it was asked for, and when its prompt was read, by `time.perf_counter`.
    """

    def __init__(
        self,
        server: Server,
        model: ServedModel,
        tokens: Sequence[int],
        text: str,
        decoding: Decoding,
        *,
        stops: Sequence[str] = (),
        keep_stop: bool = False,
        prompt_logprobs: int | None = None,
        begin: tuple[int, State | None] = (0, None),
        owner: str = "",
    ):
        """
        Args:
            tokens: the prompt; text: what it stands for.
            decoding: one row for each completion.
            stops: strings that end a completion.
            keep_stop: the one that does is part of it.
        """
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Completion | Exception] = asyncio.Queue()
        logprobs = decoding.top_logprobs is not None
        tokenizer = model.speaker.tokenizer
        stop_ids = decoding.stop_ids(tokenizer)
        choices = range(len(decoding.samplings))
        self._rows = [Row(tokenizer, [*tokens], text, stops, logprobs, 0, i, keep_stop) for i in choices]
        self._min_tokens = decoding.min_tokens
        self._stop_ids = decoding.stop_token_ids
        self._unwanted: set[int] = set()
        self._metrics = server.metrics
        self.begun = self.read = time.perf_counter()
        self.stopped_by: dict[int, str | int] = {}
        self.cached_tokens = begin[0]
        self.prompt_logprobs: list[TokenLogprob] = []
        self.last_logprobs: dict[int, TokenLogprob] = {}  # of the end of text, by completion
        self._request = Request(
            model.speaker.model,
            tokens,
            [
                SequenceDecoder(
                    sampling,
                    decoding.max_tokens,
                    stop_ids,
                    decoding.min_tokens,
                    decoding.top_logprobs,
                    decoding.masks[i],
                    tokens,
                    model.speaker.decode_token,
                )
                for i, sampling in enumerate(decoding.samplings)
            ],
            self,
            begin,
            prompt_logprobs=prompt_logprobs,
            owner=owner,
        )
        server.scheduler.submit(self._request)

    def cancel(self) -> None:
        """Nothing more of it is wanted."""
        self._request.cancel()

    def stop(self, choice: int) -> None:
        """Nothing more of one completion is wanted."""
        self._unwanted.add(choice)

    async def pieces(self) -> AsyncGenerator[Completion, None]:
        """The pieces of all completions as they come; the last of each has a finish_reason."""
        running = set(range(len(self._rows)))
        last: dict[int, float] = {}
        try:
            while running:
                item = await self._queue.get()
                if isinstance(item, Exception):
                    raise item
                if item.choice not in running:
                    continue
                now = time.perf_counter()
                if item.choice in last:
                    self._metrics.between.observe(now - last[item.choice])
                else:
                    self._metrics.first_token.observe(now - self.begun)
                last[item.choice] = now
                if item.finish_reason is not None:
                    running.discard(item.choice)
                yield item
                running -= self._unwanted
            self._metrics.whole.observe(time.perf_counter() - self.begun)
        finally:
            self._request.cancel()

    # On the scheduler's thread

    def on_prompt(self, state: State, logprobs: list[TokenLogprob]) -> None:
        self.prompt_logprobs, self.read = logprobs, time.perf_counter()

    def on_event(self, event: Event) -> bool:
        choice = event.index
        if choice in self._unwanted:
            return False
        row = self._rows[choice]
        if event.token is None and event.logprob is not None:
            self.last_logprobs[choice] = event.logprob
        piece = row.push(event, self._min_tokens)
        if row.buffer.found is not None:
            self.stopped_by[choice] = row.buffer.found
        elif event.stop_id in self._stop_ids:
            self.stopped_by[choice] = event.stop_id
        if piece is not None:
            last = piece.finish_reason is not None
            self._hand_over(piece if last else replace(piece, make_state=_no_state))
        return not row.buffer.stopped

    def on_error(self, error: Exception) -> None:
        self._hand_over(error)

    def _hand_over(self, item: Completion | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


def _no_state() -> State:
    raise RuntimeError("the batch has moved on: only the last piece of a completion has its state")


def start_all(generations: Iterable[Generation]) -> list[Generation]:
    """All of them as they start; where one is refused, none goes on."""
    started: list[Generation] = []
    try:
        for generation in generations:
            started.append(generation)
    except BaseException:
        cancel_all(started)
        raise
    return started


def cancel_all(generations: Iterable[Generation]) -> None:
    """Nobody waits for them any more."""
    for generation in generations:
        generation.cancel()


async def collect_all(generations: Sequence[Generation]) -> list[list[Completion]]:
    """The whole completions of each."""
    try:
        return await asyncio.gather(*map(_collect, generations))
    finally:
        cancel_all(generations)


async def _collect(generation: Generation) -> list[Completion]:
    rows: dict[int, Pieces] = {}
    async for piece in generation.pieces():
        rows.setdefault(piece.choice, Pieces()).add(piece)
    return [rows[i].joined() for i in sorted(rows)]


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams as they come, each with the number of its stream."""
    tasks = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                i = tasks.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                tasks[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for stream in streams:
            await stream.aclose()
