"""What a sequence gets is the same to the bit, whoever else is read or decoded beside it, and wherever it is cut."""

from __future__ import annotations

import pytest
import torch

from heronry import State
from heronry.checkpoint import assemble
from heronry.engine import Generation, Grammar, Sampling, generate, prefill
from heronry.engine.call_sizes import CallSizes, choose_call_sizes
from heronry.engine.decode_batch import DecodeBatch, SequenceDecoder
from heronry.models import Model
from heronry.text.tokenizers import ByteStream

LENGTHS = (1, 5, 63, 64, 65, 130, 200, 300, 577)
PROMPTS = [[(7 * i * i + 3 * n + i) % 101 for i in range(n)] for n in LENGTHS]
VERSIONS = ("4", "5.0", "5.0 r2", "5.1", "5.2", "6", "7")
KINDS = ["float32", "bfloat16", "float16", "int8", "int4", "plain float32", "plain bfloat16", "plain int8"]


QUICK = {("float32", "7"), ("bfloat16", "7"), ("int8", "7"), ("float32", "4"), ("plain float32", "7")}
PAIRS = [
    pytest.param((kind, version), id=f"{kind} {version}", marks=[] if (kind, version) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for version in VERSIONS
]


@pytest.fixture(params=PAIRS)
def model(request, random_checkpoint) -> Model:
    """A small one of each generation: in each dtype, with packed matrices, and without its C++ step."""
    name, version = request.param
    kind = name.rpartition(" ")[2]
    quantized = kind if kind.startswith("int") else None
    weights = random_checkpoint(version, width=128, heads=2, ffn=256)
    found = assemble(weights, dtype=None if quantized else getattr(torch, kind), quantize=quantized)
    found.native_step_enabled = "plain" not in name
    return found


class Letters:
    """The bytes below 101, each a token."""

    vocabulary = tuple(bytes([i]) for i in range(101))
    vocab_size = 101
    stop_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens) -> str:
        return bytes(tokens).decode()

    def stream(self) -> ByteStream:
        return ByteStream(self.vocabulary)


FORCING = Grammar.from_regex("([0-9]|ABCDEFGHIJ|BA|CABCD){5,}")


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


@pytest.mark.parametrize("share", [2, 1])
def test_forced_tokens_side_by_side(model, share):
    """What a grammar forces is read in calls of its own, while others take steps, or all do (share = 1)."""
    pytest.importorskip("llguidance")
    sizes = choose_call_sizes(model)
    matcher = FORCING.matcher(Letters(), 101)
    read = [prefill(model, [prompt]) for prompt in PROMPTS]
    follows = [matcher if i % share == 0 else None for i in range(len(PROMPTS))]
    wanted = {i: 12 + 2 * (i % 4) for i in range(len(PROMPTS))}
    joining = {0: [0, 1, 2], 2: [3], 5: [4, 5, 6], 6: [7, 8]}  # at which step
    batch = DecodeBatch(model, sizes)
    waiting: list[int] = []
    events: dict[int, list[tuple]] = {i: [] for i in wanted}
    states: dict[int, State] = {}
    blocks = 0
    for step in range(300):
        waiting += joining.get(step, [])
        new, waiting = waiting[: batch.free], waiting[batch.free :]
        if new:
            decoders = {
                i: SequenceDecoder(
                    Sampling(seed=i, temperature=2),
                    wanted[i],
                    top_logprobs=i % 3 or None,
                    matcher=x.copy() if (x := follows[i]) else None,
                )
                for i in new
            }
            batch.add(decoders, torch.cat([read[i][0] for i in new]), State.stack([read[i][1] for i in new]))
        for event in batch.step():
            if event.token is not None:
                events[event.index].append((event.token, event.logprob))
                blocks += event.again is not None
            else:
                assert event.finish_reason == "length"
                states[event.index] = event.state
    assert blocks > 10
    for i in wanted:
        alone = Generation(
            model, *read[i], Sampling(seed=i, temperature=2), wanted[i], top_logprobs=1, matcher=follows[i]
        )
        tokens = []
        for event in alone:
            if event.token is None:
                assert_equal(states[i], event.state)
            else:
                tokens.append((event.token, event.logprob))
        assert [x for x, _ in events[i]] == [x for x, _ in tokens]
        if i % 3:
            assert [x.logprob for _, x in events[i]] == [x.logprob for _, x in tokens]


def test_states_within_a_block(random_checkpoint):
    """A token in the middle of a block has the state after it, and text goes on from there."""
    pytest.importorskip("llguidance")
    model = assemble(random_checkpoint("7"))
    logits, state = prefill(model, PROMPTS[:2])
    matcher = Grammar.from_regex("ABCDEFGH").matcher(Letters(), 101)
    events = list(Generation(model, logits, state, Sampling(seed=1), 20, matcher=matcher))
    assert [(e.index, e.token) for e in events if e.token] == [(i, x) for i in range(2) for x in b"ABCDEFGH"]
    assert [e.finish_reason for e in events if e.token is None] == ["stop", "stop"]
    for event, count in zip(events, [*range(1, 9), 8, *range(1, 9), 8], strict=True):
        _, expected = prefill(model, [list(b"ABCDEFGH"[:count])], state[event.index])
        for x, y in zip(event.state.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_joining_with_contexts(random_checkpoint):
    """RWKV-7b keeps what it has read, and one that joins brings its own."""
    model = assemble(random_checkpoint("7", dea=5))
    read = [prefill(model, [prompt]) for prompt in PROMPTS[1:4]]
    batch = DecodeBatch(model, CallSizes(64, 64, shared=True, rows=4))
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(20):
        if step < 6 and step % 2 == 0:
            i = step // 2
            batch.add({i: SequenceDecoder(Sampling(seed=i), 3 + i)}, *read[i])
        for event in batch.step():
            if event.token is not None:
                found[event.index].append(event.token)
            else:
                assert event.state.contexts[0].tokens.tolist()[-3 - event.index :] == found[event.index]
    for i, tokens in found.items():
        [alone] = Generation(model, *read[i], Sampling(seed=i), 3 + i).run()
        assert alone.tokens == tokens


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
