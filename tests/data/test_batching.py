"""Rows: what they hold together, whoever asks for them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry import RWKV7, InputError
from heronry.data.batching import WINDOW_ORDERS, DocumentSampler, Row, WindowSampler, collate
from heronry.data.token_file import TokenFile, TokenWriter
from heronry.models import RWKV7Config

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=15).filter(any)


def made(prefix: Path, lengths: list[int], masked: bool = False, end_of_text: int | None = None) -> TokenFile:
    """Documents whose ids count on through the whole file from 1, so that an id tells where it lies."""
    writer, at = TokenWriter(prefix, "int32"), 1
    for n in lengths:
        ids = np.arange(at, at + n)
        writer.write(ids, ids % 3 > 0 if masked else None)
        at += n
    writer.finish({"end_of_text": end_of_text})
    return TokenFile(prefix)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sampling") / "x"


def same(a: Row, b: Row) -> bool:
    masks = (a.mask is None) == (b.mask is None) and (a.mask is None or np.array_equal(a.mask, b.mask))
    return (
        masks and a.starts == b.starts and np.array_equal(a.inputs, b.inputs) and np.array_equal(a.targets, b.targets)
    )


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 30), st.integers(0, 2**64 - 1), st.booleans())
def test_documents_make_every_token_a_target_once_and_do_not_leak(prefix, lengths, length, seed, masked):
    file = made(prefix, lengths, masked, end_of_text=77_777)
    sampler = DocumentSampler(file, length, seed)
    n = sampler.rows_per_epoch
    assert n == math.ceil(sum(lengths) / length)
    first = {int(file.offsets[d]) + 1: d for d in range(len(file)) if lengths[d]}  # first id -> document
    for epoch in (0, 1):
        rows = [sampler.row(epoch * n + j) for j in range(n)]
        assert [len(row.targets) for row in rows[:-1]] == [length] * (n - 1)
        targets = np.concatenate([row.targets for row in rows])
        assert sorted(targets) == list(range(1, sum(lengths) + 1))
        whole: dict[int, list[int]] = {}  # document -> its tokens, put together from the pieces
        for row in rows:
            assert row.inputs.dtype == row.targets.dtype == np.int64
            assert row.starts[0] == 0
            for a, b in zip(row.starts, (*row.starts[1:], len(row.targets)), strict=True):
                assert a < b
                begins = int(row.targets[a])
                # what comes in front: the end of text, or the token before the cut, which a row before has brought
                if begins in first:
                    assert row.inputs[a] == 77_777
                    document = whole.setdefault(first[begins], [])
                    assert not document
                else:
                    assert row.inputs[a] == begins - 1
                    document = next(tokens for tokens in whole.values() if tokens[-1] == begins - 1)
                assert np.array_equal(row.inputs[a + 1 : b], row.targets[a : b - 1])
                document += row.targets[a:b].tolist()
            if masked and file.mask is not None:
                assert row.mask.dtype == bool
                assert np.array_equal(row.mask, row.targets % 3 > 0)
        assert whole == {d: file.document(d).tolist() for d in range(len(file)) if lengths[d]}


def test_epochs_and_seeds_have_orders_of_their_own(prefix):
    file = made(prefix, [5] * 200)
    orders = []
    for seed in (1, 2):
        for sampler in (DocumentSampler(file, 5, seed), WindowSampler(file, 5, seed)):
            orders += [tuple(int(sampler.row(epoch * 200 + j).targets[0]) for j in range(200)) for epoch in (0, 1)]
    assert len(set(orders)) == 8
    assert DocumentSampler(file, 5).row(0).inputs[0] == 0  # no end of text is known


@settings(max_examples=50)
@given(LENGTHS.filter(lambda lengths: sum(lengths) > 1), st.integers(1, 30), st.sampled_from(["shuffle", "sequential"]))
def test_windows_make_every_token_but_the_first_a_target_once(prefix, lengths, length, order):
    file = made(prefix, lengths, masked=True)
    sampler = WindowSampler(file, length, 3, order)
    n = sampler.rows_per_epoch
    for epoch in (0, 1):
        rows = [sampler.row(epoch * n + j) for j in range(n)]
        targets = np.concatenate([row.targets for row in rows]).tolist()
        assert sorted(targets) == list(range(2, sum(lengths) + 1))
        assert order == "shuffle" or targets == sorted(targets)
        for row in rows:
            assert row.starts == (0,)
            assert np.array_equal(row.inputs, row.targets - 1)
            assert row.mask is None or np.array_equal(row.mask, row.targets % 3 > 0)


@settings(max_examples=50)
@given(st.integers(3, 400), st.integers(1, 7), st.integers(0, 6))
def test_cubic_is_a_bijection_and_what_rwkv_lm_does(prefix, windows, length, rest):
    file = made(prefix, [windows * length + rest % length])
    sampler = WindowSampler(file, length, order="magic_prime")
    # as its make_data.py finds the prime and its dataset.py the place
    most = len(file.tokens) // length - 1
    primes = [p for p in range(2, most + 1) if p % 3 == 2 and not any(p % d == 0 for d in range(2, p))]
    prime = primes[-1]
    assert sampler.rows_per_epoch == prime
    starts = []
    for row in range(prime + 3):
        ii = 1 + row
        factor = int(prime * ((math.sqrt(5) - 1) / 2))
        starts.append(factor * ii * ii * ii % prime * length)
        assert sampler.row(row).inputs.tolist() == [starts[-1] + 1 + i for i in range(length)]
        assert sampler.row(row).targets.tolist() == [starts[-1] + 2 + i for i in range(length)]
    assert sorted(starts[:prime]) == [k * length for k in range(prime)]


def test_random_windows_lie_anywhere(prefix):
    file = made(prefix, [50])
    sampler = WindowSampler(file, 10, 5, "random")
    assert sampler.rows_per_epoch == 5
    starts = [int(sampler.row(i).inputs[0]) for i in range(1500)]
    assert set(starts) == set(range(1, 41))
    assert max(starts.count(start) for start in set(starts)) < 75  # 37.5 are expected
    assert all(len(sampler.row(i).targets) == 10 for i in range(50))
    assert WindowSampler(file, 80, 5, "random").row(3).targets.tolist() == list(range(2, 51))


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(0, 40), st.sampled_from(["documents", *WINDOW_ORDERS]))
def test_rows_are_the_same_whoever_asks_and_whatever_was_asked_before(prefix, ranks, begin, order):
    file = made(prefix, [9, 0, 4, 17, 1, 1, 25], masked=True)

    def sampler() -> DocumentSampler | WindowSampler:
        return DocumentSampler(file, 6, 1) if order == "documents" else WindowSampler(file, 6, 1, order)

    alone = sampler()
    expected = [alone.row(i) for i in range(50)]
    for rank in range(ranks):  # each process its own sampler, beginning anywhere
        own = sampler()
        assert all(same(own.row(i), expected[i]) for i in range(begin + rank, 50, ranks))
    backwards = sampler()
    assert all(same(backwards.row(i), expected[i]) for i in reversed(range(50)))


def test_collate(prefix):
    file = made(prefix, [7, 7, 7, 7, 3, 4])
    rows = [WindowSampler(file, 5, order="sequential").row(i) for i in range(3)]
    batch = collate(rows)
    assert batch.cu_seqlens is batch.mask is None
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.tolist() == [row.inputs.tolist() for row in rows]
    assert batch.targets.tolist() == [row.targets.tolist() for row in rows]
    masked = Row(rows[0].inputs, rows[0].targets, np.array([True, False, True, True, False]))
    assert collate([masked, rows[1]]).mask.tolist() == [masked.mask.tolist(), [True] * 5]

    rows = [DocumentSampler(file, 10).row(i) for i in range(4)]
    assert any(len(row.starts) > 1 for row in rows)
    batch = collate(rows)
    assert batch.inputs.shape == batch.targets.shape == (1, 35)
    assert batch.inputs[0].tolist() == [x for row in rows for x in row.inputs.tolist()]
    assert batch.cu_seqlens == (*(10 * i + start for i, row in enumerate(rows) for start in row.starts), 35)
    assert collate([masked, rows[0]]).mask[0].tolist() == masked.mask.tolist() + [True] * 10


def test_packed_rows_are_the_documents_apart(prefix):
    file = made(prefix, [7, 12, 3, 20, 1, 30])
    rows = [DocumentSampler(file, 24, 2).row(i) for i in range(4)]
    batch = collate(rows)
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config.sized(128, 2, 32, head_size=16)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p.data, mean=float(p.data.mean()), std=0.1)
    packed, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
    apart = []
    for row in rows:
        for a, b in zip(row.starts, (*row.starts[1:], len(row.inputs)), strict=True):
            apart.append(model(torch.from_numpy(row.inputs[None, a:b]))[0])
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-9, atol=1e-9)


def test_bad_input_is_named(prefix):
    file = made(prefix, [5])
    for made_of, said in [
        (lambda: DocumentSampler(file, 0), "length of a row must be at least 1"),
        (lambda: DocumentSampler(file, 4, -1), "seed must be"),
        (lambda: WindowSampler(file, 4, 2**64), "seed must be"),
        (lambda: WindowSampler(file, 4, order="zigzag"), "unknown order 'zigzag'"),
        (lambda: WindowSampler(file, 4, order="magic_prime"), "needs 12 tokens, got 5"),
        (lambda: WindowSampler(made(prefix, [1]), 4), "nothing to predict"),
    ]:
        with pytest.raises(InputError, match=said):
            made_of()
