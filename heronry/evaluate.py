"""How well a model predicts texts: bits per byte, perplexity, LAMBADA, the log-likelihood of one text after another.

- a text is read from its first token to its last with its state carried along: nothing is cut off, whatever its length
- a context that many continuations share is read once, and each continues from its state
- many texts are packed side by side, so that short ones cost no padding
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.sources import Rows, describe, find_sources, read_records
from .engine.llm import LLM
from .errors import InputError
from .models import Model, State
from .progress import Progress

MAX_TOKENS = 4096  # of a pass through the model
MAX_ROWS = 64  # texts of a pass, each of which has a state
Item = TypeVar("Item")
Report = Callable[[int], None]  # called with the number of tokens just read or predicted


@dataclass(frozen=True)
class TextScore:
    """What texts cost a model.

    Attributes:
        nats: -log p, summed over all predicted tokens.
        tokens: how many tokens were predicted; one that only starts a text is not.
        bytes: their UTF-8 bytes.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / max(1, self.tokens))


@dataclass(frozen=True)
class LambadaScore:
    """perplexity: per last word. accuracy: the fraction of last words (0 .. 1) with every token the most likely one."""

    perplexity: float
    accuracy: float


def score_texts(llm: LLM, texts: Sequence[str], progress: Progress | None = None) -> TextScore:
    """Bits per byte and perplexity of texts, each read from an empty state, or the tuned one of the LLM.

    The first token of a text is predicted too if the model has tokens that every text starts after (see
    `opening_tokens`). Otherwise, as in a model of bytes, the first token only starts the text and is not counted.

    Raises:
        InputError: no text has a token to predict.
    """
    opening = opening_tokens(llm)
    encoded = [ids for ids in map(llm.tokenizer.encode, texts) if ids]
    pairs = [(opening, ids) if opening else (ids[:1], ids[1:]) for ids in encoded]
    n_tokens = sum(len(continuation) for _, continuation in pairs)
    if n_tokens == 0:
        raise InputError("there is no text to measure")
    nats = -sum(total for total, _ in log_likelihoods(llm.model, pairs, progress, llm.start))
    n_bytes = sum(len(text.encode()) for text in texts)
    if not opening:
        vocabulary = getattr(llm.tokenizer, "vocabulary", None)  # a token may be part of a character, no text by itself
        first_ids = [context[0] for context, _ in pairs]
        n_bytes -= sum(len(vocabulary[i]) if vocabulary else len(llm.tokenizer.decode([i]).encode()) for i in first_ids)
    return TextScore(nats, n_tokens, n_bytes)


def score_lambada(llm: LLM, passages: Sequence[str], progress: Progress | None = None) -> LambadaScore:
    """LAMBADA: the last word of each passage, predicted from the words before it."""
    if not passages:
        raise InputError("there is no passage to measure")
    pairs = []
    for passage in passages:
        context, space, word = passage.rpartition(" ")
        if not space:
            raise InputError(f"a passage has only one word: {passage[:60]!r}")
        pairs.append(encode_pair(llm, context, " " + word))
    results = log_likelihoods(llm.model, pairs, progress, llm.start)
    nats = -sum(total for total, _ in results) / len(results)
    return LambadaScore(math.exp(nats), sum(greedy for _, greedy in results) / len(results))


def opening_tokens(llm: LLM) -> list[int]:
    """The token ids in front of all that is read from an empty state, whole texts and contexts alike: the model's own,
    else the tokenizer's end of text (0 in World), else none. BlinkDL's figures have it too."""
    return list(llm.opening) or sorted(llm.tokenizer.stop_ids)[:1]


def encode_pair(llm: LLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The token ids of two texts that follow each other, cut where the second starts in the ids of both together.

    Spaces at the end of the first belong to the second, because tokens of words start with their space.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    context_ids = llm.tokenizer.encode(context)
    ids = llm.tokenizer.encode(context + continuation)
    opening = opening_tokens(llm)
    if not opening and not context_ids:
        return ids[:1], ids[1:]
    return [*opening, *context_ids], ids[len(context_ids) :]


@torch.inference_mode()
def log_likelihoods(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Progress | None = None,
    start: State | None = None,
) -> list[tuple[float, bool]]:
    """How likely each continuation is after its context.

    Args:
        pairs: (context, continuation) in token ids, neither of them empty. A context that several pairs share is read
            once.
        progress: called with the tokens read, and in all.
        start: the state of one row that every context begins from; None = the model's own.

    Returns:
        For each pair log p(continuation | context) in nats, and whether each token is the most likely one.

    Raises:
        InputError: a context or continuation is empty, or the state is of another model.
    """
    start = model.initial_state() if start is None else start
    groups: dict[tuple[int, ...], list[int]] = {}  # the pairs of each context
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise InputError(f"pair {i} has an empty {'continuation' if context else 'context'}")
        groups.setdefault(tuple(context), []).append(i)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    done, total = 0, sum(map(len, groups)) + sum(len(continuation) for _, continuation in pairs)

    def report(n_tokens: int) -> None:
        nonlocal done
        done += n_tokens
        if progress is not None:
            progress(done, total)

    for contexts in _split_into_passes(sorted(groups, key=len, reverse=True), len):
        logits, state = _read_contexts(model, start, contexts, report)
        members = [(row, i) for row, context in enumerate(contexts) for i in groups[context]]
        for part in _split_into_passes(members, lambda member: len(pairs[member[1]][1])):
            rows = [row for row, _ in part]
            continuations = [pairs[i][1] for _, i in part]
            scores = _score_continuations(model, logits[rows], state[rows], continuations, report)
            for (_, i), score in zip(part, scores, strict=True):
                results[i] = score
    return results


def _split_into_passes(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, in lists of at most MAX_ROWS items and MAX_TOKENS in total size; an item larger than that is
    a list of its own."""
    batch: list[Item] = []
    n_tokens = 0
    for item in items:
        if batch and (n_tokens + size(item) > MAX_TOKENS or len(batch) == MAX_ROWS):
            yield batch
            batch, n_tokens = [], 0
        batch.append(item)
        n_tokens += size(item)
    if batch:
        yield batch


def _read_contexts(
    model: Model, start: State, contexts: Sequence[Sequence[int]], report: Report
) -> tuple[Tensor, State]:
    """The logits after each of S contexts, [S, V], and the S states there. A single one may have any length. start: see
    `log_likelihoods`."""
    device = model.device
    if len(contexts) > 1:
        ends = [0]
        for context in contexts:
            ends.append(ends[-1] + len(context))
        tokens = torch.tensor([[token for context in contexts for token in context]], device=device)
        logits, state = model(tokens, start[[0] * len(contexts)], cu_seqlens=ends, last_only=True)
        report(tokens.numel())
        return logits[0], state
    state = start
    for piece in torch.split(torch.tensor([list(contexts[0])], device=device), MAX_TOKENS, dim=1):
        logits, state = model(piece, state, last_only=True)
        report(piece.numel())
    return logits[:, -1], state


def _score_continuations(
    model: Model, logits: Tensor, state: State, continuations: Sequence[Sequence[int]], report: Report
) -> list[tuple[float, bool]]:
    """The log-likelihood of each of S continuations, in nats, and whether all of its tokens are the most likely ones.

    Args:
        logits: [S, V], for the first token of each. state: of S rows, before that token.
    """
    device = logits.device
    sums = [0.0] * len(continuations)
    greedy = [True] * len(continuations)

    def add(logits: Tensor, targets: Tensor, rows: Sequence[int]) -> None:
        """logits [N, V], targets int64 [N] and the continuation that each belongs to."""
        logits = logits.float() if logits.dtype != torch.float64 else logits
        losses = F.cross_entropy(logits, targets, reduction="none").double().tolist()
        hits = (logits.argmax(-1) == targets).tolist()
        for row, loss, hit in zip(rows, losses, hits, strict=True):
            sums[row] -= loss
            greedy[row] &= hit
        report(len(rows))

    add(logits, torch.tensor([ids[0] for ids in continuations], device=device), range(len(continuations)))
    if len(continuations) == 1:
        inputs = torch.tensor([list(continuations[0][:-1])], device=device)
        targets = torch.tensor([list(continuations[0][1:])], device=device)
        pieces = zip(torch.split(inputs, MAX_TOKENS, 1), torch.split(targets, MAX_TOKENS, 1), strict=True)
        for piece, piece_targets in pieces:
            if piece.numel():
                logits, state = model(piece, state)
                add(logits[0], piece_targets[0], [0] * piece.shape[1])
        return list(zip(sums, greedy, strict=True))
    longer = [i for i, ids in enumerate(continuations) if len(ids) > 1]
    if longer:
        ends = [0]
        for i in longer:
            ends.append(ends[-1] + len(continuations[i]) - 1)
        inputs = torch.tensor([[token for i in longer for token in continuations[i][:-1]]], device=device)
        targets = torch.tensor([token for i in longer for token in continuations[i][1:]], device=device)
        logits, _ = model(inputs, state[longer], cu_seqlens=ends)
        add(logits[0], targets, [i for i in longer for _ in continuations[i][1:]])
    return list(zip(sums, greedy, strict=True))


def read_texts(path: str | Path, key: str | None = None) -> list[str]:
    """The texts of a file: one a line of a .jsonl or a row of a .parquet, else the whole of it. Files may be
    compressed; a folder has the texts of all its files.

    Args:
        key: the field of a row that holds its text; None: "text".

    Raises:
        InputError: the file cannot be read, or a row holds no text.
    """
    path = Path(path).expanduser()
    texts: list[str] = []
    pieces: list[str] = []
    rows = Rows(key, "text" if key is None else None)
    for record in read_records([describe(path)] if path.is_file() else find_sources([str(path)]), rows):
        if not isinstance(record.content, str):
            raise InputError(f"{record.location}: is a conversation, but only texts can be measured")
        pieces.append(record.content)
        if record.ends_document:
            texts.append("".join(pieces))
            pieces = []
    return texts
