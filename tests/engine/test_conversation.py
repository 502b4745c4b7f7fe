"""Files of conversations: appended to, loaded as they were saved, and whole after a crash or on a full disk."""

from __future__ import annotations

import hashlib
import resource
import struct
import zlib
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from heronry.checkpoint import assemble
from heronry.engine.conversation import END, HEADER, MAGIC, lineage
from heronry.engine.llm import LLM
from heronry.errors import InputError
from heronry.models import State


def last(chat):
    return chat._tree.heads[chat.branch]


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_save_and_load(llm, tmp_path, system):
    chat = llm.chat(template="g1", system=system)
    chat.say("a", max_tokens=12, seed=1)
    chat.say("b", max_tokens=12, seed=2)
    chat.fork("other")
    chat.undo()
    chat.say("c", max_tokens=12, seed=3)
    chat.fork("empty")
    chat.undo()
    chat.undo()
    chat.switch("other")
    chat.save(tmp_path / "talk")
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]

    other = llm.chat(template="story")
    other.say("gone", max_tokens=2)
    other.load(tmp_path / "talk")
    assert other.branches == chat.branches == ("main", "other", "empty")
    assert other.branch == "other"
    for name in chat.branches:
        chat.switch(name)
        other.switch(name)
        assert other.messages == chat.messages
        assert other.text == chat.text
        assert (
            other.say("and?", max_tokens=9, seed=4, top_p=0.9).text
            == chat.say("and?", max_tokens=9, seed=4, top_p=0.9).text
        )
        other.undo()
        chat.undo()
        if chat.messages and name != "empty":
            assert other.retry(max_tokens=9, seed=5).text == chat.retry(max_tokens=9, seed=5).text
    assert other.template == chat.template
    # what the branches share, they still share
    other.switch("main")
    other.undo()
    chat.switch("other")
    assert len({id(turn) for turn in (last(other), other._tree.heads["other"].before)}) == 1


def test_branches_begin_with_system_texts_of_their_own(llm, tmp_path):
    """Each reads what a conversation of its own would; appended or written as a whole, the file holds them all."""
    path, options = tmp_path / "talk", {"max_tokens": 6, "seed": 3}
    texts = {"main": "Be kind.", "2": "Be brief.", "3": "Be brief.", "4": "Be bold."}
    chat = llm.chat(template="world", system="Be kind.")
    chat.say("a", **options)
    assert not chat.is_saved
    chat.save(path)
    chat.begin("2", "Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.is_saved  # nothing was said that is not
    chat.save(path)
    chat.say("a", **options)
    chat.begin("3")
    chat.say("b", **options)
    chat.begin("4", "Be bold.")
    assert not chat.is_saved
    chat.save(path)
    assert chat.is_saved
    chat.save(tmp_path / "whole")
    for file in (path, tmp_path / "whole"):
        loaded = llm.chat(template="story")
        loaded.load(file)
        assert (loaded.branch, loaded.branches) == ("4", ("main", "2", "3", "4"))
        for name, system in texts.items():
            alone = llm.chat(template="world", system=system)
            if name != "4":
                alone.say("b" if name == "3" else "a", **options)
            loaded.switch(name)
            assert loaded.messages == alone.messages
            mine, other = loaded.say("more", **options), alone.say("more", **options)
            assert (mine.token_ids, mine.usage) == (other.token_ids, other.usage)
            assert torch.equal(mine.state.layers[0].wkv, other.state.layers[0].wkv)


def test_an_empty_conversation_is_saved_too(llm, tmp_path):
    llm.chat(template="g1").save(tmp_path / "talk")
    chat = llm.chat(template="story")
    chat.say("a", max_tokens=2)
    chat.load(tmp_path / "talk")
    assert chat.messages == []
    assert chat.say("a", max_tokens=5, seed=1, top_p=1.0).text == str(
        llm.chat(template="g1").say("a", max_tokens=5, seed=1, top_p=1.0)
    )


def test_files_that_are_refused(llm, tmp_path, random_checkpoint):
    chat = llm.chat(template="story", system="Be kind.")
    chat.say("a", max_tokens=5)
    path = tmp_path / "talk"
    chat.save(path)
    before, whole = chat.messages, path.read_bytes()
    turn = whole.index(b'{"turn"') - HEADER.size  # where the record of the turn begins

    def refused(message: str, file=path, chat=chat) -> None:
        with pytest.raises(InputError, match=message) as error:
            chat.load(file)
        assert "\n" not in str(error.value)
        assert chat.messages == before

    for cut in (0, 5):
        path.write_bytes(whole[:cut])
        refused("talk: not a heronry conversation, or one that is damaged at its beginning")
    for cut in (len(MAGIC), 100, turn - 1):
        path.write_bytes(whole[:cut])
        refused("talk: damaged or truncated conversation file")
    for at in (20, 200, turn - 50, turn + 1, turn + 17, turn + 40, len(whole) - 5 - 32, len(whole) - 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused("talk: damaged conversation file")
    path.write_text("hello")
    refused("not a heronry conversation")
    save_file({"x": torch.zeros(1)}, path)
    refused("not a heronry conversation")
    llm.state("a").save(path)
    refused("not a heronry conversation")
    refused("no such conversation file", tmp_path / "none")
    refused("no such conversation file", tmp_path)

    weights = random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3, seed=1)
    stranger = LLM(assemble(weights)).chat(template="story")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="held with another model"):
        stranger.load(path)
    chat.load(path)
    assert chat.messages == before


def state_size(llm: LLM) -> int:
    return llm.model.initial_state().nbytes


def test_sizes_and_contents_that_no_conversation_has(llm, tmp_path):
    """With right checksums: what somebody else's program could have written."""
    chat = llm.chat(template="world")
    chat.say("Hi", 2, temperature=0)
    chat.save(tmp_path / "talk")
    data = (tmp_path / "talk").read_bytes()

    def refused(content: bytes) -> str:
        (tmp_path / "talk").write_bytes(content)
        with pytest.raises(InputError) as caught:
            llm.chat().load(tmp_path / "talk")
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{tmp_path / 'talk'}: ")

    def record(text: bytes) -> bytes:
        sizes = struct.pack("<QQ", len(text), 0)
        return sizes + struct.pack("<I", zlib.crc32(sizes)) + text + hashlib.sha256(text).digest() + END

    huge = struct.pack("<QQ", 1 << 62, 1 << 62)
    assert refused(MAGIC + huge + struct.pack("<I", zlib.crc32(huge)) + data) == (
        "damaged or truncated conversation file"
    )
    for text in (b"", b"[]", b"{}", b"[" * 100_000, b'{"fingerprint": 3}', b"\xff"):
        assert refused(MAGIC + record(text)).startswith(("damaged conversation file (", "this conversation was held"))
    for turn in (b"3", b"{}", b'{"before": 7}', b'{"before": null, "text": 1}'):
        assert refused(data + record(b'{"turn": ' + turn + b"}")).startswith("damaged conversation file (")
    assert refused(data + record(b'{"branch": "main", "heads": {"main": 9}}')).startswith("damaged conversation file (")


def test_a_turn_is_appended_to_its_file(llm, tmp_path):
    """A state and the new text; what was there before is not written again."""
    chat, path = llm.chat(template="story", system="Be kind. " * 500), tmp_path / "talk"
    chat.save(path)
    size = path.stat().st_size
    for i in range(5):
        before, inode = path.read_bytes(), path.stat().st_ino
        chat.say("Go on, please. " * 20, max_tokens=20, seed=i)
        chat.save(path)
        assert path.read_bytes()[: len(before)] == before
        assert path.stat().st_ino == inode
        assert path.stat().st_size - size < state_size(llm) + 2000  # names, sizes and a digest; the message twice
        size = path.stat().st_size
    for move in (chat.undo, lambda: chat.fork("other"), lambda: chat.switch("main")):
        move()
        chat.save(path)
        assert path.stat().st_size - size < 200  # no state at all
        size = path.stat().st_size
    loaded = llm.chat()
    loaded.load(path)
    assert (loaded.messages, loaded.text) == (chat.messages, chat.text)
    assert loaded.branches == ("main", "other")
    # the turn that was taken back is left out of the file that is written next
    loaded.save(path)
    assert size - path.stat().st_size > state_size(llm)
    small = path.stat().st_size
    loaded.say("And then?", max_tokens=3)
    loaded.save(path)
    assert state_size(llm) < path.stat().st_size - small < state_size(llm) + 2000


def test_a_turn_has_one_state(llm):
    chat = llm.chat(template="story")
    for i in range(3):
        chat.say("a", max_tokens=4, seed=i)
    states = [x for turn in lineage(last(chat)) for x in vars(turn).values() if isinstance(x, State | torch.Tensor)]
    assert len(states) == 3


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999, "zeros"])
def test_a_crash_while_a_turn_is_appended_loses_that_turn_alone(llm, tmp_path, kept, caplog):
    chat, path = llm.chat(template="story"), tmp_path / "talk"
    chat.say("a", max_tokens=5, seed=1)
    chat.save(path)
    before, whole = chat.messages, path.read_bytes()
    chat.say("b", max_tokens=5, seed=2)
    chat.save(path)
    new = path.read_bytes()[len(whole) :]
    torn = bytes(len(new)) if kept == "zeros" else new[: round(len(new) * kept)]
    path.write_bytes(whole + torn)
    loaded = llm.chat(template="world")
    loaded.load(path)
    assert loaded.messages == before
    warnings = ["talk: its last turn was not written to the end and is left out"] if torn else []
    assert [record.getMessage().split("/")[-1] for record in caplog.records] == warnings
    loaded.say("c", max_tokens=5, seed=3)
    loaded.save(path)  # what was torn is gone
    again = llm.chat()
    again.load(path)
    assert again.messages == loaded.messages
    assert len(caplog.records) == len(warnings)


@pytest.mark.parametrize("limit", [0, 1, 50, 3000])
def test_a_full_disk_leaves_the_file_as_it_was(llm, tmp_path, limit):
    chat, path = llm.chat(template="story"), tmp_path / "talk"
    chat.say("a", max_tokens=5, seed=1)
    chat.save(path)
    whole = path.read_bytes()
    chat.say("b", max_tokens=5, seed=2)
    for target in (path, tmp_path / "new"):
        with (
            file_size_limit(len(whole) * (target == path) + limit),
            pytest.raises(OSError, match="File too large") as e,
        ):
            chat.save(target)
        assert e.value.filename == str(target)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["talk"]
    chat.save(path)  # there is space again
    loaded = llm.chat()
    loaded.load(path)
    assert loaded.messages == chat.messages


@contextmanager
def file_size_limit(size: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_two_chats_with_one_file_lose_nothing(llm, tmp_path):
    chat, path = llm.chat(template="story"), tmp_path / "talk (2)"
    chat.say("a", max_tokens=5, seed=1)
    chat.save(path)
    other = llm.chat()
    other.load(path)
    other.say("x", max_tokens=5)
    other.save(path)
    chat.say("b", max_tokens=5, seed=2)
    before = path.read_bytes()
    message = r"talk \(2\): another chat has saved there since; save this one under another name$"
    with pytest.raises(InputError, match=message):
        chat.save(path)
    assert path.read_bytes() == before
    chat.save(tmp_path / "mine")
    other.say("y", max_tokens=5)
    other.save(path)
    for file, saved in ((path, other), (tmp_path / "mine", chat)):
        loaded = llm.chat()
        loaded.load(file)
        assert loaded.messages == saved.messages
        assert loaded.path == file
    path.unlink()  # what was deleted is written again
    other.save(path)
    loaded.load(path)
    assert loaded.messages == other.messages


def test_what_changed_nothing_writes_nothing(llm, tmp_path):
    chat, path = llm.chat(template="story"), tmp_path / "talk"
    chat.say("a", max_tokens=5, seed=1)
    chat.save(path)
    before = path.read_bytes()
    chat.save(path)
    assert path.read_bytes() == before
    loaded = llm.chat()
    loaded.load(path)
    loaded.save(path)
    assert path.read_bytes() == before


def test_what_was_undone_stays_undone(llm, tmp_path):
    """Its turn is in the file until that is opened and saved again, but in no branch."""
    chat, path = llm.chat(template="story"), tmp_path / "talk"
    for i, message in enumerate("abc"):
        chat.say(message, max_tokens=5, seed=i)
        chat.save(path)
    chat.undo()
    chat.save(path)
    chat.undo()
    chat.save(path)
    assert b'"message": "c"' in path.read_bytes()
    loaded = llm.chat()
    loaded.load(path)
    assert (loaded.messages, loaded.text) == (chat.messages, chat.text)
    assert [x["content"] for x in loaded.messages if x["role"] == "user"] == ["a"]
    again = loaded.say("d", max_tokens=5, seed=7)
    assert again.text == chat.say("d", max_tokens=5, seed=7).text
    loaded.save(path)
    assert b'"message": "c"' not in path.read_bytes()
    chat.load(path)
    assert (chat.messages, chat.text) == (loaded.messages, loaded.text)
