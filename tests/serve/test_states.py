"""/v1/states: made, continued, forked, moved and refused."""

from __future__ import annotations

import base64
import io
import pickle
import zipfile

import httpx
import pytest
import safetensors.torch
import torch

from heronry import State

TEXT, MORE = "Once upon a time there was a dog", ". One day,"
GREEDY = {"temperature": 0, "max_tokens": 12}


def complete(http: httpx.Client, **body) -> dict:
    reply = http.post("/v1/completions", json=GREEDY | body)
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    return choice


def error_of(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def expected(llm, *texts: str) -> str:
    """What the engine writes behind texts that are read one after the other."""
    state = None
    for text in texts[:-1]:
        state = llm.state(text, state)
    return llm.generate(texts[-1], 12, temperature=0, top_p=1, state=state).text


def test_made_and_continued(http, llm):
    made = http.post("/v1/states", json={"text": TEXT, "name": "dog"})
    assert made.status_code == 201
    about = made.json()
    assert (about["id"], about["object"], about["model"], about["source"]) == ("dog", "state", "bundled", "text")
    assert (about["tokens"], about["text_end"]) == (len(llm.encode(TEXT, begins=True)), TEXT)
    shown = http.get("/v1/states/dog").json()
    assert shown == about | {"text": TEXT}
    assert about in http.get("/v1/states").json()["data"]
    for _ in range(2):  # it stays what it is
        assert complete(http, prompt=MORE, state="dog")["text"] == expected(llm, TEXT, MORE)
    longer = http.post("/v1/states", json={"text": MORE, "state": "dog"}).json()
    assert longer["tokens"] == about["tokens"] + len(llm.encode(MORE, begins=False))
    assert http.get(f"/v1/states/{longer['id']}").json()["text"] == TEXT + MORE
    assert complete(http, prompt=" the", state=longer["id"])["text"] == expected(llm, TEXT, MORE, " the")
    ids = llm.encode(TEXT, begins=True)
    http.post("/v1/states", json={"tokens": ids, "name": "ids"})
    assert complete(http, prompt=MORE, state="ids")["text"] == expected(llm, TEXT, MORE)


def test_saved_after_a_completion(http, llm):
    first = complete(http, prompt=TEXT, add_special_tokens=True, save_state="after")
    about = first.pop("state")
    assert (about["id"], about["tokens"]) == ("after", len(llm.encode(TEXT, begins=True)) + 12)
    whole = llm.generate(TEXT, 12, temperature=0, top_p=1)
    second = complete(http, prompt=MORE, state="after", save_state="after")
    assert second["text"] == llm.generate(MORE, 12, temperature=0, top_p=1, state=whole.state).text
    assert http.get("/v1/states/after").json()["text"] == TEXT + whole.text + MORE + second["text"]


def test_a_saved_state_ends_where_the_text_does(http, llm):
    """Not behind the stop string, whose tokens were read."""
    plain = complete(http, prompt=TEXT, max_tokens=40)["text"]
    stop = plain.split(".")[1][:4]
    cut = complete(http, prompt=TEXT, max_tokens=40, stop=[stop], save_state="cut")
    assert cut["text"] == plain.partition(stop)[0]
    assert http.get("/v1/states/cut").json()["text"] == TEXT + cut["text"]
    state = llm.state(TEXT + cut["text"])
    there = State.from_bytes(http.get("/v1/states/cut/content").content)
    ids = llm.tokenizer.encode(TEXT) + llm.tokenizer.encode(cut["text"])
    close = llm.generate(ids, 0).state
    for x, y in zip(there.tensors(), close.tensors(), strict=True):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)
    assert state.texts == there.texts


def test_streams_have_the_state_with_the_end(client, http):
    body = {"model": "bundled", "prompt": TEXT, **GREEDY, "stream": True, "extra_body": {"save_state": "streamed"}}
    *before, last = list(client.completions.create(**body))
    assert not any("state" in chunk.choices[0].model_extra for chunk in before)
    assert last.choices[0].state["id"] == "streamed"
    assert http.get("/v1/states/streamed").json()["text"].startswith(TEXT)


def test_stateless(http, llm):
    """The state travels with the client; nothing is kept."""
    known = http.get("/v1/states").json()
    made = http.post("/v1/states", json={"text": TEXT, "return_state": True}).json()
    first = complete(http, prompt=MORE, state={"data": made["data"]}, return_state=True)
    assert first["text"] == expected(llm, TEXT, MORE)
    complete(http, prompt=" and", state={"data": first["state"]["data"]})
    assert State.from_bytes(base64.b64decode(first["state"]["data"])).texts == (TEXT + MORE + first["text"],)
    both = http.post("/v1/completions", json=GREEDY | {"prompt": TEXT, "n": 2, "return_state": True, "seed": 1}).json()
    texts = [State.from_bytes(base64.b64decode(x["state"]["data"])).texts[0] for x in both["choices"]]
    assert texts == [TEXT + x["text"] for x in both["choices"]]
    assert http.get("/v1/states").json() == known


def test_forked_downloaded_uploaded_deleted(http, llm):
    http.post("/v1/states", json={"text": TEXT, "name": "one"})
    forked = http.post("/v1/states/one/fork", json={"name": "two"})
    assert (forked.status_code, forked.json()["id"], forked.json()["source"]) == (201, "two", "fork")
    file = http.get("/v1/states/one/content")
    assert file.headers["content-disposition"] == 'attachment; filename="one.safetensors"'
    state = State.from_bytes(file.content)
    assert state.texts == (TEXT,)
    assert llm.generate(MORE, 12, temperature=0, top_p=1, state=state).text == expected(llm, TEXT, MORE)
    assert http.delete("/v1/states/one").json() == {"id": "one", "object": "state", "deleted": True}
    for reply in (http.get("/v1/states/one"), http.delete("/v1/states/one"), http.get("/v1/states/one/content")):
        assert error_of(reply, 404)["code"] == "state_not_found"
    assert error_of(http.post("/v1/completions", json={"prompt": "a", "state": "one"}), 404)["param"] == "state"
    assert complete(http, prompt=MORE, state="two")["text"] == expected(llm, TEXT, MORE)
    uploaded = http.put("/v1/states/three", content=file.content)
    assert (uploaded.status_code, uploaded.json()["source"]) == (201, "upload")
    assert complete(http, prompt=MORE, state="three")["text"] == expected(llm, TEXT, MORE)


def tuned(llm, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in llm.model.time_states().items()}


def as_pth(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def test_tuned_states_of_others(http, llm):
    tensors = {name: x.bfloat16() for name, x in tuned(llm).items()}
    files = {"pth": as_pth(tensors), "safetensors": safetensors.torch.save(tensors)}
    start = llm.model.initial_state(time_states={name: x.float() for name, x in tensors.items()})
    text = llm.generate(TEXT, 12, temperature=0, top_p=1, state=start).text
    for name, data in files.items():
        assert http.put(f"/v1/states/{name}", content=data).status_code == 201
        assert complete(http, prompt=TEXT, state=name)["text"] == text


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('this code must not run')",)


def compressed(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def test_bad_uploads(http, llm):
    state = llm.state(TEXT)
    good, tensors, time_states = state.to_bytes(), state.to_tensors(), tuned(llm)
    name = "blocks.0.wkv"
    first = next(iter(time_states))
    metadata = {"format": "heronry.state", "fingerprint": state.fingerprint, "texts": '[""]'}

    nan = tensors[name].clone()
    nan.view(-1)[3] = torch.nan
    bad = {
        "not a state: a safetensors file": b"hello",
        "a safetensors file or a .pth file is expected": b"",
        "damaged or truncated state file": good[:-10],
        "contains NaN or infinity": safetensors.torch.save(tensors | {name: nan}, metadata),
        "its tensors do not fit the model": safetensors.torch.save(
            tensors | {name: tensors[name][:, :, :-1].contiguous()}, metadata
        ),
        "damaged: blocks.0.wkv contains NaN": safetensors.torch.save(
            tensors | {name: tensors[name].double() + 1e300}, metadata
        ),
        "belongs to another model": safetensors.torch.save(tensors, metadata | {"fingerprint": "0" * 64}),
        "a state of one sequence is expected, got one of 2": State.stack([state, state]).to_bytes(),
        "exec; refused": as_pth(Code()),
        "would run builtins.exec; refused": pickle.dumps({first: Code()}),
        "instead of blocks.0": as_pth({"blocks.0.att.key": torch.ones(2, 2)}),
        "a tuned state of another model": as_pth(time_states | {first: time_states[first][:-1]}),
        f"{first} contains NaN or infinity": as_pth(time_states | {first: time_states[first] * torch.inf}),
        "a compressed .pth file": compressed(as_pth(time_states)),
        "a damaged .pth file": as_pth(time_states)[:500],
    }
    for message, data in bad.items():
        error = error_of(http.put("/v1/states/bad", content=data), 400)
        assert message in error["message"]
        assert "/tmp" not in error["message"]
        inline = {"data": base64.b64encode(data).decode()}
        again = error_of(http.post("/v1/completions", json={"prompt": "a", "state": inline}), 400)
        assert again["message"] == error["message"]
    error = error_of(http.post("/v1/completions", json={"prompt": "a", "state": {"data": "%%"}}), 400)
    assert "not base64" in error["message"]
    assert http.get("/v1/states/bad").status_code == 404


@pytest.mark.parametrize("name", ["../../etc/passwd", "a b", "x" * 129, "", "ä", "a/b", "a\n"])
def test_names_are_no_paths(http, name):
    for path, body in [
        ("states", {"text": "a", "name": name}),
        ("completions", {"prompt": "a", "save_state": name}),
        ("completions", {"prompt": "a", "state": name}),
    ]:
        assert "cannot be the name of a state" in error_of(http.post(f"/v1/{path}", json=body), 400)["message"]


def test_bad_requests(http):
    for path, body, message in [
        ("states", {}, "give a text or tokens"),
        ("states", {"text": "a", "tokens": [1]}, "give a text or tokens"),
        ("states", {"tokens": [10**6]}, "outside this model's vocabulary"),
        ("states", {"tokens": []}, "the prompt is empty"),
        ("states", {"text": "a", "name": "x", "return_state": True}, "nothing is kept"),
        ("states", {"text": "a", "model": "other"}, "there is no model"),
        ("completions", {"prompt": ["a", "b"], "save_state": "x"}, "save_state needs one prompt"),
        ("completions", {"prompt": "a", "n": 2, "save_state": "x"}, "save_state needs one prompt"),
    ]:
        reply = http.post(f"/v1/{path}", json=body)
        assert message in error_of(reply, 404 if "model" in body else 400)["message"]
