"""Reading tokens into a state: from what is known of them already, or from a state that they continue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from ..engine.answer_state import Ending
from ..engine.completion import TokenLogprob
from ..engine.decode_batch import Event
from ..engine.requests import Request
from ..models import State
from .models import ServedModel
from .server import Server


async def begin_cached(server: Server, model: ServedModel, request: Request) -> None:
    """Has a prompt begin at its longest beginning that is known, and what is worth it kept."""
    cache = server.cache
    if cache is None or request.prompt_logprobs is not None:
        return
    root = model.root(request.owner)
    found = await asyncio.to_thread(cache.lookup, root, request.tokens)
    if found is not None:
        request.begin_at(*found)
    request.cuts = cache.cut_positions(root, request.tokens, start=request.position)
    request.on_cut = partial(cache.put, root, request.tokens)


class _Reading:
    """Receives the state after a prompt."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.state: asyncio.Future[State] = self._loop.create_future()

    def on_prompt(self, state: State, logprobs: list[TokenLogprob]) -> None:
        self._hand_over(state)

    def on_event(self, choice: int, event: Event) -> bool:
        return False

    def on_error(self, error: Exception) -> None:
        self._hand_over(error)

    def _hand_over(self, result: State | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: State | Exception) -> None:
        if self.state.done():
            return
        if isinstance(result, Exception):
            self.state.set_exception(result)
        else:
            self.state.set_result(result)


async def read_tokens(
    server: Server, model: ServedModel, tokens: Sequence[int], begin: State | None, owner: str
) -> State:
    """The state of one row after some tokens. begin: what they continue; None = they begin a text.

    Raises:
        InputError, Busy: see `Scheduler.submit`.
    """
    reading = _Reading()
    request = Request(
        model.speaker.model, tokens, (), reading, (0, model.speaker.start if begin is None else begin), owner=owner
    )
    server.scheduler.check(request)
    if begin is None:
        await begin_cached(server, model, request)
    server.scheduler.submit(request)
    try:
        return await reading.state
    finally:
        request.cancel()


async def read_ending(server: Server, model: ServedModel, ending: Ending, owner: str) -> tuple[State, int]:
    """The state behind all of a text, and how many tokens it has read since the prompt began: what a stop string left
    of a token is read by itself."""
    state, n_tokens = ending.state, ending.n_tokens
    if ending.owed:
        ids, text = model.speaker.tokenizer.encode(ending.owed), state.texts[0] + ending.owed
        state = (await read_tokens(server, model, ids, state, owner)).with_texts([text])
        n_tokens += len(ids)
    return state, n_tokens
