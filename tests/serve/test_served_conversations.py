"""/v1/conversations: trees of messages, whose branches go on from their kept states."""

from __future__ import annotations

import json
import signal
import time

import httpx
import pytest
import torch

from heronry import State
from heronry.models.state import LayerState
from heronry.serve.conversation_store import Message, Tree
from heronry.serve.errors import ApiError
from heronry.serve.options import open_kept
from heronry.serve.state_pictures import head_norms

ASK, NEXT, OTHER = "Tell me a story about a dog.", "What happened then?", "And a cat?"


class Talk:
    """A conversation, as the page holds it."""

    def __init__(self, http: httpx.Client, name: str | None = None, **settings):
        self.http = http
        if name is None:
            body = {"title": "dogs", "settings": {"temperature": 0, "max_tokens": 24} | settings}
            reply = http.post("/v1/conversations", json=body)
            assert reply.status_code == 201, reply.text
            name = reply.json()["id"]
        self.url = f"/v1/conversations/{name}"

    def set(self, **settings) -> None:
        assert self.http.post(self.url, json={"settings": settings}).status_code == 200

    def shown(self) -> dict:
        return self.http.get(self.url).json()

    def messages(self) -> dict[str, dict]:
        return {message["id"]: message for message in self.shown()["messages"]}

    def events(self, **body) -> list[dict]:
        reply = self.http.post(f"{self.url}/answers", json=body)
        assert reply.status_code == 200, reply.text
        return [json.loads(text.removeprefix("data: ")) for text in reply.text.split("\n\n") if text]

    def ask(self, parent: str | None, content: str) -> dict:
        return self.answer(parent=parent, content=content)

    def answer(self, **body) -> dict:
        """The whole answer, which is what was streamed and what is kept."""
        events = self.events(**body)
        assert events[-1]["type"] == "end", events[-1]
        found, begun = events[-1]["message"], next(event for event in events if event["type"] == "begin")
        for kind in ("content", "reasoning"):
            deltas = "".join(event["text"] for event in events if event["type"] == kind)
            assert begun["message"][kind] + deltas == found[kind]
        assert self.messages()[found["id"]] == found
        return found


def in_one_pass(llm, *messages: str, n: int = 24) -> str:
    """The last answer of the engine's own conversation."""
    chat = llm.chat()
    return [chat.say(message, n, temperature=0).text for message in messages][-1]


def test_branches_go_on_from_their_states(http, llm):
    talk = Talk(http)
    events = talk.events(content=ASK)
    kinds = [event["type"] for event in events]
    assert (kinds[:2], kinds[-1], {*kinds[2:-1]}) == (["user", "begin"], "end", {"content"})
    user, first = events[0]["message"], events[-1]["message"]
    assert (user["role"], user["parent"], user["content"], user["has_state"]) == ("user", None, ASK, False)
    assert (first["role"], first["parent"], first["finish_reason"]) == ("assistant", user["id"], "length")
    assert first["content"] == in_one_pass(llm, ASK)
    n = len(llm.encode(f"User: {ASK}\n\nAssistant:", begins=True))
    assert first["usage"] == {"prompt_tokens": n, "cached_tokens": 0, "completion_tokens": 24}
    assert (events[1]["prompt_tokens"], events[1]["cached_tokens"]) == (n, 0)
    assert first["has_state"]
    assert first["state_bytes"] > 300_000
    assert first["tokens_per_second"] > 0
    for question in (NEXT, OTHER, NEXT):
        second = talk.ask(first["id"], question)
        assert second["content"] == in_one_pass(llm, ASK, question)
        # the last token of an answer that was cut is read with the next turn
        assert second["usage"]["cached_tokens"] == n + 23
        rest = llm.tokenizer.encode(f"\n\nUser: {question}\n\nAssistant:")
        assert second["usage"]["prompt_tokens"] == n + 24 + len(rest)
    shown = talk.shown()
    assert (shown["object"], shown["title"], shown["leaf"]) == ("conversation", "dogs", second["id"])
    assert [message["parent"] for message in shown["messages"][2::2]] == [first["id"]] * 3
    assert http.get("/v1/conversations").json()["data"][0]["id"] == shown["id"]


def test_a_whole_answer_is_read_to_its_last_token(http, llm):
    talk = Talk(http, max_tokens=400)
    first = talk.ask(None, ASK)
    chat = llm.chat()
    assert (first["content"], first["finish_reason"]) == (chat.say(ASK, 400, temperature=0).text, "stop")
    talk.set(max_tokens=24)
    second = talk.ask(first["id"], NEXT)
    assert second["content"] == chat.say(NEXT, 24, temperature=0).text
    read = second["usage"]["prompt_tokens"] - second["usage"]["cached_tokens"]
    assert read == len(llm.tokenizer.encode(f"\n\nUser: {NEXT}\n\nAssistant:"))


def test_another_answer_to_the_same_message(http, llm):
    talk = Talk(http)
    first = talk.ask(None, ASK)
    second = talk.ask(first["id"], NEXT)
    again = talk.answer(parent=second["parent"])
    assert again["id"] != second["id"]
    assert (again["content"], again["usage"]) == (second["content"], second["usage"])
    talk.set(temperature=1, seed=7)
    assert talk.answer(parent=second["parent"])["content"] != second["content"]


def test_an_edited_answer_is_read_as_it_is(http, client, llm):
    talk = Talk(http)
    first = talk.ask(None, ASK)
    edited = {"parent": first["parent"], "role": "assistant", "content": "Rex ran home."}
    hand = http.post(f"{talk.url}/messages", json=edited).json()
    assert (hand["content"], hand["has_state"], hand["usage"]) == ("Rex ran home.", False, None)
    second = talk.ask(hand["id"], NEXT)
    said = [{"role": "user", "content": ASK}, edited | {"role": "assistant"}, {"role": "user", "content": NEXT}]
    whole = client.chat.completions.create(model="bundled", temperature=0, max_tokens=24, messages=said)
    assert second["content"] == whole.choices[0].message.content
    assert second["usage"]["cached_tokens"] == 0
    # what follows it goes on from there
    assert talk.ask(second["id"], OTHER)["usage"]["cached_tokens"] == second["usage"]["prompt_tokens"] + 23
    # and it is gone on with as text
    more = talk.answer(**{"continue": hand["id"]})
    whole = client.chat.completions.create(model="bundled", temperature=0, max_tokens=24, messages=said[:2])
    assert more["content"] == "Rex ran home." + whole.choices[0].message.content
    assert (more["id"], more["has_state"]) == (hand["id"], True)


@pytest.mark.parametrize("think", [None, "open"])
def test_a_cut_answer_goes_on_as_if_it_were_not(http, think):
    """Wherever it is cut, in the stop string at its end too."""
    talk = Talk(http, max_tokens=400 if think is None else 40, think=think, preset="chat")
    whole = talk.ask(None, ASK)
    n = whole["usage"]["completion_tokens"]
    for cut in (1, 17, n - 2, n - 1):
        talk.set(max_tokens=cut)
        begun = talk.answer(parent=whole["parent"])
        assert (begun["finish_reason"], begun["usage"]["completion_tokens"]) == ("length", cut)
        talk.set(max_tokens=400 if think is None else n - cut)
        more = talk.answer(**{"continue": begun["id"]})
        for name in ("content", "reasoning", "finish_reason"):
            assert more[name] == whole[name]
        assert more["usage"]["completion_tokens"] == n
    talk.set(max_tokens=8)
    followed = [talk.ask(before["id"], NEXT) for before in (whole, more)]
    assert followed[0]["content"] == followed[1]["content"]


def leave(talk: Talk, pieces: int, **body) -> tuple[str, str]:
    """The id of an answer that nobody waits for after some pieces, and what was shown of it."""
    shown, name = "", ""
    with talk.http.stream("POST", f"{talk.url}/answers", json=body) as reply:
        for line in reply.iter_lines():
            event = json.loads(line.removeprefix("data: ") or "{}")
            if event.get("type") == "begin":
                name = event["message"]["id"]
            shown += event["text"] if event.get("type") == "content" else ""
            pieces -= event.get("type") == "content"
            if not pieces:
                break
    end = time.monotonic() + 20
    while name not in talk.messages():
        assert time.monotonic() < end
        time.sleep(0.01)
    return name, shown


def test_nobody_waits_for_an_answer(http):
    talk = Talk(http, max_tokens=60)
    whole = talk.ask(None, ASK)
    talk.set(max_tokens=2000, stop=["no such text"])
    name, shown = leave(talk, 5, parent=whole["parent"])
    kept = talk.messages()[name]
    n = kept["usage"]["completion_tokens"]
    assert (kept["finish_reason"], kept["has_state"]) == ("cancelled", True)
    assert kept["content"].startswith(shown)
    assert 5 <= n < 60
    talk.set(max_tokens=60 - n)
    more = talk.answer(**{"continue": name})
    assert (more["content"], more["finish_reason"]) == (whole["content"], "length")
    talk.set(max_tokens=24)
    assert talk.ask(name, NEXT)["content"] == talk.ask(whole["id"], NEXT)["content"]


def test_other_settings_read_it_again(http, client):
    talk = Talk(http, system="Be brief.")
    first = talk.ask(None, ASK)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    said += [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": NEXT}]
    assert talk.ask(first["id"], NEXT)["usage"]["cached_tokens"] == first["usage"]["prompt_tokens"] + 23
    talk.set(system="Be kind.")
    other = talk.ask(first["id"], NEXT)
    whole = client.chat.completions.create(
        model="bundled", temperature=0, max_tokens=24, messages=[{"role": "system", "content": "Be kind."}, *said[1:]]
    )
    assert (other["content"], other["usage"]["cached_tokens"]) == (whole.choices[0].message.content, 0)
    talk.set(system="", template="raven")
    assert talk.ask(first["id"], NEXT)["usage"]["cached_tokens"] == 0


def test_a_stop_string_is_not_read_into_a_state(http, llm):
    talk = Talk(http, max_tokens=60, stop="Lily")
    first = talk.ask(None, ASK)
    expected = in_one_pass(llm, ASK, n=60).split("Lily")[0].rstrip()
    assert (first["content"], first["finish_reason"], first["has_state"]) == (expected, "stop", False)
    second = talk.ask(first["id"], NEXT)
    assert second["usage"]["cached_tokens"] == 0


def test_a_thought_is_kept_in_the_state_alone(http):
    """As in /v1/responses: a state has read it, and where that is of no use it is left out."""
    talk = Talk(http, think="open")
    first = talk.ask(None, ASK)
    assert (first["content"], bool(first["reasoning"])) == ("", True)
    assert talk.ask(first["id"], NEXT)["usage"]["cached_tokens"] == first["usage"]["prompt_tokens"] + 23


def test_states_are_named_and_begin_conversations(http, llm):
    talk = Talk(http)
    first = talk.ask(None, ASK)
    second = talk.ask(first["id"], NEXT)
    reply = http.post(f"{talk.url}/messages/{first['id']}/state", json={"name": "of-a-dog"})
    assert reply.status_code == 201
    text = f"User: {ASK}\n\nAssistant: {first['content']}\n\n"
    assert http.get("/v1/states/of-a-dog").json()["text"] == text
    assert reply.json()["tokens"] == len(llm.encode(text, begins=True))
    other = Talk(http, state="of-a-dog")
    answer = other.ask(None, NEXT)
    assert answer["content"] == second["content"]
    question = llm.tokenizer.encode(f"User: {NEXT}\n\nAssistant:")
    assert answer["usage"] == {"prompt_tokens": len(question), "cached_tokens": 0, "completion_tokens": 24}
    third = other.ask(answer["id"], OTHER)
    assert third["content"] == in_one_pass(llm, ASK, NEXT, OTHER)
    assert third["usage"]["cached_tokens"] == len(question) + 23
    # without its state it is read again, from the same beginning
    hand = {"parent": answer["parent"], "role": "assistant", "content": answer["content"]}
    hand = http.post(f"{other.url}/messages", json=hand).json()
    again = other.ask(hand["id"], OTHER)
    assert (again["content"], again["usage"]["cached_tokens"]) == (third["content"], 0)
    http.delete("/v1/states/of-a-dog")
    reply = http.post(f"{other.url}/answers", json={"parent": answer["id"], "content": ASK})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "state_not_found")
    assert len(other.messages()) == 7  # nothing was added


def test_pictures(http, llm):
    talk = Talk(http, max_tokens=40)
    events = talk.events(content=ASK, picture=True)
    pictures = [event for event in events if event["type"] == "state"]
    n = events[1]["prompt_tokens"]
    assert pictures[0]["tokens"] == n
    state = llm.state(f"User: {ASK}\n\nAssistant:")
    norms = [[float(f"{x.norm():.4g}") for x in layer.wkv[0]] for layer in state.layers]
    assert pictures[0]["layers"] == [pytest.approx(row, rel=1e-3) for row in norms]
    last = events[-1]["message"]
    kept = http.get(f"{talk.url}/messages/{last['id']}/state").json()
    assert pictures[-1]["layers"] == kept["layers"]  # the last one is of the answer's end
    assert pictures[-1]["tokens"] == kept["tokens"]
    assert (kept["object"], kept["tokens"], kept["bytes"]) == ("state", n + 39, last["state_bytes"])
    assert [len(row) for row in kept["layers"]] == [len(row) for row in norms]
    reply = http.get(f"{talk.url}/messages/{last['parent']}/state")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "state_not_found")


def test_a_picture_of_rwkv4():
    """Of what its channels remember on average, in groups: here of two channels each."""
    sums, weights = torch.full((1, 128), 6.0), torch.full((1, 128), 2.0)
    empty = torch.zeros(1, 3, 128)
    shift = torch.zeros(1, 128)
    full = torch.stack([sums, weights, torch.ones(1, 128)], 1)
    norms = head_norms(State([LayerState(shift, x, shift) for x in (full, empty)], "f"))
    assert norms == [[4.243] * 64, [0.0] * 64]  # 3 and 3


def test_deleting(http):
    talk = Talk(http)
    first = talk.ask(None, ASK)
    second, other = talk.ask(first["id"], NEXT), talk.ask(first["id"], OTHER)
    reply = http.delete(f"{talk.url}/messages/{second['parent']}").json()
    assert reply == {"id": second["parent"], "object": "message.deleted", "deleted": True}
    assert [*talk.messages()] == [first["parent"], first["id"], other["parent"], other["id"]]
    assert talk.shown()["leaf"] == other["id"]
    http.delete(f"{talk.url}/messages/{first['id']}")
    assert (talk.shown()["leaf"], [*talk.messages()]) == (first["parent"], [first["parent"]])
    deleted = http.delete(talk.url).json()
    assert deleted == {"id": talk.url.split("/")[-1], "object": "conversation.deleted", "deleted": True}
    assert http.get(talk.url).status_code == 404


def test_export_and_import(http):
    talk = Talk(http, system="Be brief.", stop=["x y z"])
    first = talk.ask(None, ASK)
    talk.ask(first["id"], NEXT)
    talk.ask(first["id"], OTHER)
    http.post(talk.url, json={"leaf": first["id"], "title": "two dogs"})
    file = http.get(f"{talk.url}/export").json()
    assert (file["object"], file["version"], len(file["messages"])) == ("conversation.export", 1, 6)
    made = http.post("/v1/conversations/import", json=file)
    assert made.status_code == 201
    copy = Talk(http, made.json()["id"])
    shown, known = copy.shown(), talk.shown()
    assert (shown["title"], shown["settings"]) == ("two dogs", known["settings"])
    names = {a["id"]: b["id"] for a, b in zip(known["messages"], shown["messages"], strict=True)}
    assert not {*names} & {*names.values()}
    assert shown["leaf"] == names[first["id"]]
    for a, b in zip(known["messages"], shown["messages"], strict=True):
        lost = {"id": names[a["id"]], "parent": names.get(a["parent"]), "has_state": False, "state_bytes": None}
        assert b == a | lost
    assert copy.ask(names[first["id"]], NEXT)["usage"]["cached_tokens"] == 0


def test_presets_and_templates(http):
    presets = http.get("/v1/presets").json()
    chat = next(preset for preset in presets["data"] if preset["id"] == "chat")
    assert (presets["object"], chat["object"]) == ("list", "preset")
    assert (chat["temperature"], chat["top_p"], chat["presence_penalty"], chat["penalty_decay"]) == (1, 0.3, 0.5, 0.996)
    meta = http.get("/v1/models").json()["data"][0]["meta"]
    assert meta["template"] == "story"
    assert {"g1", "raven", "story"} <= {*meta["templates"]}
    assert {"none", "open", "fake"} <= {*meta["thinks"]}


IMPORT = {"object": "conversation.export", "version": 1, "conversation": {}}


def messages(*places: tuple[str, str | None]) -> dict:
    listed = [{"id": a, "parent": b, "role": "user", "content": "x"} for a, b in places]
    return {"messages": listed}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("", {"title": "x" * 201}, 400, "title", "at most 200 characters"),
        ("", {"settings": {"template": "/etc/passwd.jinja"}}, 400, "settings.template", "there is no template"),
        ("", {"settings": {"preset": "x"}}, 400, "settings.preset", "there is no preset 'x'"),
        ("", {"settings": {"think": "x"}}, 400, "settings.think", "there is no mode of thinking 'x'"),
        ("", {"settings": {"temperature": -1}}, 400, "settings.temperature", "greater than or equal"),
        ("", {"settings": {"stop": [""]}}, 400, "settings.stop", "must not be empty"),
        ("/ID", {"leaf": "msg_1"}, 404, "leaf", "there is no message 'msg_1'"),
        ("/ID/messages", {"parent": "msg_1", "role": "user", "content": "x"}, 404, "parent", "there is no message"),
        ("/ID/messages", {"role": "user", "content": " \n"}, 400, "content", "the message is empty"),
        ("/ID/messages", {"role": "system", "content": "x"}, 400, "role", "Input should be"),
        ("/ID/messages", {"role": "assistant", "content": "x"}, 400, "parent", "must follow a message of the user"),
        ("/ID/answers", {}, 400, "parent", "must follow a message of the user"),
        ("/ID/answers", {"content": " "}, 400, "content", "the message is empty"),
        ("/ID/answers", {"parent": "msg_1"}, 404, "parent", "there is no message 'msg_1'"),
        ("/ID/answers", {"continue": "msg_1"}, 404, "continue", "there is no message 'msg_1'"),
        ("/ID/answers", {"continue": "msg_1", "content": "x"}, 400, "continue", "leave parent and content out"),
        ("/conv_1/answers", {"content": "x"}, 404, "conversation", "there is no conversation 'conv_1'"),
        ("/..%2f..%2fetc/answers", {"content": "x"}, 404, None, "there is no such route"),
        ("/a b", {"title": "x"}, 404, "conversation", "there is no conversation 'a b'"),
        ("/ID/messages/msg_1/state", {"name": "x"}, 404, "message", "there is no message 'msg_1'"),
        ("/ID/messages/msg_1/state", {"name": "../x"}, 400, None, "cannot be the name of a state"),
        ("/import", IMPORT | {"version": 2} | messages(), 400, "version", "Input should be 1"),
        ("/import", IMPORT | messages(("a", "b"), ("b", "a")), 400, "messages.[0].parent", "'b' does not stand before"),
        ("/import", IMPORT | messages(("a", "a")), 400, "messages.[0].parent", "'a' does not stand before"),
        ("/import", IMPORT | messages(("a", None), ("a", None)), 400, "messages.[1].id", "two messages have the id"),
        ("/import", IMPORT | messages() | {"conversation": {"leaf": "z"}}, 400, "conversation.leaf", "no message 'z'"),
        ("/import", IMPORT | {"messages": [{}] * 10_001}, 400, "messages", "at most 10000 items"),
    ],
)
def test_bad_requests(http, path, body, status, param, message):
    name = http.post("/v1/conversations", json={}).json()["id"]
    reply = http.post("/v1/conversations" + path.replace("ID", name), json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert http.get(f"/v1/conversations/{name}").json()["messages"] == []


def test_what_is_wrong_when_it_is_answered(http):
    talk = Talk(http, model="no-model")
    for settings, code in (({}, "model_not_found"), ({"model": None, "state": "no-state"}, "state_not_found")):
        talk.set(**settings)
        reply = http.post(f"{talk.url}/answers", json={"content": ASK})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, code)
    talk.set(state=None)
    for text in ('{"content": "\\ud800"}', '{"content": NaN}', "[]", "{"):
        reply = http.post(f"{talk.url}/answers", content=text, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"
    form = http.post(f"{talk.url}/answers", content='{"content": "x"}', headers={"content-type": "text/plain"})
    assert (form.status_code, "sent as application/json" in form.json()["error"]["message"]) == (400, True)
    assert talk.messages() == {}


def test_others_see_nothing(world):
    body = {"title": "mine", "settings": {"max_tokens": 3, "temperature": 0}}
    name = world.post("/v1/conversations", json=body).json()["id"]
    talk = Talk(world, name)
    message = talk.ask(None, "Hello")["id"]
    assert [each["id"] for each in world.get("/v1/conversations").json()["data"]] == [name]
    bob = {"authorization": "Bearer key-of-bob"}
    assert world.get("/v1/conversations", headers=bob).json()["data"] == []
    for method, path, given in [
        ("GET", "", None),
        ("POST", "", {"title": "his"}),
        ("GET", "/export", None),
        ("POST", "/messages", {"role": "user", "content": "x"}),
        ("POST", "/answers", {"content": "x"}),
        ("GET", f"/messages/{message}/state", None),
        ("POST", f"/messages/{message}/state", {"name": "x"}),
        ("DELETE", f"/messages/{message}", None),
        ("DELETE", "", None),
    ]:
        reply = world.request(method, talk.url + path, json=given, headers=bob)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "conversation_not_found"), path
    assert world.post(f"{talk.url}/messages/{message}/state", json={"name": "hers"}).status_code == 201
    theirs = world.post("/v1/conversations", json={"settings": {"state": "hers"}}, headers=bob).json()["id"]
    reply = world.post(f"/v1/conversations/{theirs}/answers", json={"content": "x"}, headers=bob)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "state_not_found")
    assert talk.shown()["title"] == "mine"


@pytest.mark.slow
def test_a_killed_server_has_lost_nothing(start, tmp_path, llm):
    server = start("--store", str(tmp_path / "store"))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        talk = Talk(http, max_tokens=2000, temperature=1)
        with http.stream("POST", f"{talk.url}/answers", json={"content": OTHER}) as reply:
            lost = json.loads(next(reply.iter_lines()).removeprefix("data: "))["message"]
            server.stop(signal.SIGKILL)
    server = start("--store", str(tmp_path / "store"))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        talk = Talk(http, talk.url.split("/")[-1])
        assert talk.messages() == {lost["id"]: lost}
        talk.set(max_tokens=24, temperature=0)
        first = talk.ask(None, ASK)
    server.stop(signal.SIGKILL)
    server = start("--store", str(tmp_path / "store"))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        talk = Talk(http, talk.url.split("/")[-1])
        assert talk.messages()[first["id"]] == first
        second = talk.ask(first["id"], NEXT)
        assert second["content"] == in_one_pass(llm, ASK, NEXT)
        assert second["usage"]["cached_tokens"] == first["usage"]["prompt_tokens"] + 23


@pytest.mark.slow
def test_a_server_that_stops_keeps_what_it_has_shown(start, tmp_path):
    server = start("--store", str(tmp_path / "store"), "--drain", "1")
    with httpx.Client(base_url=server.url, timeout=60) as http:
        talk = Talk(http, max_tokens=100_000, frequency_penalty=-9)  # the same word without end
        with http.stream("POST", f"{talk.url}/answers", json={"content": ASK}) as reply:
            lines = reply.iter_lines()
            for _ in range(10):
                next(lines)
            server.stop()
    server = start("--store", str(tmp_path / "store"))
    with httpx.Client(base_url=server.url, timeout=60) as http:
        [_, kept] = Talk(http, talk.url.split("/")[-1]).messages().values()
    assert (kept["role"], kept["finish_reason"], kept["has_state"]) == ("assistant", "cancelled", True)
    assert kept["content"]


def test_by_default_it_is_the_users_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for kept in open_kept(None, None, 0):
        kept.store.close()
    assert sorted(path.name for path in (tmp_path / "heronry" / "server").iterdir()) == ["conversations", "kept"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert [str(kept.store._where) for kept in open_kept(None, None, 0)] == ["RAM", "RAM"]
    assert "conversations end with this server (--store FOLDER)" in capsys.readouterr().err


def tree(**parents: str | None) -> Tree:
    roles = {"u": "user", "a": "assistant"}
    return Tree(Message(name, x, roles[name[0]], name, created=i) for i, (name, x) in enumerate(parents.items()))


def test_a_tree():
    found = tree(u1=None, a1="u1", a2="u1", u2="a1", a3="u2", u3="a9")
    assert [message.id for message in found.path("a3")] == ["u1", "a1", "u2", "a3"]
    assert found.path(None) == []
    assert {message.id for message in found.below("a1")} == {"a1", "u2", "a3"}
    assert found.below("a1")[0].id == "a1"
    with pytest.raises(ApiError, match="message 'a9' is gone: the store has dropped it") as error:
        found.path("u3")
    assert (error.value.status, error.value.code) == (409, "message_gone")
    for parent, role in ((None, "assistant"), ("a1", "assistant")):
        with pytest.raises(ApiError, match="must follow a message of the user"):
            found.check_place(parent, role)
    for parent, role in ((None, "user"), ("a1", "user"), ("u1", "user"), ("u1", "assistant")):
        found.check_place(parent, role)
