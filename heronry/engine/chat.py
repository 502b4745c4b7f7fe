"""Conversations as a tree of kept states: nothing is read twice, except the message that `retry` answers again.

A turn keeps one state, after its answer: the next message continues from there; `undo`, `fork` and `switch` only choose
which.

It covers exactly the prompt, the answer as the model wrote it without white space at its end, and the
template's separator in front of the next message. An answer often ends inside what the model has read (a stop string,
white space, half a character), so the states of the last steps are kept until it is certain what they cover. The rule:
of these, take the longest whose text is a prefix of the conversation; the rest is `owed`, and read in front of the next
message. Mostly that is the separator. If a token crosses the end (".\\n\\nU"), its share before the end is owed as
well: at most a part of one token is read again.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ..errors import InputError, show, unknown_name
from ..models import State
from ..text.chat_templates import TEMPLATES, Template, read_messages, usual_template
from ..text.tokenizers import WorldTokenizer
from ..text.utf8 import encode_utf8
from .completion import Completion, FinishReason, TokenLogprob, Usage, join
from .conversation import Beginning, ConversationTree, Turn, beginning, lineage
from .generate import Generation, prefill
from .options import DecodeOptions, Decoding, check_names, resolve
from .sampling import Sampling
from .stop_strings import StopStringBuffer
from .text_model import TextModel

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Chat:
    """A conversation with branches.

    An answer that is interrupted (Ctrl-C, a stream that is closed) keeps what was handed out of it. A stream that is
    still open when its branch moves on ends there.
    """

    def __init__(
        self,
        llm: TextModel,
        template: str | Template | None = None,
        system: str | None = None,
        history: Sequence[Mapping[str, str]] = (),
    ):
        """
        Args:
            template: a Template or the name of one in TEMPLATES; None = what the model's folder names, else raven
                for RWKV-4, g1 for RWKV-7 with the World vocabulary, world for the rest.
            system: read once, in front of everything.
            history: messages of an earlier conversation, read at once: [{"role": "user", "content": ...}, ...], the
                last of "assistant". `undo` does not reach into them.
        """
        name = llm.chat_template if template is None else template
        if name is None:
            name = usual_template(llm.model.name, isinstance(llm.tokenizer, WorldTokenizer))
        if not isinstance(name, str | Template):
            raise InputError(f"template must be a Template or the name of one, got {show(name)}")
        if isinstance(name, str) and name not in TEMPLATES:
            raise unknown_name("chat template", name, TEMPLATES)
        chosen: Template = TEMPLATES[name] if isinstance(name, str) else name
        messages = read_messages(history)
        if system:
            if messages and messages[0]["role"] == "system":
                raise InputError("a system text was given twice: by system= and in messages[0]")
            messages = [*read_messages([{"role": "system", "content": system}]), *messages]
        if messages and messages[-1]["role"] == "user":
            raise InputError("the history must end with an answer")
        self._llm = llm
        self._tree = ConversationTree(chosen, _read_beginning(llm, chosen, messages))
        self._lock = threading.Lock()  # held while a piece of an answer is made

    @property
    def llm(self) -> TextModel:
        """Who answers."""
        return self._llm

    @property
    def template(self) -> Template:
        """How messages are shown to the model."""
        return self._tree.template

    @property
    def branch(self) -> str:
        """The name of the branch we are on; the first one is "main"."""
        return self._tree.branch

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self._tree.heads)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation of this branch: [{"role": "user", "content": ...}, ...]. An answer is without white space
        around it, and with its thought from the "<think" on that the template begins it with."""
        messages = [dict(message) for message in beginning(self._tree.head).history]
        for turn in lineage(self._tree.head):
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": (self.template.opening + turn.answer).strip()})
        return messages

    @property
    def path(self) -> Path | None:
        """The file that this conversation was last saved to or loaded from."""
        return self._tree.path

    @property
    def is_saved(self) -> bool:
        """Whether all that was said is in that file."""
        return self._tree.is_saved

    @property
    def text(self) -> str:
        """All of this branch as the model sees it, up to where the next message begins."""
        return self._tree.head.text

    # fmt: off
    @overload
    def say(self, message: str, max_tokens: int = ..., *, stream: Literal[False] = ...,
            **options: Unpack[DecodeOptions]) -> Completion: ...
    @overload
    def say(self, message: str, max_tokens: int = ..., *, stream: Literal[True],
            **options: Unpack[DecodeOptions]) -> Generator[Completion, None, None]: ...
    @overload
    def say(self, message: str, max_tokens: int = ..., *, stream: bool,
            **options: Unpack[DecodeOptions]) -> Completion | Generator[Completion, None, None]: ...
    # fmt: on
    def say(
        self, message: str, max_tokens: int = 512, *, stream: bool = False, **options: Unpack[DecodeOptions]
    ) -> Completion | Generator[Completion, None, None]:
        """The answer to a message, without white space around it. Its state is that of the conversation after it.

        Args:
            stream: an iterator of its pieces, the last of which has a finish_reason.
            options: see `DecodeOptions`; by default the sampling of the template.
        """
        message = self.template.clean(message)
        encode_utf8(message)  # an error counts the characters of the message, not of the prompt around it
        pieces = self._answer(message, self._decoding(max_tokens, options))
        return pieces if stream else join(pieces)

    # fmt: off
    @overload
    def retry(self, max_tokens: int = ..., *, stream: Literal[False] = ...,
              **options: Unpack[DecodeOptions]) -> Completion: ...
    @overload
    def retry(self, max_tokens: int = ..., *, stream: Literal[True],
              **options: Unpack[DecodeOptions]) -> Generator[Completion, None, None]: ...
    @overload
    def retry(self, max_tokens: int = ..., *, stream: bool,
              **options: Unpack[DecodeOptions]) -> Completion | Generator[Completion, None, None]: ...
    # fmt: on
    def retry(
        self, max_tokens: int = 512, *, stream: bool = False, **options: Unpack[DecodeOptions]
    ) -> Completion | Generator[Completion, None, None]:
        """Another answer to the last message, in place of the one it has; see `say`. The message is read again."""
        self._last("to answer again")  # raises now, not when the stream is read
        pieces = self._answer(None, self._decoding(max_tokens, options))
        return pieces if stream else join(pieces)

    def check_options(self, max_tokens: int = 512, **options: Unpack[DecodeOptions]) -> None:
        """InputError where `say` would not take these options."""
        self._decoding(max_tokens, options)

    def _decoding(self, max_tokens: int, options: Mapping[str, Any]) -> Decoding:
        check_names(options, ["max_tokens", "stream", *DecodeOptions.__annotations__])
        default, vocab_size = Sampling(**self.template.sampling), self._llm.model.config.vocab_size
        return resolve(options, max_tokens, default, vocab_size, prompts=1)

    def undo(self) -> str:
        """Takes the last message and its answer back; returns the message."""
        turn = self._last("to take back")
        self._tree.heads[self.branch] = turn.before
        return turn.message

    def begin(self, name: str, system: str | None = None) -> None:
        """Begins a branch in which nothing was said yet, and goes on in it. system: its system text; None = it has the
        history of the branch we come from."""
        start = beginning(self._tree.head)
        if system:
            messages = read_messages([{"role": "system", "content": system}])
            start = _read_beginning(self._llm, self.template, messages)
        self.fork(name)
        self._tree.heads[name] = start

    def fork(self, name: str) -> None:
        """Begins a branch here and goes on in it; the branch we come from stays as it is."""
        if not isinstance(name, str) or not name:
            raise InputError(f"a branch needs a name, got {name!r}")
        if name in self._tree.heads:
            raise InputError(f"branch {name!r} already exists")
        self._tree.heads[name] = self._tree.head
        self._tree.branch = name

    def switch(self, name: str) -> None:
        """Goes on in another branch."""
        if name not in self._tree.heads:
            raise unknown_name("branch", name, self._tree.heads)
        self._tree.branch = name

    def _last(self, purpose: str) -> Turn:
        turn = self._tree.head
        if isinstance(turn, Beginning):
            raise InputError(f"nothing was said yet, or all of it was taken back: there is no message {purpose}")
        return turn

    def _answer(self, message: str | None, decoding: Decoding) -> Generator[Completion, None, None]:
        """The answer to a message (None: to the last one, again), one thread at a time."""
        pieces = self._draw(message, decoding)
        end = object()
        try:
            while True:
                if not self._lock.acquire(blocking=False):
                    raise InputError("this conversation is in use by another thread; give each thread its own")
                try:
                    piece = next(pieces, end)
                finally:
                    self._lock.release()
                if isinstance(piece, Completion):
                    yield piece
                else:
                    return
        finally:
            pieces.close()

    def _draw(self, message: str | None, decoding: Decoding) -> Generator[Completion, None, None]:
        """Reads the message and draws its answer: a turn, which takes the end of the branch and grows there."""
        branch, old, retried = self.branch, self._tree.head, message is None
        before = old
        if message is None:
            last = self._last("to answer again")
            before, message = last.before, last.message
        state = before.state
        question = self.template.turn.replace("{user}", message)
        prompt = before.owed + question
        tokens = self._llm.encode(prompt, begins=state is None)
        logits, asked = prefill(self._llm.model, [tokens], self._llm.start if state is None else state)
        asked = asked.with_texts([(state.texts[0] if state is not None else "") + prompt])
        read_tokens = len(tokens) + (before.n_tokens if isinstance(before, Beginning) and not retried else 0)
        turn = Turn(before, message, "", asked, self.template.separator)
        buffer, decoder = StopStringBuffer(self.template.stops), self._llm.tokenizer.stream()
        read = ""  # what the model wrote
        certain = ""  # the beginning of it that is certain to come before a stop string
        marks = {0: asked}  # characters of `read` -> the state after them
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] | None = None if decoding.top_logprobs is None else []
        passed_on = 0  # tokens that a piece was made of
        generation = Generation(
            self._llm.model,
            logits,
            asked,
            decoding.samplings,
            decoding.max_tokens,
            decoding.stop_ids(self._llm.tokenizer),
            min_tokens=decoding.min_tokens,
            top_logprobs=decoding.top_logprobs,
            masks=decoding.masks,
            prompts=[self._llm.tokenizer.encode(question)],
            decode=self._llm.decode_token,
        )
        self._tree.heads[branch] = turn  # the options are right
        try:
            for event in generation:
                if event.token is None:
                    certain += buffer.finish()
                else:
                    token_ids.append(event.token)
                    if logprobs is not None and event.logprob is not None:
                        logprobs.append(event.logprob)
                    piece = decoder.push(event.token)
                    read += piece
                    certain += buffer.push(piece) if len(token_ids) > decoding.min_tokens else piece
                    if decoder.whole:
                        marks[len(read)] = event.state
                if self._tree.heads.get(branch) is not turn:
                    return  # the conversation moved on while this stream was open
                answer = certain.rstrip()
                new = answer[len(turn.answer) :] if turn.answer else answer.lstrip()
                marks = _useful(marks, answer, certain, self.template.separator)
                turn = _settled(turn, asked.texts[0], answer + self.template.separator, len(answer), read, marks)
                self._tree.heads[branch] = turn
                finish_reason: FinishReason | None = "stop" if buffer.stopped else event.finish_reason
                if new or finish_reason is not None:
                    yield Completion(
                        text=new,
                        token_ids=token_ids[passed_on:],
                        finish_reason=finish_reason,
                        logprobs=None if logprobs is None else logprobs[passed_on:],
                        usage=Usage(read_tokens, len(token_ids)),
                        make_state=partial(_state_of, turn),
                    )
                    passed_on = len(token_ids)
                if buffer.stopped:
                    return
        except BaseException as error:  # Ctrl-C keeps what was said, if anything was
            if self._tree.heads.get(branch) is turn and (isinstance(error, Exception) or (retried and not turn.answer)):
                self._tree.heads[branch] = old
            raise

    def save(self, path: str | Path) -> None:
        """Writes all branches with their states to a file. The one that this conversation was last saved to or loaded
        from gets what is new appended; any other is written as a whole (atomically).

        Raises:
            OSError: the disk is full, no permission, ...; the file then is as it was.
            InputError: another chat has changed the file since; it stays as it is.
        """
        self._tree.save(path, self._llm.model.fingerprint)

    def load(self, path: str | Path) -> None:
        """Puts a saved conversation, its template included, in place of this one. If a crash cut its last turn off
        while it was saved, a warning says so and the rest is loaded.

        Raises:
            InputError: no such file, not a conversation, of another model, or damaged; this one then stays.
        """
        self._tree = ConversationTree.load(path, self._llm.model)


def _read_beginning(llm: TextModel, template: Template, messages: list[dict[str, str]]) -> Beginning:
    """The model reads what comes before the first message."""
    if not messages:
        return Beginning(messages)
    if messages[0]["role"] == "system":
        messages[0]["content"] = template.clean(messages[0]["content"])
    text = template.render_history(messages)
    return Beginning(messages, len(llm.encode(text, begins=True)), llm.state(text))


def _state_of(turn: Turn) -> State:
    return turn.state


def _useful(marks: dict[int, State], answer: str, said: str, separator: str) -> dict[int, State]:
    """The states that some end of the answer may still need: the last one within it, those within the separator
    that may follow it, and those of text that is not certain yet."""
    within = max(n for n in marks if n <= len(answer))
    after = len(answer) + len(separator)
    return {n: state for n, state in marks.items() if within <= n <= after or n >= len(said)}


def _settled(turn: Turn, asked: str, text: str, answer: int, read: str, marks: dict[int, State]) -> Turn:
    """The turn as it stands if its answer ends after `answer` characters of `text`, the separator included. asked: the
    text before the answer."""
    n = max(n for n in marks if text.startswith(read[:n]))
    state = marks[n].with_texts([asked + read[:n]])
    return replace(turn, answer=text[:answer], state=state, owed=text[n:])
