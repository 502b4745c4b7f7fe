"""Text in, text out: a model, its tokenizer and the engine together.

- nothing but the set of adapters changes after construction: a generation that is interrupted, by Ctrl-C, by closing it
  or by cancelling its task, leaves everything as usable as before
- an adapter by name is another `TextModel` on the same weights: choosing it changes neither the model nor other calls
- a stop string never shows in the output, nor does a part of one while text is streamed
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from ..adapters import apply_adapter
from ..catalog import BUNDLED
from ..checkpoint import load_checkpoint, locate, select_notes
from ..errors import InputError, show
from ..models import Model, State
from ..progress import Progress
from ..text.chat_templates import chat_defaults
from ..text.jinja_templates import JinjaTemplate
from ..text.template_choice import AnyTemplate, model_template, published_name
from ..text.tokenizers import Tokenizer, guess_tokenizer, load_tokenizer, read_tokenizer_json
from .adapters import Adapters
from .answers import answer_messages
from .asynchronous import iterate
from .batch import BatchCollector, PromptBatch, Row, alternate, stream_pieces
from .chat import Chat
from .completion import Completion, join
from .embeddings import Pooling, embed
from .generate import Generation, check_prompts, prefill
from .options import ChatOptions, GenerateOptions, Prompt, Prompts, check_names, read_stops, resolve
from .sampling import Sampling
from .text_model import TextModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT = Sampling(top_p=0.85)  # what the base models of this family are usually sampled with


INSTEAD = {  # what to do to a model that is not loaded here
    "dtype": "use model.to(dtype)",
    "device": "use model.to(device)",
    "quantize": "use heronry.quantize(model, ...)",
    "adapter": "use heronry.adapters.apply_adapter",
    "ln_x_eps": "give it to heronry.load",
}


class LLM(TextModel):
    """A language model that reads and writes text. See `TextModel` for its attributes."""

    def __init__(
        self,
        path: str | Path | Model | None = None,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        adapter: str | Path | None = None,
        ln_x_eps: float | None = None,
        progress: Progress | None = None,
    ):
        """
        Args:
            path: a file or folder of any format, a name on the Hugging Face hub, or the short name of a downloaded
                model; a Model is taken as it is, where it is; "bundled" or None = the small model that comes with the
                package.
            tokenizer: "bytes", "world", a tokenizer.json or a Tokenizer; None = found beside the checkpoint or told
                from the size of the vocabulary.
            dtype: None keeps the file's; the bundled model gets float32.
            device: None = "cpu".
            quantize: "int8" or "int4" packs the matrices.
            adapter: the folder or file of a LoRA, DoRA or MiSS adapter. It is merged into the weights; beside packed
                ones it stays as it is, and the plain model runs instead of the native step. For several adapters over
                one model see `adapters`.
            ln_x_eps: as for heronry.load.
            progress: called while a model is loaded, with (bytes read, bytes in all).

        All but the tokenizer are for a model that is loaded.

        Raises:
            InputError: no such model, no tokenizer that fits it, an adapter that does not, or one of these options
                with a Model.
        """
        if not isinstance(path, str | Path | Model | None):
            raise InputError(f"give the path of a model, or a Model, got {show(path)}")
        described: dict[str, Any] = {}
        base_file: Path | None = None
        if isinstance(path, Model):
            _refuse_with_model(dtype=dtype, device=device, quantize=quantize, adapter=adapter, ln_x_eps=ln_x_eps)
            model = path
            tokenizer = guess_tokenizer(path.config.vocab_size) if tokenizer is None else tokenizer
        else:
            if path is None and not (BUNDLED / "config.json").is_file():
                raise InputError("this installation has no bundled model: give the path of one")
            path = locate(BUNDLED if path is None else path)
            if path == BUNDLED and dtype is None:  # so small that float32 is the fastest everywhere
                dtype = "float32"
            base_file = path if path.is_file() else None
            model, checkpoint = load_checkpoint(path, dtype, device or "cpu", ln_x_eps, quantize, progress=progress)
            described = select_notes(checkpoint.config)
            if tokenizer is None and checkpoint.tokenizer is not None:
                tokenizer = read_tokenizer_json(checkpoint.tokenizer, path)
            elif tokenizer is None:
                tokenizer = guess_tokenizer(model.config.vocab_size, path if path.is_dir() else path.parent)
        model.check_has_weights()
        tokenizer = load_tokenizer(tokenizer, model.config.vocab_size)
        template: str | JinjaTemplate | None = None
        if isinstance(path, Path):
            template = model_template(path, described, checkpoint.template)
        if adapter is not None:
            notes = apply_adapter(model, adapter, base_file).notes
            template = notes.get("chat_template", template)
            described |= notes
        super().__init__(model, tokenizer, template, described.get("opening_tokens", ()))
        if isinstance(path, Path):
            self.tool_style = chat_defaults(published_name(path)).tool_style
        self.adapters = Adapters(self, base_file)

    def __repr__(self) -> str:
        return f"LLM({self.model.name}, {self.num_parameters() / 1e6:,.3g} M parameters, {self.dtype}, {self.device})"

    # fmt: off
    @overload
    def generate(self, prompt: Prompt, max_tokens: int = ..., *, n: None = ..., stream: Literal[False] = ...,
                 **options: Unpack[GenerateOptions]) -> Completion: ...
    @overload
    def generate(self, prompt: Prompt, max_tokens: int = ..., *, n: int, stream: Literal[False] = ...,
                 **options: Unpack[GenerateOptions]) -> list[Completion]: ...
    @overload
    def generate(self, prompt: Prompts, max_tokens: int = ..., *, n: None = ..., stream: Literal[False] = ...,
                 **options: Unpack[GenerateOptions]) -> list[Completion]: ...
    @overload
    def generate(self, prompt: Prompts, max_tokens: int = ..., *, n: int, stream: Literal[False] = ...,
                 **options: Unpack[GenerateOptions]) -> list[list[Completion]]: ...
    @overload
    def generate(self, prompt: Prompt | Prompts, max_tokens: int = ..., *, n: int | None = ..., stream: Literal[True],
                 **options: Unpack[GenerateOptions]) -> Generator[Completion, None, None]: ...
    @overload
    def generate(
        self, prompt: Prompt | Prompts, max_tokens: int = ..., *, n: int | None = ..., stream: bool,
        **options: Unpack[GenerateOptions],
    ) -> Completion | list[Completion] | list[list[Completion]] | Generator[Completion, None, None]: ...
    # fmt: on
    def generate(
        self,
        prompt: Prompt | Prompts,
        max_tokens: int = 256,
        *,
        n: int | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Completion | list[Completion] | list[list[Completion]] | Generator[Completion, None, None]:
        """What the model writes after the prompt, without the prompt.

        Args:
            prompt: a text or a list of token ids; or a list of such, which are written side by side, each as it would
                be alone.
            max_tokens: for each completion. It ends earlier at the end of text or at a stop.
            n: so many completions of each prompt, which is read once.
            stream: an iterator of Completions, each the next piece of one completion (`index`, `choice`): their texts
                joined are the text, their token ids joined the ids. The last of each has a finish_reason. The prompts
                are read before the iterator is returned.
            options: see `GenerateOptions` and `Sampling`; by default temperature 1 and top_p 0.85.

        Returns:
            A Completion; a list of them for several prompts or with `n`, a list of lists for both.

        Raises:
            InputError: an empty prompt, an unknown option, a value out of range, a state of another model.
        """
        check_names(options, ["max_tokens", "n", "stream", *GenerateOptions.__annotations__])
        batch = PromptBatch.parse(prompt, n)
        pieces = self._generate(batch, max_tokens, dict(options))
        if stream:
            return pieces
        collector = BatchCollector(batch)
        for piece in pieces:
            collector.add(piece)
        return collector.result()

    # fmt: off
    @overload
    async def generate_async(self, prompt: Prompt, max_tokens: int = ..., *, n: None = ...,
                             **options: Unpack[GenerateOptions]) -> Completion: ...
    @overload
    async def generate_async(self, prompt: Prompt, max_tokens: int = ..., *, n: int,
                             **options: Unpack[GenerateOptions]) -> list[Completion]: ...
    @overload
    async def generate_async(self, prompt: Prompts, max_tokens: int = ..., *, n: None = ...,
                             **options: Unpack[GenerateOptions]) -> list[Completion]: ...
    @overload
    async def generate_async(self, prompt: Prompts, max_tokens: int = ..., *, n: int,
                             **options: Unpack[GenerateOptions]) -> list[list[Completion]]: ...
    # fmt: on
    async def generate_async(
        self,
        prompt: Prompt | Prompts,
        max_tokens: int = 256,
        *,
        n: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """As `generate`, for asyncio: the model computes in a thread. Cancelling the task ends it after the step under
        way, in prefill too."""
        collector = BatchCollector(PromptBatch.parse(prompt, n))
        async for piece in self.stream_async(prompt, max_tokens, n=n, **options):
            collector.add(piece)
        return collector.result()

    def stream_async(
        self,
        prompt: Prompt | Prompts,
        max_tokens: int = 256,
        *,
        n: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Completion, None]:
        """As `generate(..., stream=True)`, for asyncio; see `generate_async`. Close it (`aclose`) if you leave it
        before its end."""
        check_names(options, ["max_tokens", "n", *GenerateOptions.__annotations__])
        cancelled = threading.Event()
        progress = options.get("progress")

        def check(done: int, total: int) -> None:
            if cancelled.is_set():
                raise InterruptedError("the task that wanted this text was canceled")
            if progress is not None:
                progress(done, total)

        options["progress"] = check
        begin = partial(self._generate, PromptBatch.parse(prompt, n), max_tokens, dict(options))
        return iterate(begin, cancelled.set)

    # fmt: off
    @overload
    def chat(self, messages: None = ..., *, template: str | AnyTemplate | None = ...,
             system: str | None = ..., adapter: str | None = ...) -> Chat: ...
    @overload
    def chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int = ..., *,
             template: str | AnyTemplate | None = ..., system: str | None = ..., adapter: str | None = ...,
             stream: Literal[False] = ...,
             **options: Unpack[ChatOptions]) -> Completion: ...
    @overload
    def chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int = ..., *,
             template: str | AnyTemplate | None = ..., system: str | None = ..., adapter: str | None = ...,
             stream: Literal[True],
             **options: Unpack[ChatOptions]) -> Generator[Completion, None, None]: ...
    @overload
    def chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int = ..., *,
             template: str | AnyTemplate | None = ..., system: str | None = ..., adapter: str | None = ...,
             stream: bool,
             **options: Unpack[ChatOptions]) -> Completion | Generator[Completion, None, None]: ...
    # fmt: on
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 512,
        *,
        template: str | AnyTemplate | None = None,
        system: str | None = None,
        adapter: str | None = None,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Chat | Completion | Generator[Completion, None, None]:
        """A conversation to go on with, or the answer to a list of messages.

            answer = llm.chat([{"role": "user", "content": "Rain in Paris?"}], tools=tools, think="short")
            answer.reasoning, answer.text, answer.tool_calls

        Args:
            messages: [{"role": "user", "content": ...}, ...], in OpenAI's form with calls and results of tools, see
                `heronry.text.messages.parse_messages`; None = a `Chat` that has not begun. If the last one is of the
                assistant, the model goes on with it, and only what it writes is returned. One of the user may have an
                "input", see `Chat.say`.
            template, system: see `Chat`.
            adapter: who answers, one of `adapters` by its name; None = the model itself.
            max_tokens, stream: see `Chat.say`.
            options: see `ChatOptions`.

        Returns:
            A `Chat`, or a Completion whose text is what the model says, without its thought (`reasoning`) and its calls
            (`tool_calls`), and without white space around it.
        """
        speaker = self.adapters.choose(adapter)
        if messages is None:
            given = ["max_tokens"] * (max_tokens != 512) + ["stream"] * stream + list(options)
            if given:
                raise InputError(f"{given[0]} is given to say(): without messages, chat() answers nothing yet")
            return Chat(speaker, template, system)
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise InputError(
                f"messages must be a list of messages, got {show(messages)}; a template is named by template="
            )
        pieces = answer_messages(speaker, messages, max_tokens, template, system, options)
        return pieces if stream else join(pieces)

    def embed(
        self,
        texts: Prompt | Prompts,
        *,
        pooling: Pooling = "mean",
        dimensions: int | None = None,
        adapter: str | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Texts as vectors of unit length: float32 [N, D], in the order of the texts; one text gives [1, D].

            vectors = llm.embed(["A frog sat in the pond.", "The king was angry."])
            similarity = vectors @ vectors.T

        A language model that was not trained for it gives poor vectors: docs/embeddings.md measures them.

        Args:
            texts: texts or lists of token ids.
            pooling: "mean" = the mean over the tokens of the last layer's normalised output; "state" = the wkv state of
                the last layer after the text, which has more to say and is long: n_embd times the size of a head.
            dimensions: only so many of the first numbers, again of unit length.
            adapter: one of `adapters` by its name; None = the model itself.
            progress: called with (tokens read, tokens in all).

        Raises:
            InputError: no text or an empty one, an unknown pooling, dimensions that there are not.
        """
        speaker = self.adapters.choose(adapter)
        tokens = [speaker.encode(text, begins=True) for text in PromptBatch.parse(texts, None).prompts]
        return embed(speaker.model, tokens, speaker.start, pooling, dimensions, progress)

    def _generate(
        self, batch: PromptBatch, max_tokens: int, options: dict[str, Any]
    ) -> Generator[Completion, None, None]:
        """Checks the options and reads the prompts; returns the pieces as they are decoded."""
        state: State | None = options.pop("state", None)
        adapter = options.pop("adapter", None)
        stop = options.pop("stop", None)
        progress = options.pop("progress", None)
        if progress is not None and not callable(progress):
            raise InputError(f"progress must be a function of (tokens read, tokens in all), got {show(progress)}")
        if state is not None and not isinstance(state, State):
            raise InputError(f"state must be a State, got {type(state).__name__}")
        stops = read_stops(stop)
        decoding = resolve(options, max_tokens, DEFAULT, self.model.config.vocab_size, len(batch.prompts), batch.n)
        matcher = decoding.matcher(self.tokenizer, self.model.config.vocab_size)
        speakers = self.adapters.choose_each(adapter, len(batch.prompts))
        tokens = [x.encode(prompt, begins=state is None) for x, prompt in zip(speakers, batch.prompts, strict=True)]
        texts = [self.text_of(prompt) for prompt in batch.prompts]
        if state is not None and len(state) == 1:
            state = state[[0] * len(tokens)]
        check_prompts(tokens, state)
        if state is not None:
            texts = [before + text for before, text in zip(state.texts, texts, strict=True)]
        total, done = sum(map(len, tokens)), 0
        streams = []
        for speaker in dict.fromkeys(speakers):  # each once, in order: a model call is for one of them
            chosen = [i for i, x in enumerate(speakers) if x is speaker]
            before = None if state is None else state if len(chosen) == len(texts) else state[chosen]
            if before is None and speaker.start is not None:
                before = speaker.start[[0] * len(chosen)]
            report = progress and partial(_report, progress, done, total)
            logits, after = prefill(speaker.model, [tokens[i] for i in chosen], before, progress=report)
            done += sum(len(tokens[i]) for i in chosen)
            rows = [(i, j) for i in chosen for j in range(batch.n)]
            if batch.n > 1:
                numbers = [k for k in range(len(chosen)) for _ in range(batch.n)]
                logits, after = logits[numbers], after[numbers]
            generation = Generation(
                speaker.model,
                logits,
                after,
                [decoding.samplings[i * batch.n + j] for i, j in rows],
                decoding.max_tokens,
                decoding.stop_ids(self.tokenizer),
                min_tokens=decoding.min_tokens,
                top_logprobs=decoding.top_logprobs,
                masks=[decoding.masks[i * batch.n + j] for i, j in rows],
                prompts=[tokens[i] for i, _ in rows],
                decode=self.decode_token,
                matcher=matcher,
            )
            logprobs = decoding.top_logprobs is not None
            completions = [Row(self.tokenizer, tokens[i], texts[i], stops, logprobs, i, j) for i, j in rows]
            streams.append(stream_pieces(generation, completions, decoding.min_tokens))
        return streams[0] if len(streams) == 1 else alternate(streams)


def _report(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _refuse_with_model(**options: object) -> None:
    """InputError for an option that is only for models that are loaded."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}= is for a model that is loaded; with your own, {INSTEAD[name]}")
