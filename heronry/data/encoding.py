"""Records to token ids: in this process or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..text.conversations import Piece, encode_piece, end_of_text, render_conversation
from ..text.template_choice import find_template
from ..text.tokenizers import load_tokenizer
from .rows import Content, PromptCompletion
from .sources import PIECE_SIZE, Record, TemporaryError, split_point

CHUNK = 1 << 17  # characters that a worker gets at once


@dataclass(frozen=True)
class Encoded:
    """The ids of several records, in one array."""

    ids: NDArray[Any]  # [n], in the dtype of the file
    lengths: list[int]  # of each record; their sum is n
    problems: list[str | None]  # why a record has no ids
    mask: NDArray[Any] | None  # bool [n]: which count in the loss; None: all

    def split(self) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None]]:
        """The ids and the mask of each record."""
        ends = np.cumsum(self.lengths)[:-1]
        ids = np.split(self.ids, ends)
        return ids, [None] * len(ids) if self.mask is None else list(np.split(self.mask, ends))


class Encoder:
    """Encodes records; each document is followed by the end of text if the tokenizer has an id for it."""

    def __init__(self, tokenizer: str, template: str | None, skip_bad: bool = False):
        """tokenizer, template, skip_bad: as for `tokenize_corpus`."""
        self.arguments = (tokenizer, template, skip_bad)
        self.template, self.skip_bad = None if template is None else find_template(template), skip_bad
        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "int32"
        self.end_of_text = end_of_text(self.tokenizer)

    def __call__(self, records: list[Record]) -> Encoded:
        ids, masks, problems = [], [], []
        for record in records:
            record_ids: NDArray[Any] = np.empty(0, self.dtype)
            mask: NDArray[Any] = np.empty(0, bool)
            problem = record.problem
            if problem is None:
                try:
                    record_ids, mask = self._encode(record)
                except InputError as error:
                    if not self.skip_bad:
                        raise InputError(f"{record.location}: {error}") from error
                    problem = str(error)
            ids.append(record_ids)
            masks.append(mask)
            problems.append(problem)
        mask = np.concatenate(masks)
        return Encoded(np.concatenate(ids), [len(x) for x in ids], problems, None if mask.all() else mask)

    def _encode(self, record: Record) -> tuple[NDArray[Any], NDArray[Any]]:
        """The ids of a record, and for each whether it counts in the loss, bool."""
        arrays: list[NDArray[Any]] = []
        masks: list[NDArray[Any]] = []
        counts = True  # the last piece, and so the end of text behind it
        for piece in self._pieces(record.content):
            ids, n_counted = encode_piece(piece, self.tokenizer)
            arrays.append(np.array(ids, self.dtype))
            masks.append(np.arange(len(ids)) < n_counted)
            counts = piece.n_counted > 0 or not piece.text
        if record.ends_document and self.end_of_text is not None:
            arrays.append(np.array([self.end_of_text], self.dtype))
            masks.append(np.array([counts]))
        return np.concatenate(arrays), np.concatenate(masks)

    def _pieces(self, content: Content) -> Iterator[Piece]:
        """The parts of a text or a conversation that are encoded separately."""
        if isinstance(content, PromptCompletion):
            if self.template is None:
                if not content.completion:
                    raise InputError("the completion is empty")
                yield Piece(content.prompt, 0)
                yield Piece(content.completion, len(content.completion))
                return
            content = content.messages()
        if not isinstance(content, str):
            if self.template is None:
                raise InputError("this is a conversation: choose a chat template with --template")
            yield from render_conversation(content, self.template, self.end_of_text is not None)
            return
        while len(content) > PIECE_SIZE:  # lists of ids take twenty times the memory of their text
            n = split_point(content[:PIECE_SIZE])
            yield Piece(content[:n], n)
            content = content[n:]
        yield Piece(content, len(content))


def encode_chunks(records: Iterator[Record], encoder: Encoder, workers: int) -> Iterator[tuple[list[Record], Encoded]]:
    """Yields the records in chunks, in order, each with its ids."""
    if workers == 1:
        for chunk in split_into_chunks(records):
            yield chunk, encoder(chunk)
        return
    # spawned: forking is unsafe with threads, which the tokenizers and the progress bar have
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, encoder.arguments)
    pending: deque[tuple[list[Record], Future[Encoded]]] = deque()
    try:
        for chunk in split_into_chunks(records):
            pending.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise TemporaryError("a worker was killed, perhaps for lack of memory; the same command resumes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def split_into_chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Groups records until they have CHUNK characters."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        content = record.content
        size += len(content) if isinstance(content, str) else sum(len(str(message)) for message in content)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: Encoder  # of a worker process


def _start_worker(*arguments: Any) -> None:
    """arguments: of `Encoder`."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that writes
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # which may be killed without notice
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _encoder = Encoder(*arguments)


def _encode_in_worker(records: list[Record]) -> Encoded:
    return _encoder(records)
