"""The slots of llama.cpp's server."""

from __future__ import annotations

import pytest
from sse import events

GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
STORY = "Once upon a time there was a green frog."


def complete(http, prompt, slot=0, **body) -> dict:
    reply = http.post("/completion", json={"prompt": prompt, "n_predict": 6, "id_slot": slot} | GREEDY | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def change(http, action, slot=0, **body) -> dict:
    reply = http.post(f"/slots/{slot}", params={"action": action}, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_slot_is_gone_on_from(http, llm):
    first = complete(http, STORY, 1)
    read = first["tokens_evaluated"] + first["tokens_predicted"]
    assert (first["id_slot"], first["tokens_cached"]) == (1, 0)
    text = STORY + first["content"]
    second = complete(http, text + " The frog", 1)
    rest = llm.encode(" The frog", begins=False)
    assert (second["tokens_cached"], second["tokens_evaluated"]) == (read, read + len(rest))
    assert (second["timings"]["cache_n"], second["timings"]["prompt_n"]) == (read, len(rest))
    assert second["prompt"] == text + " The frog"
    state = llm.generate(STORY, 6, temperature=0).state
    assert second["content"] == llm.generate(" The frog", 6, temperature=0, state=state).text
    assert complete(http, text + " The frog", 1, cache_prompt=False)["timings"]["cache_n"] == 0
    assert complete(http, "A prompt of another beginning", 1)["tokens_cached"] == 0
    assert complete(http, text + " The frog", 1)["tokens_cached"] == 0  # the slot has read something else since
    assert complete(http, text + " The frog", -1)["id_slot"] == -1


def test_stop_strings_and_streams(http, llm):
    """What a slot holds is the text that was told, not what was read of a stop string."""
    whole = complete(http, STORY, -1, n_predict=20)["content"]
    stop = whole[8:11]
    body = {"prompt": STORY, "n_predict": 20, "id_slot": 2, "stop": stop, "stream": True} | GREEDY
    told = [x["content"] for x in events(http.post("/completion", json=body))]
    text = STORY + "".join(told)
    assert stop not in text.removeprefix(STORY)
    found = complete(http, text + " Then", 2)
    assert found["tokens_cached"] > 0
    assert found["tokens_evaluated"] == found["tokens_cached"] + len(llm.encode(" Then", begins=False))


def test_saved_restored_erased(http):
    first = complete(http, STORY, 3)
    read = first["tokens_evaluated"] + first["tokens_predicted"]
    saved = change(http, "save", 3, filename="frog.bin")
    assert saved.pop("timings")["save_ms"] > 0
    size = saved.pop("n_written")
    assert saved == {"id_slot": 3, "filename": "frog.bin", "n_saved": read}
    assert http.get("/v1/states/frog.bin").json()["bytes"] == size
    assert change(http, "erase", 3) == {"id_slot": 3, "n_erased": read}
    assert change(http, "erase", 3) == {"id_slot": 3, "n_erased": 0}
    restored = change(http, "restore", 4, filename="frog.bin")
    assert restored.pop("timings")["restore_ms"] > 0
    assert restored == {"id_slot": 4, "filename": "frog.bin", "n_restored": read, "n_read": size}
    assert complete(http, STORY + first["content"] + " The", 4)["tokens_cached"] == read


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/completion", {"prompt": "a", "id_slot": 64}, 400, "id_slot: there is no slot 64; there are 0 to 63"),
        ("/completion", {"prompt": ["a", "b"], "id_slot": 0}, 400, "id_slot: several prompts cannot share a slot"),
        ("/slots/64?action=erase", {}, 400, "there is no slot 64; there are 0 to 63"),
        ("/slots/0?action=sing", {}, 400, "query.action: Input should be 'save', 'restore' or 'erase'"),
        ("/slots/0?action=save", {}, 400, "filename: save needs the name of a state"),
        ("/slots/63?action=save", {"filename": "a"}, 400, "slot 63 is empty: no completion of 'bundled' has named it"),
        ("/slots/0?action=restore", {"filename": "nowhere"}, 404, "state: there is no state 'nowhere'"),
        ("/slots/0?action=save", {"filename": "../a"}, 400, "cannot be the name of a state"),
        ("/slots/0?action=restore", {"filename": "a/b"}, 400, "cannot be the name of a state"),
    ],
)
def test_bad_requests(http, path, body, status, message):
    reply = http.post(path, json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert message in error["message"]
    assert error["code"] == status


def test_owners_have_slots_of_their_own(world):
    bob = {"authorization": "Bearer key-of-bob"}
    first = complete(world, "The frog", 0)
    text = "The frog" + first["content"]
    body = {"prompt": text + " and", "n_predict": 1, "id_slot": 0} | GREEDY
    assert world.post("/completion", json=body, headers=bob).json()["tokens_cached"] == 0
    reply = world.post("/slots/1?action=save", json={"filename": "a"}, headers=bob)
    assert reply.status_code == 400
    assert change(world, "erase", 0)["n_erased"] == first["tokens_evaluated"] + first["tokens_predicted"]
