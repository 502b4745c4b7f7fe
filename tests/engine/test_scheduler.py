"""Requests side by side: each gets what it gets alone, none stalls or starves, and what ends leaves nothing behind."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from heronry import State
from heronry.checkpoint import assemble
from heronry.engine import Sampling, generate, prefill
from heronry.engine.decode_batch import Event, SequenceDecoder
from heronry.engine.requests import Busy, Limits, Request
from heronry.engine.scheduler import Scheduler
from heronry.errors import InputError
from heronry.evaluate import log_likelihoods

PROMPTS = [[(7 * i * i + 3 * n + i) % 101 for i in range(n)] for n in (1, 5, 64, 130, 200, 577, 3, 90)]


class Collected:
    """A receiver that keeps everything."""

    def __init__(self, want: int = 1000):
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.times: list[float] = []
        self.logprobs, self.state, self.error = [], None, None
        self.want = want
        self.done = threading.Event()
        self.order: list[str] = []

    def on_prompt(self, state, logprobs) -> None:
        self.state, self.logprobs = state, logprobs
        self.order.append("prompt")

    def on_event(self, index: int, event: Event) -> bool:
        self.times.append(time.monotonic())
        if event.token is None:
            self.reasons[index] = event.finish_reason
            self.done.set()
            return False
        self.tokens.setdefault(index, []).append(event.token)
        if len(self.tokens[index]) >= self.want:
            self.done.set()
            return False
        return True

    def on_error(self, error: Exception) -> None:
        self.error = error
        self.done.set()


@pytest.fixture
def model(random_checkpoint):
    return assemble(random_checkpoint("7", width=64, heads=2, ffn=64, rank=3))


@pytest.fixture
def scheduler():
    scheduler = Scheduler(Limits(rows=8, waiting=20, tokens=1000))
    yield scheduler
    scheduler.close()


def ask(model, prompt, count=9, seed=0, n=1, want=1000, **options) -> tuple[Request, Collected]:
    receiver = Collected(want)
    sequences = [SequenceDecoder(Sampling(seed=seed + i, temperature=2), count) for i in range(n)]
    return Request(model, prompt, sequences, receiver, **options), receiver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gets_what_it_gets_alone(random_checkpoint, scheduler, dtype):
    model = assemble(random_checkpoint("7", width=64, heads=2, ffn=64, rank=3), dtype=dtype)
    asked = [ask(model, prompt, 5 + i, seed=i, n=1 + i % 3) for i, prompt in enumerate(PROMPTS)]
    for request, _ in asked:
        scheduler.submit(request)
    scheduler.start()
    scheduler.close(60)
    for i, (prompt, (_, receiver)) in enumerate(zip(PROMPTS, asked, strict=True)):
        assert receiver.error is None
        for j in range(1 + i % 3):
            [alone] = generate(model, [prompt], Sampling(seed=i + j, temperature=2), 5 + i).run()
            assert receiver.tokens[j] == alone.tokens
            assert receiver.reasons[j] == "length"
    assert scheduler.totals.generated_tokens == sum(len(x) for _, r in asked for x in r.tokens.values())
    assert scheduler.totals.prompt_tokens == sum(map(len, PROMPTS))
    assert (scheduler.totals.waiting, scheduler.totals.reading, scheduler.totals.decoding) == (0, 0, 0)


def test_from_a_state_on_the_grid(model, scheduler):
    grid = scheduler.sizes(model).grid
    kept: dict[int, State] = {}
    prompt = PROMPTS[5]
    first, got = ask(model, prompt, cuts=[grid, 3 * grid], on_cut=kept.__setitem__)
    scheduler.submit(first)
    scheduler.start()
    assert got.done.wait(30)
    assert kept.keys() == {grid, 3 * grid}
    before = scheduler.totals.prompt_tokens
    second, again = ask(model, prompt, begin=(3 * grid, kept[3 * grid]))
    scheduler.submit(second)
    assert again.done.wait(30)
    assert scheduler.totals.prompt_tokens - before == len(prompt) - 3 * grid
    assert again.tokens == got.tokens
    assert all(torch.equal(x, y) for x, y in zip(again.state.tensors(), got.state.tensors(), strict=True))
    assert all(
        torch.equal(x, y)
        for x, y in zip(kept[grid].tensors(), prefill(model, [prompt[:grid]])[1].tensors(), strict=True)
    )


def test_streams_go_on_while_a_long_prompt_is_read(model, scheduler):
    """Between two of its tokens a stream waits for `pause` and no more, here for one call."""
    scheduler.limits = Limits(rows=8, tokens=100_000, pause=0)
    stream, streamed = ask(model, [1, 2], 400)
    scheduler.submit(stream)
    scheduler.start()
    while not streamed.times:
        time.sleep(0.001)
    long, read = ask(model, [3] * 6400, 1)
    before = len(streamed.times)
    scheduler.submit(long)
    while not read.order:
        time.sleep(0.001)
    assert len(streamed.times) - before >= 45  # of 50 turns
    long.cancel()
    stream.cancel()


def test_short_prompts_do_not_wait_for_long_ones(model, scheduler):
    asked = [ask(model, [3] * 900, 1), *(ask(model, [i, i], 1) for i in range(5))]
    finished: list[int] = []
    for i, (request, receiver) in enumerate(asked):
        receiver.on_prompt = lambda state, logprobs, i=i: finished.append(i)
        scheduler.submit(request)
    scheduler.start()
    scheduler.close(30)
    assert finished[-1] == 0


def test_who_goes_away_makes_room(model, scheduler):
    endless = [ask(model, [i + 1], 10**9) for i in range(8)]
    for request, _ in endless:
        scheduler.submit(request)
    waiting, received = ask(model, [50], 2)
    scheduler.submit(waiting)
    scheduler.start()
    while scheduler.totals.decoding < 8:
        time.sleep(0.001)
    assert not received.order
    endless[3][0].cancel()
    assert received.done.wait(10)
    assert len(received.tokens[0]) == 2
    wanted, stopped = ask(model, [5], 10**9, want=3)  # as at a stop string
    endless[4][0].cancel()
    scheduler.submit(wanted)
    assert stopped.done.wait(10)
    time.sleep(0.05)
    assert stopped.tokens[0] == generate(model, [[5]], Sampling(seed=0, temperature=2), 3).run()[0].tokens
    scheduler.close()
    assert isinstance(endless[0][1].error, Busy)
    assert endless[3][1].error is None


def test_owners_share_the_rows(model, scheduler):
    """One who asks for much does not keep others waiting."""
    order: list[str] = []
    for owner, n in (("a", 14), ("b", 3)):
        for _ in range(n):
            request, receiver = ask(model, [1, 2, 3], 4, owner=owner)
            receiver.on_prompt = lambda state, logprobs, owner=owner: order.append(owner)
            scheduler.submit(request)
    scheduler.start()
    scheduler.close(30)
    assert order[:8].count("b") == 3
    assert len(order) == 17


def test_log_probabilities_of_a_prompt(model, scheduler):
    request, received = ask(model, PROMPTS[5], 1, prompt_logprobs=2)
    scheduler.submit(request)
    scheduler.start()
    assert received.done.wait(30)
    assert [x.token_id for x in received.logprobs] == PROMPTS[5][1:]
    [(expected, _)] = log_likelihoods(model, [(PROMPTS[5][:1], PROMPTS[5][1:])])
    assert sum(x.logprob for x in received.logprobs) == pytest.approx(expected, rel=1e-6)
    for x in received.logprobs:
        best = max(x.top_logprobs.values())
        assert x.logprob <= best
        assert (x.logprob == best) == (next(iter(x.top_logprobs)) == x.token_id)


def test_what_is_refused(model, random_checkpoint, scheduler):
    for prompt, message in [
        ([], "the prompt is empty"),
        ([1] * 1001, "has 1,001 tokens; at most 1,000"),
        ([101], "outside this model's vocabulary of 101"),
    ]:
        with pytest.raises(InputError, match=message):
            scheduler.submit(ask(model, prompt)[0])
    with pytest.raises(InputError, match="9 completions were asked for at once; at most 8 are possible here"):
        scheduler.submit(ask(model, [1], n=9)[0])
    other = assemble(random_checkpoint("7", width=64, heads=2, ffn=64, rank=3, seed=1))
    with pytest.raises(InputError, match="belongs to another model"):
        scheduler.submit(ask(model, [1], begin=(0, other.initial_state()))[0])
    for _ in range(20):
        scheduler.submit(ask(model, [1])[0])
    with pytest.raises(Busy, match="20 requests are waiting already") as busy:
        scheduler.submit(ask(model, [1])[0])
    assert 1 <= busy.value.retry_after <= 60
    scheduler.limits = Limits(state_bytes=3 * model.initial_state().nbytes)
    with pytest.raises(InputError, match="4 completions were asked for at once; at most 3"):
        scheduler.submit(ask(model, [1], n=4)[0])
    scheduler.start()
    scheduler.close(30)
    with pytest.raises(Busy, match="shutting down"):
        scheduler.submit(ask(model, [1])[0])


def test_one_that_fails_fails_alone(model, scheduler):
    def fails(drawn):
        raise ValueError("no such grammar")

    request, received = ask(model, [1, 2], 5)
    request.sequences[0].mask = fails
    good, fine = ask(model, [1, 2], 5)
    scheduler.submit(request)
    scheduler.submit(good)
    broken, refused = ask(model, [1, 2], 5)
    refused.on_event = lambda index, event: 1 // 0
    scheduler.submit(broken)
    scheduler.start()
    scheduler.close(30)
    assert str(received.error) == "no such grammar"
    assert isinstance(refused.error, ZeroDivisionError)
    assert len(fine.tokens[0]) == 5


def test_a_step_that_fails_ends_its_sequences_and_not_the_thread(model, scheduler, monkeypatch):
    first, received = ask(model, [1, 2], 5)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *args, **options: 1 // 0)
        scheduler.submit(first)
        scheduler.start()
        assert received.done.wait(10)
    assert isinstance(received.error, ZeroDivisionError)
    second, good = ask(model, [1, 2], 5)
    scheduler.submit(second)
    assert good.done.wait(10)
    assert len(good.tokens[0]) == 5


def test_only_reading(model, scheduler):
    """No sequence is asked for: the state after the prompt."""
    request, received = ask(model, PROMPTS[3], n=0)
    received.on_prompt = lambda state, logprobs: (setattr(received, "state", state), received.done.set())
    scheduler.submit(request)
    scheduler.start()
    assert received.done.wait(10)
    expected = prefill(model, [PROMPTS[3]])[1]
    assert all(torch.equal(x, y) for x, y in zip(received.state.tensors(), expected.tensors(), strict=True))


@pytest.mark.parametrize(("prompt", "n"), [(PROMPTS[6], 60), ([5] * 1000, 10)], ids=["short", "long"])
def test_reading_between_two_steps_is_bounded_by_time(model, monkeypatch, prompt, n):
    """On a clock that goes on by 3 ms with each call and by 0.1 ms with each of its tokens."""
    now, happened = [0.0], []
    monkeypatch.setattr(
        "heronry.engine.scheduler.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    )
    scheduler = Scheduler(Limits(rows=64, pause=0.03))
    read, step = scheduler._read_parts, scheduler._step

    def timed_read(parts):
        seconds = 0.003 + 0.0001 * sum(end - request.position for request, end in parts)
        read(parts)
        now[0] += seconds
        happened.append(seconds)

    def timed_step():
        step()
        happened.append("step")

    monkeypatch.setattr(scheduler, "_read_parts", timed_read)
    monkeypatch.setattr(scheduler, "_step", timed_step)
    stream, received = ask(model, PROMPTS[1], 100)
    scheduler.submit(stream)
    others = [ask(model, prompt, 1) for _ in range(n)]
    for request, _ in others:
        scheduler.submit(request)
    scheduler.start()
    scheduler.close(30)
    assert received.error is None
    assert all(collected.reasons == {0: "length"} for _, collected in others)
    pauses = [sum(map(float, turn.split())) for turn in " ".join(map(str, happened)).split("step")]
    busy = pauses[2 : pauses.index(0.0, 1) - 1]  # after the first call, which finds out how fast it is
    assert len(busy) > 1, pauses
    assert min(busy) > 0.02
    assert max(busy) < 0.03 + 0.008  # half a call of this model, whose prompts are cut at fixed places


def test_it_keeps_its_threads(model, scheduler):
    """Those of the thread that has started it, whatever number is set for others afterwards."""
    before, seen = torch.get_num_threads(), []
    request, received = ask(model, [1, 2], 2)
    received.on_prompt = lambda state, logprobs: seen.append(torch.get_num_threads())
    try:
        torch.set_num_threads(3)
        scheduler.start()
        torch.set_num_threads(1)
        scheduler.submit(request)
        assert received.done.wait(10)
    finally:
        torch.set_num_threads(before)
    assert seen == [3]
