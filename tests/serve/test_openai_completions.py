"""/v1/completions, by the official client."""

from __future__ import annotations

import openai
import pytest

import heronry

GREEDY = {"model": "bundled", "temperature": 0}
PROMPT = "Once upon a time"


def test_the_text_is_what_the_engine_writes(client, llm):
    found = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=20)
    expected = llm.generate(llm.tokenizer.encode(PROMPT), 20, temperature=0, top_p=1)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason) == (expected.text, "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (4, 20, 24)
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")


def test_four_forms_of_a_prompt(client, llm):
    ids = llm.tokenizer.encode(PROMPT)
    other = "The dog was"
    encode = llm.tokenizer.encode
    texts = {prompt: llm.generate(encode(prompt), 9, temperature=0, top_p=1).text for prompt in (PROMPT, other)}
    for prompt, expected in [
        (PROMPT, [PROMPT]),
        ([PROMPT, other], [PROMPT, other]),
        (ids, [PROMPT]),
        ([ids, llm.tokenizer.encode(other)], [PROMPT, other]),
    ]:
        found = client.completions.create(**GREEDY, prompt=prompt, max_tokens=9)
        assert [x.text for x in found.choices] == [texts[x] for x in expected]
        assert [x.index for x in found.choices] == list(range(len(expected)))


def test_sampling_and_seeds(client, llm):
    options = {"seed": 7, "temperature": 1.3, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    found = client.completions.create(model="bundled", prompt=[PROMPT, "A"], n=3, max_tokens=12, **options)
    expected = llm.generate([*map(llm.tokenizer.encode, (PROMPT, "A"))], 12, n=3, **options)
    assert [x.text for x in found.choices] == [x.text for row in expected for x in row]
    more = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "penalty_decay": 0.9}
    found = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=12, **options, extra_body=more)
    assert found.choices[0].text == llm.generate(llm.tokenizer.encode(PROMPT), 12, **options, **more).text
    begun = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=12, extra_body={"add_special_tokens": True})
    assert begun.choices[0].text == llm.generate(PROMPT, 12, temperature=0, top_p=1).text
    [there] = llm.tokenizer.encode(" there")
    banned = client.completions.create(**GREEDY, prompt=f"{PROMPT},", max_tokens=1, logit_bias={str(there): -100})
    assert client.completions.create(**GREEDY, prompt=f"{PROMPT},", max_tokens=1).choices[0].text == " there"
    assert banned.choices[0].text != " there"


def test_a_stream_is_the_whole(client):
    options = {"model": "bundled", "prompt": [PROMPT, "The dog"], "n": 2, "max_tokens": 15, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**options)
    texts, tokens, logprobs, reasons = {}, {}, {}, {}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
        logprobs.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
        reasons[choice.index] = choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
        assert reasons[choice.index] == choice.finish_reason


def test_stops(client, llm):
    plain = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=40).choices[0].text
    cut = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=40, stop=["zzz", " girl"])
    assert cut.choices[0].text == plain.partition(" girl")[0] != plain
    assert cut.choices[0].finish_reason == "stop"
    [there] = llm.tokenizer.encode(" there")
    found = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=9, extra_body={"stop_token_ids": [there]})
    assert (found.choices[0].text, found.choices[0].finish_reason) == (",", "stop")


def test_echo_and_log_probabilities(client, llm):
    """What lm-evaluation-harness asks for: one entry follows the prompt, whatever it is, and the top holds the best."""
    ids = llm.tokenizer.encode("Once upon a time there was a little girl named Sue.")
    found = client.completions.create(**GREEDY, prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1234)
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(ids) + 1
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    [(total, _)] = heronry.evaluate.log_likelihoods(llm.model, [(ids[:1], ids[1:])])
    assert sum(logprobs.token_logprobs[1:-1]) == pytest.approx(total, abs=1e-4)
    for chosen, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
        assert chosen in top.values()
        assert chosen <= max(top.values())
    text = found.choices[0].text
    assert [text[i:].startswith(token) for i, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)] == [
        True
    ] * len(logprobs.tokens)


def test_the_end_of_text_is_an_entry(client, llm):
    end = sorted(llm.tokenizer.stop_ids)[0]
    found = client.completions.create(
        **GREEDY, prompt=PROMPT, max_tokens=1, logprobs=1, echo=True, logit_bias={str(end): 100}
    )
    [choice] = found.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "stop")
    assert choice.logprobs.tokens[-1] == "<|endoftext|>"
    assert len(choice.logprobs.tokens) == 5


def test_best_of(client):
    options = {"model": "bundled", "prompt": PROMPT, "max_tokens": 8, "seed": 5}
    every = client.completions.create(**options, n=6, logprobs=0).choices
    mean = {x.text: sum(x.logprobs.token_logprobs) / 8 for x in every}
    best = client.completions.create(**options, n=2, best_of=6)
    assert [x.text for x in best.choices] == sorted(mean, key=mean.get, reverse=True)[:2]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 48


def test_names_of_tokens(client, llm):
    pieces = llm.tokenizer.encode("ä")
    found = client.completions.create(**GREEDY, prompt=[pieces], max_tokens=0, logprobs=0, echo=True)
    assert found.choices[0].logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa4"]
    found = client.completions.create(
        **GREEDY, prompt="a", max_tokens=0, logprobs=0, echo=True, extra_body={"return_tokens_as_token_ids": True}
    )
    assert found.choices[0].logprobs.tokens == [f"token_id:{llm.tokenizer.encode('a')[0]}"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [10**6]}, None, "outside this model's vocabulary"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, None, "1000 completions were asked for at once; at most 64"),
        ({"best_of": 1, "n": 2}, "best_of", "best_of must be at least n"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"stop": [""]}, "stop", "must not be empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 stop strings"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "its keys are token ids"),
        ({"logit_bias": {"99999": 1}}, None, "must be below 2048"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for streams"),
    ],
)
def test_bad_requests(client, fields, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.completions.create(**({"model": "bundled", "prompt": "a", "max_tokens": 2} | fields))
    assert error.value.body["type"] == "invalid_request_error"
    assert error.value.body["param"] == param
