"""Conversations as a tree of kept states: whatever was read once is never read again.

A turn keeps two moments: after the template's "Assistant:", with the logits of the first word of the answer
(`retry` draws from them), and after the answer (the next message goes on from there; `undo`, `fork` and `switch`
only choose which one).

The second moment stands for exactly this: the prompt, the answer as the model wrote it without white space at its
end, and the template's separator in front of the next message. An answer is often cut inside of what the model has
read (a stop string, white space, half a character), so the states of the last steps are kept until it is certain
what they stand for. The rule: of these, take the longest whose text the conversation begins with; what is missing
is `owed`, and read in front of the next message. Mostly that is the separator. If a token crosses the cut (".\\n\\nU"),
its share before the cut is owed as well: a part of one token is then all that is read a second time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..files import atomic_write
from ..models import LayerState, State
from ..text.chat_templates import TEMPLATES, Template, read_messages, template_from, usual_template
from ..text.tokenizers import WorldTokenizer
from .completion import Completion, FinishReason, TokenLogprob, Usage, joined
from .generate import Generation, prefill
from .options import Decoding, resolve
from .sampling import Sampling
from .stop_strings import StopStringBuffer
from .text_model import TextModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecodeOptions

FORMAT = "heronry.chat"


@dataclass(frozen=True, eq=False)
class Turn:
    """A message, its answer, and the two moments that are kept."""

    before: Turn | None
    message: str
    asked: State  # the prompt is read; one row, like `state`
    logits: Tensor  # [V], of the answer's first token
    answer: str  # as the model wrote it, without white space at its end
    state: State
    owed: str  # what the conversation's text has beyond that of `state`


class Chat:
    """A conversation with branches.

    An answer that is broken off (Ctrl-C, a stream that is closed) keeps what was handed out of it. A stream that
    is still open when its branch moves on ends there.

    Attributes:
        branch: the name of the branch we are on; the first one is "main".
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
        name = (
            template or llm.chat_template or usual_template(llm.model.name, isinstance(llm.tokenizer, WorldTokenizer))
        )
        if isinstance(name, str) and name not in TEMPLATES:
            raise InputError(f"unknown chat template {name!r}; choose from {', '.join(TEMPLATES)}")
        self.template: Template = TEMPLATES[name] if isinstance(name, str) else name
        self.branch = "main"
        self._llm = llm
        self._history = read_messages(([{"role": "system", "content": system}] if system else []) + list(history))
        if self._history and self._history[-1]["role"] == "user":
            raise InputError("the history must end with an answer")
        if self._history and self._history[0]["role"] == "system":
            self._history[0]["content"] = self.template.clean(self._history[0]["content"])
        self._opening: State | None = None  # what the first message goes on from
        if self._history:
            self._opening = llm.state(self.template.render_history(self._history))
        self._heads: dict[str, Turn | None] = {self.branch: None}  # branch -> its last turn

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self._heads)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation of this branch: [{"role": "user", "content": ...}, ...], answers without white space
        around them."""
        messages = [dict(message) for message in self._history]
        for turn in _lineage(self._heads[self.branch]):
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": turn.answer.strip()})
        return messages

    @property
    def text(self) -> str:
        """All of this branch as the model sees it, up to where the next message begins."""
        before, owed = self._end(self._heads[self.branch])
        return (before.texts[0] if before is not None else "") + owed

    # fmt: off
    @overload
    def say(self, message: str, max_tokens: int = ..., *, stream: Literal[False] = ...,
            **options: Unpack[DecodeOptions]) -> Completion: ...
    @overload
    def say(self, message: str, max_tokens: int = ..., *, stream: Literal[True],
            **options: Unpack[DecodeOptions]) -> Generator[Completion, None, None]: ...
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
        pieces = self._ask(message, max_tokens, self._decoding(options))
        return pieces if stream else joined(list(pieces))

    # fmt: off
    @overload
    def retry(self, max_tokens: int = ..., *, stream: Literal[False] = ...,
              **options: Unpack[DecodeOptions]) -> Completion: ...
    @overload
    def retry(self, max_tokens: int = ..., *, stream: Literal[True],
              **options: Unpack[DecodeOptions]) -> Generator[Completion, None, None]: ...
    # fmt: on
    def retry(
        self, max_tokens: int = 512, *, stream: bool = False, **options: Unpack[DecodeOptions]
    ) -> Completion | Generator[Completion, None, None]:
        """Another answer to the last message, in place of the one it has; see `say`."""
        self._last()  # raises now, not when the stream is read
        pieces = self._answer(None, max_tokens, self._decoding(options))
        return pieces if stream else joined(list(pieces))

    def check_options(self, **options: Unpack[DecodeOptions]) -> None:
        """InputError where `say` would not take these options."""
        self._decoding(options)

    def _decoding(self, options: Mapping[str, Any]) -> Decoding:
        return resolve(options, Sampling(**self.template.sampling), prompts=1)

    def undo(self) -> str:
        """Takes the last message and its answer back; returns the message."""
        turn = self._last()
        self._heads[self.branch] = turn.before
        return turn.message

    def fork(self, name: str) -> None:
        """Begins a branch here and goes on in it; the branch we come from stays as it is."""
        if name in self._heads:
            raise InputError(f"there is a branch {name!r} already")
        self._heads[name] = self._heads[self.branch]
        self.branch = name

    def switch(self, name: str) -> None:
        """Goes on in another branch."""
        if name not in self._heads:
            raise InputError(f"there is no branch {name!r}; there are {', '.join(self._heads)}")
        self.branch = name

    def _last(self) -> Turn:
        turn = self._heads[self.branch]
        if turn is None:
            raise InputError("nothing was said yet")
        return turn

    def _end(self, turn: Turn | None) -> tuple[State | None, str]:
        """What goes on after a turn: its state and what is owed to it."""
        return (turn.state, turn.owed) if turn is not None else (self._opening, "")

    def _ask(self, message: str, max_tokens: int, decoding: Decoding) -> Generator[Completion, None, None]:
        before = self._heads[self.branch]
        state, owed = self._end(before)
        prompt = owed + self.template.turn.replace("{user}", message)
        tokens = self._llm.encode(prompt, begins=state is None)
        logits, asked = prefill(self._llm.model, [tokens], self._llm.start if state is None else state)
        asked = asked.with_texts([(state.texts[0] if state is not None else "") + prompt])
        turn = Turn(before, message, asked, logits[0], "", asked, self.template.separator)
        yield from self._answer(turn, max_tokens, decoding)

    def _answer(self, turn: Turn | None, max_tokens: int, decoding: Decoding) -> Generator[Completion, None, None]:
        """Draws the answer of `turn` (None: the last), which takes the end of the branch and grows there."""
        branch, old, retried = self.branch, self._heads[self.branch], turn is None
        turn = replace(turn or self._last(), answer="", owed=self.template.separator)
        turn = replace(turn, state=turn.asked)
        self._heads[branch] = turn
        prompt = self._llm.tokenizer.encode(self.template.turn.replace("{user}", turn.message))
        buffer, decoder = StopStringBuffer(self.template.stops), self._llm.tokenizer.stream()
        read = ""  # what the model wrote
        certain = ""  # the beginning of it that is certain to come before a stop string
        marks = {0: turn.asked}  # characters of `read` -> the state after them
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] | None = None if decoding.top_logprobs is None else []
        passed_on = 0  # tokens that a piece was made of
        generation = Generation(
            self._llm.model,
            turn.logits[None],
            turn.asked,
            decoding.samplings,
            max_tokens,
            decoding.stop_ids(self._llm.tokenizer),
            min_tokens=decoding.min_tokens,
            top_logprobs=decoding.top_logprobs,
            masks=decoding.masks,
            prompts=[prompt],
        )
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
                if self._heads.get(branch) is not turn:
                    return  # the conversation moved on while this stream was open
                answer = certain.rstrip()
                new = answer[len(turn.answer) :] if turn.answer else answer.lstrip()
                marks = _useful(marks, answer, certain, self.template.separator)
                turn = _settled(turn, answer + self.template.separator, len(answer), read, marks)
                self._heads[branch] = turn
                finish_reason: FinishReason | None = "stop" if buffer.stopped else event.finish_reason
                if new or finish_reason is not None:
                    yield Completion(
                        text=new,
                        token_ids=token_ids[passed_on:],
                        finish_reason=finish_reason,
                        logprobs=None if logprobs is None else logprobs[passed_on:],
                        usage=Usage(len(prompt), len(token_ids)),
                        make_state=partial(_state_of, turn),
                    )
                    passed_on = len(token_ids)
                if buffer.stopped:
                    return
        except BaseException as error:  # Ctrl-C keeps what was said, if anything was
            if self._heads.get(branch) is turn and (isinstance(error, Exception) or (retried and not turn.answer)):
                self._heads[branch] = old
            raise

    def save(self, path: str | Path) -> None:
        """Writes all branches with their states to one safetensors file (atomically)."""
        turns: dict[Turn, int] = {}  # in the order of the file; a turn comes after the one before it
        for head in self._heads.values():
            for turn in _lineage(head):
                turns.setdefault(turn, len(turns))
        states = [self._opening] if self._opening is not None else []
        states += [state for turn in turns for state in (turn.asked, turn.state)]
        about = {
            "template": asdict(self.template),
            "history": self._history,
            "branch": self.branch,
            "heads": {name: None if head is None else turns[head] for name, head in self._heads.items()},
            "turns": [
                {
                    "before": None if turn.before is None else turns[turn.before],
                    "message": turn.message,
                    "answer": turn.answer,
                    "owed": turn.owed,
                }
                for turn in turns
            ],
            "texts": [state.texts[0] for state in states],
        }
        tensors = {}
        if turns:
            tensors["logits"] = torch.stack([turn.logits.float() for turn in turns]).cpu()
        if states:
            for i, layer in enumerate(State.stack(states).layers):
                for name, x in layer._asdict().items():
                    tensors[f"blocks.{i}.{name}"] = x.cpu().contiguous()
        conversation = json.dumps(about)
        metadata = {
            "format": FORMAT,
            "fingerprint": self._llm.model.fingerprint,
            "conversation": conversation,
            "sha256": _digest(conversation, tensors),
        }
        with atomic_write(Path(path).expanduser()) as part:
            save_file(tensors, part, metadata=metadata)

    def load(self, path: str | Path) -> None:
        """Puts a saved conversation, its template included, in place of this one.

        Raises:
            InputError: no such file, not a conversation, of another model, or damaged; this one then stays.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such conversation file")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: not a heronry conversation")
                if metadata["fingerprint"] != self._llm.model.fingerprint:
                    raise InputError(f"{path}: this conversation was held with another model")
                keys = file.keys()
                tensors = {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{path}: damaged or truncated conversation file ({error})") from error
        if metadata.get("sha256") != _digest(metadata["conversation"], tensors):
            raise InputError(f"{path}: damaged conversation file")
        about = json.loads(metadata["conversation"])  # whole, as the digest says
        device = self._llm.model.device
        layers = [
            LayerState(*(tensors[f"blocks.{i}.{name}"].to(device) for name in LayerState._fields))
            for i in range(len(tensors) // len(LayerState._fields))
        ]
        texts = about["texts"]
        rows = State(layers, metadata["fingerprint"], texts) if texts else None
        states = iter([rows[i] for i in range(len(texts))] if rows else [])
        opening = next(states) if about["history"] else None
        turns: list[Turn] = []
        for i, turn in enumerate(about["turns"]):
            before = None if turn["before"] is None else turns[turn["before"]]
            asked, state = next(states), next(states)
            logits = tensors["logits"][i].to(device)
            turns.append(Turn(before, turn["message"], asked, logits, turn["answer"], state, turn["owed"]))
        self.template = template_from(about["template"])
        self.branch, self._history, self._opening = about["branch"], about["history"], opening
        self._heads = {name: None if head is None else turns[head] for name, head in about["heads"].items()}


def _state_of(turn: Turn) -> State:
    return turn.state


def _lineage(turn: Turn | None) -> list[Turn]:
    """The turns from the first to this one."""
    turns = []
    while turn is not None:
        turns.append(turn)
        turn = turn.before
    return turns[::-1]


def _useful(marks: dict[int, State], answer: str, said: str, separator: str) -> dict[int, State]:
    """The states that some end of the answer may still need: the last one within it, those within the separator
    that may follow it, and those of text that is not certain yet."""
    within = max(n for n in marks if n <= len(answer))
    after = len(answer) + len(separator)
    return {n: state for n, state in marks.items() if within <= n <= after or n >= len(said)}


def _settled(turn: Turn, text: str, answer: int, read: str, marks: dict[int, State]) -> Turn:
    """The turn as it stands if its answer ends after `answer` characters of `text`, the separator included."""
    n = max(n for n in marks if text.startswith(read[:n]))
    state = marks[n].with_texts([turn.asked.texts[0] + read[:n]])
    return replace(turn, answer=text[:answer], state=state, owed=text[n:])


def _digest(conversation: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(conversation.encode())
    for key in sorted(tensors):
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()
