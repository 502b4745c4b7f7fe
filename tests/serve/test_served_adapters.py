"""Adapters that clients load and remove, in the words of rwkv_lightning and of vLLM."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch

from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_adapter
from heronry.checkpoint import load

BODY = {"contents": ["The sky is"], "max_tokens": 12, "temperature": 0, "stop_tokens": []}
INSIDE = "adapters are loaded only from inside of the server's adapter folder"


@pytest.fixture(scope="module")
def folder(world):
    """The server's folder, with the adapters "one" and "two", and one beside it."""
    file = world.app.state.server.models.find("tiny").path
    folder = world.app.state.server.adapters._folder
    for seed, place in enumerate((folder / "one", folder / "two", folder.parent / "outside")):
        torch.manual_seed(seed)
        model = load(file)
        inject_adapter(model, 4, 8)
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                torch.nn.init.normal_(p, std=0.5)
        save_adapter(model.eval(), place, {})
    (folder / "link").symlink_to(folder.parent / "outside")
    return folder


def ask(client, method: str, route: str, status: int = 200, **body) -> dict:
    reply = client.request(method, route, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def write(client, **more) -> str:
    return ask(client, "POST", "/v1/batch/completions", **BODY | more)["choices"][0]["message"]["content"]


def test_loaded_used_and_removed(world, world_llm, folder):
    plain = write(world)
    version = ask(world, "POST", "/v1/adapters", adapter_id="a", path="one")["version"]
    assert len(version) == 64
    assert ask(world, "POST", "/v1/adapters", adapter_id="a", path=str(folder / "one"))["version"] == version
    listed = ask(world, "GET", "/v1/adapters")["data"]
    assert listed == [{"id": "a", "version": version, "manifest": {"path": "one"}}]
    one = write(world, adapter_id="a", adapter_version=version, adapter_scale=1.0)
    ids = world_llm.tokenizer.encode("The sky is")
    options = {"sampling": "lightning", "temperature": 0, "adapter": "a", "ignore_eos": False}
    assert one == world_llm.generate(ids, 12, **options).text != plain
    assert write(world, model="a") == one
    assert "a" in [model["id"] for model in world.get("/v1/models").json()["data"]]
    wrong = ask(world, "POST", "/v1/batch/completions", 404, **BODY, adapter_id="a", adapter_version="0" * 64)
    assert wrong["error"] == "adapter_version: the adapter 'a' is here in another version"
    other = ask(world, "POST", "/v1/adapters", adapter_id="a", path="two")["version"]
    assert other != version
    assert write(world, adapter_id="a") not in (one, plain)  # not what was kept of the prompt for the first
    old = weakref.ref(world_llm.adapters["a"].model)
    assert ask(world, "DELETE", "/v1/adapters", adapter_id="a", adapter_version=version) == {"deleted": True}
    assert "a" in world_llm.adapters
    assert ask(world, "DELETE", "/v1/adapters", adapter_id="a") == {"deleted": True}
    assert ask(world, "DELETE", "/v1/adapters", adapter_id="a") == {"deleted": True}
    missing = ask(world, "POST", "/v1/batch/completions", 404, **BODY, adapter_id="a")
    assert missing["error"] == "adapter_id: there is no adapter 'a' of 'tiny' here"
    write(world)  # by when the last batch is forgotten
    gc.collect()
    assert old() is None


def test_sessions_of_an_adapter_are_its_own(world, folder):
    ask(world, "POST", "/v1/adapters", adapter_id="b", path="one")
    session = {"session_id": "with adapters", "stop_tokens": [], "temperature": 0, "max_tokens": 8}

    def go_on(text: str, **more) -> str:
        found = ask(world, "POST", "/state/chat/completions", **session, contents=[text], **more)
        return found["choices"][0]["message"]["content"]

    plain, adapted = go_on("The sky is"), go_on("The sky is", adapter_id="b")
    assert plain != adapted
    assert go_on("\n\nThe", adapter_id="b") != go_on("\n\nThe")
    ask(world, "DELETE", "/v1/adapters", adapter_id="b")


def test_in_the_words_of_vllm(world, folder):
    def post(path: str, **body):
        reply = world.post(path, json=body)
        return reply.status_code, reply.json()["error"]["message"] if reply.status_code >= 400 else reply.text

    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    assert post(load, lora_name="c", lora_path="one") == (200, "Success: LoRA adapter 'c' added successfully.")
    assert post(load, lora_name="c", lora_path="one") == (400, "the adapter 'c' is loaded already")
    assert post(unload, lora_name="c") == (200, "Success: LoRA adapter 'c' removed successfully.")
    assert post(unload, lora_name="c") == (404, "there is no adapter 'c' that was loaded")
    assert post(unload, lora_name="tiny")[0] == 404
    assert post(load, lora_name="tiny", lora_path="one") == (400, "there is a model 'tiny' already")
    assert post(load, lora_name="a/b", lora_path="one")[0] == 400
    assert post(load, lora_name="d", lora_path="../outside") == (403, INSIDE)


@pytest.mark.parametrize(
    "path", ["..", ".", "", "/", "/etc", "/etc/passwd", "../outside", "one/../../outside", "link", "a\0b", "x" * 5000]
)
def test_paths_elsewhere(world, folder, path):
    reply = ask(world, "POST", "/v1/adapters", 403, adapter_id="x", path=path)
    assert reply == {"error": INSIDE}
    reply = ask(world, "POST", "/v1/adapters", 403, adapter_id="x", path=str(folder.parent / "outside"))
    assert reply == {"error": INSIDE}


def test_what_is_no_adapter(world, folder):
    missing = ask(world, "POST", "/v1/adapters", 404, adapter_id="x", path="three")
    assert missing == {"error": "there is no 'three' in the server's adapter folder"}
    (folder / "text").write_text("hello")
    wrong = ask(world, "POST", "/v1/adapters", 400, adapter_id="x", path="text")
    assert wrong["error"].startswith("text: ")
    assert os.fspath(folder) not in wrong["error"]


def test_without_a_folder_nothing_is_loaded(http):
    message = "adapters are loaded from a folder that the server is started with: --adapter-folder"
    reply = http.post("/v1/adapters", json={"adapter_id": "a", "path": "/etc"})
    assert (reply.status_code, reply.json()) == (403, {"error": message})
    reply = http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/etc"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")
    assert reply.json()["error"]["message"] == message
