"""A conversation with branches, as data: a tree of turns, each with the state after it, and its file.

The file is a line MAGIC and then records, each of which adds to those before it, so that saving a turn appends one:

- the first has the template, the history with the state after it, and the fingerprint of the model
- the others may have a turn with its state, and have all branches as they then are
- a record is HEADER (bytes of JSON, of tensors, CRC of both numbers), JSON, a safetensors file, their SHA-256, END

What ends before its END is the trace of a crash while it was written: it is left out, and said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import safetensors.torch

from ..errors import InputError
from ..files import atomic_write, naming
from ..models import Model, State
from ..text.chat_templates import Template, template_from

log = logging.getLogger("heronry")

MAGIC = b"heronry.chat 2\n"
HEADER = struct.Struct("<QQI")
END = b"end\n"


@dataclass(frozen=True, eq=False)
class Turn:
    """A message and its answer."""

    before: Turn | None
    message: str
    answer: str  # as the model wrote it, without white space at its end
    state: State  # one row
    owed: str  # what the conversation's text has beyond that of `state`


@dataclass
class _File:
    """The file that a conversation was last written to or read from.

    size: its bytes; more were added by somebody else, or by a write that failed.
    turns: the numbers of the turns in it.
    count: of its turns, with those that are in no branch any more.
    """

    path: Path
    size: int
    turns: WeakKeyDictionary[Turn, int]
    count: int

    def is_unchanged(self, path: Path) -> bool:
        return path == self.path and path.is_file() and path.stat().st_size == self.size


@dataclass
class ConversationTree:
    """All branches of a conversation; turns that branches share are shared in memory and in the file.

    history: the messages that came before the first turn.
    opening: the state after the history, which the first message goes on from; None = there is none.
    branch: the name of the current branch.
    heads: each branch's last turn, by name; None = it has none.
    """

    template: Template
    history: list[dict[str, str]]
    opening: State | None
    branch: str = "main"
    heads: dict[str, Turn | None] = field(default_factory=lambda: {"main": None})
    _file: _File | None = None

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Writes all branches: the file that this conversation was last saved to or loaded from gets what is new
        appended, any other is written as a whole (atomically). fingerprint: of the model.

        Raises:
            OSError: the disk is full, ...; the file then is as it was.
        """
        path = Path(path).expanduser().resolve()
        if self._file is not None and self._file.is_unchanged(path):
            file = self._file
            turns = WeakKeyDictionary(file.turns)
            with naming(path), open(path, "rb+", buffering=0) as out:
                out.seek(file.size)
                try:
                    count = self._write_turns(out, turns, file.count)
                    os.fsync(out.fileno())
                except BaseException:
                    out.truncate(file.size)
                    raise
        else:
            begin = {"template": asdict(self.template), "history": self.history, "fingerprint": fingerprint}
            if self.opening is not None:
                begin["opening"] = self.opening.texts[0]
            turns = WeakKeyDictionary()
            with atomic_write(path) as part, open(part, "wb") as out:
                out.write(MAGIC)
                _write_record(out, begin, self.opening)
                count = self._write_turns(out, turns, 0)
        self._file = _File(path, path.stat().st_size, turns, count)

    def _write_turns(self, out: BinaryIO, turns: WeakKeyDictionary[Turn, int], count: int) -> int:
        """Writes the turns that have no number yet, and gives them one; a record for each, the last of which has the
        branches. Returns how many turns there are then."""
        new = list(dict.fromkeys(turn for head in self.heads.values() for turn in lineage(head) if turn not in turns))
        for turn in new:
            turns[turn] = count
            count += 1
        numbers = {name: None if head is None else turns[head] for name, head in self.heads.items()}
        branches = {"branch": self.branch, "heads": numbers}
        for turn in new:
            record = {
                "before": None if turn.before is None else turns[turn.before],
                "message": turn.message,
                "answer": turn.answer,
                "text": turn.state.texts[0][len(self.text(turn.before)) :],
                "owed": turn.owed,
            }
            _write_record(out, {"turn": record} | (branches if turn is new[-1] else {}), turn.state)
        if not new:
            _write_record(out, branches, None)
        return count

    @classmethod
    def load(cls, path: str | Path, model: Model) -> ConversationTree:
        """What `save` wrote, on the device of the model. A turn that was not written to its end is left out, with a
        warning.

        Raises:
            InputError: no such file, not a conversation, of another model, or damaged.
        """
        path = Path(path).expanduser().resolve()
        records = read_records(path)
        begin, opening, size = next(records)
        if begin["fingerprint"] != model.fingerprint:
            raise InputError(f"{path}: this conversation was held with another model")
        tree = cls(template_from(begin["template"]), begin["history"], None)
        if opening:
            tree.opening = _state(opening, begin["opening"], model)
        turns: list[Turn] = []
        numbers: dict[str, int | None] = {"main": None}
        for record, tensors, end in records:
            if (turn := record.get("turn")) is not None:
                before = None if turn["before"] is None else turns[turn["before"]]
                state = _state(tensors, tree.text(before) + turn["text"], model)
                turns.append(Turn(before, turn["message"], turn["answer"], state, turn["owed"]))
            if "heads" in record:
                tree.branch, numbers = record["branch"], record["heads"]
            size = end
        tree.heads = {name: None if number is None else turns[number] for name, number in numbers.items()}
        in_use = {turn for head in tree.heads.values() for turn in lineage(head)}
        if len(in_use) == len(turns):  # else the next save leaves out what is in no branch any more
            tree._file = _File(path, size, WeakKeyDictionary({turn: i for i, turn in enumerate(turns)}), len(turns))
        return tree

    def text(self, turn: Turn | None) -> str:
        """All text up to the end of a turn, to where the next message begins."""
        if turn is None:
            return "" if self.opening is None else self.opening.texts[0]
        return turn.state.texts[0] + turn.owed


def lineage(turn: Turn | None) -> list[Turn]:
    """The turns from the first to this one."""
    turns = []
    while turn is not None:
        turns.append(turn)
        turn = turn.before
    return turns[::-1]


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
                content = file.read(sum(sizes))
                digest, end = file.read(32), file.read(len(END))
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
    tensors = {} if state is None else state.named_tensors()
    text, data = json.dumps(description).encode(), safetensors.torch.save(tensors) if tensors else b""
    sizes = struct.pack("<QQ", len(text), len(data))
    header = HEADER.pack(len(text), len(data), zlib.crc32(sizes))
    digest = hashlib.sha256(text)
    digest.update(data)
    for part in (header, text, data, digest.digest() + END):
        view = memoryview(part)
        while view:  # an unbuffered file may take less than all
            view = view[out.write(view) :]


def _state(data: bytes, text: str, model: Model) -> State:
    """The state in a record."""
    tensors = {name: x.to(model.device) for name, x in safetensors.torch.load(data).items()}
    return State.from_named_tensors(tensors, model.fingerprint, [text])
