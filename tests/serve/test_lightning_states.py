"""rwkv_lightning's uploaded states."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from sse import events

GREEDY = {"temperature": 0, "alpha_presence": 0, "alpha_frequency": 0, "stop_tokens": [0], "max_tokens": 8}
TEXT = "Once upon a time"


def tuned(llm) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in llm.model.time_states().items()}


def as_pth(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def upload(client, name: str, data: bytes, **headers: str):
    return client.post("/v1/state/upload", files={"file": (name, data)}, headers=headers)


@pytest.fixture(scope="module")
def role(server, llm) -> str:
    """An uploaded state by its id."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=60) as client:
        reply = upload(client, "role.pth", as_pth(tuned(llm)))
    assert reply.status_code == 200, reply.text
    about = reply.json()
    assert about.pop("created") > 1.7e9
    assert about.pop("size_bytes") > 1000
    count = len(llm.model.time_states())
    assert about == {"object": "rwkv.state", "state_id": "role.pth", "filename": "role.pth", "tensor_count": count}
    return "role.pth"


def test_every_text_begins_from_it(http, llm, role):
    start = llm.model.initial_state(time_states={name: x.float() for name, x in tuned(llm).items()})
    texts = [TEXT, "The dog"]
    written = [llm.generate(llm.tokenizer.encode(text), 8, temperature=0, top_p=1, state=start).text for text in texts]
    assert written != [llm.generate(llm.tokenizer.encode(text), 8, temperature=0, top_p=1).text for text in texts]
    body = {"contents": texts, "state_id": role, **GREEDY}
    for path in ("/v1/batch/completions", "/v2/chat/completions", "/v1/chat/completions"):
        found = http.post(path, json=body).json()
        assert [choice["message"]["content"] for choice in found["choices"]] == written
    by_header = http.post("/v1/batch/completions", json=body | {"state_id": None}, headers={"x-rwkv-state-id": role})
    assert [choice["message"]["content"] for choice in by_header.json()["choices"]] == written
    streamed = ["", ""]
    for part in events(http.post("/big_batch/completions", json=body))[:-1]:
        streamed[part["choices"][0]["index"]] += part["choices"][0]["delta"].get("content", "")
    assert streamed == written
    prompt = llm.tokenizer.encode("English: a\n\nFrench:")
    translated = llm.generate(prompt, 2048, temperature=0, top_p=1, state=start).text
    body = {"source_lang": "en", "target_lang": "fr", "text_list": ["a"], "state_id": role}
    found = http.post("/translate/v1/batch-translate", json=body).json()
    assert found["translations"] == [{"detected_source_lang": "en", "text": translated}]


def test_listed_and_deleted(http, llm, role):
    again = upload(http, role, as_pth(tuned(llm)))
    assert (again.status_code, again.json()) == (400, {"error": "State role.pth already exists"})
    two = upload(http, "two.pth", as_pth(tuned(llm)), **{"x-rwkv-state-upload-uuid": "0190-abc"}).json()
    assert two["state_id"] == "two-0190-abc"
    for method in ("GET", "POST"):
        found = http.request(method, "/v1/state/list").json()
        assert found["object"] == "list"
        assert two in found["data"]
        assert role in [x["state_id"] for x in found["data"]]
    name, other = "two-0190-abc", {"x-rwkv-state-id": "other"}
    for changes in ({"headers": other}, {"params": {"state_id": "other"}}):
        reply = http.request("DELETE", "/v1/state/delete", json={"state_id": name}, **changes)
        assert (reply.status_code, reply.json()) == (400, {"error": "state_id: two different ids in one request"})
    reply = http.post("/v1/state/delete", headers={"x-rwkv-state-id": name}, params={"state_id": name})
    assert (reply.status_code, reply.json()) == (200, {"state_id": name, "deleted": True})
    for request in (
        {"json": {"state_id": name}},
        {"headers": {"x-rwkv-state-id": name}},
        {"params": {"state_id": name}},
    ):
        reply = http.request("DELETE", "/v1/state/delete", **request)
        assert reply.status_code == 404
        assert (reply.json()["state_id"], reply.json()["deleted"]) == (name, False)
    reply = http.delete("/v1/state/delete")
    assert (reply.status_code, reply.json()) == (400, {"error": "Missing state_id"})
    body = {"contents": [TEXT], "state_id": name}
    reply = http.post("/v1/batch/completions", json=body)
    assert (reply.status_code, reply.json()) == (404, {"error": f"state: there is no state {name!r}"})
    reply = http.post("/v1/batch/completions", json=body, headers=other)
    assert (reply.status_code, reply.json()) == (400, {"error": "state_id: two different ids in one request"})


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('this code must not run')",)


def test_bad_uploads(http, llm):
    good = as_pth(tuned(llm))
    first = next(iter(tuned(llm)))
    bad = {
        "refused": as_pth({first: Code()}),
        "would run builtins.exec; refused": pickle.dumps({first: Code()}),
        "contains NaN or infinity": as_pth(tuned(llm) | {first: tuned(llm)[first] * torch.inf}),
        "not a state": b"hello",
        "a damaged .pth file": good[:500],
    }
    for message, data in bad.items():
        reply = upload(http, "bad.pth", data)
        assert reply.status_code == 400
        assert message in reply.json()["error"]
    for name in ("../role.pth", "a/b.pth", "..\\x.pth", "a b.pth", "x" * 129):
        reply = upload(http, name, good)
        assert reply.status_code == 400
        assert "cannot be the name of a state" in reply.json()["error"]
    evil = upload(http, "evil.pth", good, **{"x-rwkv-state-upload-uuid": "../../x"})
    assert "cannot be the name of a state" in evil.json()["error"]
    for request in ({"json": {"file": "a"}}, {"files": {"other": b"a"}}, {"data": {"file": "a"}}):
        reply = http.post("/v1/state/upload", **request)
        assert reply.status_code == 400
        assert reply.json()["error"].endswith("a multipart form with a file is expected")
    cut = http.post(
        "/v1/state/upload", content=b"--x\r\nno form", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert cut.status_code == 400
    assert isinstance(cut.json()["error"], str)


def test_states_are_their_owners(world, world_llm):
    assert upload(world, "ann.pth", as_pth(tuned(world_llm))).status_code == 200
    bob = {"authorization": "Bearer key-of-bob"}
    assert world.get("/v1/state/list", headers=bob).json()["data"] == []
    assert world.post("/v1/state/delete", json={"state_id": "ann.pth"}, headers=bob).status_code == 404
    assert world.post("/v1/state/upload", headers={"authorization": ""}).status_code == 401
    body = {"contents": [TEXT], "state_id": "ann.pth"}
    assert world.post("/v1/batch/completions", json=body, headers=bob).status_code == 404
    assert world.post("/v1/state/delete", json={"state_id": "ann.pth"}).json()["deleted"] is True
