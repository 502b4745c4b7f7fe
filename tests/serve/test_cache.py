"""States of prompts' beginnings: what was read once is not read again, and no bit changes by it."""

from __future__ import annotations

import httpx
import pytest

STORY = "Once upon a time there was a little girl named Lily. She had a red ball and a blue car. " * 12


def ask(http: httpx.Client, text: str, **options) -> tuple[str, int]:
    body = {"prompt": text, "max_tokens": 12, "temperature": 0} | options
    found = http.post("/v1/completions", json=body).json()
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_hits_are_counted_and_change_nothing(http, llm):
    plain, cached = ask(http, STORY)
    assert cached == 0
    tokens = len(llm.tokenizer.encode(STORY))
    again, cached = ask(http, STORY)
    assert (again, cached) == (plain, (tokens - 1) // 128 * 128)
    assert llm.generate(llm.tokenizer.encode(STORY), 12, temperature=0, top_p=1).text == plain
    # another end: what both begin with is kept once the second has shown where they part
    ends = [f"{STORY} One day, {name}" for name in ("Tim", "Sue", "Ann")]
    counts = [ask(http, end)[1] for end in ends]
    assert counts[0] > 0
    assert all(
        ask(http, end)[0] == llm.generate(llm.tokenizer.encode(end), 12, temperature=0, top_p=1).text for end in ends
    )


def test_a_conversation_goes_on_from_its_state(client):
    messages = [{"role": "system", "content": STORY}, {"role": "user", "content": "Hello"}]
    first = client.chat.completions.create(model="bundled", messages=messages, max_tokens=8, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    second = client.chat.completions.create(model="bundled", messages=messages, max_tokens=8, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 129


@pytest.mark.slow  # four servers
@pytest.mark.parametrize("stored", [False, True])
def test_owners_and_a_restart(start, tmp_path, tmp_key_file, stored):
    options = ["--api-keys", str(tmp_key_file), *(["--store", str(tmp_path / "states")] if stored else [])]
    counts = []
    for _ in range(2):
        server = start(*options)
        for owner in ("ann", "ann", "bob"):
            with httpx.Client(base_url=server.url, timeout=30, headers={"x-api-key": f"key-of-{owner}"}) as http:
                counts.append(ask(http, STORY)[1])
        server.stop()
    assert counts[0] == counts[2] == 0
    assert counts[1] > 0
    assert counts[3:] == ([counts[1]] * 3 if stored else counts[:3])
