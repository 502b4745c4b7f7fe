"""A conversation with branches, as data: a tree of turns, each with the state after it, and its file.

The file is a line MAGIC and then records, each of which adds to those before it, so that saving a turn appends one:

- the first has the template, the history with the state after it, and the fingerprint of the model
- the others may have a turn, or the history of branches that begin with another one, with the state after it; and have
  all branches as they then are. Turns and such histories are numbered together
- a record is HEADER (bytes of JSON, of tensors, CRC of both numbers), JSON, a safetensors file, their SHA-256, END

What ends before its END is the trace of a crash while it was written: it is left out, and said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import sys
import zlib
from collections.abc import Iterator, KeysView
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import safetensors.torch
from safetensors import SafetensorError

from ..errors import InputError
from ..files import atomic_write, naming
from ..models import Model, State
from ..text.chat_templates import Template, template_from

log = logging.getLogger("heronry")

MAGIC = b"heronry.chat 2\n"
HEADER = struct.Struct("<QQI")
END = b"end\n"


@dataclass(frozen=True, eq=False)
class Beginning:
    """What comes before the first turn of a branch."""

    history: list[dict[str, str]]  # messages
    n_tokens: int = 0  # that these are
    state: State | None = None  # after them; None = there are none
    owed: str = ""

    @property
    def text(self) -> str:
        """Up to where the first message begins."""
        return "" if self.state is None else self.state.texts[0]


@dataclass(frozen=True, eq=False)
class Turn:
    """A message and its answer."""

    before: Turn | Beginning
    message: str
    answer: str  # as the model wrote it, without white space at its end
    state: State  # one row
    owed: str  # what the conversation's text has beyond that of `state`

    @property
    def text(self) -> str:
        """Up to where the next message begins."""
        return self.state.texts[0] + self.owed


@dataclass
class _File:
    """The file that a conversation was last written to or read from.

    size: its bytes; with others it was changed by somebody else.
    end: of its last whole record; what follows is the trace of a crash.
    numbers: of the turns and beginnings in it.
    count: of these, with those that are in no branch any more.
    branches: as they were last written.
    is_stale: it was read, and holds turns that are in no branch any more: the next save leaves them out.
    """

    path: Path
    size: int
    end: int
    numbers: WeakKeyDictionary[Turn | Beginning, int | None]
    count: int
    branches: dict[str, Any]
    is_stale: bool = False


@dataclass
class ConversationTree:
    """All branches of a conversation; turns that branches share are shared in memory and in the file.

    beginning: of the first branch.
    branch: the name of the current branch.
    heads: each branch's last turn, by name; its beginning if it has none.
    """

    template: Template
    beginning: Beginning
    branch: str = "main"
    heads: dict[str, Turn | Beginning] = field(init=False)
    _file: _File | None = None

    def __post_init__(self) -> None:
        self.heads = {self.branch: self.beginning}

    @property
    def head(self) -> Turn | Beginning:
        """The end of the current branch."""
        return self.heads[self.branch]

    @property
    def path(self) -> Path | None:
        """Of the file that this conversation was last saved to or loaded from."""
        return None if self._file is None else self._file.path

    @property
    def is_saved(self) -> bool:
        """Whether every turn is in the file."""
        turns = [node for node in self._nodes() if isinstance(node, Turn)]
        return not turns or (self._file is not None and all(turn in self._file.numbers for turn in turns))

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Writes all branches: the file that this conversation was last saved to or loaded from gets what is new
        appended, any other is written as a whole (atomically). fingerprint: of the model.

        Raises:
            OSError: the disk is full, ...; the file then is as it was.
            InputError: somebody else has changed the file since; it stays as it is.
        """
        path = Path(path).expanduser()
        file = self._file
        if file is None or path.resolve() != file.path or not path.exists():
            self._file = self._write_whole(path, fingerprint)
            return
        with _locked(path):
            if path.stat().st_size != file.size:
                raise InputError(f"{path}: another chat has saved there since; save this one under another name")
            self._file = self._write_whole(path, fingerprint) if file.is_stale else self._append(file)

    def _write_whole(self, path: Path, fingerprint: str) -> _File:
        first = self.beginning
        begin = {"template": asdict(self.template), "fingerprint": fingerprint, **_describe_beginning(first)}
        numbers: WeakKeyDictionary[Turn | Beginning, int | None] = WeakKeyDictionary()
        numbers[first] = None
        with atomic_write(path) as part, open(part, "wb") as out:
            out.write(MAGIC)
            _write_record(out, begin, first.state)
            count, branches = self._write_new(out, numbers, 0)
            size = out.tell()
        return _File(path.resolve(), size, size, numbers, count, branches)

    def _append(self, file: _File) -> _File:
        numbers = WeakKeyDictionary(file.numbers)
        with naming(file.path), open(file.path, "rb+", buffering=0) as out:
            out.truncate(file.end)
            file.size = out.seek(file.end)
            try:
                count, branches = self._write_new(out, numbers, file.count, file.branches)
                os.fsync(out.fileno())
            except BaseException:
                out.truncate(file.end)
                raise
            size = out.tell()
        return _File(file.path, size, size, numbers, count, branches)

    def _write_new(
        self,
        out: BinaryIO,
        numbers: WeakKeyDictionary[Turn | Beginning, int | None],
        count: int,
        written: dict[str, Any] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Writes the turns and beginnings that have no number yet, and gives them one; a record for each, the last of
        which has the branches. Without new ones there is a record of the branches, unless they are as they were
        `written` last. Returns how many there are then, and the branches."""
        new = [node for node in self._nodes() if node not in numbers]
        for node in new:
            numbers[node] = count
            count += 1
        branches: dict[str, Any] = {
            "branch": self.branch,
            "heads": {name: numbers[head] for name, head in self.heads.items()},
        }
        for node in new:
            record: dict[str, Any]
            if isinstance(node, Beginning):
                record = {"beginning": _describe_beginning(node)}
            else:
                turn = {"before": numbers[node.before], "message": node.message, "answer": node.answer}
                turn |= {"text": node.state.texts[0][len(node.before.text) :], "owed": node.owed}
                record = {"turn": turn}
            _write_record(out, record | (branches if node is new[-1] else {}), node.state)
        if not new and branches != written:
            _write_record(out, branches, None)
        return count, branches

    @classmethod
    def load(cls, path: str | Path, model: Model) -> ConversationTree:
        """What `save` wrote, on the device of the model. A turn that was not written to its end is left out, with a
        warning.

        Raises:
            InputError: no such file, not a conversation, of another model, or damaged.
        """
        path = Path(path).expanduser()
        try:
            return cls._from_records(path, model)
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise InputError(f"{path}: damaged conversation file ({error})") from error

    @classmethod
    def _from_records(cls, path: Path, model: Model) -> ConversationTree:
        """The conversation in a file, whose records have any content."""
        records = read_records(path)
        size = path.stat().st_size if path.is_file() else 0  # what another chat adds while this one reads is its own
        begin, opening, whole = next(records)
        if begin["fingerprint"] != model.fingerprint:
            raise InputError(f"{path}: this conversation was held with another model")
        tree = cls(template_from(begin["template"]), _beginning(begin, opening, model))
        nodes: list[Turn | Beginning] = []
        branches: dict[str, Any] = {"branch": "main", "heads": {"main": None}}
        for record, tensors, end in records:
            if "beginning" in record:
                nodes.append(_beginning(record["beginning"], tensors, model))
            elif (turn := record.get("turn")) is not None:
                before = tree.beginning if turn["before"] is None else nodes[turn["before"]]
                state = _state(tensors, before.text + turn["text"], model)
                nodes.append(Turn(before, turn["message"], turn["answer"], state, turn["owed"]))
            if "heads" in record:
                branches = {"branch": record["branch"], "heads": record["heads"]}
            whole = end
        tree.branch = branches["branch"]
        tree.heads = {
            name: tree.beginning if number is None else nodes[number] for name, number in branches["heads"].items()
        }
        numbers: WeakKeyDictionary[Turn | Beginning, int | None] = WeakKeyDictionary()
        numbers[tree.beginning] = None
        for i, node in enumerate(nodes):
            numbers[node] = i
        is_stale = not tree._nodes() >= set(nodes)
        tree._file = _File(path.resolve(), size, whole, numbers, len(nodes), branches, is_stale)
        return tree

    def _nodes(self) -> KeysView[Turn | Beginning]:
        """What is in any branch, each after what it goes on from."""
        nodes: dict[Turn | Beginning, None] = {}
        for head in self.heads.values():
            nodes |= dict.fromkeys([beginning(head), *lineage(head)])
        return nodes.keys()


def lineage(head: Turn | Beginning) -> list[Turn]:
    """The turns from the first to this one."""
    turns = []
    while isinstance(head, Turn):
        turns.append(head)
        head = head.before
    return turns[::-1]


def beginning(head: Turn | Beginning) -> Beginning:
    """Of the branch that ends here."""
    while isinstance(head, Turn):
        head = head.before
    return head


def is_conversation(path: Path) -> bool:
    """Whether the file was written by `ConversationTree.save`."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """The records of a conversation file: the description, the tensors as a safetensors file (b"": none), and the
    byte where the record ends. A torn one at the end is left out, with a warning.

    Raises:
        InputError: no such file, not a conversation, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such conversation file")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{path}: not a heronry conversation, or one that is damaged at its beginning")
        first = True
        while header := file.read(HEADER.size):
            if len(header) == HEADER.size and any(header):
                *sizes, crc = HEADER.unpack(header)
                if zlib.crc32(header[:-4]) != crc:
                    raise InputError(f"{path}: damaged conversation file")
                left = path.stat().st_size - file.tell()
                content, digest, end = (file.read(min(size, left)) for size in (sum(sizes), 32, len(END)))
                if end == END:
                    if hashlib.sha256(content).digest() != digest:
                        raise InputError(f"{path}: damaged conversation file")
                    yield json.loads(content[: sizes[0]]), content[sizes[0] :], file.tell()
                    first = False
                    continue
            if first:
                break
            log.warning("heronry: %s: its last turn was not written to the end and is left out", path)
            return
    if first:
        raise InputError(f"{path}: damaged or truncated conversation file")


def _write_record(out: BinaryIO, description: dict[str, Any], state: State | None) -> None:
    text = json.dumps(description).encode()
    data = b"" if state is None else safetensors.torch.save(state.to_tensors())
    sizes = struct.pack("<QQ", len(text), len(data))
    header = HEADER.pack(len(text), len(data), zlib.crc32(sizes))
    digest = hashlib.sha256(text)
    digest.update(data)
    for part in (header, text, data, digest.digest() + END):
        view = memoryview(part)
        while view:  # an unbuffered file may take less than all
            view = view[out.write(view) :]


def _describe_beginning(node: Beginning) -> dict[str, Any]:
    """As it is in a record."""
    described: dict[str, Any] = {"history": node.history, "n_tokens": node.n_tokens}
    return described if node.state is None else described | {"opening": node.text}


def _beginning(record: dict[str, Any], tensors: bytes, model: Model) -> Beginning:
    """The one in a record."""
    state = _state(tensors, record["opening"], model) if tensors else None
    return Beginning(record["history"], record.get("n_tokens", 0), state)


def _state(data: bytes, text: str, model: Model) -> State:
    """The state in a record."""
    return State.from_tensors(safetensors.torch.load(data), model.fingerprint, [text]).to(model.device)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time is in the block, where the system and the disk can do that."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path, "rb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
