"""From a request's prompt to pieces of text, across the border between the scheduler's thread and asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ..engine.answer_state import AnswerState, ResumableAnswer
from ..engine.batch import Row
from ..engine.completion import Completion, Pieces, TokenLogprob, join
from ..engine.decode_batch import Event, SequenceDecoder
from ..engine.options import Decoding
from ..engine.requests import Request
from ..models import State
from .inbox import Inbox
from .models import ServedModel
from .reading import begin_cached
from .server import Server

T = TypeVar("T")


class Generation:
    """The completions of one prompt. `submit` it, then iterate over `pieces` once; leaving that early frees the rows
    before the next step.

    cached_tokens: of the prompt, that were not read again.
    replayed: what is certain of the text of a completion that is gone on with; the pieces come behind it.
    prompt_logprobs: of the prompt's tokens but the first, once the first piece is there, where they were asked for.
    stopped_by: the stop string or stop id that ended a completion, by its number, once its last piece is there; the end
        of text is none.
    begun, read, latest: when it was asked for, its prompt was read and its latest piece was handed out, by
        `time.perf_counter`.
    last_logprobs: of the end of text, by completion.
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
        owner: str = "",
        written: str | None = None,
        begin: State | None = None,
        keep: Sequence[AnswerState] = (),
        is_over: Callable[[str], bool] | None = None,
        resume: tuple[Sequence[int], ResumableAnswer] | None = None,
    ):
        """
        Args:
            tokens: the prompt; text: what it stands for.
            decoding: one row for each completion.
            stops: strings that end a completion.
            keep_stop: the one that does is part of it.
            written: of an answer in a chat, at the end of the prompt.
            begin: the state of one row that the prompt continues; None = it begins a text.
            keep: one for each completion, each of which is followed to its state.
            is_over: called with each piece of the one completion, on the scheduler's thread; True ends it.
            resume: the tokens of the one completion so far, and what follows it to its state; see `replayed`.
        """
        self._inbox: Inbox[Completion | Exception] = Inbox(server.doorbell)
        self._server, self._model = server, model
        speaker = model.speaker
        logprobs = decoding.top_logprobs is not None
        stop_ids = decoding.stop_ids(speaker.tokenizer)
        choices = range(len(decoding.samplings))
        self._rows = [
            Row(speaker.tokenizer, [*tokens], text, stops, logprobs, 0, i, keep_stop, with_state=False) for i in choices
        ]
        self._min_tokens = decoding.min_tokens
        self._stop_ids = decoding.stop_token_ids
        self._unwanted: set[int] = set()
        self._continues, self._keep, self._is_over = begin is not None, keep, is_over
        self._is_ended = False
        self.replayed = ""
        earlier: Sequence[int] = ()
        if resume is not None:
            earlier, followed = resume
            self._keep = (followed,)
            for token in earlier:
                self.replayed += (said := self._rows[0].replay(token))
                followed.replay(self._rows[0], said)
        self.begun = self.read = self.latest = time.perf_counter()
        self.stopped_by: dict[int, str | int] = {}
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.last_logprobs: dict[int, TokenLogprob] = {}
        self._grammar = decoding.grammar
        self._make_matcher = partial(decoding.matcher, speaker.tokenizer, speaker.model.config.vocab_size, written)
        self._request = Request(
            speaker.model,
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
                    speaker.decode_token,
                    earlier,
                )
                for i, sampling in enumerate(decoding.samplings)
            ],
            self,
            (0, speaker.start if begin is None else begin),
            prompt_logprobs=prompt_logprobs,
            owner=owner,
        )

    def check(self) -> None:
        """InputError for what is never taken in, see `Scheduler.check`."""
        self._server.scheduler.check(self._request)

    async def submit(self) -> None:
        """Has it read and written, from the longest beginning of the prompt that is known.

        Raises:
            InputError, Busy: see `Scheduler.submit`.
        """
        request = self._request
        self.check()
        if self._grammar is not None:
            await self._server.grammars.check(self._grammar)
        matcher = await asyncio.to_thread(self._make_matcher)
        if matcher is not None:
            for sequence in request.sequences:
                sequence.matcher = matcher.copy()
        if not self._continues:
            await begin_cached(self._server, self._model, request)
            self.cached_tokens = request.position
        self._server.scheduler.submit(request)

    def cancel(self) -> None:
        """Nothing more of it is wanted."""
        self._request.cancel()

    def stop(self, choice: int) -> None:
        """Nothing more of one completion is wanted."""
        self._unwanted.add(choice)

    def end(self) -> None:
        """Ends the completions with their next token, which is their last."""
        self._is_ended = True

    async def pieces(self) -> AsyncGenerator[Completion, None]:
        """The pieces of all completions as they come; the last of each has a finish_reason."""
        running = set(range(len(self._rows)))
        last: dict[int, float] = {}
        try:
            while running:
                item = await self._inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item.choice not in running:
                    continue
                item = self._join_ready(item)
                now = time.perf_counter()
                if item.choice in last:
                    self._server.metrics.between.observe(now - last[item.choice])
                else:
                    self._server.metrics.first_token.observe(now - self.begun)
                last[item.choice] = self.latest = now
                if item.finish_reason is not None:
                    running.discard(item.choice)
                    self._server.metrics.completions.labels(item.finish_reason).inc()
                yield item
                running -= self._unwanted
            self._server.metrics.note_end(self.begun, self._request.admitted, self.read, self.latest, self._lengths())
        finally:
            self._request.cancel()

    def _lengths(self) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each completion."""
        return len(self._request.tokens), [len(row.token_ids) for row in self._rows]

    def _join_ready(self, item: Completion) -> Completion:
        """One piece of this and what has come behind it: where events cost more than tokens, several tokens share
        one."""
        ready = self._inbox.items
        while item.finish_reason is None and ready:
            after = ready[0]
            if isinstance(after, Exception) or after.choice != item.choice:
                break
            ready.popleft()
            item = join([item, after])
        return item

    # On the scheduler's thread

    def on_prompt(self, state: State, logprobs: list[TokenLogprob]) -> None:
        self.prompt_logprobs, self.read = logprobs, time.perf_counter()
        for keep in self._keep:
            keep.begin(state)

    def on_event(self, choice: int, event: Event) -> bool:
        if choice in self._unwanted:
            return False
        row = self._rows[choice]
        if self._is_ended and event.finish_reason is None:
            event = replace(event, finish_reason="cancelled")
        if event.token is None and event.logprob is not None:
            self.last_logprobs[choice] = event.logprob
        piece = row.push(event, self._min_tokens)
        if row.buffer.found is not None:
            self.stopped_by[choice] = row.buffer.found
        elif event.stop_id in self._stop_ids:
            self.stopped_by[choice] = event.stop_id
        if piece is None:
            is_last = False
        else:
            if piece.finish_reason is None and self._is_over is not None and self._is_over(piece.text):
                piece = replace(piece, finish_reason="stop")
            is_last = piece.finish_reason is not None
        if self._keep:
            self._keep[choice].push(event, row, piece)
        if piece is not None:
            self._inbox.put(piece)
        return not is_last

    def on_error(self, error: Exception) -> None:
        self._inbox.put(error)


async def submit_all(generations: Sequence[Generation]) -> None:
    """All of them or none."""
    try:
        await asyncio.gather(*(generation.submit() for generation in generations))
    except BaseException:
        cancel_all(generations)
        raise


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
    if len(streams) == 1:  # as a rule
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(1)  # what waits is joined by its stream

    async def pump(i: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                await queue.put((i, item))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for stream in streams:
            await stream.aclose()
