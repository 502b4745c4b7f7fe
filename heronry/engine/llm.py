"""Text in, text out: a model, its tokenizer and the engine together.

- nothing here changes after construction: a generation that is broken off, by Ctrl-C or by closing it, leaves
  everything as usable as before
- a stop string never shows in the output, nor does a part of one while text is streamed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from .. import adapters
from ..checkpoint import load_checkpoint, locate, notes, read_time_state
from ..errors import InputError
from ..models import Model, State
from ..text.tokenizers import HFTokenizer, Tokenizer, guess_tokenizer, load_tokenizer
from .generate import Generation, generate, prefill
from .sampling import Sampling

if TYPE_CHECKING:  # chat.py stands on this file
    from ..text.chat_templates import Template
    from .chat import Chat

BUNDLED = Path(__file__).parent.parent / "bundled"
DEFAULT = Sampling(top_p=0.85)  # what the base models of this family are usually sampled with


class LLM:
    """A language model that reads and writes text.

    Attributes:
        model, tokenizer: what it is made of.
        chat_template: the name its folder gives for conversations; None if it gives none.
        opening: token ids read in front of every text that begins from nothing. A model that always saw a mark
            there in training expects it; a folder's config.json names them as "opening_tokens".
        start: the state of one row that a text begins from, in front of the opening; None = the model's own.
    """

    def __init__(
        self,
        path: str | Path | Model | None = None,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        adapter: str | Path | None = None,
    ):
        """
        Args:
            path: a checkpoint (.pth, .safetensors) or a folder; a Model is taken as it is, where it is;
                None = the small model that comes with the package.
            tokenizer: "bytes", "world", a tokenizer.json or a Tokenizer; None = found beside the checkpoint or told
                from the size of the vocabulary.
            dtype, device: for a model that is loaded; None keeps the file's dtype, the bundled model gets float32.
            quantize: "int8" or "int4" packs the matrices of a model that is loaded.
            adapter: the folder of a LoRA or DoRA adapter for a model that is loaded. It is merged into the weights;
                beside packed ones it stays as it is, and the plain model runs instead of the native step.

        Raises:
            InputError: no such model, no tokenizer that fits it, or an adapter that does not.
        """
        told: dict[str, Any] = {}
        if isinstance(path, Model):
            if adapter is not None:
                raise InputError(
                    "adapter= is for a model that is loaded; for your own model use heronry.adapters.apply_adapter"
                )
            self.model = path
            tokenizer = guess_tokenizer(path.config.vocab_size) if tokenizer is None else tokenizer
        else:
            if path is None and not (BUNDLED / "config.json").is_file():
                raise InputError("this installation has no bundled model: give the path of one")
            if path is None:  # so small that float32 is the fastest everywhere
                path, dtype = BUNDLED, dtype or "float32"
            path = locate(path)
            self.model, checkpoint = load_checkpoint(path, dtype=dtype, device=device, quantize=quantize)
            told = notes(checkpoint.config)
            if tokenizer is None and checkpoint.tokenizer is not None:
                tokenizer = HFTokenizer(path, checkpoint.tokenizer)
            elif tokenizer is None:
                tokenizer = guess_tokenizer(self.model.config.vocab_size, path if path.is_dir() else path.parent)
        self.tokenizer = load_tokenizer(tokenizer, self.model.config.vocab_size)
        if adapter is not None:
            told |= adapters.apply_adapter(self.model, adapter).notes
        self.chat_template: str | None = told.get("chat_template")
        self.opening: list[int] = list(told.get("opening_tokens", ()))
        self.start: State | None = None

    # fmt: off
    @overload
    def generate(self, prompt: str, max_tokens: int = ..., *, stream: Literal[False] = ..., state: State | None = ...,
                 stop: str | Sequence[str] | None = ..., **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_tokens: int = ..., *, stream: Literal[False] = ...,
                 state: State | None = ..., stop: str | Sequence[str] | None = ..., **sampling: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: str, max_tokens: int = ..., *, stream: Literal[True], state: State | None = ...,
                 stop: str | Sequence[str] | None = ..., **sampling: Any) -> Iterator[str]: ...
    @overload
    def generate(self, prompt: list[str], max_tokens: int = ..., *, stream: Literal[True], state: State | None = ...,
                 stop: str | Sequence[str] | None = ..., **sampling: Any) -> Iterator[tuple[int, str]]: ...
    # fmt: on
    def generate(
        self,
        prompt: str | list[str],
        max_tokens: int = 256,
        *,
        stream: bool = False,
        state: State | None = None,
        stop: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> str | list[str] | Iterator[str] | Iterator[tuple[int, str]]:
        """What the model writes after the prompt, without the prompt.

        Args:
            prompt: one text, or a list whose texts are written side by side as each would be alone.
            max_tokens: for each text. It ends earlier at the end of text or at a stop string.
            stream: an iterator of pieces as they come; of (index, piece) for a list. The prompts are read at once.
            state: goes on from here (see `state`) instead of from nothing: a row for each prompt, or one for all.
            stop: strings that end the text; they are not part of it.
            sampling: fields of `Sampling`; by default temperature 1 and top_p 0.85. One seed serves every prompt of
                a list.

        Raises:
            InputError: an empty prompt, an unknown option, a value out of range, a state of another model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        options = DEFAULT.changed(**sampling)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in stops:
            raise InputError("a stop string must not be empty")
        tokens = [self.encode(text, begins=state is None) for text in prompts]
        state = self.start if state is None else state
        if state is not None and len(state) == 1:
            state = state[[0] * len(prompts)]
        events = generate(self.model, tokens, options, max_tokens, self.tokenizer.stop_ids, state)
        pieces = self._pieces(events, len(prompts), stops)
        if stream:
            return (piece for _, piece in pieces) if isinstance(prompt, str) else pieces
        texts = [""] * len(prompts)
        for i, piece in pieces:
            texts[i] += piece
        return texts[0] if isinstance(prompt, str) else texts

    def state(self, text: str, state: State | None = None) -> State:
        """The state after reading a text, from nothing or going on from `state`; one row that knows its text."""
        tokens = [self.encode(text, begins=state is None)]
        before = state.texts[0] if state is not None else ""
        return prefill(self.model, tokens, self.start if state is None else state)[1].with_texts([before + text])

    def begin_from(self, path: str | Path) -> None:
        """From now on every text begins from the tuned state in a file, and with the opening it was tuned with.

        Raises:
            InputError: no such file, or not a tuned state of this model.
        """
        tensors, notes = read_time_state(path, self.model)
        self.start = self.model.initial_state(time_states=tensors)
        self.opening = list(notes.get("opening_tokens", self.opening))
        self.chat_template = notes.get("chat_template", self.chat_template)

    def encode(self, text: str, begins: bool) -> list[int]:
        """Token ids; a text that `begins` from nothing has the model's opening in front."""
        return (self.opening if begins else []) + self.tokenizer.encode(text)

    def chat(self, template: str | Template | None = None, system: str | None = None) -> Chat:
        """A conversation; see chat.py for the templates and for which one is the default."""
        from .chat import Chat

        return Chat(self, template, system)

    def _pieces(self, events: Generation, count: int, stops: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        decoders = [self.tokenizer.stream() for _ in range(count)]
        holds = [StopStringBuffer(stops) for _ in range(count)]
        for event in events:
            i = event.index
            if event.token is not None:
                piece = holds[i].push(decoders[i].push(event.token))
            else:
                piece = holds[i].push(decoders[i].finish()) + holds[i].finish()
            if piece:
                yield i, piece
            if holds[i].stopped:
                events.drop(i)


class StopStringBuffer:
    """Text on its way out: ends before the first stop string, holds back what may be the beginning of one.

    What comes out in total depends on the text alone, not on how it is cut into pieces: it ends at the stop string
    that is complete first (of several that end together, the one that begins first).
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        if self.stopped:
            return ""
        self.held += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self.held = self.held[: min(found)[1]], ""
            return out
        keep = max((_overlap(self.held, stop) for stop in self._stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        out, self.held = self.held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
