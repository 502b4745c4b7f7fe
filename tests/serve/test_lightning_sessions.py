"""rwkv_lightning's sessions and their turns."""

from __future__ import annotations

import pytest
from sse import events

from heronry.serve import lightning_sessions
from heronry.serve.lightning_sessions import KIND, SEPARATOR

GREEDY = {"temperature": 0, "alpha_presence": 0, "alpha_frequency": 0, "stop_tokens": [0], "max_tokens": 12}
FIRST, SECOND, THIRD = "Once upon a time there was a dog", "The dog was", "\n\nThe cat"


def ask(client, path: str, status: int = 200, headers: dict | None = None, **body) -> dict:
    reply = client.post(path, json=body, headers=headers)
    assert reply.status_code == status, reply.text
    return reply.json()


def go_on(client, session: str, text: str, **more) -> str:
    found = ask(client, "/state/chat/completions", session_id=session, contents=[text], **GREEDY | more)
    return found["choices"][0]["message"]["content"]


def turn(client, session: str, number: int, text: str, **more) -> tuple[int, str]:
    body = {"session_id": session, "dialogue_idx": number, "contents": [text], **GREEDY, **more}
    found = ask(client, "/multi_state/chat/completions", **body)
    return found["dialogue_idx"], found["choices"][0]["message"]["content"]


def expected(llm, *texts: str, **options) -> list[str]:
    """What the engine writes after each of these texts, one after the other."""
    state, found = None, []
    for text in texts:
        whole = llm.generate(llm.tokenizer.encode(text), 12, temperature=0, top_p=1, state=state, **options)
        assert whole.text == whole.text.rstrip()
        state = whole.state
        found.append(whole.text)
    return found


def test_a_session_goes_on(http, llm):
    texts = expected(llm, FIRST, SEPARATOR + SECOND, THIRD)
    body = {"session_id": "s1", "contents": [FIRST], **GREEDY}
    first = ask(http, "/state/chat/completions", **body)
    assert (first["id"], first["object"]) == ("rwkv7-fast-state", "chat.completion")
    message = {"role": "assistant", "content": texts[0]}
    assert first["choices"] == [{"index": 0, "message": message, "finish_reason": "length"}]
    read = len(llm.tokenizer.encode(FIRST))
    assert first["usage"] == {"prompt_tokens": read, "completion_tokens": 12, "total_tokens": read + 12}
    assert go_on(http, "s1", SECOND) == texts[1]
    headers = {"x-rwkv-session-id": "s1"}
    third = ask(http, "/state/chat/completions", headers=headers, contents=[THIRD], **GREEDY)
    assert third["choices"][0]["message"]["content"] == texts[2]
    assert go_on(http, "another", FIRST) == texts[0]


def test_it_goes_on_behind_what_was_said(http, llm):
    """Not behind a stop string, nor behind white space, which would be read twice."""
    plain = llm.generate(llm.tokenizer.encode(FIRST), 40, temperature=0, top_p=1).text
    stop = plain.split(".")[1][:4]
    assert go_on(http, "cut", FIRST, max_tokens=40, stop_tokens=[stop]) == plain.partition(stop)[0]
    said = plain.partition(stop)[0].rstrip()
    state = llm.generate([*llm.tokenizer.encode(FIRST), *llm.tokenizer.encode(said)], 0).state
    after = llm.generate(llm.tokenizer.encode(SEPARATOR + SECOND), 12, temperature=0, top_p=1, state=state)
    assert go_on(http, "cut", SECOND) == after.text


def test_streams(http, llm):
    texts = expected(llm, FIRST, SEPARATOR + SECOND)
    for text, whole in zip((FIRST, SECOND), texts, strict=True):
        body = {"session_id": "streamed", "contents": [text], "stream": True, "chunk_size": 4, **GREEDY}
        *parts, last, done = events(http.post("/state/chat/completions", json=body))
        assert done == "[DONE]"
        assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == whole
        assert (last["choices"][0]["finish_reason"], last["usage"]["completion_tokens"]) == ("length", 12)


def test_turns_are_a_tree(http, llm):
    first, again = expected(llm, FIRST, SEPARATOR + SECOND)
    assert turn(http, "tree", 0, FIRST) == (1, first)
    assert turn(http, "tree", 1, SECOND) == (2, again)
    assert turn(http, "tree", 1, SECOND, seed=3) == (3, again)  # a branch
    deep = expected(llm, FIRST, SEPARATOR + SECOND, THIRD)[2]
    assert turn(http, "tree", 2, THIRD) == (4, deep)
    body = {"session_id": "tree", "dialogue_idx": 3, "contents": [THIRD], "stream": True, **GREEDY}
    number, *parts, last, _ = events(http.post("/multi_state/chat/completions", json=body))
    assert number == {"object": "multi_state.dialogue_idx", "session_id": "tree:5", "dialogue_idx": 5}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == deep
    assert last["choices"][0]["finish_reason"] == "length"
    unknown = {"error": "dialogue_idx: session 'tree' has no turn 9"}
    body = {"session_id": "tree", "dialogue_idx": 9, "contents": [THIRD], **GREEDY}
    assert ask(http, "/multi_state/chat/completions", 404, **body) == unknown
    assert turn(http, "tree", 0, FIRST)[0] == 6  # another root


def test_status_and_deletion(http):
    go_on(http, "gone", FIRST, max_tokens=1)
    for _ in range(2):
        turn(http, "gone", 0, FIRST, max_tokens=1)
    status = ask(http, "/state/status")
    ids = [x["session_id"] for x in status["sessions"]]
    assert ids[:3] == ["gone:2", "gone:1", "gone"]
    assert {x["cache_level"] for x in status["sessions"]} == {"L2 (RAM)"}
    counts = [status[name] for name in ("l1_cache_count", "l2_cache_count", "database_count", "total_sessions")]
    assert (status["status"], counts) == ("success", [0, len(ids), 0, len(ids)])
    assert ask(http, "/state/delete", session_id="gone")["status"] == "success"
    assert ask(http, "/state/delete", 404, session_id="gone")["status"] == "not_found"
    assert ask(http, "/state/delete", session_id="gone", delete_prefix=True)["status"] == "success"
    assert ask(http, "/state/delete", session_id="gone", delete_prefix=True)["status"] == "success"
    left = [x["session_id"] for x in ask(http, "/state/status")["sessions"]]
    assert not [name for name in left if name.startswith("gone")]
    assert ask(http, "/state/delete", 400) == {"error": "Missing session_id"}


def test_a_session_is_its_owners(world):
    bob = {"authorization": "Bearer key-of-bob"}
    go_on(world, "mine", FIRST)
    assert "mine" in [x["session_id"] for x in ask(world, "/state/status")["sessions"]]
    assert ask(world, "/state/status", headers=bob)["total_sessions"] == 0
    assert ask(world, "/state/delete", 404, headers=bob, session_id="mine")["status"] == "not_found"
    body = {"session_id": "mine", "contents": [SECOND], "password": "key-of-bob", **GREEDY}
    [theirs] = ask(world, "/state/chat/completions", headers={"authorization": ""}, **body)["choices"]
    fresh = ask(world, "/v1/batch/completions", contents=[SECOND], **GREEDY)["choices"][0]
    assert theirs == fresh
    assert go_on(world, "mine", SECOND) != fresh["message"]["content"]


def lose_states(app, owner: str) -> None:
    store = app.state.server.kept.store
    store.expire(KIND, 2**40, 0)
    assert not any(entry.size for entry in store.entries(KIND, owner))


def test_a_state_that_is_gone_is_read_again(world, world_llm):
    first, second = expected(world_llm, FIRST, SEPARATOR + SECOND)
    assert go_on(world, "long", FIRST) == first
    lose_states(world.app, "ann")
    assert go_on(world, "long", SECOND) == second


def test_what_began_from_an_upload_is_not_begun_from_nothing(world):
    made = world.post("/v1/states", json={"text": FIRST, "name": "role"})
    assert made.status_code == 201
    go_on(world, "actor", SECOND, state_id="role")
    go_on(world, "actor", THIRD)
    lose_states(world.app, "ann")
    body = {"session_id": "actor", "contents": [SECOND], **GREEDY}
    error = ask(world, "/state/chat/completions", 410, **body)["error"]
    assert error.startswith("the state of session 'actor' is gone")


def test_an_uploaded_state_wins_and_is_kept_in_the_session(http, llm):
    http.post("/v1/states", json={"text": FIRST, "name": "begin", "add_special_tokens": False})
    assert go_on(http, "begun", THIRD) == expected(llm, THIRD)[0]
    state = llm.generate(llm.tokenizer.encode(FIRST), 0).state
    whole = llm.generate(llm.tokenizer.encode(SECOND), 12, temperature=0, top_p=1, state=state)
    assert go_on(http, "begun", SECOND, state_id="begin") == whole.text
    after = llm.generate(llm.tokenizer.encode(THIRD), 12, temperature=0, top_p=1, state=whole.state)
    assert go_on(http, "begun", THIRD) == after.text


@pytest.mark.parametrize("session", ["../../etc/passwd", "会话 1", "a/b\n", "x" * 1000, "s:1"])
def test_any_name_is_a_name(http, session):
    assert go_on(http, session, FIRST, max_tokens=1)
    assert session in [x["session_id"] for x in ask(http, "/state/status")["sessions"]]
    assert ask(http, "/state/delete", session_id=session)["status"] == "success"


def test_bad_requests(http):
    body = {"session_id": "bad", "contents": [FIRST], **GREEDY}
    other, same = {"x-rwkv-session-id": "other"}, {"x-rwkv-session-id": "bad"}
    for path in ("/state/chat/completions", "/multi_state/chat/completions"):
        assert ask(http, path, 400, contents=[FIRST]) == {"error": "Missing session_id"}
        found = ask(http, path, 400, headers=other, **body)
        assert found == {"error": "session_id: two different ids in one request"}
        assert "exactly one text, got 2" in ask(http, path, 400, **body | {"contents": ["a", "b"]})["error"]
        assert ask(http, path, headers=same, **body | {"max_tokens": 1})["usage"]["completion_tokens"] == 1
        assert "there is no state 'none'" in ask(http, path, 404, **body | {"state_id": "none"})["error"]
    assert ask(http, "/state/delete", 400, headers=other, session_id="bad")["error"].endswith("in one request")
    assert ask(http, "/multi_state/chat/completions", 400, **body | {"dialogue_idx": -1})["error"].startswith(
        "dialogue_"
    )


def test_what_cannot_be_kept_is_an_error(world, monkeypatch):
    monkeypatch.setattr(world.app.state.server.kept, "put", lambda *_: False)
    body = {"session_id": "full", "contents": [FIRST], **GREEDY}
    assert "cannot be kept" in ask(world, "/state/chat/completions", 507, **body)["error"]
    *parts, last = events(world.post("/state/chat/completions", json=body | {"stream": True}))
    assert "cannot be kept" in last["error"]
    assert not any("finish_reason" in part["choices"][0] for part in parts)
    assert lightning_sessions.NUMBERS != KIND
