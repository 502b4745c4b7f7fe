"""lm-evaluation-harness over HTTP gives the scores of `heronry eval`'s own reader."""

from __future__ import annotations

from math import log

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from heronry.evaluate import log_likelihoods, score_texts
from heronry.integrations.lm_eval import HeronryLM

PAIRS = [
    ("Once upon a time there was a little", " girl named Lily."),
    ("Once upon a time there was a little", " dog. He liked to"),
    ("She had a red", " ball"),
    ("Tim was sad because", " xylophone quartz"),
]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture
def remote(server) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="bundled", tokenizer_backend="remote", batch_size=2
    )


def test_log_likelihoods(remote, llm):
    """The harness puts nothing in front of a context, so nothing is here either."""
    found = remote.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    ids = [tuple(llm.tokenizer.encode(text) for text in pair) for pair in PAIRS]
    expected = log_likelihoods(llm.model, ids)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)


def test_whole_texts_score_as_in_heronry_eval(remote, llm):
    texts = [context + rest for context, rest in PAIRS]
    found = remote.loglikelihood_rolling(requests("loglikelihood_rolling", [(x,) for x in texts]), disable_tqdm=True)
    own = HeronryLM(llm).loglikelihood_rolling(requests("loglikelihood_rolling", [(x,) for x in texts]), True)
    assert found == pytest.approx(own, rel=1e-5)  # float32: products of other shapes round otherwise
    score = score_texts(llm, texts)
    assert f"{-sum(found) / log(2) / score.bytes:.4f}" == f"{score.bits_per_byte:.4f}"  # as the harness prints it


def test_texts(remote, llm):
    asked = [(context, {"until": ["."], "max_gen_toks": 24, "temperature": 0.0}) for context, _ in PAIRS]
    found = remote.generate_until(requests("generate_until", asked), disable_tqdm=True)
    plain = [llm.generate(llm.tokenizer.encode(context), 24, temperature=0, stop=".").text for context, _ in PAIRS]
    assert found == plain
