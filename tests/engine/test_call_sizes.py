"""What a sequence gets is the same to the bit, whoever else is read or decoded beside it, and wherever it is cut."""

from __future__ import annotations

import pytest
import torch

from heronry import State
from heronry.checkpoint import assemble
from heronry.engine import Sampling, generate, prefill
from heronry.engine.call_sizes import CallSizes, choose_call_sizes
from heronry.engine.decode_batch import DecodeBatch, SequenceDecoder
from heronry.models import Model

LENGTHS = (1, 5, 63, 64, 65, 130, 200, 300, 577)
PROMPTS = [[(7 * i * i + 3 * n + i) % 101 for i in range(n)] for n in LENGTHS]
KINDS = ["float32", "bfloat16", "float16", "int8", "int4", "plain float32", "plain bfloat16", "plain int8"]


@pytest.fixture(params=[pytest.param(kind, marks=[] if "8" not in kind[-1] else pytest.mark.slow) for kind in KINDS])
def model(request, version, random_checkpoint) -> Model:
    """A small one of each generation: in each dtype, with packed matrices, and without its C++ step."""
    kind = request.param.rpartition(" ")[2]
    quantized = kind if kind.startswith("int") else None
    weights = random_checkpoint(version, width=128, heads=2, ffn=256)
    found = assemble(weights, dtype=None if quantized else getattr(torch, kind), quantize=quantized)
    found.native_step_enabled = "plain" not in request.param
    return found


def assert_equal(a: State, b: State) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_prompts_side_by_side_and_in_parts(model):
    sizes = choose_call_sizes(model)
    logits, state = prefill(model, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, one = prefill(model, [prompt])
        assert torch.equal(logits[i], alone[0])
        assert_equal(state[i], one)
        for cut in range(sizes.grid, len(prompt), sizes.grid):
            _, before = prefill(model, [prompt[:cut]])
            rest, after = prefill(model, [prompt[cut:]], before)
            assert torch.equal(rest, alone)
            assert_equal(after, one)


def test_decoding_side_by_side(model):
    prompts = PROMPTS[:6]
    samplings = [Sampling(seed=i, temperature=2) for i in range(len(prompts))]
    together = generate(model, prompts, samplings, 12).run()
    for prompt, sampling, result in zip(prompts, samplings, together, strict=True):
        [alone] = generate(model, [prompt], sampling, 12).run()
        assert alone.tokens == result.tokens
        assert_equal(alone.state, result.state)


def test_joining_and_leaving(model):
    """Sequences join a running batch and leave it, in rows that others left, and none of them notices."""
    sizes = choose_call_sizes(model)
    read = [prefill(model, [prompt]) for prompt in PROMPTS]
    wanted = {i: 3 + 2 * (i % 4) for i in range(len(PROMPTS))}
    joining = {0: [0], 2: [1, 2], 3: [3], 7: [4, 5, 6], 8: [7, 8]}  # at which step
    batch = DecodeBatch(model, sizes)
    waiting: list[int] = []
    tokens: dict[int, list[int]] = {i: [] for i in wanted}
    states: dict[int, State] = {}
    for step in range(200):
        waiting += joining.get(step, [])
        new, waiting = waiting[: batch.free], waiting[batch.free :]
        if new:
            decoders = {i: SequenceDecoder(Sampling(seed=i, temperature=2), wanted[i]) for i in new}
            stacked = State.stack([read[i][1] for i in new])
            batch.add(decoders, torch.cat([read[i][0] for i in new]), stacked)
        for event in batch.step():
            if event.token is not None:
                tokens[event.index].append(event.token)
            else:
                assert event.finish_reason == "length"
                states[event.index] = event.state
    assert not len(batch)
    for i, prompt in enumerate(PROMPTS):
        [alone] = generate(model, [prompt], Sampling(seed=i, temperature=2), wanted[i]).run()
        assert tokens[i] == alone.tokens
        assert_equal(states[i], alone.state)


def test_a_mask_that_fails_ends_its_sequence_alone(random_checkpoint):
    model = assemble(random_checkpoint("7"))

    def fails(drawn: list[int]) -> None:
        if len(drawn) == 2:
            raise ValueError("no more")

    logits, state = prefill(model, PROMPTS[:2])
    batch = DecodeBatch(model, choose_call_sizes(model))
    batch.add(
        {5: SequenceDecoder(Sampling(seed=1), 4, mask=fails), 6: SequenceDecoder(Sampling(seed=1), 4)}, logits, state
    )
    events = [event for _ in range(6) for event in batch.step()]
    assert [(e.index, e.token is None) for e in events if e.index == 5] == [(5, False), (5, False), (5, True)]
    assert isinstance(next(e.error for e in events if e.index == 5 and e.token is None), ValueError)
    assert [e.finish_reason for e in events if e.index == 6] == [None] * 4 + ["length"]


def test_cuts():
    strict = CallSizes(128, 128, shared=False, rows=1)
    assert [strict.next_cut(x, 300) for x in (0, 128, 256)] == [128, 256, 300]
    free = CallSizes(64, 512, shared=True, rows=1)
    assert [free.next_cut(0, 1000), free.next_cut(512, 1000), free.next_cut(64, 1000, at=[64, 192, 960])] == [
        512,
        1000,
        192,
    ]
