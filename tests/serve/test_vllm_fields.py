"""What vLLM adds to /v1/completions."""

from __future__ import annotations

import pytest
import torch
from sse import events

from heronry.text.chat_templates import fill_in_middle, render

PROMPT = "Once upon a time"
BODY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def complete(client, **body) -> dict:
    reply = client.post("/v1/completions", json=BODY | body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def test_what_stopped_it(http, llm):
    plain = complete(http)
    assert (plain["finish_reason"], plain["stop_reason"]) == ("length", None)
    [there], end = llm.tokenizer.encode(" there"), sorted(llm.tokenizer.stop_ids)[0]
    assert complete(http, stop=["zzz", " there"])["stop_reason"] == " there"
    assert complete(http, stop_token_ids=[there])["stop_reason"] == there
    ended = complete(http, logit_bias={str(end): 100})
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", None)


def test_the_stop_string_may_be_part_of_the_text(http):
    plain = complete(http)["text"]
    before = plain.partition(" there")[0]
    kept = complete(http, stop=" there", include_stop_str_in_output=True)
    assert kept["text"] == f"{before} there"
    assert complete(http, stop=" there")["text"] == before
    reply = http.post(
        "/v1/completions", json=BODY | {"stop": " ther", "stream": True, "include_stop_str_in_output": True}
    )
    assert "".join(part["choices"][0]["text"] for part in events(reply)[:-1]) == f"{before} ther"


def test_token_ids(http, llm):
    found = complete(http, return_token_ids=True)
    assert found["prompt_token_ids"] == llm.tokenizer.encode(PROMPT)
    expected = llm.generate(llm.tokenizer.encode(PROMPT), 12, temperature=0)
    assert found["token_ids"] == expected.token_ids
    *parts, _ = events(http.post("/v1/completions", json=BODY | {"return_token_ids": True, "stream": True}))
    choices = [part["choices"][0] for part in parts]
    assert [token for choice in choices for token in choice["token_ids"]] == expected.token_ids
    assert [i for i, choice in enumerate(choices) if "prompt_token_ids" in choice] == [0]
    assert {choice["stop_reason"] for choice in choices} == {None}
    assert "token_ids" not in complete(http)


def test_usage_in_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = BODY | {"prompt": [PROMPT, "The dog"], "stream": True, "stream_options": options}
    *parts, last, done = events(http.post("/v1/completions", json=body))
    assert done == "[DONE]"
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 24
    assert {part["usage"]["prompt_tokens"] for part in parts} == {last["usage"]["prompt_tokens"]}


def test_which_tokens_are_allowed(http, llm):
    ids = llm.tokenizer.encode(" yes no")
    found = complete(http, allowed_token_ids=ids, return_token_ids=True, temperature=1, seed=1)
    assert len(found["token_ids"]) == 12
    assert {*found["token_ids"]} <= {*ids}


def test_bad_words(http, llm):
    plain = complete(http)["text"]
    assert plain.startswith(", there was a")
    without = complete(http, bad_words=["there"])["text"]
    assert "there" not in without
    assert complete(http, bad_words=["zebra"])["text"] == plain
    assert len(llm.tokenizer.encode(" there was")) == 2
    phrase = complete(http, bad_words=["there was"])["text"]  # of which only the last token is banned
    assert phrase.startswith(", there")
    assert "there was" not in phrase


def test_suffix(world, world_llm, http):
    body = {"prompt": "def f(", "suffix": "\n    return x"}
    expected = world_llm.generate(world_llm.tokenizer.encode(fill_in_middle(*body.values())), 12, temperature=0)
    assert complete(world, **body)["text"] == expected.text
    for client, prompt in ((http, "def f("), (world, [5, 6])):
        reply = client.post("/v1/completions", json=BODY | body | {"prompt": prompt})
        assert reply.status_code == 400
        message = "its vocabulary is not" if client is http else "with a suffix the prompt must be a text"
        assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids", "give token ids from 0 to 2047"),
        ({"allowed_token_ids": [2048]}, "allowed_token_ids", "give token ids from 0 to 2047"),
        ({"bad_words": [" "]}, "bad_words", "a word must not be empty"),
    ],
)
def test_bad_fields(http, fields, param, message):
    reply = http.post("/v1/completions", json=BODY | fields)
    assert reply.status_code == 400
    assert (reply.json()["error"]["param"], reply.json()["error"]["message"]) == (param, message)


def expected_column(llm, ids, top) -> list:
    """As vLLM has the log-probabilities of a prompt."""
    logprobs = llm.model(torch.tensor([ids]))[0][0].detach().float().log_softmax(-1)
    column = [None]
    for token, row in zip(ids[1:], logprobs, strict=False):
        order = row.argsort(descending=True).tolist()
        told = dict.fromkeys([token, *order[:top]])
        column.append(
            {
                str(i): {
                    "logprob": pytest.approx(float(row[i]), abs=1e-4),
                    "rank": order.index(i) + 1,
                    "decoded_token": llm.tokenizer.decode([i]),
                }
                for i in told
            }
        )
    return column


@pytest.mark.parametrize("top", [0, 3])
def test_prompt_logprobs(http, llm, top):
    prompt = "Once upon a time there was a"
    body = {"prompt": prompt, "max_tokens": 2, "prompt_logprobs": top}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    ids = llm.tokenizer.encode(prompt)
    assert choice["prompt_logprobs"] == expected_column(llm, ids, top)
    echoed = {"echo": True, "logprobs": 1}
    [both] = http.post("/v1/completions", json=body | echoed).json()["choices"]
    assert both["prompt_logprobs"] == choice["prompt_logprobs"]
    assert {len(told) for told in both["logprobs"]["top_logprobs"][1:]} <= {1, 2}  # one, and that of the text
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "prompt_logprobs": top}
    found = http.post("/v1/chat/completions", json=chat).json()
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]
    text = render(chat["messages"], llm.chat_template)
    assert found["prompt_logprobs"] == expected_column(llm, llm.encode(text, begins=True), top)


ASKED = {"completions": {"prompt": "a"}, "chat/completions": {"messages": [{"role": "user", "content": "a"}]}}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_logprobs": 21}, "Input should be less than or equal to 20"),
        ({"prompt_logprobs": -1}, "Input should be greater than or equal to 0"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs are not for streams"),
    ],
)
def test_prompt_logprobs_that_are_refused(http, path, fields, message):
    reply = http.post(f"/v1/{path}", json=ASKED[path] | fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")
    assert reply.json()["error"]["message"] == message
