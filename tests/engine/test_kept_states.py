"""States with names: by tenant, with what they stand for, in RAM where they are still the same."""

from __future__ import annotations

import torch

from heronry import State
from heronry.engine.kept_states import KeptStates, new_name
from heronry.models import LayerState
from heronry.stores.disk import DiskStore
from heronry.stores.store import Key


def make_state(number: float) -> State:
    layer = LayerState(torch.full((1, 2), float(number)), torch.full((1, 1, 2, 2), float(number)), torch.zeros(1, 2))
    return State([layer], "f" * 32, ["été"])


def number_of(kept) -> float:
    return float(kept.state.layers[0].wkv[0, 0, 0, 0])


def test_put_and_get(tmp_path):
    store = DiskStore(tmp_path, 1 << 20)
    kept = KeptStates(store, 1000)
    key = Key("response", "alice", new_name("resp"))
    assert kept.put(key, make_state(0.1), {"items": ["hello"]})
    assert not kept.store.entries("response", "bob")
    assert kept.get(Key("response", "bob", key.name)) is None
    for _ in range(2):
        found = kept.get(key)
        assert number_of(found) == float(torch.tensor(0.1))
        assert (found.state.texts, found.state.fingerprint) == (("été",), "f" * 32)
        assert found.entry.about == {"items": ["hello"]}
    assert kept.get(key).state is found.state


def test_another_server_changes_a_session(tmp_path):
    one, other = (KeptStates(DiskStore(tmp_path, 1 << 20), 1000) for _ in range(2))
    key = Key("session", "", "s")
    assert one.put(key, make_state(1))
    assert number_of(other.get(key)) == 1
    assert one.put(key, make_state(2))
    assert number_of(other.get(key)) == 2
    assert one.store.delete(key)
    assert other.get(key) is None


def test_a_state_that_is_gone_is_still_known(tmp_path):
    key, large = Key("response", "", "a"), Key("response", "", "b")
    size = len(make_state(1).to_bytes())
    kept = KeptStates(DiskStore(tmp_path, size + 10), 1000)
    assert kept.put(key, make_state(1), {"items": []} | {"text": "a"})
    assert kept.get(key).state is not None
    assert kept.put(large, make_state(2))
    found = kept.get(key)
    assert (found.state, found.entry.about) == (None, {"items": [], "text": "a"})


def test_bytes_that_are_no_state(tmp_path, caplog):
    store = DiskStore(tmp_path, 1 << 20)
    key = Key("state", "", "a")
    assert store.put(key, b"something", {"text": "kept"})
    found = KeptStates(store).get(key)
    assert (found.state, found.entry.about) == (None, {"text": "kept"})
    assert "state//a is of no use: damaged or truncated state file" in caplog.text


def test_names_cannot_be_guessed():
    names = {new_name("resp") for _ in range(100)}
    assert len(names) == 100
    assert {(name[:5], len(name)) for name in names} == {("resp_", 37)}
