"""Texts as vectors: by the definition, in every generation, and the same to the bit alone and beside others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import heronry
from heronry.checkpoint import assemble
from heronry.engine import Sampling
from heronry.engine.decode_batch import SequenceDecoder
from heronry.engine.embeddings import Pooler, embed, embedding_model, embedding_size
from heronry.engine.requests import Limits, Request
from heronry.engine.scheduler import Scheduler
from heronry.errors import InputError

PROMPTS = [[(7 * i * i + 3 * n + i) % 101 for i in range(n)] for n in (1, 5, 63, 64, 65, 130, 300, 577, 2)]


@pytest.fixture(params=["float32", "bfloat16"])
def model(request, version, random_checkpoint):
    return assemble(random_checkpoint(version, width=128, heads=2, ffn=256), dtype=getattr(torch, request.param))


@pytest.fixture(scope="module")
def llm() -> heronry.LLM:
    return heronry.LLM()


@pytest.mark.parametrize("pooling", ["mean", "state"])
def test_alone_and_beside_others(model, pooling):
    together = embed(model, PROMPTS, pooling=pooling)
    assert together.dtype == np.float32
    assert together.shape == (len(PROMPTS), embedding_size(model, pooling))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    for prompt, vector in zip(PROMPTS, together, strict=True):
        assert np.array_equal(embed(model, [prompt], pooling=pooling)[0], vector)


def test_the_mean_of_what_the_head_reads(model):
    """The head times the outputs is the logits, and their mean is the embedding."""
    model.native_step_enabled = False
    with torch.inference_mode():
        outputs, _ = embedding_model(model)(torch.tensor(PROMPTS[2:3]))
        logits, _ = model(torch.tensor(PROMPTS[2:3]))
        assert torch.equal(model.head(outputs), logits)
    mean = outputs[0].double().mean(0).numpy()
    bound = 1e-5 if model.dtype == torch.float32 else 1e-2  # packed or not, sums round otherwise
    np.testing.assert_allclose(embed(model, PROMPTS[2:3])[0], mean / np.linalg.norm(mean), atol=bound)


def test_the_state_of_the_last_layer(random_checkpoint):
    model = assemble(random_checkpoint("7"))
    with torch.inference_mode():
        _, state = embedding_model(model)(torch.tensor(PROMPTS[1:2]), cu_seqlens=(0, 5))
    wkv = state.layers[-1].wkv.double().numpy().ravel()
    assert np.array_equal(
        embed(model, PROMPTS[1:2], pooling="state")[0], (wkv / np.sqrt((wkv**2).sum())).astype(np.float32)
    )


def test_the_scheduler_gives_the_same(model):
    """Beside a sequence that is decoded, so that the prompts are read in small parts."""
    body = embedding_model(model)
    scheduler = Scheduler(Limits(rows=8, waiting=20, tokens=1000))
    scheduler.start()
    vectors: dict[int, np.ndarray] = {}

    class Receiver:
        def __init__(self, i: int):
            self.i, self.pooler = i, Pooler()

        def on_prompt(self, state, _) -> None:
            vectors[self.i] = self.pooler.finish(state)

    class Reader:
        def on_prompt(self, *_) -> None: ...

        def on_event(self, *_) -> bool:
            return True

    scheduler.submit(Request(model, [1, 2], [SequenceDecoder(Sampling(seed=0), 200)], Reader()))
    for i, prompt in enumerate(PROMPTS):
        receiver = Receiver(i)
        scheduler.submit(Request(body, prompt, [], receiver, on_outputs=receiver.pooler.add))
    scheduler.close(30)
    expected = embed(model, PROMPTS)
    assert [i for i in range(len(PROMPTS)) if not np.array_equal(vectors[i], expected[i])] == []


def test_llm(llm):
    texts = ["A frog sat in the pond.", "The frog swam in the water.", "Mom drove the red car to the shop."]
    vectors = llm.embed(texts)
    assert vectors.shape == (3, 192)
    similar = vectors @ vectors.T
    assert similar[0, 1] > similar[0, 2]
    assert np.array_equal(llm.embed(texts[1]), vectors[1:2])
    assert np.array_equal(llm.embed([llm.encode(texts[1], begins=True)]), vectors[1:2])
    short = llm.embed(texts, dimensions=50)
    np.testing.assert_allclose(short, vectors[:, :50] / np.linalg.norm(vectors[:, :50], axis=1)[:, None], atol=1e-6)
    assert llm.embed(texts, pooling="state").shape == (3, 192 * 64)


def test_progress_and_more_texts_than_a_group(llm):
    texts = [f"Story {i} is short." for i in range(70)]
    told: list[tuple[int, int]] = []
    vectors = llm.embed(texts, progress=lambda done, total: told.append((done, total)))
    assert np.array_equal(vectors[66], llm.embed(texts[66])[0])
    total = sum(len(llm.encode(text, begins=True)) for text in texts)
    assert told[-1] == (total, total)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        (["a"], {"pooling": "max"}, "pooling must be one of mean, state, got 'max'"),
        (["a"], {"dimensions": 193}, "dimensions must be a whole number from 1 to 192, got 193"),
        (["a"], {"dimensions": 0}, "dimensions must be a whole number of at least 1, got 0"),
        ([[5000]], {}, "token id 5000 is outside this model's vocabulary of 2048"),
    ],
)
def test_what_is_refused(llm, texts, options, message):
    with pytest.raises(InputError, match=message):
        llm.embed(texts, **options)


def test_nothing_that_is_not_a_number(random_checkpoint):
    weights = random_checkpoint("7")
    weights["ln_out.weight"][3] = torch.inf
    with pytest.raises(InputError, match="the embedding contains NaN or infinity"):
        embed(assemble(weights), [[1, 2]])
