"""Texts to token files: processes encode, one writes, and a run that was killed goes on.

- the files are the same for any number of workers, and whether or not a run was stopped on its way
- what is under way is a few pieces of text a worker, whatever there is in all
- PREFIX.progress.json says every second how far the run is; what was written after it is cut off and made again
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import atomic_write
from ..text.tokenizers import load_tokenizer
from .sources import BEGINNING, PIECE, Messages, Place, Record, cut, find, read
from .token_file import TokenWriter, Written, beside, discard, publish

# A conversation in pieces that are encoded one by one, each with the number of characters at its beginning whose
# prediction counts in the loss. It is called in every worker, so it must be possible to pickle it.
Render = Callable[[Messages], list[tuple[str, int]]]
SMALL = 16 << 20  # bytes of sources that are encoded before other processes have started
CHUNK = 1 << 17  # characters that a worker gets at once
NOTE = 1.0  # seconds between notes of how far we are
NOTHING = Written()


@dataclass(frozen=True)
class Standing:
    """How far a run is: documents are done, of them `held` in PREFIX-eval; reading goes on at `place`."""

    place: Place = BEGINNING
    documents: int = 0
    kept: Written = NOTHING
    held: Written = NOTHING
    sealed: bool = False  # all is written, and gets its names

    @property
    def tokens(self) -> int:
        return self.kept.tokens + self.held.tokens


Tell = Callable[[int, Standing], None]  # bytes of the sources that are done; what came of them


def prepare(
    sources: list[str],
    out: str | Path,
    tokenizer: str | Path,
    *,
    key: str = "text",
    render: Render | None = None,
    template: str | None = None,
    holdout: float = 0.0,
    workers: int = 1,
    restart: bool = False,
    tell: Tell = lambda done, standing: None,
) -> Standing:
    """Makes the token file `out` of `sources` (see reading.py), or goes on making it.

    Args:
        tokenizer: "bytes", "world", or the path of a tokenizer.json, which is copied to PREFIX.tokenizer.json.
        key: of the text in rows that have several fields.
        render: what makes pieces of conversations; without it they are refused.
        template: its name, for whoever uses a model that learned from them.
        holdout: this part of the documents, every k-th, goes to PREFIX-eval instead.
        restart: begin anew, whatever is there. Files of an earlier run stay until the new ones are whole.
        tell: is called once it is known where to begin, and then as it goes on.

    Raises:
        InputError: sources that cannot be read; files that are there already; an unfinished run with other options.
    """
    if holdout and not 0 < holdout <= 0.5:
        raise InputError(f"the part to hold out must be above 0 and at most 0.5, got {holdout}")
    if workers < 1:
        raise InputError(f"there must be at least one worker, got {workers}")
    found, prefix = find(sources), Path(out).expanduser()
    file = None if tokenizer in ("bytes", "world") else Path(tokenizer)
    encoder = Encoder(str(tokenizer), render)
    options = {
        "sources": [list(asdict(source).values()) for source in found],
        "tokenizer": tokenizer if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
        "key": key,
        "template": template,
        "holdout": holdout,
    }
    held_out = beside(prefix, "-eval")
    prefixes = [prefix, held_out] if holdout else [prefix]
    notes = beside(prefix, ".progress.json")
    standing = _standing(notes, options, prefixes, restart)
    if not standing.sealed:
        about = {
            "tokenizer": tokenizer if file is None else f"{prefix.name}.tokenizer.json",
            "vocab_size": encoder.vocab_size,
            "end_of_text": encoder.end_of_text,
            "template": template,
            "sources": [source.name for source in found],
        }
        if sum(SMALL if source.size is None else source.size for source in found) < SMALL:
            workers = 1
        before = [sum(source.size or 0 for source in found[:n]) for n in range(len(found) + 1)]
        every = round(1 / holdout) if holdout else 0
        kept = TokenWriter(prefix, encoder.dtype, standing.kept)
        held = TokenWriter(held_out, encoder.dtype, standing.held) if every else None

        def note(standing: Standing) -> None:
            kept.flush()
            if held is not None:
                held.flush()
            _note(notes, options, standing)

        noted = time.monotonic()
        _note(notes, options, standing)
        tell(before[standing.place.source] + standing.place.byte, standing)
        try:
            for records, encoded in _encoded(read(found, key, standing.place), encoder, workers):
                documents = standing.documents
                for ids, mask, record in zip(*encoded.parts(), records, strict=True):
                    writer = held if held is not None and documents % every == every - 1 else kept
                    writer.write(ids, mask, record.ends)
                    documents += record.ends
                standing = Standing(
                    records[-1].place, documents, kept.written, held.written if held is not None else NOTHING
                )
                tell(before[standing.place.source] + standing.place.byte, standing)
                if time.monotonic() - noted > NOTE:
                    note(standing)
                    noted = time.monotonic()
            tell(before[-1], standing)
            empty = [
                p for p, written in zip(prefixes, (standing.kept, standing.held), strict=False) if not written.tokens
            ]
            if not empty:
                for writer in filter(None, (kept, held)):
                    writer.seal(about)
                standing = replace(standing, sealed=True)
                _note(notes, options, standing)
        except OSError as error:
            raise InputError(f"{prefix}: cannot be written ({error})") from error
        except BaseException:  # Ctrl-C, or a bad line
            note(standing)
            raise
        finally:
            for writer in filter(None, (kept, held)):
                writer.close()
        if empty:
            for path in prefixes:
                discard(path)
            notes.unlink()
            raise InputError(f"{empty[0]}: would be empty, there are {standing.documents} documents in the sources")
    if file is not None:
        with atomic_write(beside(prefix, ".tokenizer.json")) as copy:
            shutil.copyfile(file, copy)
    for path, written in zip(prefixes, (standing.kept, standing.held), strict=False):
        publish(path, written.masked)
    notes.unlink()
    return standing


def _standing(notes: Path, options: dict[str, Any], prefixes: list[Path], restart: bool) -> Standing:
    """Where to begin."""
    if restart:
        notes.unlink(missing_ok=True)
    elif notes.is_file():
        try:
            told = json.loads(notes.read_text(encoding="utf-8"))
            before, standing = told["options"], told["standing"]
            place, kept, held = Place(*standing["place"]), Written(**standing["kept"]), Written(**standing["held"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{notes}: is damaged; begin anew with --restart") from error
        other = [name for name in options if before.get(name) != options[name]]
        if other:
            raise InputError(f"{notes}: an unfinished run had other {' and '.join(other)}; begin anew with --restart")
        return Standing(place, standing["documents"], kept, held, standing["sealed"])
    else:
        for path in (beside(prefix, ending) for prefix in prefixes for ending in (".bin", ".idx")):
            if path.exists():
                raise InputError(f"{path}: is there already; replace it with --restart")
    for prefix in prefixes:
        discard(prefix)
    return Standing()


def _note(notes: Path, options: dict[str, Any], standing: Standing) -> None:
    with atomic_write(notes) as part:
        part.write_text(json.dumps({"options": options, "standing": asdict(standing)}), encoding="utf-8")


@dataclass(frozen=True)
class Encoded:
    """What became of some records."""

    ids: np.ndarray  # [n] of all of them, in the dtype of the file
    lengths: list[int]  # of each
    mask: np.ndarray | None  # bool [n]; None = all count

    def parts(self) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """ids and mask of each."""
        cuts = np.cumsum(self.lengths)[:-1]
        ids = np.split(self.ids, cuts)
        return ids, [None] * len(ids) if self.mask is None else list(np.split(self.mask, cuts))


class Encoder:
    """Records to ids, each document with the end of text behind it where the tokenizer has an id for that."""

    def __init__(self, tokenizer: str, render: Render | None):
        self.spec, self.render = tokenizer, render
        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "int32"
        # of a tokenizer with several the first: <|endoftext|> comes before <|im_end|> everywhere
        self.end_of_text = min(self.tokenizer.stop_ids, default=None)

    def __call__(self, records: list[Record]) -> Encoded:
        ids: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        lengths = []
        for record in records:
            try:
                done = [self._encode(text, counted) for text, counted in self._pieces(record.content)]
            except InputError as error:
                raise InputError(f"{record.where}: {error}") from error
            if record.ends and self.end_of_text is not None:
                done.append((np.array([self.end_of_text], self.dtype), np.ones(1, bool)))
            ids += (x for x, _ in done)
            counts += (x for _, x in done)
            lengths.append(sum(len(x) for x, _ in done))
        mask = np.concatenate(counts)
        return Encoded(np.concatenate(ids), lengths, None if mask.all() else mask)

    def _pieces(self, content: str | Messages) -> Iterator[tuple[str, int]]:
        if not isinstance(content, str):
            if self.render is None:
                raise InputError("is a conversation: name a chat template with --template")
            yield from self.render(content)
            return
        while len(content) > PIECE:  # lists of ids take twenty times the memory of their text
            n = cut(content[:PIECE])
            yield content[:n], n
            content = content[n:]
        yield content, len(content)

    def _encode(self, text: str, counted: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [n] and bool [n]: which of them have a character among the first `counted`."""
        ids = self.tokenizer.encode(text)
        n = len(ids) if counted >= len(text) else 0
        if 0 < counted < len(text):
            stream, read = self.tokenizer.stream(), 0
            while read < counted and n < len(ids):
                read += len(stream.push(ids[n]))
                n += 1
        counts = np.zeros(len(ids), bool)
        counts[:n] = True
        return np.array(ids, self.dtype), counts


def _encoded(records: Iterator[Record], encoder: Encoder, workers: int) -> Iterator[tuple[list[Record], Encoded]]:
    """Chunks of records, in their order, with what became of them."""
    if workers == 1:
        for chunk in _chunks(records):
            yield chunk, encoder(chunk)
        return
    # spawned, for a forked process is not safe where threads run; they do in the tokenizers and in the progress bar
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (encoder.spec, encoder.render))
    waiting: deque[tuple[list[Record], Future[Encoded]]] = deque()
    try:
        for chunk in _chunks(records):
            waiting.append((chunk, pool.submit(_work, chunk)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise InputError("a worker has ended, perhaps for want of memory; the same command goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
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


_encoder: Encoder  # of a worker


def _begin(tokenizer: str, render: Render | None) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # which may be killed and cannot tell us
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer, render)


def _work(records: list[Record]) -> Encoded:
    return _encoder(records)
