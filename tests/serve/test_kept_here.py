"""Kept responses and states in an app of this process: other templates, stores that are full, and age."""

from __future__ import annotations

import asyncio
import time

import pytest
from starlette.testclient import TestClient

from heronry.engine.kept_states import KeptStates
from heronry.engine.text_model import TextModel
from heronry.errors import InputError
from heronry.serve.app import create_app
from heronry.serve.expiry import expire_now_and_then
from heronry.serve.models import ModelTable, ServedModel
from heronry.serve.options import open_store, read_keys
from heronry.stores.memory import MemoryStore
from heronry.stores.store import Key
from heronry.text.jinja_templates import JinjaTemplate

KEEPS = (
    "{% for m in messages %}{{ m.role | title + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
COUNTS = "{{ messages | length }}\n\n" + KEEPS  # shows what was said otherwise each time
ASK = {"temperature": 0, "max_output_tokens": 12}


@pytest.fixture
def open_app(llm):
    """A client of an app with a template and a store of so many bytes."""
    clients: list[TestClient] = []

    def open_client(template: str | None = None, max_bytes: int = 1 << 30) -> TestClient:
        speaker = TextModel(llm.model, llm.tokenizer, template and JinjaTemplate(template), llm.opening)
        models = ModelTable([ServedModel("m", llm, speaker, "m", None)])
        app = create_app(models, kept=KeptStates(MemoryStore(max_bytes)))
        client = TestClient(app, base_url="http://localhost")
        clients.append(client.__enter__())
        return client

    yield open_client
    for client in clients:
        client.__exit__()


def follow(client: TestClient) -> tuple[dict, dict]:
    first = client.post("/v1/responses", json=ASK | {"input": "Tell me a story."}).json()
    more = {"input": "And then?", "previous_response_id": first["id"]}
    return first, client.post("/v1/responses", json=ASK | more).json()


@pytest.mark.parametrize(("template", "goes_on"), [(KEEPS, True), (COUNTS, False)])
def test_a_template_in_jinja_goes_on_where_its_text_does(open_app, template, goes_on):
    first, second = follow(open_app(template))
    cached = second["usage"]["input_tokens_details"]["cached_tokens"]
    assert cached == (first["usage"]["total_tokens"] if goes_on else 0)


def test_what_a_store_cannot_hold(open_app):
    """A response that is not kept says so; a state that was to be kept is an error."""
    client = open_app(max_bytes=1000)
    first, second = follow(client)
    assert first["store"] is False
    assert second["error"]["code"] == "previous_response_not_found"
    reply = client.post("/v1/states", json={"text": "a"})
    assert (reply.status_code, reply.headers["x-should-retry"]) == (507, "false")
    assert reply.json()["error"]["message"].startswith("the state cannot be kept: it is larger than the store")


def test_age():
    """States go before the items of responses; what is used stays."""
    store = MemoryStore(1 << 20)
    keys = [Key("response", "", "old"), Key("response", "", "older"), Key("state", "", "old"), Key("state", "", "new")]
    ages = (40, 400, 40, 0)
    for key, age in zip(keys, ages, strict=True):
        store.put(key, b"x", {"a": 1})
        held = store._held[key]
        used = time.time() - age * 86400
        store._held[key] = type(held)(type(held.entry)(key, {"a": 1}, 1, held.entry.digest, used, used), held.place, 8)

    async def once() -> None:
        task = asyncio.create_task(expire_now_and_then(None, store, store, 30))
        await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(once())
    found = [store.get(key) for key in keys]
    assert [entry and entry.size for entry in found] == [0, None, None, 1]


def test_owners_are_names_of_keys_or_the_keys_themselves():
    """Never their place in a list: another order must not hand the states of one to another."""
    one = read_keys(["secret", "ann=a"], None)
    other = read_keys(["ann=new", "more", "secret"], None)
    assert one["a"] == other["new"] == "ann"
    assert one["secret"] == other["secret"] != other["more"]
    assert "secret" not in one["secret"]
    with pytest.raises(
        InputError, match=r"'a b' cannot be the name of a key: use letters, digits and any of _ \. : @ -"
    ):
        read_keys(["a b=key"], None)


@pytest.mark.parametrize("place", ["http://x", "redis://host:port/0"])
def test_places_that_are_no_store(place):
    with pytest.raises(InputError, match="the URL of Redis is wrong"):
        open_store(place, "kept", 1)


def test_keys_in_base64():
    """What is padded with = is no NAME=KEY; what is left of one whose variable was empty is no key."""
    padded = ["sk-abc==", "c2VjcmV0LWtleS0x/+aG9w==", "c2VjcmV0LWtleS0xYWI=", "bob=c2VjcmV0LWI="]
    keys = read_keys(padded, None)
    assert list(keys) == [*padded[:3], "c2VjcmV0LWI="]
    assert keys["c2VjcmV0LWI="] == "bob"
    assert len({*keys.values()}) == 4
    assert read_keys(["a=b==", "c=d=e"], None) == {"b==": "a", "d=e": "c"}
    for empty in ("ann=", "=", "==", ""):
        with pytest.raises(InputError, match="must not be empty; expected KEY or NAME=KEY"):
            read_keys([empty], None)
    with pytest.raises(InputError, match="'' cannot be the name of a key"):
        read_keys(["=key"], None)
