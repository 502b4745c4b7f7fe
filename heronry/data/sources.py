"""Where texts come from: files, folders and data sets become records, one after the other.

- a record is a text, a conversation, or a piece of a text that is too long to be read at once
- every record knows the place after it, so that reading goes on there as if it had never stopped
- nothing is kept: memory is that of the largest record, or of one row group of a .parquet
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError

PIECE = 1 << 20  # bytes, of a text that is read and encoded in pieces
ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
HUB = "hf://"
Messages = list[dict[str, Any]]  # of {"role", "content"}


class Place(NamedTuple):
    """Where the reading stands."""

    source: int = 0  # number of the one that is being read
    record: int = 0  # lines or rows of it that are done
    byte: int = 0  # of its bytes on the disk that are done; where a .txt or .jsonl goes on


BEGINNING = Place()


@dataclass(frozen=True)
class Record:
    content: str | Messages
    ends: bool  # the document ends here; False: the next record is its next piece
    place: Place  # after this one
    where: str  # for complaints


@dataclass(frozen=True)
class Source:
    """A file, a folder of `datasets`, or hf://name[:split]."""

    name: str
    size: int | None  # bytes on the disk, None on the hub
    changed: int | None  # nanoseconds, the time of its last change


def find(names: list[str]) -> list[Source]:
    """The sources that paths, folders, globs and hf:// names stand for, in order; those of a folder by name.

    Raises:
        InputError: there is nothing of that name, or of a kind that is read.
    """
    found: list[Source] = []
    for name in names:
        if name.startswith(HUB):
            found.append(Source(name, None, None))
            continue
        path = Path(name).expanduser()
        paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not paths:
            raise InputError(f"{name}: no such file or folder")
        files = [file for path in paths for file in _files(path)]
        if not files:
            raise InputError(f"{name}: holds no {', '.join(ENDINGS)}")
        found += files
    return found


def _files(path: Path) -> Iterator[Source]:
    if path.is_dir() and not _is_dataset(path):
        inside = sorted(path.iterdir())
        for file in inside:
            if file.is_dir() or file.name.endswith(ENDINGS):
                yield from _files(file)
        return
    if path.is_file() and not path.name.endswith(ENDINGS):
        raise InputError(f"{path}: is no {', '.join(ENDINGS)} or data set folder")
    stats = [file.stat() for file in (sorted(path.rglob("*.arrow")) if path.is_dir() else [path])]
    yield Source(str(path), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0))


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read(sources: list[Source], key: str = "text", start: Place = BEGINNING) -> Iterator[Record]:
    """All records from `start` on. A text without a character is none.

    key: of the text in a row that has several fields; else "messages" is looked for.

    Raises:
        InputError: something that is not a text; it names the file and the line.
    """
    for number in range(start.source, len(sources)):
        source = sources[number]
        place = start if number == start.source else Place(number)  # of the first it may be the middle
        try:
            for record in _reader(source)(source, key, place):
                if record.content or source.name.endswith(".txt"):  # the last piece of a .txt may be empty
                    yield record
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{source.name}: cannot be read to its end ({error})") from error


def _reader(source: Source) -> Callable[[Source, str, Place], Iterator[Record]]:
    if source.name.startswith(HUB):
        return _hub
    readers = {".txt": _text, ".jsonl": _lines, ".jsonl.gz": _zipped_lines, ".parquet": _parquet}
    return next((readers[ending] for ending in ENDINGS if source.name.endswith(ending)), _dataset)


def _text(source: Source, key: str, place: Place) -> Iterator[Record]:
    """One document, in pieces. Where one ends depends on where it begins alone, not on where the reading began."""
    at = place.byte
    with open(source.name, "rb") as file:
        ended = place.record == 1 or not source.size
        while not ended:
            file.seek(at)
            block = file.read(PIECE)
            ended = len(block) < PIECE
            try:  # of a character that the block cuts through nothing is taken
                text = codecs.getincrementaldecoder("utf-8")().decode(block, final=ended)
            except UnicodeDecodeError as error:
                raise InputError(f"{source.name}: is not UTF-8 at byte {at + error.start}") from error
            if not ended:
                text = text[: cut(text)]
            at += len(text.encode())
            yield Record(text, ended, Place(place.source, int(ended), at), source.name)


def cut(text: str) -> int:
    """How many characters of a long text to take: the last end of a line between two that are not blank, if any.

    There tokenizers begin a new token anyway, so that the pieces have the ids of the whole.
    """
    end = text.rfind("\n")
    for _ in range(1000):  # many lines are indented or blank
        if end < 1 or not (text[end - 1].isspace() or text[end + 1 : end + 2].isspace() or end + 1 == len(text)):
            break
        end = text.rfind("\n", 0, end)
    return end + 1 if end > 0 else text.rfind("\n") + 1 or len(text)


def _lines(source: Source, key: str, place: Place) -> Iterator[Record]:
    with open(source.name, "rb") as file:
        file.seek(place.byte)
        byte = place.byte
        for number, line in enumerate(file, place.record + 1):
            byte += len(line)
            yield from _line(source, key, line, Place(place.source, number, byte))


def _zipped_lines(source: Source, key: str, place: Place) -> Iterator[Record]:
    with open(source.name, "rb") as file, gzip.open(file) as lines:
        for number, line in enumerate(lines, 1):
            if number > place.record:  # what is before must be unpacked again, but not be understood
                yield from _line(source, key, line, Place(place.source, number, file.tell()))


def _line(source: Source, key: str, line: bytes, place: Place) -> Iterator[Record]:
    if not line.strip():
        return
    where = f"{source.name}, line {place.record}"
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object")
    yield Record(_content(row, key, where), True, place, where)


def _content(row: dict[str, Any], key: str, where: str) -> str | Messages:
    for name in (key, "messages"):
        value = row.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(message, dict) for message in value):
            return value
        if value is not None:
            raise InputError(f"{where}: {name!r} is neither a text nor a list of messages")
    raise InputError(f"{where}: has neither {key!r} nor 'messages'")


def _parquet(source: Source, key: str, place: Place) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise InputError(f"{source.name}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(source.name)
        columns = [name for name in (key, "messages") if name in file.schema_arrow.names]
        if not columns:
            raise InputError(f"{source.name}: has no column {key!r} nor 'messages'")
        rows, number = file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            if number + file.metadata.row_group(group).num_rows <= place.record:
                number += file.metadata.row_group(group).num_rows
                continue
            for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if number > place.record:
                        yield _row(source, key, row, place.source, number, rows)
    except pyarrow.ArrowException as error:
        raise InputError(f"{source.name}: damaged or not a .parquet ({error})") from error


def _row(source: Source, key: str, row: dict[str, Any], number: int, record: int, rows: int | None) -> Record:
    where = f"{source.name}, row {record}"
    byte = source.size * record // rows if source.size is not None and rows else 0
    return Record(_content(row, key, where), True, Place(number, record, byte), where)


def _dataset(source: Source, key: str, place: Place) -> Iterator[Record]:
    """A folder that `Dataset.save_to_disk` wrote; of several splits the one named train."""
    datasets = _datasets(source)
    rows = datasets.load_from_disk(source.name)
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            raise InputError(f"{source.name}: has no split train; name the folder of one of {', '.join(rows)}")
        rows = rows["train"]
    names = [name for name in (key, "messages") if name in rows.column_names]
    if not names:
        raise InputError(f"{source.name}: has no column {key!r} nor 'messages'")
    rows = rows.select_columns(names)
    for number in range(place.record, len(rows)):
        yield _row(source, key, rows[number], place.source, number + 1, len(rows))


def _hub(source: Source, key: str, place: Place) -> Iterator[Record]:
    datasets = _datasets(source)
    name, _, split = source.name.removeprefix(HUB).partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True).skip(place.record)
        for number, row in enumerate(rows, place.record + 1):
            yield _row(source, key, row, place.source, number, None)
    except InputError:
        raise
    except Exception as error:  # the network, the name, the split, the files: the library raises what it likes
        raise InputError(f"{source.name}: {' '.join(str(error).split())}") from error


def _datasets(source: Source) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f"{source.name}: reading it needs datasets: pip install datasets") from None
    return datasets
