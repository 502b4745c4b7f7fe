"""Sources of text: files, folders and datasets are read as a stream of records.

- a record is a text, a conversation, or a piece of a text that is too long to be read at once
- every record holds the position after it, from which reading can resume
- nothing is kept: memory use is that of the largest record, or of one row group of a .parquet file
- .txt, .jsonl and .json may be compressed, see text_files.py
"""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import hub
from ..errors import InputError
from .json_items import json_items, starts_with_array
from .rows import FIELDS, Content, read_row
from .text_files import TextFile, describe_bad_byte, kind, named_errors

PIECE_SIZE = 1 << 20  # bytes; longer texts are read and encoded in pieces
KINDS = (".txt", ".jsonl", ".json", ".parquet")
HUB = "hf://"


class TemporaryError(InputError):
    """Nothing is wrong with the texts, but they cannot be read just now; the same command may succeed."""


class Position(NamedTuple):
    """How far the sources have been read."""

    source: int = 0  # index of the current one
    record: int = 0  # lines or rows of it that have been read
    byte: int = 0  # bytes of its file that have been read, for those who wait
    offset: int = 0  # bytes of its text that have been read, not compressed; where a .txt or .jsonl resumes


START = Position()


@dataclass(frozen=True)
class Record:
    """A document, or a piece of one."""

    content: Content
    ends_document: bool  # False: the next record is the next piece of the document
    position: Position  # after this record
    location: str  # file and line, for error messages
    problem: str | None = None  # why this row has no content


@dataclass(frozen=True)
class Rows:
    """How rows are read.

    Attributes:
        key, shape: see `read_row`.
        skip_bad: a row that cannot be read becomes a record with its problem instead of an error.
    """

    key: str | None = None
    shape: str | None = None
    skip_bad: bool = False

    def record(self, load: Callable[[], Any], position: Position, location: str) -> Record:
        """The record of a row. load: returns the row, or raises InputError."""
        try:
            return Record(read_row(load(), self.key, self.shape), True, position, location)
        except InputError as error:
            if not self.skip_bad:
                raise InputError(f"{location}: {error}") from error
            return Record("", True, position, location, str(error))

    def columns(self, source: Source, names: list[str]) -> list[str]:
        """Those of a table that are needed."""
        if self.key is not None and self.key not in names:
            raise InputError(f"{source.name}: has no column {self.key!r}; its columns are {', '.join(names)}")
        needed = [name for name in names if name in FIELDS or name == self.key]
        if not needed:
            raise InputError(f"{source.name}: has no column of a known name; choose one with --key: {', '.join(names)}")
        return needed


@dataclass(frozen=True)
class Source:
    """A file, a folder of `datasets`, or hf://NAME[:SPLIT]."""

    name: str
    size: int | None  # bytes on disk, None on the hub
    modified: int | None  # time of the last change in nanoseconds, None on the hub


def find_sources(names: list[str]) -> list[Source]:
    """Expands paths, folders, globs and hf:// names to sources, in order; the contents of a folder by name.

    Raises:
        InputError: nothing of that name exists, or nothing of a supported kind.
    """
    sources: list[Source] = []
    for name in names:
        if name.startswith(HUB):
            sources.append(Source(name, None, None))
            continue
        if not name:
            raise InputError("the name of a text must not be empty")
        path = Path(name).expanduser()
        paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not paths:
            raise InputError(f"{name}: no such file or folder")
        files = [file for path in paths for file in _expand(path)]
        if not files:
            raise InputError(f"{name}: contains no {', '.join(KINDS)} file")
        sources += files
    return sources


def _expand(path: Path) -> Iterator[Source]:
    """The sources in a folder, or the file or dataset at `path`."""
    if path.is_dir() and not _is_dataset(path):
        for file in sorted(path.iterdir()):
            # other .json files are settings, vocabularies, or what describes a token file
            if file.is_dir() or (kind(file.name) in KINDS and (kind(file.name) != ".json" or starts_with_array(file))):
                yield from _expand(file)
        return
    if not path.is_dir() and kind(path.name) not in KINDS:
        raise InputError(f"{path}: unsupported kind of file; expected {', '.join(KINDS)} or a dataset folder")
    yield describe(path)


def describe(path: Path) -> Source:
    """The source that is this file or dataset."""
    stats = [file.stat() for file in (sorted(path.rglob("*.arrow")) if path.is_dir() else [path])]
    return Source(str(path), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0))


def _is_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_records(sources: list[Source], rows: Rows | None = None, start: Position = START) -> Iterator[Record]:
    """Yields all records from `start` on, without empty texts.

    Raises:
        InputError: something that cannot be read; the message names the file and the line.
    """
    rows = rows or Rows()
    for number in range(start.source, len(sources)):
        source = sources[number]
        position = start if number == start.source else Position(number)
        read = _reader(source)
        with named_errors(source.name):
            for record in read(source, rows, position):
                if record.content or record.problem or read is _read_text:  # the last piece of a text may be empty
                    yield record


def _reader(source: Source) -> Callable[[Source, Rows, Position], Iterator[Record]]:
    """The function that reads this kind of source from a position on."""
    if source.name.startswith(HUB):
        return _read_hub
    if not Path(source.name).is_file():
        return _read_dataset
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    return readers.get(kind(source.name), _read_text)


def _read_text(source: Source, rows: Rows, position: Position) -> Iterator[Record]:
    """One document, in pieces. The end of a piece depends only on its beginning, not on where reading started."""
    if position.record == 1:
        return
    with TextFile(source.name, position.offset) as file:
        offset, rest, ended = file.offset, b"", False
        while not ended:
            block = rest + file.read(PIECE_SIZE - len(rest))
            ended = len(block) < PIECE_SIZE
            if not block and not position.offset:
                return  # an empty file
            try:  # a character that is cut off at the end of the block is left for the next one
                text = codecs.getincrementaldecoder("utf-8")().decode(block, final=ended)
            except UnicodeDecodeError as error:
                line = file.line_number(offset + error.start)
                bad = describe_bad_byte(error, offset)
                raise InputError(f"{source.name}, line {line}: is not UTF-8 ({bad})") from error
            if not ended:
                text = text[: split_point(text)]
            size = len(text.encode())
            offset, rest = offset + size, block[size:]
            position = Position(position.source, int(ended), min(offset, file.bytes_on_disk), offset)
            yield Record(text, ended, position, source.name)


def split_point(text: str) -> int:
    """How many characters of a long text to encode together: up to the last end of a line between two that are neither
    blank nor indented, if there is one.

    Tokenizers start a new token there anyway, so the pieces have the same ids as the whole.
    """
    end = text.rfind("\n")
    for _ in range(1000):  # many lines are indented or blank
        if end < 1 or not (text[end - 1].isspace() or text[end + 1 : end + 2].isspace() or end + 1 == len(text)):
            break
        end = text.rfind("\n", 0, end)
    return end + 1 if end > 0 else text.rfind("\n") + 1 or len(text)


def _read_jsonl(source: Source, rows: Rows, position: Position) -> Iterator[Record]:
    with TextFile(source.name, position.offset) as file:
        for number, line in enumerate(file.lines(), position.record + 1):
            if not line.strip():
                continue
            byte = min(file.offset, file.bytes_on_disk)  # of a plain file, more has been read ahead
            after = Position(position.source, number, byte, file.offset)
            yield rows.record(partial(_parse_json, line), after, f"{source.name}, line {number}")


def _read_json(source: Source, rows: Rows, position: Position) -> Iterator[Record]:
    """An array, or objects one after another."""
    with TextFile(source.name, position.offset) as file:
        for number, item in enumerate(json_items(file, position.offset > 0), position.record + 1):
            after = Position(position.source, number, min(item.end, file.bytes_on_disk), item.end)
            yield rows.record(
                partial(_parse_json, item.text), after, f"{source.name}, item {number} (line {item.line})"
            )


def _parse_json(text: bytes) -> Any:
    """The value; InputError if it is not JSON."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 ({describe_bad_byte(error)})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except (RecursionError, ValueError) as error:  # a number of too many digits is a ValueError
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"not JSON ({reason})") from error


def _read_parquet(source: Source, rows: Rows, position: Position) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise InputError(f"{source.name}: reading .parquet needs pyarrow: pip install 'heronry[train]'") from None
    try:
        file = parquet.ParquetFile(source.name)
        columns = rows.columns(source, file.schema_arrow.names)
        n_rows, number = file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            if number + file.metadata.row_group(group).num_rows <= position.record:
                number += file.metadata.row_group(group).num_rows
                continue
            for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if number > position.record:
                        yield _row_record(source, rows, row, Position(position.source, number), n_rows)
    except pyarrow.ArrowException as error:
        raise InputError(f"{source.name}: damaged, or not a .parquet file ({error})") from error


def _row_record(source: Source, rows: Rows, row: dict[str, Any], after: Position, n_rows: int | None) -> Record:
    """The record in a row of a table. after: the position after the row, whose byte is estimated from `n_rows`, the
    number of rows in the table."""
    byte = source.size * after.record // n_rows if source.size is not None and n_rows else 0
    return rows.record(lambda: row, after._replace(byte=byte), f"{source.name}, row {after.record}")


def _read_dataset(source: Source, rows: Rows, position: Position) -> Iterator[Record]:
    """A folder written by `Dataset.save_to_disk`; if it has several splits, the one called train."""
    datasets = _import_datasets(source)
    table = datasets.load_from_disk(source.name)
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise InputError(
                f"{source.name}: has no split train; give the folder of one of its splits: {', '.join(table)}"
            )
        table = table["train"]
    table = table.select_columns(rows.columns(source, table.column_names))
    for number in range(position.record, len(table)):
        yield _row_record(source, rows, table[number], Position(position.source, number + 1), len(table))


def _read_hub(source: Source, rows: Rows, position: Position) -> Iterator[Record]:
    """A dataset of the Hugging Face hub, streamed."""
    _import_datasets(source)
    try:
        with hub.without_repetition():
            table = hub.load_dataset(source.name, streaming=True).skip(position.record)
            for number, row in enumerate(table, position.record + 1):
                yield _row_record(source, rows, row, Position(position.source, number), None)
    except ConnectionError as error:
        raise TemporaryError(
            f"{source.name}: the connection to the hub was lost; try the same command again"
        ) from error
    except Exception as error:  # many kinds: network, name, split, files
        if isinstance(error, InputError) and str(error).startswith(source.name):
            raise  # of a row
        raise TemporaryError(f"{source.name}: {' '.join(str(error).split())}") from error


def _import_datasets(source: Source) -> Any:
    """The package, which is optional and slow to import."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f"{source.name}: reading it needs the package datasets: pip install datasets") from None
    return datasets
