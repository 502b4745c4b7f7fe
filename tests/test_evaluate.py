"""Likelihoods, bits a byte and LAMBADA, against sums over the logits of whole texts."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry import LLM, InputError, State, evaluate
from heronry.checkpoint import assemble
from heronry.cli.app import app
from heronry.evaluate import encode_pair, log_likelihoods, opening_tokens, read_texts, score_lambada, score_texts

IDS = st.lists(st.integers(0, 100), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def models(random_checkpoint):
    loaded = {}

    def model(version: str):
        if version not in loaded:
            weights = random_checkpoint(version, width=32, heads=2, ffn=40, rank=3)
            loaded[version] = assemble({name: x.double() for name, x in weights.items()})
        return loaded[version]

    return model


def by_hand(model, before, after) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]]))[0][0, len(before) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum()
    return chosen.item(), logits.argmax(-1).tolist() == list(after)


@given(pairs=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6), share=st.booleans())
@settings(max_examples=15)
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_likelihoods(models, version, pairs, share):
    model = models(version)
    if share:
        pairs = [(pairs[0][0], after) for _, after in pairs]
    for (before, after), (likelihood, hit) in zip(pairs, log_likelihoods(model, pairs), strict=True):
        expected, right = by_hand(model, before, after)
        assert likelihood == pytest.approx(expected, abs=1e-9)
        assert hit == right


def test_passes_of_every_size_say_the_same(models, monkeypatch):
    model = models("7")
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 9, 30, 1, 17]
    texts = [torch.randint(101, (n,), generator=generator).tolist() for n in lengths]
    pairs = [(texts[i], texts[j]) for i in range(6) for j in range(6)]
    whole = log_likelihoods(model, pairs)
    for tokens, rows in ((1, 64), (8, 2), (25, 64), (4096, 1)):
        monkeypatch.setattr(evaluate, "MAX_TOKENS", tokens)
        monkeypatch.setattr(evaluate, "MAX_ROWS", rows)
        again = log_likelihoods(model, pairs)
        assert [hit for _, hit in again] == [hit for _, hit in whole]
        torch.testing.assert_close(torch.tensor([x for x, _ in again]), torch.tensor([x for x, _ in whole]))


def test_the_most_likely_text_is_called_that(models):
    model = models("7")
    with torch.no_grad():
        tokens = [5]
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert log_likelihoods(model, [(tokens[:1], tokens[1:]), (tokens[:1], [*tokens[1:-1], 3])])[0][1]


def test_what_is_shared_is_read_once(models):
    """A long beginning and fifty continuations: fewer tokens go through the model than for one of each."""
    model = models("4")
    read = []
    hook = model.emb.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    model.native_step_enabled = False
    log_likelihoods(model, [(list(range(90)), [i, i + 1]) for i in range(50)])
    hook.remove()
    model.native_step_enabled = True
    assert sum(read) == 90 + 50


def test_bits_of_bytes(models, random_checkpoint):
    llm = LLM(assemble(random_checkpoint("6", width=32, heads=2, ffn=40, rank=3, vocab=256)))
    texts = ["The rook sat.", "Äh, ja!", ""]
    scores = score_texts(llm, texts)
    nats = 0.0
    for text in texts[:2]:
        ids = list(text.encode())
        nats -= by_hand(llm.model, ids[:1], ids[1:])[0]
    count = sum(len(text.encode()) - 1 for text in texts[:2])
    assert (scores.tokens, scores.bytes) == (count, count)
    assert scores.nats == pytest.approx(nats, rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / count, rel=1e-5)
    with pytest.raises(InputError, match="there is no text to measure"):
        score_texts(llm, ["", "a"])


def test_bits_of_the_bundled_model():
    """As the script that made it measures: from the end mark to the end mark."""
    llm = LLM()
    text = "Once upon a time there was a little bird. It wanted to fly."
    scores = score_texts(llm, [text])
    expected, _ = by_hand(llm.model, [0], llm.tokenizer.encode(text))
    assert scores.nats == pytest.approx(-expected, rel=1e-5)
    assert scores.bytes == len(text)
    assert 0.3 < scores.bits_per_byte < 2


@pytest.mark.parametrize("version", ["4", "7"])
def test_texts_begin_from_a_tuned_state(version, random_checkpoint):
    """As they do where the same state is in the checkpoint; many side by side, and a single one."""
    weights = random_checkpoint(version, width=32, heads=2, ffn=40, rank=3, vocab=256, tuned=True)
    tuned = LLM(assemble(dict(weights)))
    plain = LLM(assemble({name: x for name, x in weights.items() if "time_state" not in name}))
    started = LLM(plain.model)
    started.start = State(tuned.model.initial_state().layers, plain.model.fingerprint)
    for texts in (["The rook sat."], ["The rook sat.", "The heron stood.", "a b"]):
        expected, found = score_texts(tuned, texts), score_texts(started, texts)
        assert found.nats == pytest.approx(expected.nats, rel=1e-5)
        assert score_texts(plain, texts).nats != pytest.approx(expected.nats, rel=1e-3)
        assert score_lambada(started, texts).perplexity == pytest.approx(
            score_lambada(tuned, texts).perplexity, rel=1e-5
        )


def test_lambada(models):
    llm = LLM()
    passages = ["Once upon a time there was a little girl named Lily", "The dog was very happy"]
    score = score_lambada(llm, passages)
    scores = [
        by_hand(llm.model, *encode_pair(llm, *(text.rsplit(" ", 1)[0], " " + text.rsplit(" ", 1)[1])))
        for text in passages
    ]
    assert score.perplexity == pytest.approx(math.exp(-sum(x for x, _ in scores) / 2), rel=1e-4)
    assert score.accuracy == sum(hit for _, hit in scores) / 2
    with pytest.raises(InputError, match="has only one word"):
        score_lambada(llm, ["Hello"])


def test_world_models_read_the_end_of_text_in_front_of_a_context(random_checkpoint):
    """As they read it in front of a whole text, and as the published figures were measured."""
    llm = LLM(assemble(random_checkpoint("7", width=64, heads=1, ffn=64, rank=3, vocab=65536)))
    ids = llm.tokenizer.encode("The cat sat on the mat")
    assert opening_tokens(llm) == [0]
    assert encode_pair(llm, "The cat sat on the", " mat") == ([0, *ids[:-1]], ids[-1:])
    expected, _ = by_hand(llm.model, [0, *ids[:-1]], ids[-1:])
    assert score_lambada(llm, ["The cat sat on the mat"]).perplexity == pytest.approx(math.exp(-expected), rel=1e-4)


def test_progress_counts_tokens_within_a_text(models):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "MAX_TOKENS", 64)
        pairs = [([1], [2] * 300), ([1], [3, 4]), ([5] * 130, [6])]
        log_likelihoods(models("7"), pairs, lambda done, total: calls.append((done, total)))
    assert {total for _, total in calls} == {1 + 300 + 2 + 130 + 1}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == 434
    assert max(b - a for (a, _), (b, _) in pairwise(calls)) <= 64


def test_pairs_are_cut_as_the_harness_does():
    llm = LLM()
    whole = llm.tokenizer.encode("The cat sat")
    before, after = encode_pair(llm, "The cat ", "sat")
    assert (before, after) == ([0, *llm.tokenizer.encode("The cat")], whole[len(llm.tokenizer.encode("The cat")) :])
    assert encode_pair(llm, "", "The cat") == ([0], llm.tokenizer.encode("The cat"))


def test_on_the_command_line(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("Once upon a time there was a bird.")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"The {x} was big"}) + "\n" for x in ("cat", "dog")))
    app(["eval", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], standalone_mode=False)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'a.txt'}: ")
    assert "(34 bytes" in lines[0]
    assert "1 text)" in lines[0]
    assert "2 texts)" in lines[1]
    app(["eval", "--lambada", str(tmp_path / "b.jsonl")], standalone_mode=False)
    assert "2 passages, perplexity " in capfd.readouterr().out


def test_bad_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"story": "y"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: does not have the shape text \(keys: 'story'\)"):
        read_texts(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(InputError, match=r"line 1: 'text' is neither a string nor a list of messages"):
        read_texts(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"c.txt, line 1: is not UTF-8 \(byte 0xff at position 2\)"):
        read_texts(tmp_path / "c.txt")
    with pytest.raises(InputError, match="no such file or folder"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(
        InputError, match=r"d.jsonl, line 1: has the shape messages, not text \(keys: 'messages'\); name"
    ):
        read_texts(tmp_path / "d.jsonl")
    with pytest.raises(InputError, match="line 1: is a conversation, but only texts can be measured"):
        read_texts(tmp_path / "d.jsonl", "messages")
    (tmp_path / "e.jsonl").write_text('{"text": "x", "messages": [], "id": 1}\n{"text": "y", "output": "z"}\n')
    assert read_texts(tmp_path / "e.jsonl") == ["x", "y"]
    assert read_texts(tmp_path / "e.jsonl", "text") == ["x", "y"]
    with pytest.raises(InputError, match="there is no passage to measure"):
        score_lambada(LLM(), [])


def test_a_long_text_is_read_by_the_piece_with_its_state(models, monkeypatch):
    model = models("7")
    tokens = torch.randint(101, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, _ = by_hand(model, tokens[:1], tokens[1:])
    monkeypatch.setattr(evaluate, "MAX_TOKENS", 64)
    likelihood, _ = log_likelihoods(model, [(tokens[:1], tokens[1:])])[0]
    assert likelihood == pytest.approx(expected, abs=1e-7)
    assert log_likelihoods(model, [(tokens[:699], tokens[699:])])[0][0] == pytest.approx(
        by_hand(model, tokens[:699], tokens[699:])[0], abs=1e-9
    )
