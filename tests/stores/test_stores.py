"""Stores of states: a folder, a real Redis and RAM, which must do the same."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_server import RedisServer

from heronry.errors import InputError
from heronry.stores import disk as disk_module
from heronry.stores import redis as redis_module
from heronry.stores.disk import DiskStore
from heronry.stores.memory import MemoryStore
from heronry.stores.redis import RedisStore
from heronry.stores.store import MAX_ABOUT_BYTES, Key

A, B, C, D = (Key("state", "t", name) for name in "abcd")


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=["disk", "redis", "memory"])
def open_store(request, tmp_path):
    """A function that opens the same store again, with other bounds."""
    if request.param == "memory":
        store = MemoryStore(0)

        def with_bounds(max_bytes: int, max_about_bytes: int = MAX_ABOUT_BYTES) -> MemoryStore:
            store._max_bytes, store._max_about_bytes = max_bytes, max_about_bytes
            return store

        yield with_bounds
        return
    if request.param == "disk":
        yield lambda *bounds: DiskStore(tmp_path / "states", *bounds)
        return
    url = request.getfixturevalue("redis").url
    import redis

    redis.Redis.from_url(url).flushall()
    yield lambda *bounds: RedisStore(url, *bounds)


def data_of(store, *keys: Key) -> list[bytes | None]:
    return [entry and entry.data for entry in map(store.get, keys)]


def test_what_is_put_is_there_when_opened_again(open_store):
    store = open_store(1000)
    before = time.time()
    assert store.put(A, b"one", {"text": "été"})
    assert store.put(B, b"two")
    assert store.put(A, b"three", {"text": "x"})
    store.close()
    store = open_store(1000)
    entry = store.get(A)
    assert (entry.key, entry.data, entry.about, entry.size) == (A, b"three", {"text": "x"}, 5)
    assert before - 1 < entry.created <= entry.used < time.time() + 1
    assert store.get(A, with_data=False).data is None
    assert data_of(store, A, B, C) == [b"three", b"two", None]
    assert store.present([A, B, C, Key("state", "u", "a"), Key("other", "t", "a")]) == {A, B}
    assert store.present([]) == set()
    assert store.nbytes == 8
    assert [entry.key for entry in store.entries("state", "t")] == [B, A]
    assert [entry.key for entry in store.entries("state", "t", 1)] == [B]
    assert store.entries("state", "") == store.entries("other", "t") == []
    assert store.delete(A)
    assert not store.delete(A)
    assert data_of(store, A, B) == [None, b"two"]
    assert store.nbytes == 3


def test_what_has_no_bytes(open_store):
    """A message that is nothing but its text."""
    store = open_store(100, 100)
    assert store.put(A, b"", {"text": "a"})
    assert not store.put(B, b"")
    store.close()
    store = open_store(100, 100)
    entry = store.get(A)
    assert (entry.about, entry.size, entry.digest, entry.data) == ({"text": "a"}, 0, "", None)
    assert [entry.about for entry in store.entries("state", "t")] == [{"text": "a"}]
    assert (store.present([A]), store.nbytes) == (set(), 0)
    assert store.put(A, b"", {"text": "b"})
    assert store.put(C, bytes(100))  # pushes out no text
    assert store.get(A).about == {"text": "b"}
    assert store.put(A, b"x", {"text": "c"})
    assert (data_of(store, A, C), store.nbytes) == ([b"x", None], 1)
    assert store.put(A, b"", {"text": "d"})
    assert (store.get(A).about, store.nbytes) == ({"text": "d"}, 0)
    assert store.put(B, b"", {"text": "x" * 80})  # the texts are bounded too
    assert store.get(A) is None
    store.expire("state", time.time() + 100, 0)
    assert store.get(B) is not None
    assert store.delete(B)


def test_least_recently_used_bytes_go_first_and_what_is_known_stays(open_store):
    store = open_store(100)
    assert store.put(A, bytes(40), {"text": "a"})
    assert store.put(B, bytes(40))
    assert store.get(A).data
    assert store.put(C, bytes(60), {"text": "c"})  # with a, which was used after b
    assert store.get(B) is None
    assert store.put(D, bytes(1))
    entry = store.get(A)
    assert (entry.data, entry.size, entry.digest, entry.about) == (None, 0, "", {"text": "a"})
    assert store.present([A, B, C, D]) == {C, D}
    assert store.nbytes == 61
    assert not store.put(B, bytes(101))
    assert store.nbytes == 61
    assert open_store(60).put(D, bytes(2))
    assert data_of(store, C, D) == [None, bytes(2)]


def test_what_is_known_is_bounded_too(open_store):
    size = len(json.dumps({"text": "x" * 10}))
    store = open_store(100, 2 * size + 1)
    keys = [Key("state", "t", str(i)) for i in range(5)]
    for key in keys[:2]:
        assert store.put(key, b"x", {"text": "x" * 10})
    assert store.put(A, b"y")
    for key in keys[2:]:
        assert store.put(key, b"x", {"text": "x" * 10})
    assert [entry.key for entry in store.entries("state", "t")] == [keys[4], keys[3], A]
    assert not store.put(B, b"x", {"text": "x" * 100})


def test_expiry(open_store):
    store = open_store(100)
    other = Key("other", "t", "a")
    assert store.put(other, b"c", {"text": "a"})
    assert store.put(A, b"a", {"text": "a"})
    assert store.put(B, b"b")
    time.sleep(0.01)
    start = time.time()
    time.sleep(0.01)
    assert store.put(C, b"c", {"text": "c"})
    store.expire("state", start, start - 100)
    assert [(entry.key, entry.size) for entry in store.entries("state", "t")] == [(C, 1), (A, 0)]
    assert store.nbytes == 2
    store.expire("state", start + 100, start)
    assert [(entry.key, entry.size) for entry in store.entries("state", "t")] == [(C, 0)]
    store.expire("state", 0, start + 100)
    assert store.entries("state", "t") == []
    assert store.get(other).data == b"c"


NAMES = st.sampled_from([Key(kind, tenant, name) for kind in ("x", "y") for tenant in ("", "t") for name in "abc"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "delete", "present"]), NAMES, st.integers(1, 60), st.booleans()),
    max_size=30,
)


def test_a_store_is_a_bounded_dictionary(open_store):
    store = open_store(100)

    @settings(max_examples=25, deadline=None)
    @given(steps=STEPS)
    def check(steps):
        check_steps(store, steps)

    check()


def check_steps(store, steps):
    for kind in "xy":
        for tenant in ("", "t"):
            for entry in store.entries(kind, tenant):
                store.delete(entry.key)
    expected: dict[Key, tuple[bytes | None, dict]] = {}  # the least recently used first
    for i, (what, key, size, known) in enumerate(steps):
        data, about = bytes([i]) * size, {"i": i} if known else {}
        if what == "put":
            assert store.put(key, data, about)
            expected.pop(key, None)
            expected[key] = data, about
            for old in list(expected):
                if sum(len(held or b"") for held, _ in expected.values()) > 100:
                    expected[old] = None, expected[old][1]
                    if not expected[old][1]:
                        del expected[old]
        elif what == "get":
            entry = store.get(key)
            assert (entry and (entry.data, entry.about)) == expected.get(key)
            if key in expected:
                expected[key] = expected.pop(key)
        elif what == "delete":
            assert store.delete(key) == (expected.pop(key, None) is not None)
        else:
            assert store.present([key]) == ({key} if expected.get(key, (None,))[0] else set())
        assert store.nbytes == sum(len(held or b"") for held, _ in expected.values())
    for kind, tenant in {(key.kind, key.tenant) for key in expected}:
        found = [entry.key for entry in store.entries(kind, tenant)]
        assert found == [key for key in reversed(expected) if (key.kind, key.tenant) == (kind, tenant)]


BAD = ["", "a/b", "../a", "a\\b", "a b", "a\n", "é", "x" * 129, None, 5, "a\0"]


@pytest.mark.parametrize("name", BAD)
def test_names_from_outside(name):
    with pytest.raises(InputError, match="cannot be the name of a state: use 1 to 128 letters, digits"):
        Key("state", "t", name)
    if name != "":
        with pytest.raises(InputError, match="cannot be the tenant of a state"):
            Key("state", name, "a")
    with pytest.raises(InputError, match="cannot be the kind of a state"):
        Key(name, "t", "a")


def files(folder: Path) -> set[Path]:
    return {path for path in (folder / "states").iterdir() if not path.name.startswith("index")}


@pytest.mark.parametrize("how", ["changed", "truncated", "longer", "empty", "deleted"])
@pytest.mark.parametrize("known", [True, False])
def test_damaged_files(tmp_path, how, known, caplog):
    store = DiskStore(tmp_path / "states", 1000)
    assert store.put(A, b"content", {"text": "a"} if known else None)
    assert store.put(B, b"other")
    [file] = [path for path in files(tmp_path) if path.read_bytes() == b"content"]
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes({"changed": b"Content", "truncated": b"conten", "longer": b"content ", "empty": b""}[how])
    for _ in range(2):
        entry = store.get(A)
        assert (entry is not None) == known
        assert entry is None or (entry.data, entry.size, entry.about) == (None, 0, {"text": "a"})
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'states'}: state/t/a was damaged and has been removed"
    ]
    assert not file.exists()
    assert store.present([A, B]) == {B}
    assert store.nbytes == 5
    assert store.put(A, b"again")
    assert data_of(store, A, B) == [b"again", b"other"]


def test_damage_in_redis(redis, caplog):
    store = RedisStore(redis.url, 1000)
    server = store._redis
    server.flushall()
    for damage in (lambda name: server.set(name, b"Content"), server.delete):
        assert store.put(A, b"content")
        [name] = server.keys("heronry:blob:*")
        damage(name)
        caplog.clear()
        assert store.get(A) is None
        assert [record.message for record in caplog.records] == [
            "Redis at 127.0.0.1: state/t/a was damaged and has been removed"
        ]
        assert server.keys("heronry:blob:*") == []
        assert store.nbytes == 0


def test_large_values_lie_in_pieces(redis, monkeypatch):
    monkeypatch.setattr(redis_module, "PIECE", 100)
    store = RedisStore(redis.url, 10_000)
    store._redis.flushall()
    data = random.Random(0).randbytes(1050)
    assert store.put(A, data)
    assert store.get(A).data == data
    assert len(store._redis.keys("heronry:blob:*")) == 11
    assert {store._redis.ttl(name) for name in store._redis.keys("heronry:*")} == {-1}
    assert store.put(A, data[:100])
    assert store.get(A).data == data[:100]
    assert len(store._redis.keys("heronry:blob:*")) == 1
    assert store.delete(A)
    assert set(store._redis.keys("*")) == {b"heronry:bytes", b"heronry:about_bytes"}


def test_an_answer_of_redis_that_is_lost(redis, monkeypatch):
    """The question is asked again, and nothing is done twice."""
    store = RedisStore(redis.url, 100)
    store._redis.flushall()
    assert store.put(A, b"before")
    send = store._run
    monkeypatch.setattr(store, "_run", lambda *words: send(*words) and send(*words))
    assert store.put(A, b"content", {"text": "a"})
    monkeypatch.undo()
    assert data_of(store, A) == [b"content"]
    assert store.nbytes == 7


def test_keys_that_somebody_deletes_in_redis(redis):
    """What is left goes on, and the sums come right again."""
    store = RedisStore(redis.url, 100)
    store._redis.flushall()
    assert store.put(A, bytes(60), {"text": "a"})
    store._redis.delete("heronry:entry:state/t/a")
    assert store.get(A) is None
    assert store.put(B, bytes(60))
    assert store.put(C, bytes(40))
    assert data_of(store, B, C) == [bytes(60), bytes(40)]
    assert store.put(D, bytes(60))
    assert data_of(store, B, C, D) == [None, bytes(40), bytes(60)]
    assert store.nbytes == 100


def test_redis_goes_away_and_comes_back(tmp_path, monkeypatch, caplog):
    """Its answers are missed, with one warning; once it is back, what it had is there."""
    monkeypatch.setattr(redis_module, "PAUSE", 0.05)
    server = RedisServer(tmp_path)
    try:
        store = RedisStore(server.url, 1000)
        assert store.put(A, b"a")
        server.stop()
        assert data_of(store, A) == [None]
        assert not store.put(B, b"b")
        assert store.present([A]) == set()
        assert (store.entries("state", "t"), store.nbytes, store.delete(A)) == ([], 0, False)
        store.expire("state", 0, 0)
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert record.message.startswith("Redis at 127.0.0.1 cannot be read (Error 111")
        assert RedisStore(server.url, 1000).put(A, b"a") is False
        caplog.clear()
        server.start()
        time.sleep(0.06)
        assert data_of(store, A) == [b"a"]
        assert store.put(B, b"b")
        assert [record.message for record in caplog.records] == ["Redis at 127.0.0.1 cannot be read: this is over"]
        caplog.clear()
        store._redis.config_set("maxmemory", 1)
        store._redis.config_set("maxmemory-policy", "noeviction")
        assert not store.put(C, b"c")
        assert data_of(store, A) == [b"a"]
        assert not store.put(A, b"c")
        assert data_of(store, A) == [b"a"]
        assert store.delete(B)
        assert store.nbytes == 1
        [record] = caplog.records
        assert record.message.startswith("Redis at 127.0.0.1 cannot be written (command not allowed when used memory")
        store._redis.config_set("maxmemory", 0)
        assert store.put(C, b"c")
    finally:
        server.stop()


def test_a_redis_that_hangs(tmp_path, monkeypatch):
    """It is asked once in a while, not every time."""
    monkeypatch.setattr(redis_module, "PAUSE", 100)
    monkeypatch.setattr(redis_module, "TIMEOUT", 0.1)
    server = RedisServer(tmp_path)
    try:
        store = RedisStore(server.url, 1000)
        assert store.put(A, b"a")
        server.process.send_signal(signal.SIGSTOP)
        asked = []
        send = store._redis.execute_command
        monkeypatch.setattr(store._redis, "execute_command", lambda *words: asked.append(words) or send(*words))
        for _ in range(100):
            assert store.get(A) is None
        assert len(asked) == 1
        assert not store.is_readable
    finally:
        server.stop()


def test_prefixes_are_stores_of_their_own(redis):
    one, two = (RedisStore(redis.url, 10, prefix=f"heronry:{name}:") for name in ("one", "two"))
    assert one.put(A, b"123456")
    assert two.put(A, b"654321")
    assert two.put(B, b"7777")
    assert two.put(C, b"88")  # makes room in its own
    assert data_of(one, A, B) == [b"123456", None]
    assert data_of(two, A, B, C) == [None, b"7777", b"88"]
    assert (one.nbytes, two.nbytes) == (6, 6)


@pytest.mark.parametrize("url", ["nowhere", "redis://host:port/0", "http://x"])
def test_wrong_addresses(url):
    with pytest.raises(InputError, match="the URL of Redis is wrong: "):
        RedisStore(url, 1000)


def test_an_index_that_cannot_be_opened(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    index = folder / "index.sqlite"
    index.write_bytes(b"no database " * 1000)
    with pytest.raises(InputError, match=r"cannot be opened \(file is not a database\); another folder can be used"):
        DiskStore(folder, 1000)
    assert index.read_bytes() == b"no database " * 1000
    index.unlink()
    DiskStore(folder, 1000).close()
    with sqlite3.connect(index) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(InputError, match="was written by another version of heronry; choose another folder"):
        DiskStore(folder, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        DiskStore(tmp_path / "file" / "states", 1000)


def test_a_folder_that_somebody_deletes(tmp_path, caplog):
    """Nothing is said to be kept that would be gone after a restart."""
    store = DiskStore(tmp_path / "states", 1000)
    assert store.put(A, b"a")
    shutil.rmtree(tmp_path / "states")
    assert not store.put(B, b"b")
    assert store.get(A) is None
    assert "cannot be written ([Errno 2] No such file or directory" in caplog.text


def test_leftovers_are_removed(tmp_path, monkeypatch):
    folder = tmp_path / "states"
    store = DiskStore(folder, 1000)
    assert store.put(A, b"a")
    (folder / "0.safetensors").write_bytes(b"left")
    (folder / ".0.safetensors.1.part").write_bytes(b"left")
    (folder / "mine.txt").write_bytes(b"of somebody")
    DiskStore(folder, 1000).close()
    assert len(files(tmp_path)) == 4  # somebody may be writing
    monkeypatch.setattr(disk_module, "GRACE", 0)
    time.sleep(0.01)
    store.expire("state", 0, 0)
    assert {path.name for path in files(tmp_path)} - {"mine.txt"} == {
        path.name for path in files(tmp_path) if path.read_bytes() == b"a"
    }
    assert data_of(store, A) == [b"a"]
