"""Many sequences at once give what each gives alone, and states stand for exactly what was handed out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry.checkpoint import assemble
from heronry.engine import Generation, Sampling, generate, prefill
from heronry.engine.call_sizes import CallSizes
from heronry.engine.generate import _packs
from heronry.errors import InputError
from heronry.models import Model, State

PROMPTS = [[5, 6, 7], [1], list(range(40)), [9] * 17]
GREEDY = Sampling(temperature=0)


@pytest.fixture
def any_model(version, random_checkpoint) -> Model:
    weights = random_checkpoint(version, width=32, heads=2, layers=2, ffn=40, rank=3)
    return assemble({name: x.double() for name, x in weights.items()})


def read(model: Model, tokens: list[int], state: State | None = None) -> tuple[torch.Tensor, State]:
    with torch.inference_mode():
        logits, state = model(torch.tensor([tokens]), state)
    return logits[0, -1], state


def assert_same(a: State, b: State, tolerance: float = 1e-8) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        for left, right in zip(x, y, strict=True):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


class Counted:
    """Notes how many tokens each call of the model was given."""

    def __init__(self, model: Model):
        self.tokens: list[int] = []
        self._hook = model.register_forward_hook(lambda module, inputs, output: self.tokens.append(inputs[0].numel()))

    def __enter__(self) -> list[int]:
        return self.tokens

    def __exit__(self, *error) -> None:
        self._hook.remove()


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    grid=st.integers(1, 10),
    pieces=st.integers(1, 4),
    shared=st.booleans(),
)
def test_packs_hold_every_token_once_and_never_too_many(lengths, grid, pieces, shared):
    sizes = CallSizes(grid, grid * pieces, shared, rows=1)
    packs = list(_packs(lengths, sizes))
    assert all(0 < sum(end - start for _, start, end in pack) <= sizes.tokens for pack in packs)
    # each is cut where it would be alone
    cuts = {(i, start) for pack in packs for i, start, _ in pack}
    assert cuts == {(i, start) for i, length in enumerate(lengths) for start in range(0, length, sizes.tokens)}
    if shared:  # and a pack is closed only when what comes next has no room
        counts = [sum(end - start for _, start, end in pack) for pack in packs]
        pairs = zip(counts, packs[1:], strict=False)
        assert all(count + after[0][2] - after[0][1] > sizes.tokens for count, after in pairs)
    else:
        assert all(len(pack) == 1 for pack in packs)
    assert all(len({i for i, _, _ in pack}) == len(pack) for pack in packs)
    seen = [(i, t) for pack in packs for i, start, end in pack for t in range(start, end)]
    assert seen == [(i, t) for i, length in enumerate(lengths) for t in range(length)]


def test_prefill_is_reading_each_alone(any_model):
    prompts = [*PROMPTS, [7] * 300]
    logits, state = prefill(any_model, prompts)
    alone = [read(any_model, prompt) for prompt in prompts]
    torch.testing.assert_close(logits, torch.stack([x for x, _ in alone]), rtol=1e-7, atol=1e-7)
    for i, (_, one) in enumerate(alone):
        assert torch.allclose(read(any_model, [3], state[i])[0], read(any_model, [3], one)[0], rtol=1e-7, atol=1e-7)


def test_prefill_in_bfloat16_is_each_alone_to_the_bit(model):
    """Random numbers need not be equal to be close, but two texts part at the first token that differs."""
    model = assemble({name: x.bfloat16() for name, x in model.state_dict().items()})
    prompts = [[(7 * i + n) % 50 for i in range(n)] for n in (3, 300, 1, 40, 400, 515)]
    logits, state = prefill(model, prompts)
    for i, prompt in enumerate(prompts):
        alone, one = prefill(model, [prompt])
        assert torch.equal(alone[0], logits[i])
        assert all(
            torch.equal(x, y[i : i + 1])
            for a, b in zip(one.layers, state.layers, strict=True)
            for x, y in zip(a, b, strict=True)
        )


def test_prefill_goes_on_from_states(model):
    _, before = prefill(model, PROMPTS)
    logits, state = prefill(model, PROMPTS[::-1], before)
    for i, prompt in enumerate(PROMPTS):
        alone, one = read(model, prompt + PROMPTS[::-1][i])
        torch.testing.assert_close(logits[i], alone, rtol=1e-8, atol=1e-8)
        assert_same(state[i], one)


def test_prefill_calls_are_bounded(model):
    with Counted(model) as calls:
        prefill(model, [[1] * 300, [2] * 30])
    assert calls == [128, 128, 44, 30]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_p=0.9, seed=3, frequency_penalty=0.3)])
def test_a_batch_is_its_sequences_alone(any_model, sampling):
    together = generate(any_model, PROMPTS, sampling, 12, stop_ids={4, 17, 50}).run()
    for prompt, result in zip(PROMPTS, together, strict=True):
        [alone] = generate(any_model, [prompt], sampling, 12, stop_ids={4, 17, 50}).run()
        assert alone.tokens == result.tokens
        assert alone.finish_reason == result.finish_reason


def test_each_sequence_has_its_own_sampling(model):
    samplings = [Sampling(seed=1), Sampling(seed=2), GREEDY, Sampling(seed=1)]
    results = generate(model, [[7]] * 4, samplings, 10).run()
    assert results[0].tokens == results[3].tokens
    assert len({tuple(result.tokens) for result in results}) == 3
    for sampling, result in zip(samplings, results, strict=True):
        assert generate(model, [[7]], sampling, 10).run()[0].tokens == result.tokens


def test_greedy_is_the_plain_loop(model):
    logits, state = read(model, PROMPTS[0])
    expected = []
    for _ in range(8):
        expected.append(int(logits.argmax()))
        logits, state = read(model, expected[-1:], state)
    [result] = generate(model, [PROMPTS[0]], GREEDY, 8).run()
    assert result.tokens == expected
    assert result.finish_reason == "length"


def test_the_final_state_has_read_all_that_was_handed_out(model):
    free = generate(model, PROMPTS, Sampling(seed=5), 20).run()
    stops = {free[0].tokens[3], free[2].tokens[9]}
    results = generate(model, PROMPTS, Sampling(seed=5), 20, stop_ids=stops).run()
    assert results[0].finish_reason == results[2].finish_reason == "stop"
    for prompt, result, unstopped in zip(PROMPTS, results, free, strict=True):
        assert not stops & set(result.tokens)
        assert result.tokens == unstopped.tokens[: len(result.tokens)]
        assert len(result.state) == 1
        assert_same(result.state, read(model, prompt + result.tokens)[1])


def test_every_event_has_its_state(model):
    tokens: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    for event in generate(model, PROMPTS, Sampling(seed=1), 5):
        if event.token is not None:
            tokens[event.index].append(event.token)
        assert_same(event.state, read(model, PROMPTS[event.index] + tokens[event.index])[1])


def test_going_on_is_not_starting_again(model):
    [whole] = generate(model, [PROMPTS[2]], GREEDY, 12).run()
    [first] = generate(model, [PROMPTS[2]], GREEDY, 6).run()
    _, before = read(model, PROMPTS[2] + first.tokens[:-1])
    [second] = generate(model, [first.tokens[-1:]], GREEDY, 6, state=before).run()
    assert first.tokens + second.tokens == whole.tokens


def test_one_step_a_token_and_finished_rows_leave(random_checkpoint):
    model = assemble(random_checkpoint("7", width=32, heads=2, ffn=40, rank=3))
    free = generate(model, PROMPTS, Sampling(seed=5), 6).run()
    stop = free[1].tokens[2]
    kept = sum(len(r.tokens) for r in generate(model, PROMPTS, Sampling(seed=5), 6, stop_ids={stop}).run())
    with Counted(model) as calls:
        generate(model, PROMPTS, Sampling(seed=5), 6, stop_ids={stop}).run()
    read, steps = calls[: len(PROMPTS)], calls[len(PROMPTS) :]
    assert read == [len(prompt) for prompt in PROMPTS]
    assert sum(steps) == kept < 4 * 6
    assert steps == sorted(steps, reverse=True)


def test_dropped_sequences_say_nothing_more(model):
    events = generate(model, PROMPTS, Sampling(seed=1), 5)
    seen = []
    for event in events:
        seen.append((event.index, event.token))
        if len(seen) == 6:  # in the second step, at sequence 1
            events.drop(0)
            events.drop(2)
    assert [i for i, _ in seen] == [0, 1, 2, 3, 0, 1, 3, 1, 3, 1, 3, 1, 1, 3, 3]
    alone = generate(model, [PROMPTS[3]], Sampling(seed=1), 5).run()[0]
    assert [token for i, token in seen if i == 3] == [*alone.tokens, None]


def test_no_tokens_at_all(model):
    logits, state = prefill(model, PROMPTS)
    for i, result in enumerate(Generation(model, logits, state, GREEDY, 0).run()):
        assert result.tokens == []
        assert result.finish_reason == "length"
        assert_same(result.state, state[i])


def test_nothing_needs_a_gradient(model):
    [result] = generate(model, [[1, 2]], GREEDY, 2).run()
    assert not any(x.requires_grad for layer in result.state.layers for x in layer)


@settings(max_examples=20)
@given(prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=5))
def test_any_prompts(model, prompts):
    together = generate(model, prompts, Sampling(seed=9), 3).run()
    alone = [generate(model, [prompt], Sampling(seed=9), 3).run()[0] for prompt in prompts]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_what_cannot_be_generated_is_named(model, random_checkpoint):
    for prompts, message in [
        ([], "there is no prompt"),
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[256]], "token id 256 is outside this model's vocabulary of 256"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(model, prompts, GREEDY, 1)
    _, state = prefill(model, [[1], [2]])
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(model, [[]], GREEDY, 1, state=state[0])
    with pytest.raises(InputError, match="a state of 2 sequences was given for 3 prompts"):
        generate(model, [[1]] * 3, GREEDY, 1, state=state)
    with pytest.raises(InputError, match="3 samplings were given for 1 sequences"):
        generate(model, [[1]], [GREEDY] * 3, 1)
    other = assemble(random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3, seed=1))
    with pytest.raises(InputError, match="another model"):
        generate(other, [[1]], GREEDY, 1, state=state[0])


def test_not_a_number(random_checkpoint):
    weights = random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3)
    weights["head.weight"][7] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        generate(assemble(weights), [[1]], GREEDY, 1).run()
