"""One answer in a conversation: what it is read from, written and kept."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from ..engine.answer_state import ResumableAnswer
from ..engine.batch import Row
from ..engine.completion import Completion
from ..engine.decode_batch import Event
from ..models import State
from ..text.chat_templates import Prompt
from . import named_states
from .answers import Answer
from .conversation_store import ConversationStore, KeptAnswer, Message, Tree, new_message
from .generation import Generation
from .models import ServedModel
from .named_states import Begin
from .prompt_reading import Known, PromptReading, front_of
from .prompts import AnswerBody, answer_decoding, read_prompt
from .server import Server
from .state_pictures import head_norms
from .stream import event

PICTURES_EVERY = 0.2  # seconds


class Setting:
    """Under which an answer is given.

    begin: the state that the conversation begins from; None = it begins a text.
    """

    def __init__(self, server: Server, settings: dict[str, Any], begin: Begin | None, digest: str | None):
        self.settings = settings
        self.model: ServedModel = server.models.find(settings["model"])
        self.body = AnswerBody(**{name: settings[name] for name in AnswerBody.model_fields if name in settings})
        self.begin, self.digest = begin, digest
        most = settings["max_tokens"]
        self.max_tokens: int = server.most_tokens if most is None else most

    @classmethod
    async def read(cls, server: Server, owner: str, settings: dict[str, Any]) -> Setting:
        """ApiError for a model or a state that is not here."""
        if settings["state"] is None:
            return cls(server, settings, None, None)
        model, name = server.models.find(settings["model"]), settings["state"]
        begin = await named_states.begin_from(server, model, owner, name)
        entry, _ = await named_states.find(server, owner, name)
        return cls(server, settings, begin, entry.digest)

    def messages(self, path: list[Message]) -> list[dict[str, Any]]:
        """With the system text."""
        return [*self._system, *(message.in_openais_form() for message in path)]

    @property
    def _system(self) -> list[dict[str, Any]]:
        text = self.settings["system"]
        return [{"role": "system", "content": text}] if text.strip() else []

    def prompt(self, path: list[Message], after: int = 0) -> Prompt:
        """For an answer to the last message, or the rest of that. after: so many messages of the path were read."""
        goes_on = path[-1].role == "assistant"
        return read_prompt(
            self.model,
            self.messages(path),
            self.body,
            template=self.settings["template"],
            continue_final_message=goes_on,
            after=after and after + len(self._system),
        )

    def front(self, prompt: Prompt) -> str:
        return front_of(self.model, prompt, self.settings["system"], self.digest)


class ConversationAnswer:
    """Writes one answer, and keeps it. `events` may be left at any time: what was written until then is kept."""

    def __init__(self, server: Server, owner: str, conversation: str, setting: Setting, *, picture: bool = False):
        self.server, self.owner, self.conversation, self.setting = server, owner, conversation, setting
        self.store = ConversationStore(server, owner)
        self.picture = picture
        self.user: Message | None = None  # to be kept before the model begins
        self._replaces = False
        self._events: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

    async def reply(self, tree: Tree, parent: str | None, content: str | None) -> None:
        """Answers a message that is there, or a new one with this content.

        Raises:
            ApiError, InputError: nothing was begun.
        """
        path = tree.path(parent)
        if content is not None:
            self.user = new_message(parent, "user", content)
            path = [*path, self.user]
        prompt = self.setting.prompt(path)
        front = self.setting.front(prompt)
        reading = await self._read(path, prompt, front)
        message = new_message(path[-1].id, "assistant", "", model=self.setting.model.name)
        self._begin(message, reading, front, prompt)

    async def go_on(self, tree: Tree, message: Message) -> None:
        """Goes on with an answer: from its last token if it was cut, else from its text.

        Raises:
            ApiError, InputError: nothing was begun.
        """
        self._replaces = True
        path = tree.path(message.id)
        prompt = self.setting.prompt(path)
        front, kept = self.setting.front(prompt), message.answer
        if kept is not None and kept.tokens and kept.front == front:
            state = await self.store.state(self.conversation, message)
            if state is not None and state.fingerprint == self.setting.model.speaker.model.fingerprint:
                self._resume(message, kept, Known(state, kept.n_tokens, ""), prompt)
                return
        self._begin(message, await self._read(path, prompt, front), front, prompt)

    async def _read(self, path: list[Message], prompt: Prompt, front: str) -> PromptReading:
        """From the last answer in front of the new one whose state is known and was read under the same front."""
        known, n = None, 0
        for n in range(len(path) - 1, 0, -1):
            before = path[n - 1]
            if before.answer is not None and before.state_bytes and before.answer.front == front:
                state = await self.store.state(self.conversation, before)
                if state is not None:
                    known = Known(state, before.answer.n_tokens, before.answer.owed)
                    break
        begin = None if self.setting.begin is None else self.setting.begin.state
        return PromptReading(self.setting.model, prompt, known, lambda: self.setting.prompt(path, n), begin)

    def _begin(self, message: Message, reading: PromptReading, front: str, prompt: Prompt) -> None:
        """Reads a prompt, and writes behind it."""
        self._kept = KeptAnswer(front, reading.n_tokens, 0, "", prompt.opening, prompt.beginning, None)
        self._followed = _Followed(self, reading.text, reading.n_tokens, prompt.template.separator)
        self._n_known = reading.n_known
        self._generate(message, reading.ids, reading.text, prompt, reading.state, ())

    def _resume(self, message: Message, kept: KeptAnswer, known: Known, prompt: Prompt) -> None:
        """Writes behind the last token of an answer."""
        assert kept.tokens is not None
        self._kept = kept
        prompt = prompt._replace(opening=kept.opening, beginning=kept.beginning)
        n = kept.n_tokens - kept.n_prompt
        written = self.setting.model.speaker.tokenizer.decode(kept.tokens[:n])
        text = known.state.texts[0]
        text = text[: len(text) - len(written)]
        self._followed = _Followed(self, text, kept.n_prompt, prompt.template.separator, (n, known.state))
        self._n_known = known.n_tokens
        self._generate(message, kept.tokens[n:], text, prompt, known.state, kept.tokens)

    def _generate(
        self,
        message: Message,
        ids: Sequence[int],
        text: str,
        prompt: Prompt,
        begin: State | None,
        earlier: Sequence[int],
    ) -> None:
        self._n_prompt, self._earlier = self._n_known + len(ids), len(earlier)
        self._answer = Answer(prompt._replace(beginning=""), self.setting.body.stops)
        model, setting = self.setting.model, self.setting
        self.generation = Generation(
            self.server,
            model,
            ids,
            text,
            answer_decoding(model, setting.body, prompt, setting.max_tokens, None, 1),
            stops=prompt.template.stops,
            owner=self.owner,
            written=prompt.opening + prompt.beginning,
            begin=begin,
            resume=(earlier, self._followed),
        )
        self.generation.check()
        begun = self._answer.parser.feed(prompt.beginning + self.generation.replayed)
        self.message = replace(
            message, content=begun.content, reasoning=begun.reasoning, model=model.name, finish_reason=None
        )

    async def events(self) -> AsyncGenerator[str, None]:
        """All events as they come; an error is raised. Where this is left before the end, what was written is kept."""
        if self.user is not None:
            yield event({"type": "user", "message": (await self.store.add(self.conversation, self.user)).describe()})
        await self.generation.submit()
        numbers = {"prompt_tokens": self._n_prompt, "cached_tokens": self._n_known + self.generation.cached_tokens}
        writing = asyncio.ensure_future(self._write(numbers))
        self.server.writing.add(writing)
        writing.add_done_callback(self.server.writing.discard)
        try:
            yield event({"type": "begin", "message": self.message.describe()} | numbers)
            while (item := await self._events.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield event(item)
        finally:
            if self._answer.written:
                self.generation.end()
            else:
                writing.cancel()
            await asyncio.wait([writing])

    def tell(self, data: dict[str, Any]) -> None:
        """One more event."""
        self._events.put_nowait(data)

    async def _write(self, numbers: dict[str, int]) -> None:
        """Takes all pieces, and keeps the answer."""
        try:
            try:
                await self._take_pieces()
            finally:
                self.generation.cancel()
            if self.picture and (end := self._followed.ending) is not None:
                layers = await asyncio.to_thread(head_norms, end.state)
                self.tell({"type": "state", "tokens": end.n_tokens, "layers": layers})
            self.tell({"type": "end", "message": (await self._keep(numbers)).describe()})
            self._events.put_nowait(None)
        except Exception as error:
            self._events.put_nowait(error)
            if self._answer.written and self.message.finish_reason is None:  # what was shown is not lost
                self.message = replace(self.message, finish_reason="cancelled")
                await self._keep(numbers)

    async def _take_pieces(self) -> None:
        async for piece in self.generation.pieces():
            taken, message = self._answer.take(piece), self.message
            for kind in ("reasoning", "content"):
                if text := getattr(taken, kind):
                    self.tell({"type": kind, "text": text})
            content, reasoning = message.content + taken.content, message.reasoning + taken.reasoning
            self.message = replace(message, content=content, reasoning=reasoning, finish_reason=taken.finish_reason)
            if taken.finish_reason is not None:
                return

    async def _keep(self, numbers: dict[str, int]) -> Message:
        """The whole answer, with its state: unless that has read a stop string of the caller, which is not shown."""
        written, seconds = self._answer.written, self.generation.latest - self.generation.read
        usage = self.message.usage if self._earlier and self.message.usage else numbers
        message = replace(self.message, usage=usage | {"completion_tokens": written})
        if seconds > 0:
            message = replace(message, tokens_per_second=round((written - self._earlier) / seconds, 1))
        end, state = self._followed.ending, None
        if end is not None and not self._answer.parser.stopped:
            state = end.state
            kept = replace(self._kept, n_tokens=end.n_tokens, owed=end.owed, tokens=self._followed.tokens)
            message = replace(message, answer=kept)
        return await self.store.add(self.conversation, message, state, replaces=self._replaces)


class _Followed(ResumableAnswer):
    """Tells of the state while it is followed, on the scheduler's thread."""

    def __init__(self, answer: ConversationAnswer, text: str, n_tokens: int, separator: str, *earlier: Any):
        super().__init__(text, n_tokens, separator, *earlier)
        self._tell, self._loop = answer.tell, asyncio.get_running_loop()
        self._next = time.monotonic() if answer.picture else math.inf

    def begin(self, state: State) -> None:
        super().begin(state)
        self._show(state, self._replayed)

    def push(self, event: Event, row: Row, piece: Completion | None) -> None:
        super().push(event, row, piece)
        if event.token is not None and time.monotonic() >= self._next:
            self._show(event.state, len(row.token_ids))

    def _show(self, state: State, written: int) -> None:
        if time.monotonic() >= self._next and not self._loop.is_closed():
            self._next = time.monotonic() + PICTURES_EVERY
            told = {"type": "state", "tokens": self._n_tokens + written, "layers": head_norms(state)}
            self._loop.call_soon_threadsafe(self._tell, told)
