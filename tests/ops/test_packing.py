"""Cutting sequences into chunks and joining them again."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry.ops.packing import Chunks, boundaries
from heronry.ops.wkv6 import wkv6

from .cases import BY_NAME, cut, draw

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=8)
LENGTH = st.integers(1, 9)


@given(st.integers(1, 4), st.integers(1, 40), LENGTH)
@settings(max_examples=50)
def test_join_undoes_split(batch: int, tokens: int, length: int):
    x = torch.arange(batch * tokens * 2.0).reshape(batch, tokens, 2)
    chunks = Chunks(batch, tokens, None, length)
    assert torch.equal(chunks.join(chunks.split(x)), x)


@given(LENGTHS, LENGTH)
@settings(max_examples=50)
def test_join_undoes_split_when_packed(lengths: list[int], length: int):
    cu = (0, *accumulate(lengths))
    x = torch.arange(cu[-1] * 2.0).reshape(1, cu[-1], 2)
    chunks = Chunks(1, cu[-1], cu, length)
    assert torch.equal(chunks.join(chunks.split(x)), x)


@given(LENGTHS, LENGTH)
@settings(max_examples=50)
def test_every_step_holds_the_next_chunk_of_each_sequence(lengths: list[int], length: int):
    """Sequence s counts s + 0.01, s + 0.02, ...: rows find their state by place, padding holds the fill."""
    cu = (0, *accumulate(lengths))
    x = torch.cat([s + torch.arange(1, n + 1) / 100 for s, n in enumerate(lengths)])
    chunks = Chunks(1, cu[-1], cu, length)
    cutting = chunks.split(x[None, :, None], fill=-1.0)[..., 0]
    owners = chunks.to_chunk_order(torch.arange(len(lengths))).tolist()
    row = 0
    for step, alive in enumerate(chunks.alive):
        assert alive == sum(n > step * length for n in lengths)
        for s in owners[:alive]:
            piece = x[cu[s] : cu[s + 1]][step * length : (step + 1) * length]
            assert torch.equal(cutting[row, : len(piece)], piece)
            assert (cutting[row, len(piece) :] == -1).all()
            row += 1
    assert row == len(cutting)


@given(LENGTHS, LENGTH)
@settings(max_examples=50)
def test_leave_undoes_enter(lengths: list[int], length: int):
    cu = (0, *accumulate(lengths))
    chunks = Chunks(1, cu[-1], cu, length)
    states = torch.arange(float(len(lengths)))
    running, finished = chunks.to_chunk_order(states), []
    for alive in chunks.alive:
        if alive < len(running):
            finished.append(running[alive:])
            running = running[:alive]
    assert torch.equal(chunks.from_chunk_order([*finished, running]), states)


def test_boundaries_come_from_tensors_and_sequences():
    assert boundaries(torch.tensor([0, 2, 5], dtype=torch.int32), 1, 5) == (0, 2, 5)
    assert boundaries([0, 5], 1, 5) == (0, 5)
    assert boundaries(None, 3, 5) is None


@pytest.mark.parametrize("cu", [[0, 4], [0, 3, 3, 5], [1, 5], [0, 2.0, 5], 5])
def test_bad_boundaries_are_refused(cu):
    with pytest.raises(ValueError, match="cu_seqlens"):
        boundaries(cu, 1, 5)


def test_a_cut_made_in_inference_mode_serves_training():
    """The cut is remembered: made while generating, it must not taint a later backward pass."""
    operator = BY_NAME["wkv6"]
    arguments = draw(operator, 1, 23, 1, 2)
    cu = [0, 11, 23]
    with torch.inference_mode():
        wkv6(**cut(operator, arguments, 0, 23, None), cu_seqlens=cu, impl="chunked")
    leaves = {name: x.requires_grad_() for name, x in cut(operator, arguments, 0, 23, None).items()}
    y, _ = wkv6(**leaves, cu_seqlens=cu, impl="chunked")
    y.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())
