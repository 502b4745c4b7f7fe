"""Several token files as one training set, each read as often as its weight says.

- a weight is a source's share of the tokens that are read, whatever its size: small sources are repeated
- every row comes from one source, whose rows are read in the order that they have without the others
- which source a row comes from depends on its number and the seed alone, as everything in batching.py does
- the rows of a source come at even distances, so at any time its share of the tokens is that of its weight up to a few
  rows
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from .batching import DocumentSampler, LaneSampler, Row, WindowSampler, generator_for
from .token_file import TokenFile

SourceSampler = DocumentSampler | LaneSampler | WindowSampler
RESOLUTION = 1 << 48  # of the distances between the rows of the most frequent source


class Mixture:
    """Token files that one model is trained on.

    Attributes:
        files: the sources.
        weights: of each, positive.
    """

    def __init__(self, paths: Sequence[str | Path], weights: Sequence[float]):
        """
        Raises:
            InputError: a file cannot be read, or they were made by different tokenizers.
        """
        self.files, self.weights = [TokenFile(path) for path in paths], list(weights)
        self._reference = next((file for file in self.files if file.tokenizer is not None), self.files[0])
        for file in self.files:
            self._check(file)

    def _check(self, file: TokenFile) -> None:
        """That a file has the ids of the others. Of one that names no tokenizer this is the user's word."""
        other = self._reference
        if file.tokenizer is not None and _fingerprint(file.tokenizer) != _fingerprint(other.tokenizer):
            raise InputError(
                f"{file.prefix}: was made with the tokenizer {file.tokenizer}, but {other.prefix} with "
                f"{other.tokenizer}; all sources need the same one"
            )
        if file.end_of_text != other.end_of_text:
            raise InputError(
                f"{file.prefix}: its texts end with the id {file.end_of_text}, but those of {other.prefix} with "
                f"{other.end_of_text}; all sources need the same tokenizer"
            )
        if file.tokenizer is None and other.tokenizer is not None and file.vocab_size > other.vocab_size:
            raise InputError(
                f"{file.prefix}: has token ids up to {file.vocab_size - 1}, but the tokenizer of {other.prefix} "
                f"ends at {other.vocab_size - 1}"
            )

    @cached_property
    def vocab_size(self) -> int:
        return max(file.vocab_size for file in self.files)

    @property
    def n_tokens(self) -> int:
        return sum(len(file.tokens) for file in self.files)

    @property
    def tokenizer(self) -> str | Path | None:
        """See `TokenFile`."""
        return self._reference.tokenizer

    @property
    def tokenizer_file(self) -> Path | None:
        return self._reference.tokenizer_file

    @property
    def has_end_of_text(self) -> bool:
        """Whether something known ends the documents."""
        return any(file.metadata.get("end_of_text") is not None for file in self.files)

    @property
    def notes(self) -> dict[str, Any]:
        """See `TokenFile`. A chat template is named if it is that of all conversations."""
        templates = {file.notes["chat_template"] for file in self.files if "chat_template" in file.notes}
        return {
            "opening_tokens": self._reference.notes["opening_tokens"],
            **({"chat_template": templates.pop()} if len(templates) == 1 else {}),
        }


class MixtureSampler:
    """Rows of several samplers. See batching.py for what a sampler is.

    Attributes:
        rows_per_epoch: number of rows that have as many tokens as all sources together.
        shortest_row: tokens of the shortest row.
    """

    def __init__(self, samplers: Sequence[SourceSampler], weights: Sequence[float], seed: int = 0, lanes: int = 0):
        """
        Args:
            samplers, weights: one of each for every source.
            seed: from 0 to 2^64 - 1.
            lanes: of LaneSamplers, each of which is a mixture of its own; 0 for other samplers.
        """
        self.samplers, self.lanes = samplers, max(1, lanes)
        tokens = [Fraction(sampler.tokens_per_epoch, sampler.rows_per_epoch) for sampler in samplers]  # of a row
        rates = [Fraction(weight) / n for weight, n in zip(weights, tokens, strict=True)]  # of rows
        tokens_per_row = sum(map(Fraction, weights)) / sum(rates)
        self.rows_per_epoch = math.ceil(sum(sampler.tokens_per_epoch for sampler in samplers) / tokens_per_row)
        self.shortest_row = min(sampler.shortest_row for sampler in samplers)
        self._schedules = [Schedule(rates, seed, lane) for lane in range(self.lanes)]

    def row(self, i: int) -> Row:
        """Row i >= 0. The rows of a lane are those of each source of that lane, in order."""
        step, lane = divmod(i, self.lanes)
        source, j = self._schedules[lane].locate(step)
        return replace(self.samplers[source].row(j * self.lanes + lane), source=source)

    def tokens_read(self, n_rows: int) -> list[int]:
        """How many tokens of each source are targets in the first rows. n_rows: a multiple of the lanes."""
        counts = [schedule.counts(n_rows // self.lanes) for schedule in self._schedules]
        return [
            sum(sampler.tokens_read(of_lane[source], lane) for lane, of_lane in enumerate(counts))
            for source, sampler in enumerate(self.samplers)
        ]


class Schedule:
    """The order of rows in which row j of source s comes at the time phases[s] + j * strides[s], in whole numbers. Of
    two at the same time, that of the source that is named first comes first."""

    def __init__(self, rates: Sequence[Fraction], seed: int, lane: int = 0):
        """
        Args:
            rates: how frequent the rows of each source are, positive, of any sum.
            seed, lane: of the phases.
        """
        self.strides = [round(RESOLUTION * max(rates) / rate) for rate in rates]
        draws = generator_for(seed, (1 << 64) - 1 - lane).integers(1 << 53, size=len(rates)).tolist()
        self.phases = [stride * draw >> 53 for stride, draw in zip(self.strides, draws, strict=True)]

    def locate(self, i: int) -> tuple[int, int]:
        """The source s and the number j of row i."""
        time = self._time(i)
        before = self._counts_until(time)
        source = self._due(time)[i - sum(before)]
        return source, before[source]

    def counts(self, n: int) -> list[int]:
        """How many of the first n rows come from each source."""
        if not n:
            return [0] * len(self.strides)
        time = self._time(n - 1)
        counts = self._counts_until(time)
        for source in self._due(time)[: n - sum(counts)]:
            counts[source] += 1
        return counts

    def _time(self, i: int) -> int:
        """When row i comes: the latest time with at most i rows before it."""
        fastest = self.strides.index(min(self.strides))
        low, high = 0, self.phases[fastest] + i * self.strides[fastest]  # this source alone has i rows before that
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self._counts_until(middle)) <= i:
                low = middle
            else:
                high = middle - 1
        return low

    def _counts_until(self, time: int) -> list[int]:
        """How many rows of each source come before a time."""
        return [max(0, -((phase - time) // stride)) for phase, stride in zip(self.phases, self.strides, strict=True)]

    def _due(self, time: int) -> list[int]:
        """The sources with a row at a time."""
        pairs = enumerate(zip(self.phases, self.strides, strict=True))
        return [source for source, (phase, stride) in pairs if time >= phase and (time - phase) % stride == 0]


def _fingerprint(tokenizer: str | Path | None) -> str | None:
    """Equal for equal tokenizers."""
    return hashlib.sha256(tokenizer.read_bytes()).hexdigest() if isinstance(tokenizer, Path) else tokenizer
