"""Mixtures: which row comes from which source, to the row, and what every source has given, to the token."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import made, same

from heronry import InputError
from heronry.data.batching import DocumentSampler, LaneSampler, WindowSampler
from heronry.data.mixture import Mixture, MixtureSampler, Schedule
from heronry.data.token_file import TokenFile, TokenWriter

RATES = st.lists(st.floats(1e-3, 1e3).map(Fraction), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[TokenFile]:
    """Three sources of very different sizes; an id tells where it lies in its source."""
    folder = tmp_path_factory.mktemp("mixture")
    lengths = {"large": [37] * 60, "masked": [11, 3, 0, 90, 64], "tiny": [9]}
    return [made(folder / name, sizes, name == "masked") for name, sizes in lengths.items()]


@settings(max_examples=100)
@given(RATES, st.integers(0, 2**64 - 1), st.integers(0, 40))
def test_a_schedule_is_the_merger_of_even_sequences(rates, seed, lane):
    """Against the plain way: all rows of all sources up to some time, sorted."""
    schedule = Schedule(rates, seed, lane)
    for stride, phase, rate in zip(schedule.strides, schedule.phases, rates, strict=True):
        assert 0 <= phase < stride
        assert stride == round((1 << 48) * max(rates) / rate)
    pairs = list(enumerate(zip(schedule.phases, schedule.strides, strict=True)))
    events = sorted((phase + j * stride, s, j) for s, (phase, stride) in pairs for j in range(120))[:120]
    assert [schedule.locate(i) for i in range(120)] == [(s, j) for _, s, j in events]
    for n in (0, 1, 7, 120):
        assert schedule.counts(n) == [sum(s == source for _, s, _ in events[:n]) for source in range(len(rates))]


@settings(max_examples=60)
@given(RATES, st.integers(0, 2**64 - 1), st.integers(1, 10**9))
def test_the_counts_are_those_of_the_rates(rates, seed, n):
    counts = Schedule(rates, seed).counts(n)
    assert sum(counts) == n
    for rows, rate in zip(counts, rates, strict=True):
        assert abs(rows - n * rate / sum(rates)) <= len(rates)


def test_exact_counts():
    """Weights 5, 3 and 2: of every ten rows five, three and two, whatever the seed."""
    for seed in range(5):
        schedule = Schedule([Fraction(5), Fraction(3), Fraction(2)], seed)
        rows = [schedule.locate(i)[0] for i in range(1000)]
        assert [rows.count(source) for source in range(3)] == [500, 300, 200]
        assert all([rows[i : i + 10].count(source) for source in range(3)] == [5, 3, 2] for i in range(0, 1000, 10))
    orders = {
        tuple(Schedule([Fraction(5), Fraction(3), Fraction(2)], seed).locate(i) for i in range(20)) for seed in range(9)
    }
    assert len(orders) > 4


def test_weights_of_any_size():
    schedule = Schedule([Fraction(1e300), Fraction(1e-300)], 1)
    assert [schedule.locate(i) for i in (0, 10**9)] == [(0, 0), (0, 10**9)]
    assert schedule.counts(10**12) == [10**12, 0]


def samplers(files: list[TokenFile], order: str, length: int = 16, lanes: int = 0) -> list:
    if order == "carried":
        return [LaneSampler(file, length, lanes, 5) for file in files]
    if order == "documents":
        return [DocumentSampler(file, length, 5) for file in files]
    return [WindowSampler(file, length, 5, order) for file in files]


@pytest.mark.parametrize("order", ["documents", "shuffle", "sequential", "random", "magic_prime"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.25, 0.05), (1e-3, 5, 2)])
def test_every_token_is_accounted_for(files, order, weights):
    """Each source is read exactly as it is alone, row for row and epoch for epoch; the tokens of each are those that
    the rows hold; and their shares are the weights, although rows of a tiny source are short."""
    if order == "magic_prime":
        files, weights = files[:2], weights[:2]
    alone = samplers(files, order)
    mixed = MixtureSampler(samplers(files, order), weights, 3)
    read, tokens = [0] * len(files), [0] * len(files)
    n = 2000
    for i in range(n):
        if i % 97 == 0:
            assert mixed.tokens_read(i) == tokens
        row = mixed.row(i)
        assert same(row, alone[row.source].row(read[row.source]))
        read[row.source] += 1
        tokens[row.source] += len(row.targets)
    assert mixed.tokens_read(n) == tokens
    for share, weight in zip(tokens, weights, strict=True):
        assert share / sum(tokens) == pytest.approx(weight / sum(weights), abs=4 * 16 / sum(tokens))
    mean = sum(tokens) / n
    everything = sum(sampler.tokens_per_epoch for sampler in alone)
    assert mixed.rows_per_epoch == pytest.approx(everything / mean, rel=0.02, abs=1)
    for i in (1500, 3, 777):  # at random, and from the middle
        other = MixtureSampler(samplers(files, order), weights, 3)
        assert same(other.row(i), mixed.row(i))


def test_the_tokens_of_whole_epochs_are_those_of_the_file(files):
    """In one epoch of a source every token of it is a target once."""
    mixed = MixtureSampler(samplers(files, "documents"), (3, 2, 1), 0)
    seen: list[list[int]] = [[], [], []]
    i = 0
    while min(map(len, seen)) < 2 or len(seen[0]) < len(files[0].tokens):
        row = mixed.row(i)
        seen[row.source] += row.targets.tolist()
        i += 1
    for targets, file in zip(seen, files, strict=True):
        n = len(file.tokens)
        for epoch in range(len(targets) // n):
            assert sorted(targets[epoch * n : (epoch + 1) * n]) == list(range(1, n + 1))


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_read_on_in_every_source(files, lanes):
    """What a lane reads of a source is one text, as if there were no other; its rows are in between."""
    files = files[:2]
    mixed = MixtureSampler(samplers(files, "carried", 8, lanes), (2, 1), 4, lanes)
    alone = samplers(files, "carried", 8, lanes)
    tokens = [0, 0]
    read = {(source, lane): 0 for source in (0, 1) for lane in range(lanes)}
    for step in range(400):
        assert step % 50 or mixed.tokens_read(step * lanes) == tokens
        for lane in range(lanes):
            row = mixed.row(step * lanes + lane)
            key = (row.source, lane)
            plain = alone[row.source].row(read[key] * lanes + lane)
            assert same(row, plain)
            assert row.continues == plain.continues
            read[key] += 1
            tokens[row.source] += len(row.targets)
    assert tokens[0] / sum(tokens) == pytest.approx(2 / 3, abs=0.01)


def written(prefix: Path, end_of_text: int | None = None, **metadata) -> Path:
    writer = TokenWriter(prefix, "uint16")
    writer.write(np.arange(5))
    writer.finish({"end_of_text": end_of_text, **metadata})
    return prefix


def test_sources_of_different_tokenizers_are_refused_by_name(tmp_path):
    a = written(tmp_path / "a", tokenizer="bytes", vocab_size=256, template="g1")
    b = written(tmp_path / "b", tokenizer="world", vocab_size=65536, end_of_text=0)
    unknown = written(tmp_path / "c")
    with pytest.raises(InputError, match=r"b: was made with the tokenizer world, but .*a with bytes; all sources need"):
        Mixture([a, b], [1, 1])
    for name, content in (("d", "1"), ("e", "1"), ("f", "2")):
        written(tmp_path / name, tokenizer=f"{name}.tokenizer.json", vocab_size=9)
        (tmp_path / f"{name}.tokenizer.json").write_text(content)
    assert Mixture([tmp_path / "d", tmp_path / "e"], [1, 1]).tokenizer == tmp_path / "d.tokenizer.json"
    with pytest.raises(InputError, match=r"f: was made with the tokenizer .*f.tokenizer.json, but .*d with .*d.tokeni"):
        Mixture([tmp_path / "d", tmp_path / "f"], [1, 1])
    data = Mixture([unknown, a], [1, 2])
    assert (data.tokenizer, data.vocab_size, data.n_tokens) == ("bytes", 256, 10)
    assert data.notes == {"opening_tokens": [0], "chat_template": "g1"}
    other = written(tmp_path / "g", tokenizer="bytes", vocab_size=256, template="world")
    assert Mixture([a, other], [1, 1]).notes == {"opening_tokens": [0]}
    small = written(tmp_path / "h", tokenizer="bytes", vocab_size=3)
    with pytest.raises(InputError, match=r"c: has token ids up to 4, but the tokenizer of .*h ends at 2"):
        Mixture([unknown, small], [1, 1])
    ends = written(tmp_path / "i", end_of_text=3)
    with pytest.raises(InputError, match=r"i: its texts end with the id 3, but those of .*a with 0"):
        Mixture([a, ends], [1, 1])
