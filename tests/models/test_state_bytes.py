"""States as bytes: the same to the bit when they come back, and refused when they are damaged."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import save

from heronry import InputError, State
from heronry.checkpoint import assemble
from heronry.models import Model


@pytest.fixture
def state(version, random_checkpoint) -> State:
    model: Model = assemble(random_checkpoint(version))
    with torch.no_grad():
        _, state = model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    return state.with_texts(["été", ""])


def test_bytes_are_the_state(state, tmp_path):
    again = State.from_bytes(state.to_bytes())
    assert (again.fingerprint, again.texts, len(again)) == (state.fingerprint, ("été", ""), 2)
    before, after = state.to_tensors(), again.to_tensors()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == x.dtype and torch.equal(before[name], x) for name, x in after.items())
    state.save(tmp_path / "a.safetensors")
    assert torch.equal(State.from_bytes((tmp_path / "a.safetensors").read_bytes()).layers[0].wkv, state.layers[0].wkv)


@pytest.mark.parametrize("version", ["7"], indirect=True)
def test_damaged_bytes(state):
    data = state.to_bytes()
    draw = random.Random(0)
    messages = []
    for _ in range(300):
        length = draw.choice([0, 1, 7, 8, 9, draw.randrange(len(data)), len(data)])
        damaged = bytearray(data[:length])
        if damaged:
            at = draw.randrange(min(len(damaged), 400))
            damaged[at] = draw.randrange(256)
        try:
            State.from_bytes(bytes(damaged))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not a heronry state file"),
        ({"format": "pt"}, "not a heronry state file"),
        ({"format": "heronry.state"}, "damaged or truncated state file .'fingerprint'."),
        ({"format": "heronry.state", "fingerprint": "f"}, "damaged or truncated state file .'texts'."),
        ({"format": "heronry.state", "fingerprint": "f", "texts": "["}, "damaged or truncated state file"),
        ({"format": "heronry.state", "fingerprint": "f", "texts": json.dumps("a" * 2)}, "its texts are 'aa'"),
    ],
)
@pytest.mark.parametrize("version", ["7"], indirect=True)
def test_other_files(state, metadata, message):
    with pytest.raises(InputError, match=message):
        State.from_bytes(save(state.to_tensors(), metadata))


def test_metadata_that_are_null():
    header = b'{"__metadata__":null}'
    with pytest.raises(InputError, match="not a heronry state file"):
        State.from_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("version", ["7"], indirect=True)
def test_numbers_that_are_none(state):
    state.layers[1].wkv[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"blocks.1.wkv contains NaN or infinity"):
        State.from_bytes(state.to_bytes())
