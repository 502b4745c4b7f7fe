"""Many requests on one thread that runs the models: continuous batching.

- every turn of the loop reads prompts for a bounded time and then takes one step with all sequences that are decoded:
  no stream waits for a long prompt, and no prompt waits for a stream
- sequences join the batch when their prompt is read and leave it at their end, or when nobody wants them any more
- of the owners that wait, the one with the fewest sequences is next
- what a sequence gets does not depend on the others: see call_sizes.py
- the thread never waits for a receiver, nor for anything but work
- where a process has more computing threads than cores, they sleep between two meetings of a team, and a short call
  takes twice as long: while this thread has a team, others should compute alone
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from itertools import count
from math import inf
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from .call_sizes import GRID, CallSizes, choose_call_sizes
from .decode_batch import DecodeBatch, Event, SequenceDecoder, token_logprob
from .requests import Busy, Limits, Request, Totals

log = logging.getLogger("heronry")
CLOSING = "the server is shutting down"


class Scheduler:
    """Runs requests of one or several models on a thread of its own, from `start` to `close`."""

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.totals = Totals()
        self._waiting: dict[str, deque[Request]] = {}  # by owner, those that have waited longest first
        self._reading: deque[Request] = deque()  # the next to read first
        self._batches: dict[Model, list[DecodeBatch]] = {}
        self._sizes: WeakKeyDictionary[Model, CallSizes] = WeakKeyDictionary()  # models may come and go
        self._row_bytes: WeakKeyDictionary[Model, int] = WeakKeyDictionary()
        self._token_seconds: WeakKeyDictionary[Model, float] = WeakKeyDictionary()  # in the last call that read
        self._decoding: dict[int, tuple[Request, int, DecodeBatch]] = {}  # sequence -> its number in its request
        self._numbers = count()
        self._changed = threading.Condition()
        self._deadline: float | None = None  # once it is being closed
        self._finish_times: deque[float] = deque(maxlen=64)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to work, with as many threads as the caller has."""
        threads, ready = torch.get_num_threads(), threading.Event()

        def work() -> None:
            torch.set_num_threads(threads)
            torch.get_num_threads()  # settles it: a thread takes the last number set anywhere when it first computes
            ready.set()
            self._run()

        self._thread = threading.Thread(target=work, name="heronry-scheduler", daemon=True)
        self._thread.start()
        ready.wait()

    def is_alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread is not None and self._thread.is_alive()

    def sizes(self, model: Model) -> CallSizes:
        """How this model's prompts are cut."""
        if model not in self._sizes:
            self._sizes[model] = choose_call_sizes(model)
        return self._sizes[model]

    def _state_bytes(self, model: Model) -> int:
        """Of one sequence of this model."""
        if model not in self._row_bytes:
            self._row_bytes[model] = model.initial_state().nbytes
        return self._row_bytes[model]

    def check(self, request: Request) -> None:
        """InputError for a request that is never taken in: an empty prompt, one beyond the limits, token ids or a state
        of another model, or more sequences than ever run at a time."""
        if not request.tokens:
            raise InputError("the prompt is empty")
        if len(request.tokens) > self.limits.tokens:
            raise InputError(f"the prompt has {len(request.tokens):,} tokens; at most {self.limits.tokens:,} are read")
        vocab_size = request.model.config.vocab_size
        if min(request.tokens) < 0 or max(request.tokens) >= vocab_size:
            raise InputError(f"a token id of the prompt is outside this model's vocabulary of {vocab_size}")
        if request.state is not None and request.state.fingerprint != request.model.fingerprint:
            raise InputError("this state belongs to another model")
        most = min(self.limits.rows, self.limits.state_bytes // self._state_bytes(request.model))
        if request.rows > most:
            raise InputError(f"{request.rows} completions were asked for at once; at most {most} are possible here")

    def submit(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            InputError: see `check`.
            Busy: too many requests wait, or the scheduler is being closed.
        """
        self.check(request)
        with self._changed:
            if self._deadline is not None:
                raise Busy(CLOSING, 5)
            waiting = sum(map(len, self._waiting.values()))
            if waiting >= self.limits.waiting:
                raise Busy(f"{waiting} requests are waiting already", self._time_for(waiting))
            self.totals.cached_tokens += request.position
            self._waiting.setdefault(request.owner, deque()).append(request)
            self._changed.notify()

    def _time_for(self, requests: int) -> float:
        """Seconds in which so many requests end, by how fast the last ones did."""
        times = self._finish_times
        if len(times) < 2 or times[-1] == times[0]:
            return 1
        return min(60, max(1, requests * (times[-1] - times[0]) / (len(times) - 1)))

    def close(self, timeout: float = 0) -> None:
        """Takes nothing more in; what was taken in has so many seconds to end, and fails after them."""
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._deadline is None and not self._has_work():
                    self._changed.wait()
                if not self._has_work():
                    return
                self._admit()
            if self._deadline is not None and time.monotonic() > self._deadline:
                waiting = [request for queue in self._waiting.values() for request in queue]
                decoding = [request for request, _, _ in self._decoding.values()]
                for request in dict.fromkeys([*waiting, *self._reading, *decoding]):
                    self._fail(request, Busy(CLOSING, 5))
                self._waiting.clear()
            self._leave()
            self._read()
            self._step()
            self.totals.reading, self.totals.decoding = len(self._reading), len(self._decoding)
            self.totals.waiting = sum(map(len, self._waiting.values()))

    def _has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._decoding)

    def _admit(self) -> None:
        """Lets requests begin, as far as there is room for their sequences."""
        if not self._waiting:
            return
        rows: Counter[str] = Counter()  # of each owner
        room, memory = self.limits.rows, self.limits.state_bytes
        active = [(request, request.rows) for request in self._reading]
        for request, n in [*active, *((request, 1) for request, _, _ in self._decoding.values())]:
            rows[request.owner] += n
            room -= n
            memory -= n * self._state_bytes(request.model)
        while self._waiting:
            owner = min(self._waiting, key=rows.__getitem__)
            request = self._waiting[owner][0]
            needed = request.rows * self._state_bytes(request.model)
            if not request.cancelled:
                if request.rows > room or needed > memory:
                    return
                rows[owner] += request.rows
                room -= request.rows
                memory -= needed
                request.admitted = time.perf_counter()
                self._reading.append(request)
            self._waiting[owner].popleft()
            queue = self._waiting.pop(owner)  # to the end of those with as many rows
            if queue:
                self._waiting[owner] = queue

    def _leave(self) -> None:
        """Takes out what nobody wants any more."""
        if any(request.cancelled for request in self._reading):
            self._reading = deque(request for request in self._reading if not request.cancelled)
        for number, (request, _, batch) in list(self._decoding.items()):
            if request.cancelled:
                batch.drop(number)
                del self._decoding[number]

    def _read(self) -> None:
        """Reads a part of the prompts: for no longer than streams can wait, if there are streams."""
        streams, end = bool(self._decoding), time.monotonic() + self.limits.pause
        while self._reading:
            model, begin = self._reading[0].model, time.monotonic()
            room = self.sizes(model).tokens
            if streams:
                room = max(GRID, min(room, int((end - begin) / self._token_seconds.get(model, inf))))
            parts = self._next_parts(room)
            tokens = sum(to - request.position for request, to in parts)
            try:
                self._read_parts(parts)
            except Exception as error:
                for request, _ in parts:
                    self._fail(request, error)
            for request, _ in parts:
                self._reading.remove(request)
                if not request.cancelled and request.position < len(request.tokens):
                    self._reading.append(request)  # behind the others
            now = time.monotonic()
            self._token_seconds[model] = (now - begin) / max(tokens, GRID)  # a call for few takes about as long
            if not streams or now + GRID * self._token_seconds[model] > end:
                return

    def _next_parts(self, room: int) -> list[tuple[Request, int]]:
        """The requests that are read in the next call, and up to where."""
        first = self._reading[0]
        sizes = self.sizes(first.model)
        parts: list[tuple[Request, int]] = []
        for request in self._reading:
            if request.model is not first.model or (request.prompt_logprobs is not None and parts):
                continue
            if sizes.shared:  # then it may be cut anywhere
                tokens = max(sizes.grid, min(sizes.tokens, room) // sizes.grid * sizes.grid)
                end = replace(sizes, tokens=tokens).next_cut(request.position, len(request.tokens), request.cuts)
            else:
                end = sizes.next_cut(request.position, len(request.tokens), request.cuts)
            if parts and end - request.position > room:
                break
            parts.append((request, end))
            room -= end - request.position
            if not sizes.shared or room <= 0 or request.prompt_logprobs is not None:
                break
        return parts

    @torch.inference_mode()
    def _read_parts(self, parts: list[tuple[Request, int]]) -> None:
        """One call of a model, and what follows from it."""
        model = parts[0][0].model
        ids: list[int] = []
        cu = [0]
        for request, end in parts:
            ids += request.tokens[request.position : end]
            cu.append(len(ids))
        states = [model.initial_state() if request.state is None else request.state for request, _ in parts]
        top = parts[0][0].prompt_logprobs  # such a request is alone in its call
        only_last = top is None and all(request.on_outputs is None for request, _ in parts)
        outputs, state = model(
            torch.tensor([ids], device=model.device),
            State.stack(states),
            cu_seqlens=tuple(cu) if self.sizes(model).shared else None,
            last_only=only_last,
        )
        if top is not None:
            self._note_logprobs(parts[0][0], ids, outputs[0], top)
        self.totals.prompt_tokens += len(ids)
        for row, (request, end) in enumerate(parts):
            own = outputs[0, row : row + 1] if only_last else outputs[0, cu[row] : cu[row + 1]]
            if request.on_outputs is not None:
                request.on_outputs(own)
            request.position, request.state, request.logits = end, state[row], own[-1]
            if end in request.cuts and request.on_cut is not None:
                request.on_cut(end, request.state)
        self._begin_decoding(model, [request for request, end in parts if end == len(request.tokens)])

    def _note_logprobs(self, request: Request, ids: list[int], logits: Tensor, top: int) -> None:
        """The log-probabilities of the ids that were just read. logits: [T, V] after each of them."""
        before = [] if request.logits is None else [request.logits[None]]
        targets = ids if before else ids[1:]
        logprobs = torch.cat([*before, logits[:-1]]).float().log_softmax(-1).cpu()
        for target, row in zip(targets, logprobs, strict=True):
            request.logprobs.append(token_logprob(target, row, top))

    def _begin_decoding(self, model: Model, requests: list[Request]) -> None:
        """Their prompts are read. All sequences join at once, so that a batch is moved to larger memory once."""
        joining: deque[tuple[Request, int, Tensor, State]] = deque()
        for request in requests:
            assert request.state is not None
            assert request.logits is not None
            request.receiver.on_prompt(request.state, request.logprobs)
            joining.extend((request, i, request.logits, request.state) for i in range(len(request.sequences)))
            request.state = request.logits = None
            if not request.sequences:
                self._finish(request)
        batches = self._batches.setdefault(model, [])
        while joining:
            batch = next((batch for batch in batches if batch.free), None)
            if batch is None:
                batches.append(batch := DecodeBatch(model, self.sizes(model)))
            sequences: dict[int, SequenceDecoder] = {}
            logits, states = [], []
            while joining and len(sequences) < batch.free:
                request, i, own_logits, own_state = joining.popleft()
                number = next(self._numbers)
                self._decoding[number] = request, i, batch
                sequences[number] = request.sequences[i]
                logits.append(own_logits)
                states.append(own_state)
            batch.add(sequences, torch.stack(logits), State.stack(states))

    def _step(self) -> None:
        """One token for every sequence that is decoded. Batches that are empty then are forgotten, with their model."""
        for batches in self._batches.values():
            for batch in batches:
                if not len(batch):
                    continue
                try:
                    events = batch.step()
                except Exception as error:
                    log.exception("heronry: a step failed")
                    for number in batch.numbers():
                        self._fail(self._decoding[number][0], error)
                    continue
                self.totals.steps += 1
                for event in events:
                    self._hand_out(event)
        in_use = {model: [batch for batch in batches if len(batch)] for model, batches in self._batches.items()}
        self._batches = {model: batches for model, batches in in_use.items() if batches}

    def _hand_out(self, event: Event) -> None:
        request, i, batch = self._decoding.get(event.index, (None, 0, None))
        if request is None or batch is None:
            return  # another of its events has ended it
        goes_on = event.token is not None
        try:
            if event.error is not None:
                self._fail(request, event.error)
                return
            self.totals.generated_tokens += goes_on
            goes_on &= request.receiver.on_event(i, event)
        except Exception as error:
            log.exception("heronry: a result could not be handed out")
            self._fail(request, error)
            return
        if not goes_on:
            batch.drop(event.index)
            del self._decoding[event.index]
            request.unfinished -= 1
            if not request.unfinished:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        self.totals.finished += 1
        self._finish_times.append(time.monotonic())

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends a request with an error."""
        request.cancel()
        for number, (other, _, batch) in list(self._decoding.items()):
            if other is request:
                batch.drop(number)
                del self._decoding[number]
        self._finish(request)
        request.receiver.on_error(error)
