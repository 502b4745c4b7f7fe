"""How well a model knows texts: bits a byte, perplexity, the likelihood of one text after another, LAMBADA.

- a text is read from its first token to its last with its state carried along: nothing is cut off, whatever its length
- what many continuations have in common is read once, and each goes on from its state
- many texts are packed side by side, so that short ones cost no padding
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .engine.llm import LLM
from .errors import InputError
from .models import Model, State

AT_ONCE = 4096  # tokens of a pass
MOST_ROWS = 64  # texts of a pass, each of which has a state
Item = TypeVar("Item")
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # shows how many of a known number are done


def quiet(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class Bits:
    """What texts cost.

    Attributes:
        nats: all of them together.
        tokens, bytes: how many were told; a token that only begins a text is not told.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats / max(1, self.tokens))


def bits(llm: LLM, texts: Sequence[str], track: Track = quiet) -> Bits:
    """What a model pays for texts, each from nothing.

    The first token of a text is told too if the model has a mark that texts begin after (`llm.opening`, or the end of
    text); a model without one, such as a model of bytes, begins with it.

    Raises:
        InputError: there is nothing to be told.
    """
    marks = opening(llm)
    encoded = [(marks, llm.tokenizer.encode(text)) for text in texts]
    spans = [(ids[:1], ids[1:]) if not before else (before, ids) for before, ids in encoded if ids]
    told = [len(after) for _, after in spans]
    if not sum(told):
        raise InputError("there is no text to measure")
    nats = -sum(total for total, _ in likelihoods(llm.model, spans, track))
    size = sum(len(text.encode()) for text in texts)
    if not marks:
        words = getattr(llm.tokenizer, "vocabulary", None)  # a byte alone may be no text
        firsts = [before[0] for before, _ in spans]
        size -= sum(len(words[i]) if words else len(llm.tokenizer.decode([i]).encode()) for i in firsts)
    return Bits(nats, sum(told), size)


def opening(llm: LLM) -> list[int]:
    """The tokens that stand in front of a text which begins from nothing."""
    return list(llm.opening) or sorted(llm.tokenizer.stop_ids)[:1]


@torch.inference_mode()
def likelihoods(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], track: Track = quiet
) -> list[tuple[float, bool]]:
    """For each (before, after) of token ids, neither empty: the logarithm of the probability of `after`, in nats, and
    whether each of its tokens is the most likely one.

    A `before` that several pairs share is read once.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (before, after) in enumerate(pairs):
        if not before or not after:
            raise InputError(f"pair {i} has an empty {'beginning' if not before else 'continuation'}")
        groups.setdefault(tuple(before), []).append(i)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    passes = list(_filled(sorted(groups, key=len, reverse=True), len))
    for some in track(passes, len(passes)):
        starts, state = _read(model, some)
        members = [(row, i) for row, before in enumerate(some) for i in groups[before]]
        for part in _filled(members, lambda member: len(pairs[member[1]][1])):
            rows = [row for row, _ in part]
            told = _told(model, starts[rows], state[rows], [pairs[i][1] for _, i in part])
            for (_, i), result in zip(part, told, strict=True):
                results[i] = result
    return results


def _filled(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in groups of at most AT_ONCE tokens and MOST_ROWS of them, or of one."""
    some: list[Item] = []
    count = 0
    for item in items:
        if some and (count + size(item) > AT_ONCE or len(some) == MOST_ROWS):
            yield some
            some, count = [], 0
        some.append(item)
        count += size(item)
    if some:
        yield some


def _read(model: Model, texts: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
    """The logits after each text, [S, V], and the states there; long texts by the piece."""
    if len(texts) > 1:
        ends = [0]
        for text in texts:
            ends.append(ends[-1] + len(text))
        tokens = torch.tensor([[token for text in texts for token in text]], device=model.device)
        logits, state = model(tokens, cu_seqlens=ends, last_only=True)
        return logits[0], state
    state = None
    for piece in torch.tensor([list(texts[0])], device=model.device).split(AT_ONCE, dim=1):
        logits, state = model(piece, state, last_only=True)
    assert state is not None
    return logits[:, -1], state


def _told(model: Model, first: Tensor, state: State, texts: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """The likelihood of each text after its state, whose logits are `first` [S, V]."""
    device = first.device
    sums = [0.0] * len(texts)
    greedy = [True] * len(texts)

    def count(logits: Tensor, targets: Tensor, owners: Sequence[int]) -> None:
        wide = logits.float() if logits.dtype != torch.float64 else logits
        nats = F.cross_entropy(wide, targets, reduction="none").double().tolist()
        best = (wide.argmax(-1) == targets).tolist()
        for owner, nat, hit in zip(owners, nats, best, strict=True):
            sums[owner] -= nat
            greedy[owner] &= hit

    count(first, torch.tensor([text[0] for text in texts], device=device), range(len(texts)))
    if len(texts) == 1:
        inputs = torch.tensor([list(texts[0][:-1])], device=device)
        targets = torch.tensor([list(texts[0][1:])], device=device)
        for piece, wanted in zip(inputs.split(AT_ONCE, 1), targets.split(AT_ONCE, 1), strict=True):
            if piece.numel():
                logits, state = model(piece, state)
                count(logits[0], wanted[0], [0] * piece.shape[1])
        return list(zip(sums, greedy, strict=True))
    longer = [i for i, text in enumerate(texts) if len(text) > 1]
    if longer:
        ends = [0]
        for i in longer:
            ends.append(ends[-1] + len(texts[i]) - 1)
        inputs = torch.tensor([[token for i in longer for token in texts[i][:-1]]], device=device)
        targets = torch.tensor([token for i in longer for token in texts[i][1:]], device=device)
        logits, _ = model(inputs, state[longer], cu_seqlens=ends)
        count(logits[0], targets, [i for i in longer for _ in texts[i][1:]])
    return list(zip(sums, greedy, strict=True))


def encode_pair(llm: LLM, before: str, after: str) -> tuple[list[int], list[int]]:
    """Two texts that follow each other, as token ids: cut where the second begins in the ids of both together. Spaces
    at the end of the first belong to the second, for words bring the space in front of them."""
    kept = before.rstrip()
    before, after = kept, before[len(kept) :] + after
    if not before:
        ids = llm.tokenizer.encode(after)
        marks = opening(llm)
        return (marks, ids) if marks else (ids[:1], ids[1:])
    first = llm.tokenizer.encode(before)
    return [*llm.opening, *first], llm.tokenizer.encode(before + after)[len(first) :]


def lambada(llm: LLM, passages: Sequence[str], track: Track = quiet) -> tuple[float, float]:
    """LAMBADA: the last word of each passage after what stands before it. Its perplexity, and how often all of its
    tokens are the most likely ones (0 .. 1)."""
    pairs = []
    for passage in passages:
        before, space, word = passage.rpartition(" ")
        if not space:
            raise InputError(f"a passage has one word only: {passage[:60]!r}")
        pairs.append(encode_pair(llm, before, " " + word))
    told = likelihoods(llm.model, pairs, track)
    nats = -sum(total for total, _ in told) / len(told)
    return math.exp(nats), sum(hit for _, hit in told) / len(told)


def read_texts(path: Path, key: str = "text") -> list[str]:
    """The texts in a .jsonl (one object a line) or, of any other file, its whole text.

    Raises:
        InputError: what is wrong with it, and in which line.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start})") from error
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            texts.append(json.loads(line)[key])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: no JSON object with a {key!r}") from error
        if not isinstance(texts[-1], str):
            raise InputError(f"{path}, line {number}: {key!r} is no text")
    return texts
