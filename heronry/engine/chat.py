"""Conversations as a tree of kept states: nothing is read twice, except the message that `retry` answers again and
what `go_on` goes on with.

A turn keeps one state, after its answer: the next message continues from there; `undo`, `fork` and `switch` only choose
which.

It covers exactly the prompt, the answer as the model wrote it without white space at its end, and the
template's separator in front of the next message. An answer often ends inside what the model has read (a stop string,
white space, half a character), so the states of the last steps are kept until it is certain what they cover. The rule:
of these, take the longest whose text is a prefix of the conversation; the rest is `owed`, and read in front of the next
message. Mostly that is the separator. If a token crosses the end (".\\n\\nU"), its share before the end is owed as
well: at most a part of one token is read again.

A template in Jinja shows the whole conversation with each new message, and what it shows beyond the last state is read.
If it shows earlier turns otherwise than they were read, say without their thoughts, it goes on from the last state that
still fits, or from nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from ..errors import InputError, show, unknown_name
from ..models import State
from ..text.chat_templates import Prompt, read_messages, usual_template
from ..text.stop_strings import StopStringBuffer
from ..text.template_choice import AnyTemplate, find_template
from ..text.tokenizers import WorldTokenizer
from ..text.utf8 import encode_utf8
from .answer_state import last_mark, useful_marks
from .completion import Completion, FinishReason, TokenLogprob, Usage, join
from .conversation import Beginning, ConversationTree, Turn, beginning_of, lineage
from .generate import Generation, prefill
from .options import DecodeOptions, Decoding, check_names, resolve
from .sampling import Sampling
from .text_model import TextModel

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Request(NamedTuple):
    """What is to be answered.

    before: what it follows.
    message: of the user.
    text: all of the conversation, up to where the answer begins.
    opening: what the answer begins with in that text.
    answer: what the answer begins with already, behind the opening.
    again: the message was said before, in the last turn of the branch.
    is_raw: the answer is handed out with the white space at its beginning.
    """

    before: Turn | Beginning
    message: dict[str, str]
    text: str
    opening: str
    answer: str
    again: bool = False
    is_raw: bool = False


class Chat:
    """A conversation with branches.

    An answer that is interrupted (Ctrl-C, a stream that is closed) keeps what was handed out of it. A stream that is
    still open when its branch moves on ends there.
    """

    def __init__(
        self,
        llm: TextModel,
        template: str | AnyTemplate | None = None,
        system: str | None = None,
        history: Sequence[Mapping[str, str]] = (),
    ):
        """
        Args:
            template: a Template or JinjaTemplate, or what `find_template` takes: the name of one in TEMPLATES, of a
                .jinja file, or a turn with {user} in it; None = the model's (see `heronry info`).
            system: read once, in front of everything.
            history: messages of an earlier conversation, read at once: [{"role": "user", "content": ...}, ...], the
                last of "assistant". `undo` does not reach into them.
        """
        chosen = choose_template(llm, template)
        _ = chosen.separator  # InputError for a template that is damaged
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
    def template(self) -> AnyTemplate:
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
        return self._tree.messages(self._tree.head)

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
    def say(self, message: str, max_tokens: int = ..., *, input: str = ..., beginning: str = ...,
            stream: Literal[False] = ..., **options: Unpack[DecodeOptions]) -> Completion: ...
    @overload
    def say(self, message: str, max_tokens: int = ..., *, input: str = ..., beginning: str = ...,
            stream: Literal[True], **options: Unpack[DecodeOptions]) -> Generator[Completion, None, None]: ...
    @overload
    def say(self, message: str, max_tokens: int = ..., *, input: str = ..., beginning: str = ..., stream: bool,
            **options: Unpack[DecodeOptions]) -> Completion | Generator[Completion, None, None]: ...
    # fmt: on
    def say(
        self,
        message: str,
        max_tokens: int = 512,
        *,
        input: str = "",
        beginning: str = "",
        stream: bool = False,
        **options: Unpack[DecodeOptions],
    ) -> Completion | Generator[Completion, None, None]:
        """The answer to a message, without white space around it. Its state is that of the conversation after it.

        Args:
            input: what the message is about; templates such as alpaca have a place for it.
            beginning: what the answer begins with; only what the model writes after it is returned.
            stream: an iterator of its pieces, the last of which has a finish_reason.
            options: see `DecodeOptions`; by default the sampling of the template.
        """
        message = self.template.clean(message)
        encode_utf8(message)  # an error counts the characters of the message, not of the prompt around it
        [asked] = read_messages([{"role": "user", "content": message, "input": input}])
        if not isinstance(beginning, str):
            raise InputError(f"beginning must be a text, got {show(beginning)}")
        opening, answer = self.template.begin_answer(beginning) if beginning.strip() else (self.template.opening, "")

        def begin(old: Turn | Beginning) -> _Request:
            before = self._tree.messages(old)
            text = self.template.extend(old.text, [*before, asked])
            return _Request(old, asked, text.removesuffix(self.template.opening) + opening, opening, answer)

        pieces = self._answer(begin, self._decoding(max_tokens, options))
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

        def begin(_: Turn | Beginning) -> _Request:
            last = self._last("to answer again")
            text = self.template.extend(last.before.text, [*self._tree.messages(last.before), last.asked])
            return _Request(last.before, last.asked, text, self.template.opening, "", again=True)

        pieces = self._answer(begin, self._decoding(max_tokens, options))
        return pieces if stream else join(pieces)

    # fmt: off
    @overload
    def go_on(self, max_tokens: int = ..., *, stream: Literal[False] = ...,
              **options: Unpack[DecodeOptions]) -> Completion: ...
    @overload
    def go_on(self, max_tokens: int = ..., *, stream: Literal[True],
              **options: Unpack[DecodeOptions]) -> Generator[Completion, None, None]: ...
    @overload
    def go_on(self, max_tokens: int = ..., *, stream: bool,
              **options: Unpack[DecodeOptions]) -> Completion | Generator[Completion, None, None]: ...
    # fmt: on
    def go_on(
        self, max_tokens: int = 512, *, stream: bool = False, **options: Unpack[DecodeOptions]
    ) -> Completion | Generator[Completion, None, None]:
        """More of the last answer, which max_tokens or Ctrl-C has cut off; see `say`. What is returned follows on from
        its last character; nothing, if the model has ended it. The message and the answer are read again, and penalties
        count what was said, as if the answer had not been cut off."""
        self._last("whose answer could go on")

        def begin(_: Turn | Beginning) -> _Request:
            last = self._last("whose answer could go on")
            text, opening = self._tree.text_before_answer(last), self.template.opening
            opening = opening if text.endswith(opening) else ""
            return _Request(last.before, last.asked, text, opening, last.answer, again=True)

        pieces = self._answer(begin, self._decoding(max_tokens, options))
        return pieces if stream else join(pieces)

    def answer(self, prompt: Prompt, max_tokens: int, options: Mapping[str, Any]) -> Generator[Completion, None, None]:
        """What the model writes behind a prompt that holds a whole conversation, with white space at its beginning."""

        def begin(old: Turn | Beginning) -> _Request:
            return _Request(old, {"content": ""}, prompt.context, prompt.opening, prompt.beginning, is_raw=True)

        return self._answer(begin, self._decoding(max_tokens, options))

    def check_options(self, max_tokens: int = 512, **options: Unpack[DecodeOptions]) -> None:
        """InputError where `say` would not take these options."""
        self._decoding(max_tokens, options)

    def _decoding(self, max_tokens: int, options: Mapping[str, Any]) -> Decoding:
        check_names(options, ["max_tokens", "stream", *DecodeOptions.__annotations__])
        default, vocab_size = Sampling(**self.template.sampling), self._llm.model.config.vocab_size
        decoding = resolve(options, max_tokens, default, vocab_size, prompts=1)
        decoding.matcher(self._llm.tokenizer, vocab_size)  # InputError before anything is read
        return decoding

    def undo(self) -> str:
        """Takes the last message and its answer back; returns the message."""
        turn = self._last("to take back")
        self._tree.heads[self.branch] = turn.before
        return turn.message

    def begin(self, name: str, system: str | None = None) -> None:
        """Begins a branch in which nothing was said yet, and goes on in it. system: its system text; None = it has the
        history of the branch we come from."""
        start = beginning_of(self._tree.head)
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

    def _answer(
        self, begin: Callable[[Turn | Beginning], _Request], decoding: Decoding
    ) -> Generator[Completion, None, None]:
        """The answer to what `begin` makes of the branch's last turn, one thread at a time."""
        pieces = self._draw(begin, decoding)
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

    def _draw(
        self, begin: Callable[[Turn | Beginning], _Request], decoding: Decoding
    ) -> Generator[Completion, None, None]:
        """Reads the message and draws its answer: a turn, which takes the end of the branch and grows there."""
        branch, old = self.branch, self._tree.head
        request = begin(old)
        written = request.opening + request.answer
        matcher = decoding.matcher(self._llm.tokenizer, self._llm.model.config.vocab_size, written)
        before, beginning = request.before, request.answer
        kept = (*(turn.state for turn in reversed(lineage(before))), beginning_of(before).state)
        state = next((x for x in kept if x is not None and request.text.startswith(x.texts[0])), None)
        said = "" if state is None else state.texts[0]
        tokens = self._llm.encode(request.text[len(said) :], begins=state is None)
        logits, asked = prefill(self._llm.model, [tokens], self._llm.start if state is None else state)
        asked = asked.with_texts([request.text])
        marks = {0: asked}  # characters of `read` -> the state after them
        more = self._llm.tokenizer.encode(beginning)
        if more:
            logits, asked = prefill(self._llm.model, [more], asked)
            asked = asked.with_texts([request.text + beginning])
            marks[len(beginning)] = asked
            tokens += more
        read_tokens = len(tokens) + (before.n_tokens if isinstance(before, Beginning) and not request.again else 0)
        turn = Turn(before, request.message["content"], beginning, asked, self.template.separator)
        turn = replace(turn, input=request.message.get("input", ""))
        buffer, decoder = StopStringBuffer(self.template.stops, beginning), self._llm.tokenizer.stream()
        read = beginning  # what the model wrote
        certain = beginning.removesuffix(
            buffer.held
        )  # the beginning of it that is certain to come before a stop string
        shown = len(beginning)  # characters of the answer that were handed out
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
            prompts=[self._llm.tokenizer.encode(request.text.removeprefix(before.text) + beginning)],
            decode=self._llm.decode_token,
            earlier=more if request.again else (),
            matcher=matcher,
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
                    if decoder.whole and event.again is None:  # else it would be read again
                        marks[len(read)] = event.state
                if self._tree.heads.get(branch) is not turn:
                    return  # the conversation moved on while this stream was open
                answer = certain.rstrip()
                new = answer[shown:] if shown or request.is_raw else answer.lstrip()
                shown = max(shown, len(answer))
                marks = useful_marks(marks, answer, certain, self.template.separator)
                turn = _settled(turn, request.text, answer + self.template.separator, len(answer), read, marks)
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
            is_nothing_new = request.again and len(turn.answer) <= len(beginning)
            if self._tree.heads.get(branch) is turn and (isinstance(error, Exception) or is_nothing_new):
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


def choose_template(llm: TextModel, template: str | AnyTemplate | None) -> AnyTemplate:
    """What `find_template` finds; None = the template of the model."""
    name = llm.chat_template if template is None else template
    if name is None:
        name = usual_template(llm.model.name, isinstance(llm.tokenizer, WorldTokenizer))
    return find_template(name)


def _read_beginning(llm: TextModel, template: AnyTemplate, messages: list[dict[str, str]]) -> Beginning:
    """The model reads what comes before the first message."""
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = template.clean(messages[0]["content"])
    text = template.render_history(messages)
    if not text:
        return Beginning(messages)
    return Beginning(messages, len(llm.encode(text, begins=True)), llm.state(text))


def _state_of(turn: Turn) -> State:
    return turn.state


def _settled(turn: Turn, asked: str, text: str, answer: int, read: str, marks: dict[int, State]) -> Turn:
    """The turn as it stands if its answer ends after `answer` characters of `text`, the separator included. asked: the
    text before the answer."""
    n = last_mark(marks, text, read)
    state = marks[n].with_texts([asked + read[:n]])
    return replace(turn, answer=text[:answer], state=state, owed=text[n:])
