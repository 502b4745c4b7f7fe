"""The routes of llama.cpp's server."""

from __future__ import annotations

import json

import pytest
from sse import events

from heronry.text.chat_templates import fill_in_middle, render

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
# llama.cpp's own, which cut off before the temperature
USUAL = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "penalty_decay": 1, "order": "top-p-first"}


def complete(http, **body) -> dict:
    reply = http.post("/completion", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_completion(http, llm):
    found = complete(http, prompt=PROMPT, n_predict=12, return_tokens=True, **GREEDY)
    expected = llm.generate(PROMPT, 12, temperature=0)
    ids = llm.encode(PROMPT, begins=True)
    assert (found["content"], found["tokens"]) == (expected.text, expected.token_ids)
    assert (found["stop"], found["stop_type"], found["stopping_word"], found["truncated"]) == (True, "limit", "", False)
    counts = (found["tokens_evaluated"], found["tokens_predicted"], found["tokens_cached"])
    assert counts == (len(ids), 12, 0)
    assert (found["model"], found["prompt"], found["index"]) == ("bundled", PROMPT, 0)
    timings = found["timings"]
    assert (timings["prompt_n"], timings["cache_n"], timings["predicted_n"]) == (len(ids), 0, 12)
    assert timings["predicted_per_second"] == pytest.approx(12000 / timings["predicted_ms"])
    assert timings["prompt_ms"] > 0
    assert found["generation_settings"]["n_predict"] == 12


def test_what_is_not_said_is_as_in_llama_cpp(http, llm):
    expected = llm.generate(PROMPT, 12, seed=3, **USUAL)
    assert complete(http, prompt=PROMPT, n_predict=12, seed=3)["content"] == expected.text
    more = {"presence_penalty": 0.5, "frequency_penalty": 0.5}
    expected = llm.generate(PROMPT, 12, seed=3, repetition_penalty=1.3, **USUAL, **more)
    found = complete(http, prompt=PROMPT, n_predict=12, seed=3, repeat_penalty=1.3, **more)
    assert found["content"] == expected.text
    assert complete(http, prompt=PROMPT, n_predict=0)["content"] == ""
    nulls = {"temperature": None, "top_k": None, "stop": None, "grammar": None, "id_slot": None}
    assert (
        complete(http, prompt=PROMPT, n_predict=12, seed=3, **nulls, repeat_penalty=1.3, **more)["content"]
        == expected.text
    )
    free = {"prompt": PROMPT, "n_predict": 60, "temperature": 3, "top_k": 0, "top_p": 1, "min_p": 0}  # any two differ
    assert len({complete(http, **free, seed=2**32 - 1)["content"] for _ in range(3)}) == 3
    settings = http.get("/props").json()["default_generation_settings"]["params"]
    assert {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p", "n_predict")} == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "n_predict": -1,
    }


def test_forms_of_a_prompt(http, llm):
    ids = llm.tokenizer.encode(PROMPT)
    alone = llm.generate(ids, 6, temperature=0).text
    assert complete(http, prompt=ids, n_predict=6, **GREEDY)["content"] == alone
    mixed = [*ids, " there was", llm.tokenizer.encode(" a")[0]]
    expected = llm.generate([*ids, *llm.tokenizer.encode(" there was"), mixed[-1]], 6, temperature=0).text
    assert complete(http, prompt=mixed, n_predict=6, **GREEDY)["content"] == expected
    several = complete(http, prompt=[PROMPT, ids], n_predict=6, **GREEDY)
    assert [x["content"] for x in several] == [llm.generate(PROMPT, 6, temperature=0).text, alone]
    assert [x["index"] for x in several] == [0, 1]
    assert complete(http, prompt=[PROMPT], n_predict=6, **GREEDY)["content"] == several[0]["content"]


def test_a_stream_is_the_whole(http):
    body = {"prompt": [PROMPT, "The dog"], "n_predict": 15, "seed": 3, "n_probs": 2}
    whole = complete(http, return_tokens=True, **body)
    parts = events(http.post("/completion", json=body | {"stream": True}))
    for i, expected in enumerate(whole):
        *pieces, end = [part for part in parts if part["index"] == i]
        assert all(not piece["stop"] for piece in pieces)
        assert "".join(piece["content"] for piece in pieces) == expected["content"]
        assert [token for piece in pieces for token in piece["tokens"]] == expected["tokens"]
        entries = [entry for piece in pieces for entry in piece["completion_probabilities"]]
        assert entries == expected["completion_probabilities"]
        assert (end["stop"], end["content"], end["stop_type"]) == (True, "", expected["stop_type"])
        assert end["tokens_predicted"] == expected["tokens_predicted"]


def test_why_it_stops(http, llm):
    plain = llm.generate(PROMPT, 40, temperature=0).text
    found = complete(http, prompt=PROMPT, n_predict=40, stop=["zzz", " girl"], **GREEDY)
    assert found["content"] == plain.partition(" girl")[0] != plain
    assert (found["stop_type"], found["stopping_word"]) == ("word", " girl")
    end = sorted(llm.tokenizer.stop_ids)[0]
    found = complete(http, prompt=PROMPT, n_predict=9, logit_bias=[[end, 100]], **GREEDY)
    assert (found["content"], found["stop_type"], found["tokens_predicted"]) == ("", "eos", 0)
    found = complete(http, prompt=PROMPT, n_predict=9, logit_bias=[[end, 100]], ignore_eos=True, **GREEDY)
    assert (found["stop_type"], found["tokens_predicted"]) == ("limit", 9)


def test_forms_of_a_bias(http, llm):
    [there] = llm.tokenizer.encode(" there")

    def first(bias: object) -> str:
        return complete(http, prompt=f"{PROMPT},", n_predict=1, logit_bias=bias, **GREEDY)["content"]

    assert first([]) == first(None) == " there"
    banned = first([[there, False]])
    assert banned != " there"
    assert first([[" there", False]]) == first({str(there): False}) == first({" there": False}) == banned
    assert first([[there, -90.5]]) == banned
    assert first({" girl": 90}) in " girl"


def test_probabilities(http, llm):
    found = complete(http, prompt=PROMPT, n_predict=5, n_probs=3, **GREEDY)["completion_probabilities"]
    expected = llm.generate(PROMPT, 5, temperature=0, top_logprobs=3).logprobs
    for entry, logprob in zip(found, expected, strict=True):
        assert (entry["id"], entry["logprob"]) == (logprob.token_id, pytest.approx(logprob.logprob))
        assert entry["token"] == llm.tokenizer.decode([entry["id"]])
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [x["id"] for x in entry["top_logprobs"]] == list(logprob.top_logprobs)
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


def test_grammars(http):
    found = complete(http, prompt=PROMPT, n_predict=20, seed=1, grammar='root ::= " "? ("yes" | "no")')
    assert found["content"].strip() in ("yes", "no")
    assert found["stop_type"] == "eos"
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    found = complete(http, prompt=PROMPT, n_predict=40, seed=1, json_schema=schema)
    assert json.loads(found["content"]).keys() == {"a"}


def test_infill(world, world_llm, http):
    ids = world_llm.tokenizer.encode(fill_in_middle("# a.py\ndef f(x):\n    y", "\n    return x"))
    body = {"input_prefix": "def f(x):\n", "input_suffix": "\n    return x", "prompt": "    y"}
    body |= {"input_extra": [{"filename": "a.py", "text": "# a.py"}], "n_predict": 5, **GREEDY}
    found = world.post("/infill", json=body).json()
    assert found["content"] == world_llm.generate(ids, 5, temperature=0).text
    assert found["generation_settings"]["stop"] == ["✿"]
    refused = http.post("/infill", json=body)
    assert refused.status_code == 400
    assert "'bundled' cannot fill in the middle: its vocabulary is not that of RWKV World" in refused.text


def test_the_server(http, llm):
    props = http.get("/props").json()
    assert (props["total_slots"], props["model_path"], props["eos_token"]) == (64, "bundled", "<|endoftext|>")
    assert "messages" in props["chat_template"]
    slots = http.get("/slots").json()
    assert [slot["id"] for slot in slots] == list(range(64))
    assert not any(slot["is_processing"] for slot in slots)
    messages = [{"role": "user", "content": "Hello"}]
    assert http.post("/apply-template", json={"messages": messages}).json() == {"prompt": render(messages, "story")}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": []}, "prompt: the prompt is empty"),
        ({"prompt": [1, [2]]}, "prompt: a list of token ids and texts has no lists in it"),
        ({"prompt": [10**6]}, "token id 1000000 is outside this model's vocabulary of 2048"),
        ({}, "prompt: Field required"),
        ({"prompt": "a", "n_predict": -2}, "n_predict: Input should be greater than or equal to -1"),
        ({"prompt": "a", "grammar": 'root ::= "a'}, "grammar"),
        ({"prompt": "a", "grammar": "root ::= [0-9]", "json_schema": {}}, "give a grammar or a json_schema, not both"),
        ({"prompt": "a", "logit_bias": [["a", 1, 2]]}, "logit_bias"),
        ({"prompt": "a", "model": "none"}, "model: there is no model 'none' here; there is bundled"),
    ],
)
def test_errors_have_its_shape(http, body, message):
    reply = http.post("/completion", json={"n_predict": 2} | body)
    status = 404 if "model" in body else 400
    error = reply.json()["error"]
    assert error.keys() == {"code", "message", "type"}
    assert (reply.status_code, error["code"]) == (status, status)
    assert message in error["message"]
