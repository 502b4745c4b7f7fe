"""The views by name: each takes a model with a text to look at, and makes pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InputError, show
from ..memory import release_memory
from ..models import Model
from ..progress import Progress
from ..text.tokenizers import Tokenizer, spell
from . import text_figures as draw
from .cascade import measure_cascade
from .decay import read_decays
from .flow import influence, trace
from .lens import read_lens
from .memory import loss_by_position, recall
from .reads import read_weights
from .state import check_has_heads, knock_out, read_history, read_state, state_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNKS = (32, 64, 128, 256, 512)  # tokens a piece
ANIMATED = 128  # of these
SHORTEST = 64  # tokens of a text that says something about memory
MAX_QUOTED = 100  # characters
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Picture(NamedTuple):
    """A figure and how to read it.

    animation: a GIF that goes with it.
    """

    figure: Figure
    caption: str
    animation: bytes | None = None


@dataclass(frozen=True)
class Look:
    """A model and what it is looked at with.

    Attributes:
        opening: token ids that every text begins with.
        prompt: the text that is read.
        subject: the part of it that `flow` puts noise on.
        answer: the text whose first token is expected after the prompt; None: the most likely one.
        fact, question, recalled: for `memory`: a text, what is asked later, and the answer.
        against: for `state`: a second text, whose state is compared with that of the prompt.
        texts: long texts for `memory` and `cascade`, as token ids without the opening.
    """

    model: Model
    tokenizer: Tokenizer
    opening: Sequence[int]
    prompt: str
    subject: str | None = None
    answer: str | None = None
    fact: str = ""
    question: str = ""
    recalled: str = ""
    against: str | None = None
    texts: Sequence[Sequence[int]] = field(default=(), repr=False)
    progress: Progress | None = field(default=None, repr=False)

    @cached_property
    def tokens(self) -> list[int]:
        return self.encode(self.prompt)

    def encode(self, text: str, name: str = "the prompt") -> list[int]:
        ids = [*self.opening, *self.tokenizer.encode(text)]
        if len(ids) < 2:
            raise InputError(f"{name} is too short: it needs at least two tokens")
        return ids

    @cached_property
    def pieces(self) -> list[tuple[str, int]]:
        """The prompt in whole characters: a text, and how many tokens it takes."""
        stream, pieces, n = self.tokenizer.stream(), [], 0
        for token in self.tokens[len(self.opening) :]:
            n += 1
            text = stream.push(token)
            if stream.whole:
                pieces.append((text, n))
                n = 0
        return [*pieces, (stream.finish(), n)] if n else pieces

    @cached_property
    def labels(self) -> list[str]:
        """Of every token its text; of parts of a character the character, and which part it is."""
        labels = [spell(self.tokenizer, token) for token in self.opening]
        for text, n in self.pieces:
            labels += [text] if n == 1 else [f"{text} {i + 1}/{n}" for i in range(n)]
        return labels

    def subject_positions(self) -> list[int]:
        """Of the tokens that hold a character of the subject, wherever it stands in the prompt."""
        if not self.subject:
            raise InputError("name the part of the prompt that gets noise with --subject")
        prompt = "".join(text for text, _ in self.pieces)  # a tokenizer may normalise what it reads
        begins = [i for i in range(len(prompt)) if prompt.startswith(self.subject, i)]
        if not begins:
            raise InputError(f"the prompt does not contain the subject {show(self.subject)}")
        position, at = len(self.opening), 0
        positions: list[int] = []
        for text, n in self.pieces:
            end = at + len(text)
            if any(at < begin + len(self.subject) and begin < end for begin in begins):
                positions += range(position, position + n)
            position, at = position + n, end
        return positions

    def answer_token(self) -> int:
        """The first token of the answer; the model's own if none is given."""
        if self.answer is None:
            return int(read_lens(self.model, self.tokens).best[-1, -1])
        ids = self.tokenizer.encode(self.answer)
        if not ids:
            raise InputError("the answer is empty")
        return ids[0]


def quote(text: str) -> str:
    """A text in quotation marks and on one line; of a long one the end."""
    line = "".join(draw.VISIBLE.get(x, x) for x in text)
    return f"“{line if len(line) <= MAX_QUOTED else '…' + line[1 - MAX_QUOTED :]}”"


def view_decay(look: Look) -> list[Picture]:
    found = read_decays(look.model, look.tokens)
    figure = draw.draw_decay_curves(found.half_lives, found.on_text, found.rates, found.mixes)
    on = "averaged over the prompt" if found.on_text is not None else "the same for every text"
    caption = f"How fast the memory of each channel fades ({on}). Half-life: after so many tokens half is left."
    if look.model.name == "rwkv6":
        caption += " The token shift of the time mix is drawn without what depends on the token."
    return [Picture(figure, caption)]


def view_flow(look: Look) -> list[Picture]:
    positions, answer = look.subject_positions(), look.answer_token()
    found = trace(look.model, look.tokens, positions, answer, progress=look.progress)
    gradient = influence(look.model, look.tokens, answer)
    word = spell(look.tokenizer, answer)
    figure = draw.draw_flow(*found, gradient, look.labels, word)
    caption = (
        f"Noise on {quote(look.subject or '')} changes the probability of {quote(word)} from {100 * found.clean:.3g}% "
        f"to {100 * found.corrupted:.3g}%."
    )
    if found.corrupted > found.clean / 2:
        caption += " The answer does not rest on the subject: there is little to put back."
    else:
        caption += " The first two pictures: where putting back one layer's output, or its memory, undoes that."
    if look.model.generation in ("rwkv7a", "rwkv7b"):
        caption += " What every layer looks up for a token gets no noise."
    return [Picture(figure, caption)]


def view_reads(look: Look) -> list[Picture]:
    found = read_weights(look.model, look.tokens)
    figure = draw.draw_reads(found.shares, look.labels)
    caption = (
        "The operators written as attention: how much of what a token reads was written by each earlier token. "
        f"The map times the values gives the operator's output up to {found.error:.0e}."
    )
    if look.model.generation == "rwkv7b":
        caption += " The attention that RWKV-7b has beside them is not drawn."
    return [Picture(figure, caption)]


def view_cascade(look: Look) -> list[Picture]:
    tokens = [*look.opening, *(token for text in look.texts for token in text)][: 4 * max(CHUNKS)]
    if len(tokens) < 2 * max(CHUNKS):
        raise InputError(f"cascade needs a text of {2 * max(CHUNKS)} tokens, got {len(tokens)}: give a longer --text")
    found = [measure_cascade(look.model, tokens, chunk) for chunk in CHUNKS]
    measured = [float((x.begins + x.seconds).max()) for x in found]
    ideal = [float((x.ideal_begins + x.seconds).max()) for x in found]
    shown = found[CHUNKS.index(ANIMATED)]
    figure = draw.draw_cascade(shown.steps[:, :8], CHUNKS, measured, ideal)
    animation = draw.animate_cascade(shown.begins, shown.seconds, shown.ideal_begins, ANIMATED)
    return [
        Picture(figure, f"Reading {len(tokens):,} tokens: what could run together, and how it ran here.", animation)
    ]


def view_state(look: Look) -> list[Picture]:
    if look.against is not None:
        check_has_heads(look.model)
        states = [read_state(look.model, tokens) for tokens in (look.tokens, look.encode(look.against, "--against"))]
        figure = draw.draw_difference(state_difference(*states), look.prompt, look.against)
        caption = f"How far apart the states after {quote(look.prompt)} and {quote(look.against)} are, head by head."
        return [Picture(figure, caption)]
    return [
        Picture(
            draw.draw_history(*read_history(look.model, look.tokens)),
            "The state while the prompt is read. The effective rank says in how many directions a head's matrix holds "
            "something.",
        )
    ]


def view_knockout(look: Look) -> list[Picture]:
    found = knock_out(look.model, look.tokens)
    return [
        Picture(
            draw.draw_knockout(*found, look.prompt),
            "How much the next token changes when one part of the state is emptied and everything else stays.",
        )
    ]


def view_lens(look: Look) -> list[Picture]:
    found = read_lens(look.model, look.tokens)
    said = [[spell(look.tokenizer, int(token)) for token in row] for row in found.best]
    figure = draw.draw_lens(said, found.probability, look.labels)
    return [Picture(figure, "What comes out if the model stops after a layer and says its next word at once.")]


def view_memory(look: Look) -> list[Picture]:
    if not look.texts:
        raise InputError("memory needs long texts: give them with --text")
    encode = look.tokenizer.encode
    fact, question, recalled = encode(look.fact), encode(look.question), encode(look.recalled)
    if not (fact and question and recalled):
        raise InputError("memory needs a --fact, a --question and what should be --recalled, of a token or more each")
    length = min(map(len, look.texts))
    if length < SHORTEST:
        raise InputError(f"memory needs a text of {SHORTEST} tokens, got {length}: give a longer --text")
    losses = loss_by_position(
        look.model, [[*look.opening, *text[:length]] for text in look.texts], progress=look.progress
    )
    distances = [distance for distance in DISTANCES if distance <= length]
    remembered = recall(
        look.model,
        look.opening,
        fact,
        [text[:length] for text in look.texts],
        question,
        recalled,
        distances,
        progress=look.progress,
    )
    figure = draw.draw_memory(*losses, remembered.distances, remembered.gain, look.fact)
    texts = f"{len(look.texts)} texts" if len(look.texts) > 1 else "a text"
    return [
        Picture(
            figure,
            f"Left: the loss at every position of {texts} of {length:,} tokens. Right: {quote(look.fact)} is read, "
            f"then other text, then {quote(look.question.strip())}; how much more probable "
            f"{quote(look.recalled.strip())} is than without the fact.",
        )
    ]


VIEWS: dict[str, Callable[[Look], list[Picture]]] = {
    "decay": view_decay,
    "flow": view_flow,
    "reads": view_reads,
    "cascade": view_cascade,
    "state": view_state,
    "knockout": view_knockout,
    "lens": view_lens,
    "memory": view_memory,
}


def view_report(look: Look) -> tuple[list[Picture], dict[str, str]]:
    """All that fit the model and the texts; and why the others, by name, do not.

    Raises:
        InputError: the prompt is too short for any of them.
    """
    _ = look.tokens
    pictures: list[Picture] = []
    left_out = {}
    for name, view in VIEWS.items():
        try:
            pictures += view(look)
        except InputError as error:
            left_out[name] = str(error)
        release_memory()  # each view has other needs
    return pictures, left_out
