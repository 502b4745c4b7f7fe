"""Stores of states that several processes write, whose processes are killed, whose disk is full."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from redis_server import RedisServer

from heronry.stores import disk as disk_module
from heronry.stores.disk import DiskStore
from heronry.stores.redis import RedisStore
from heronry.stores.store import Key, StateStore

FORK = multiprocessing.get_context("fork")


def key_of(number: object) -> Key:
    return Key("state", "t", str(number))


def data_of(number: object) -> bytes:
    """1 to 500 bytes that only this number has."""
    digest = hashlib.sha256(str(number).encode()).digest()
    return (digest * 16)[: 1 + int.from_bytes(digest[:2], "little") % 500]


def check_folder(folder: Path, store: DiskStore) -> None:
    """The index and the files agree."""
    files = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert dict(store._query("SELECT file, size FROM entries WHERE size > 0")) == files
    assert store.nbytes == sum(files.values())


def write_many(open_store: Callable[[], StateStore], seed: int, failures) -> None:
    try:
        draw = random.Random(seed)
        with closing(open_store()) as store:
            for _ in range(40):
                number = draw.randrange(60)
                entry = store.get(key_of(number))
                assert entry is None or entry.data in (None, data_of(number))
                assert store.put(key_of(number), data_of(number), {"text": "a"} if number % 2 else None)
                if draw.random() < 0.1:
                    store.delete(key_of(draw.randrange(60)))
                if draw.random() < 0.1:
                    store.expire("state", time.time() - 0.1, time.time() - 0.2)
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_four_processes_write_at_the_same_time(tmp_path, kind):
    server = RedisServer(tmp_path) if kind == "redis" else None

    def open_store() -> StateStore:
        return RedisStore(server.url, 5000) if server else DiskStore(tmp_path / "states", 5000)

    try:
        if server:
            open_store().close()  # imports redis here, not in all of them
        failures = FORK.Queue()
        workers = [FORK.Process(target=write_many, args=(open_store, seed, failures)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert failures.empty(), failures.get()
        store = open_store()
        held = {entry.key.name: entry.size for entry in store.entries("state", "t") if entry.size}
        assert sum(held.values()) == store.nbytes <= 5000
        assert all(store.get(key_of(name)).data == data_of(name) for name in held)
        if server:
            names = store._redis.keys("heronry:blob:*")
            assert sum(map(store._redis.strlen, names)) == store.nbytes
            assert {store._redis.ttl(name) for name in names} <= {-1}
        else:
            check_folder(tmp_path / "states", store)
    finally:
        if server:
            server.stop()


def write_until_killed(open_store: Callable[[], StateStore], first: int, done: int) -> None:
    store = open_store()
    for number in range(first, first + 10_000):
        assert store.put(key_of(number % 997), data_of(number), {"number": number})
        os.write(done, number.to_bytes(4, "little"))


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_killed_at_any_moment(tmp_path, kind, monkeypatch):
    """What `put` returned for is there, and nothing is left of what it did not."""
    server = RedisServer(tmp_path) if kind == "redis" else None

    def open_store() -> StateStore:
        return RedisStore(server.url, 1 << 30) if server else DiskStore(tmp_path / "states", 1 << 30)

    draw = random.Random(0)
    latest: dict[int, int] = {}
    try:
        for round_ in range(6):
            reading, writing = os.pipe()
            worker = FORK.Process(target=write_until_killed, args=(open_store, round_ * 10_000, writing))
            worker.start()
            os.close(writing)
            latest |= {(n := int.from_bytes(os.read(reading, 4), "little")) % 997: n}
            time.sleep(draw.random() * 0.06)
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            with os.fdopen(reading, "rb") as file:
                while number := file.read(4):
                    n = int.from_bytes(number, "little")
                    latest[n % 997] = n
            with closing(open_store()) as store:
                for slot, number in latest.items():
                    entry = store.get(key_of(slot))
                    newer = entry.about["number"]
                    assert newer == number or newer == max(latest.values()) + 1  # put, but not yet told
                    assert entry.data == data_of(newer)
                    latest[slot] = newer
        store = open_store()
        if server:
            names = store._redis.keys("heronry:blob:*")
            kept = [name for name in names if store._redis.ttl(name) == -1]
            assert sum(map(store._redis.strlen, kept)) == store.nbytes
        else:
            monkeypatch.setattr(disk_module, "GRACE", -1)
            store.expire("state", 0, 0)
            assert not list((tmp_path / "states").glob(".*"))
            check_folder(tmp_path / "states", store)
    finally:
        if server:
            server.stop()


def test_a_full_disk(mount, caplog):
    """What is there can be read; what cannot be written is refused, with one warning, until there is space."""
    folder = mount("size=400k")
    store = DiskStore(folder / "states", 1 << 30)
    big = bytes(30_000)
    stored = []
    for number in range(30):
        if store.put(key_of(number), big):
            stored.append(number)
    assert 3 < len(stored) < 14
    [record] = caplog.records
    assert record.message.startswith(f"{folder / 'states'} cannot be written (")
    assert "No space left on device" in record.message or "disk is full" in record.message  # the index was too large
    assert not list((folder / "states").glob(".*"))
    for number in range(30):
        entry = store.get(key_of(number))
        assert (entry.data if entry else None) == (big if number in stored else None)
    assert store.present(map(key_of, range(30))) == set(map(key_of, stored))
    again = DiskStore(folder / "states", 1 << 30)
    assert again.get(key_of(stored[0])).data == big
    assert len(caplog.records) == 1
    os.system(f"mount -o remount,size=9m {folder}")
    assert store.put(key_of(99), big)
    assert caplog.records[1].message == f"{folder / 'states'} cannot be written: this is over"
    assert len(caplog.records) == 2
    check_folder(folder / "states", store)
    store.close()
    again.close()
