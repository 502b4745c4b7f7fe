"""The routes of Ai00."""

from __future__ import annotations

import pytest
from sse import events

import heronry
from heronry.serve import ai00

PROMPT = "Once upon a time"
SAMPLER = {
    "type": "Nucleus",
    "top_p": 0.5,
    "top_k": 128,
    "temperature": 1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.3,
    "penalty_decay": 0.99654026,
}
USUAL = {name: value for name, value in SAMPLER.items() if name != "type"} | {"order": "top-p-first"}
GREEDY = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}


def ask(client, path: str, **body) -> dict:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def write(llm, text: str, max_tokens: int, **options) -> heronry.Completion:
    return llm.generate(llm.tokenizer.encode(text), max_tokens, **{"stop": "\n\n", **USUAL, **options})


def test_models(http):
    for prefix in ("/api/oai", "/api/oai/v1"):
        assert http.get(f"{prefix}/models").json() == {"data": [{"object": "models", "id": "bundled"}]}
    info = http.get("/api/models/info").json()
    assert info["reload"]["model_path"] == "bundled"
    assert (info["model"]["version"], info["model"]["num_vocab"], info["states"]) == ("V7", 2048, [])


def test_a_completion(http, llm):
    body = {"prompt": ["Once upon", " a time"], "max_tokens": 12, "sampler": SAMPLER | GREEDY}
    found = ask(http, "/api/oai/completions", **body)
    expected = write(llm, PROMPT, 12, **GREEDY)
    assert found["choices"] == [{"text": expected.text, "index": 0, "finish_reason": "length"}]
    assert (found["object"], found["model"]) == ("text_completion", "bundled")
    usage = found["usage"]
    assert (usage["prompt"], usage["completion"], usage["total"]) == (4, 12, 16)
    assert usage["duration"].keys() == {"secs", "nanos"}
    stopped = ask(http, "/api/oai/v1/completions", **body | {"stop": [" girl", "zzz"], "max_tokens": 40})
    assert stopped["choices"][0]["text"] == write(llm, PROMPT, 40, stop=" girl", **GREEDY).text
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_which_sampler_counts(http, llm):
    """The sampler comes before the fields beside it; all else is as in Ai00."""

    def first(**body) -> str:
        return ask(http, "/api/oai/completions", prompt=f"{PROMPT},", max_tokens=1, **body)["choices"][0]["text"]

    assert first(temperature=0) == first(top_k=1) == first(temperature=9, sampler={"top_k": 1}) == " there"
    assert first(sampler={"temperature": 9}, sampler_override={"temperature": 0}) == " there"
    [there] = llm.tokenizer.encode(" there")
    [girl] = llm.tokenizer.encode(" girl")
    assert first(top_k=1, bias={str(there): -100}) != " there"
    assert first(top_k=1, logit_bias={str(girl): 100}) == " girl"


def test_a_stream_is_the_whole(http):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = ask(http, "/api/oai/completions", **body)
    *parts, end, done = events(http.post("/api/oai/completions", json=body | {"stream": True}))
    assert done == "[DONE]"
    assert {part["object"] for part in parts} == {"text_completion.chunk"}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == whole["choices"][0]["text"]
    assert {part["choices"][0]["finish_reason"] for part in parts} == {None}
    assert end["choices"] == [{"delta": {}, "index": 0, "finish_reason": "length"}]
    assert end["usage"]["completion"] == 12


def test_choices(http, llm):
    text, choices = "The little girl was very", [" happy", " stone", " happy and sad"]
    found = ask(http, "/api/oai/chooses", input=["The little girl", " was very"], choices=choices)
    encode = llm.tokenizer.encode

    def cost(before: list[int], choice: str) -> float:
        [(total, _)] = heronry.evaluate.log_likelihoods(llm.model, [(before, encode(choice))])
        return -total / len(encode(choice))

    expected = [cost(encode(text), choice) for choice in choices]
    assert [x["rank"] for x in found["data"]] == [0, 1, 2]
    assert [x["index"] for x in found["data"]] == sorted(range(3), key=expected.__getitem__)
    for entry in found["data"]:
        assert entry["choice"] == choices[entry["index"]]
        assert entry["perplexity"] == pytest.approx(expected[entry["index"]], abs=1e-4)
    assert found["data"][0]["choice"] != " stone"
    assert (found["object"], found["model"], found["data"][0]["object"]) == ("list", "bundled", "choice")
    calibrated = ask(http, "/api/oai/chooses", input=text, choices=choices, calibrate=True)
    alone = [cost(sorted(llm.tokenizer.stop_ids)[:1], choice) for choice in choices]
    for entry in calibrated["data"]:
        i = entry["index"]
        assert entry["perplexity"] == pytest.approx(expected[i] - alone[i], abs=1e-4)


def test_keys(world, http):
    nobody = {"authorization": ""}

    def exchange(app: str, secret: str) -> tuple[int, dict]:
        reply = world.post("/api/auth/exchange", json={"app_id": app, "app_secret": secret}, headers=nobody)
        return reply.status_code, reply.json()

    refused = {"token": None, "code": 403, "message": "NO-Match AppId and SecretKey"}
    assert exchange("ann", "wrong") == exchange("bob", "key-of-ann") == (403, refused)
    status, reply = exchange("ann", "key-of-ann")
    assert (status, reply["code"], reply["message"]) == (200, 200, "SUCCESS")
    assert world.get("/api/oai/models", headers={"authorization": f"Bearer {reply['token']}"}).status_code == 200
    without = world.get("/api/oai/models", headers=nobody)
    assert without.status_code == 401
    assert without.json()["error"]["code"] == 401
    here = http.post("/api/auth/exchange", json={"app_id": "a", "app_secret": "s"})
    message = "this server asks for no keys: call it without a token"
    assert (here.status_code, here.json()) == (404, {"token": None, "code": 404, "message": message})


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": 5}, "prompt"),
        ("completions", {"prompt": "a", "max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
        ("completions", {"prompt": "a", "sampler": {"type": "Mirostat"}}, "sampler.type: Input should be 'Nucleus'"),
        ("completions", {"prompt": "a", "bnf_schema": "start ::= 'a';"}, "bnf_schema: Ai00's BNF is not served here"),
        ("completions", {"prompt": "a", "state": {"path": "/etc/passwd"}}, "state: the id of a state is expected"),
        ("completions", {"prompt": "a", "state": "../x"}, "'../x' cannot be the name of a state"),
        ("states", {"input": ""}, "the prompt is empty"),
        ("embeds", {"input": ""}, "input: the input is empty"),
        ("chat/completions", {"messages": []}, "messages: there are no messages"),
        ("chat/completions", {"messages": {"role": "poet", "content": "a"}}, "role: Input should be 'System'"),
        ("completions", {"prompt": "a", "bias": {"99999": 1}}, "must be below 2048"),
        ("chooses", {"input": "a", "choices": []}, "choices: give texts to choose from, none of them empty"),
        ("chooses", {"input": "a", "choices": ["b", ""]}, "choices: give texts to choose from, none of them empty"),
    ],
)
def test_errors_have_its_shape(http, path, body, message):
    reply = http.post(f"/api/oai/{path}", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["name"]) == (400, "Bad Request")
    assert message in error["brief"]


def test_no_state_is_an_id_too(http):
    zeros = "00000000-0000-0000-0000-000000000000"
    assert ask(http, "/api/oai/completions", prompt="a", max_tokens=1, state=zeros)["usage"]["completion"] == 1
    assert ask(http, "/api/oai/completions", max_tokens=1)["usage"]["prompt"] == 1


CHAT = [
    {"role": "SYSTEM", "content": "A story.\n\n \nShort."},
    {"role": "user", "content": "Once upon a time"},
    {"role": "Assistant", "content": " there was "},
    {"role": "tool", "content": "a dog"},
]
SHOWN = "System: A story.\nShort.\n\nUser: Once upon a time\n\nAssistant: there was\n\nObservation: a dog\n\n"


def test_a_chat(http, llm):
    body = {"messages": CHAT, "max_tokens": 16, "sampler": SAMPLER | GREEDY, "stop": ["\n\nUser:"]}
    expected = write(llm, f"{SHOWN}Assistant:", 16, stop="\n\nUser:", **GREEDY)
    found = ask(http, "/api/oai/chat/completions", **body)
    message = {"role": "Assistant", "content": expected.text.strip()}
    assert found["choices"] == [{"message": message, "index": 0, "finish_reason": expected.finish_reason}]
    assert (found["object"], found["usage"]["completion"]) == ("chat.completion", 16)
    first, *parts, end, done = events(http.post("/api/oai/v1/chat/completions", json=body | {"stream": True}))
    assert first["choices"] == [{"delta": {"role": "Assistant"}, "index": 0, "finish_reason": None}]
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == message["content"]
    assert end["choices"] == [{"delta": {}, "index": 0, "finish_reason": expected.finish_reason}]
    assert (end["object"], end["usage"]["completion"], done) == ("chat.completion.chunk", 16, "[DONE]")
    names = {"user": "Bob", "Assistant": "Alice {content}"}
    form = {"record": "<{role}> {content}", "prefix": "<{assistant}>", "sep": "\n"}
    shown = "<Bob> Hi {role}\n<Alice {content}>"
    one = ask(
        http,
        "/api/oai/chat/completions",
        **body | {"messages": {"role": "user", "content": "Hi {role}"}, "names": names, "template": form},
    )
    assert one["usage"]["prompt"] == len(llm.tokenizer.encode(shown))
    assert one["choices"][0]["message"]["content"] == write(llm, shown, 16, stop="\n\nUser:", **GREEDY).text.strip()


def test_states_by_their_id(http, llm):
    made = ask(http, "/api/oai/states", input=["Once upon", " a time"])
    [data] = made["data"]
    assert (made["object"], data["object"], made["usage"]["total"]) == ("list", "states", 4)
    state = llm.generate(llm.tokenizer.encode(PROMPT), 0).state
    body = {"prompt": " there was", "max_tokens": 12, "sampler": SAMPLER | GREEDY, "state": data["id"]}
    expected = write(llm, " there was", 12, state=state, **GREEDY)
    assert ask(http, "/api/oai/completions", **body)["choices"][0]["text"] == expected.text
    longer = ask(http, "/api/oai/v1/states", input=" there was", state=data["id"])["data"][0]["id"]
    assert http.get(f"/v1/states/{longer}").json()["text"] == "Once upon a time there was"
    chat = {"messages": {"role": "User", "content": "Hi"}, "max_tokens": 6, "sampler": GREEDY, "state": data["id"]}
    said = write(llm, "User: Hi\n\nAssistant:", 6, state=state, **GREEDY).text.strip()
    assert ask(http, "/api/oai/chat/completions", **chat)["choices"][0]["message"]["content"] == said
    encode = llm.tokenizer.encode
    [(total, _)] = heronry.evaluate.log_likelihoods(
        llm.model, [(encode(PROMPT) + encode(" there was"), encode(" a dog"))]
    )
    [choice] = ask(http, "/api/oai/chooses", input=" there was", choices=[" a dog"], state=data["id"])["data"]
    assert choice["perplexity"] == pytest.approx(-total / len(encode(" a dog")), abs=1e-3)
    reply = http.post("/api/oai/completions", json=body | {"state": "00000000-0000-0000-0000-000000000001"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, 404)


def test_embeddings(http, llm):
    text = "A frog sat in the pond."
    found = ask(http, "/api/oai/embeds", input=text, max_tokens=4, prefix="query:")
    [data] = found["data"]
    assert (found["object"], data["object"], data["index"]) == ("embeds", "embed", 0)
    assert "".join(chunk["chunk"] for chunk in data["chunks"]) == text
    encode = llm.tokenizer.encode
    ids = encode(text)
    for i, chunk in enumerate(data["chunks"]):
        [expected] = llm.embed([encode("query:") + ids[4 * i : 4 * i + 4]])
        assert chunk["embed"] == [pytest.approx(expected.tolist(), abs=1e-5)]
    assert len(data["chunks"]) == -(-len(ids) // 4) > 1


def test_parts_end_between_characters():
    data = "aß€a".encode()
    parts = ai00.split_whole([*data], 3, lambda ids: bytes(ids).decode(errors="replace"))
    assert [bytes(part).decode() for part in parts] == ["aß", "€", "a"]


def test_what_only_its_owner_may(http, llm):
    for method in ("GET", "POST"):
        reply = http.request(method, "/admin/models/load", json={"model_path": "/etc/passwd"})
        assert reply.status_code == 403
        assert reply.json()["error"]["brief"].startswith("models are chosen when the server is started")
    [model] = http.get("/api/models/list").json()
    assert (model["name"], model["path"]) == ("bundled", "bundled")
    assert model["size"] == 4 * llm.num_parameters()
