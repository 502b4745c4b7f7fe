"""/v1/embeddings, by the official client."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest

TEXTS = ["A frog sat in the pond.", "Mom drove the red car to the shop. " * 30, "x"]


def test_every_form_of_input(client, llm):
    ids = [llm.encode(text, begins=True) for text in TEXTS]
    expected = llm.embed(TEXTS)
    for given, rows in [(TEXTS, [0, 1, 2]), (TEXTS[1], [1]), (ids, [0, 1, 2]), (ids[1], [1])]:
        found = client.embeddings.create(model="bundled", input=given)  # the client asks for base64 by itself
        assert [x.index for x in found.data] == list(range(len(rows)))
        for item, row in zip(found.data, rows, strict=True):
            assert np.array_equal(np.float32(item.embedding), expected[row])
        read = sum(len(ids[row]) for row in rows)
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (read, read)
        assert (found.object, found.data[0].object, found.model) == ("list", "embedding", "bundled")


def test_encodings_and_dimensions(http, llm):
    body = {"model": "bundled", "input": TEXTS[0]}
    floats = http.post("/v1/embeddings", json=body).json()
    assert set(floats) == {"object", "data", "model", "usage"}
    assert set(floats["data"][0]) == {"object", "index", "embedding"}
    coded = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.float32(floats["data"][0]["embedding"]))
    short = http.post("/v1/embeddings", json=body | {"dimensions": 20}).json()["data"][0]["embedding"]
    assert np.array_equal(np.float32(short), llm.embed(TEXTS[0], dimensions=20)[0])
    state = http.post("/v1/embeddings", json=body | {"pooling": "state"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.float32(state), llm.embed(TEXTS[0], pooling="state")[0])


def test_many_texts_beside_a_stream(client, llm):
    """More than there are rows; a stream goes on meanwhile, and gives the text that it gives alone."""
    texts = [f"Story {i} is about a frog." for i in range(70)]
    options = {"model": "bundled", "prompt": "Once", "max_tokens": 40, "temperature": 0}
    alone = client.completions.create(**options).choices[0].text
    stream = client.completions.create(**options, stream=True)
    pieces = [next(stream).choices[0].text]
    found = client.embeddings.create(model="bundled", input=texts)
    pieces += [part.choices[0].text for part in stream]
    assert "".join(pieces) == alone
    assert np.array_equal(np.float32([x.embedding for x in found.data]), llm.embed(texts))


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"input": ""}, 400, "input", "the input is empty"),
        ({"input": []}, 400, "input", "the input is empty"),
        ({"input": ["a", ""]}, 400, "input", "the input is empty"),
        ({"input": ["a"] * 2049}, 400, "input", "the input has 2,049 texts; at most 2,048 are embedded at once"),
        ({"input": [5000]}, 400, None, "token id 5000 is outside this model's vocabulary of 2048"),
        ({"dimensions": 193}, 400, "dimensions", "dimensions must be a whole number from 1 to 192, got 193"),
        ({"dimensions": 0}, 400, "dimensions", "Input should be greater than or equal to 1"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "Input should be 'float' or 'base64'"),
        ({"pooling": "max"}, 400, "pooling", "Input should be 'mean' or 'state'"),
        ({"model": "other"}, 404, "model", "there is no model 'other' here; there is bundled"),
    ],
)
def test_what_is_refused(http, change, status, param, message):
    found = http.post("/v1/embeddings", json={"model": "bundled", "input": "a"} | change)
    error = found.json()["error"]
    assert (found.status_code, error["param"], error["message"]) == (status, param, message)


def test_a_text_beyond_the_limit_is_refused(client):
    with pytest.raises(openai.BadRequestError, match=r"the prompt has 1,200,001 tokens; at most 1,048,576 are read"):
        client.embeddings.create(model="bundled", input=[[1] * 1_200_001])
