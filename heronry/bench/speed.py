"""The speed and the memory of models of equal size: decoding by position, steps of training by length of the text.

Every model has a process of its own, and their blocks alternate, see contest.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models import State
from ..models.baselines import Cache
from ..progress import Progress
from ..train.losses import sum_losses
from .contest import WARM_UP_BLOCKS, Contest, Outcome, Result, Row, run_contest
from .contestants import Job
from .equal_models import VOCABULARY, build_model, with_positions
from .plan import Plan
from .worker import Contestant, forget_peak, process_memory

GROWING = ("GPT", "AFT-full")  # keep every token
MOST_STEPS = 64  # in a block of decoding
PIECE = 512  # tokens of a prompt at a time


class Decoding(NamedTuple):
    """
    positions: [P], tokens that have been read before.
    seconds: [P] by model, for a token.
    state_bytes: [P] by model, of what must be kept to go on.
    slowdown: by model, the time at the last position over that at the first, the median of neighbouring blocks.
    plain_seconds: by model, at the first position without the step in C++, for RWKV.
    """

    positions: NDArray[Any]
    seconds: dict[str, NDArray[Any]]
    state_bytes: dict[str, NDArray[Any]]
    slowdown: dict[str, float]
    plain_seconds: dict[str, float]


class Training(NamedTuple):
    """
    contexts: [C], tokens of a text.
    seconds: [C] by model, for a token of a step: forward and backward pass.
    peak_bytes: [C] by model, of the step beyond the loaded model; nan where the system does not say.
    """

    contexts: NDArray[Any]
    seconds: dict[str, NDArray[Any]]
    peak_bytes: dict[str, NDArray[Any]]


# ---- decoding ----------------------------------------------------------------------------------------------------


class Decoder:
    """A new model in a worker's process, that reads a token at a time.

    Args:
        name, config: see equal_models.py.
        plain: without the step in C++.
    """

    def __init__(self, name: str, config: Any, plain: bool = False):
        self.name, self.config, self.plain = name, config, plain
        self.own_sizes: dict[str, int] = {}
        self.position = 0
        self.state: Any = None

    def load(self) -> None:
        self.model = build_model(self.name, self.config).eval()
        self.model.native_step_enabled = not self.plain

    def decode(self, position: int, tokens: int) -> Job:
        """The tokens after `position`, in every block the same ones. Positions rise from job to job."""
        state = self._state_at(position, tokens)
        self.own_sizes[state_key(position)] = state_bytes(state)
        steps = torch.randint(VOCABULARY, (tokens, 1, 1))

        @torch.inference_mode()
        def job() -> None:
            now = _rewound(state)
            for step in steps:
                _, now = self.model(step, now)

        return job

    @torch.inference_mode()
    def _state_at(self, position: int, room: int) -> Any:
        """After reading random tokens. A cache, of which nothing but the size matters for the time, is filled with
        random numbers instead; it has room for more tokens."""
        state: Any = self.model(torch.randint(VOCABULARY, (1, 1)))[1]
        if _is_cache(state):
            return [_random_cache(layer.buffers, position, room) for layer in state]
        while self.position < position:
            piece = torch.randint(VOCABULARY, (1, min(PIECE, position - self.position)))
            _, self.state = self.model(piece, self.state, last_only=True)
            self.position += piece.shape[1]
        return self.state


def _random_cache(like: tuple[Tensor, Tensor], length: int, room: int) -> Cache:
    keys, values = (torch.randn(*x.shape[:-2], length + room, x.shape[-1]) for x in like)
    return Cache((keys, values), length, [length])


def _rewound(state: Any) -> Any:
    """The same state; a cache may write over what followed, as nobody holds it any more."""
    if _is_cache(state):
        return [Cache(layer.buffers, layer.length, [layer.length]) for layer in state]
    return state


def _is_cache(state: Any) -> bool:
    return isinstance(state, list) and isinstance(state[0], Cache)


def state_bytes(state: Any) -> int:
    """Of a model's state: a `State`, tensors, or caches."""
    return int(state.nbytes if isinstance(state, State) else sum(part.nbytes for part in state))


def state_key(position: int) -> str:
    return f"state at {position}"


def compare_decoding(plan: Plan, configs: dict[str, Any], progress: Progress | None = None) -> Decoding:
    """Times single tokens after each of the positions.

    Raises:
        InputError: a model failed; the message says why.
    """
    first, last = plan.positions[0], plan.positions[-1]
    rows = []
    for position in plan.positions:  # each block follows that of another process, so all find the caches equally cold
        for name, config in configs.items():
            contestant = Contestant(Decoder, (name, with_positions(config, last + MOST_STEPS)))
            steps = MOST_STEPS if name not in GROWING else max(4, min(MOST_STEPS, 131072 // position))
            against = (f"{name} {first}",) if position == last else ()
            rows.append(
                Row(f"{name} {position}", contestant, "decode", (position, steps), None, steps, against=against)
            )
    for name, config in configs.items():
        if name.startswith("RWKV"):
            plain = Contestant(Decoder, (name, config, True))
            rows.append(Row(f"{name} plain", plain, "decode", (first, MOST_STEPS), None, MOST_STEPS))
    outcome = Outcome(Contest("compare", "decoding", "token", rows))
    _run(outcome, plan.decode_blocks, 1, progress)  # a step this small gains nothing from more threads
    results = outcome.results

    def by_position(figure: Callable[[Result, int], float]) -> dict[str, NDArray[Any]]:
        return {name: np.array([figure(results[f"{name} {p}"], p) for p in plan.positions]) for name in configs}

    return Decoding(
        np.array(plan.positions),
        by_position(lambda result, _: result.median / result.row.units),
        by_position(lambda result, position: result.memory[state_key(position)]),
        {name: 1 / (outcome.speed_ratio(results[f"{name} {last}"], f"{name} {first}") or math.nan) for name in configs},
        {name: results[f"{name} plain"].median / MOST_STEPS for name in configs if name.startswith("RWKV")},
    )


# ---- steps of training -------------------------------------------------------------------------------------------


class Learner:
    """A new model in a worker's process, which makes forward and backward passes over random tokens. What the optimizer
    adds is the same for all."""

    def __init__(self, name: str, config: Any):
        self.name, self.config = name, config
        self.own_sizes: dict[str, int] = {}

    def load(self) -> None:
        self.model = build_model(self.name, self.config)
        self._pass(torch.zeros(1, 3, dtype=torch.int64))  # loads what PyTorch loads late, which is no part of a step
        self.loaded = process_memory({}).get("resident", 0)

    def step(self, rows: int, length: int) -> Job:
        tokens = torch.randint(VOCABULARY, (rows, length + 1))
        key = peak_key(length)

        def job() -> None:
            weighs = key not in self.own_sizes and forget_peak()  # the first step, which is not timed
            self._pass(tokens)
            if weighs:
                self.own_sizes[key] = process_memory({})["peak"] - self.loaded

        return job

    def _pass(self, tokens: Tensor) -> None:
        logits, _ = self.model(tokens[:, :-1])
        nats, _ = sum_losses(logits, tokens[:, 1:], None)
        (nats / tokens[:, 1:].numel()).backward()
        self.model.zero_grad()


def peak_key(length: int) -> str:
    return f"peak of {length}"


def compare_training(plan: Plan, configs: dict[str, Any], progress: Progress | None = None) -> Training:
    """Times steps of `plan.step_tokens` tokens in texts of each length.

    Raises:
        InputError: a model failed; the message says why.
    """
    longest, rows = max(plan.contexts), []
    for name, config in configs.items():
        contestant = Contestant(Learner, (name, with_positions(config, longest)))
        for length in plan.contexts:
            n = max(1, plan.step_tokens // length)
            rows.append(Row(f"{name} {length}", contestant, "step", (n, length), units=n * length))
    outcome = Outcome(Contest("compare", "training", "token", rows))
    _run(outcome, plan.step_blocks, torch.get_num_threads(), progress)
    found = {name: [outcome.results[f"{name} {length}"] for length in plan.contexts] for name in configs}
    return Training(
        np.array(plan.contexts),
        {name: np.array([x.median / x.row.units for x in results]) for name, results in found.items()},
        {
            name: np.array([x.memory.get(peak_key(n), math.nan) for x, n in zip(results, plan.contexts, strict=True)])
            for name, results in found.items()
        },
    )


def _run(outcome: Outcome, blocks: int, threads: int, progress: Progress | None) -> None:
    """Runs a contest, whose workers have so many threads each.

    Raises:
        InputError: a contestant failed.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    total, lines = len(outcome.results) * (1 + WARM_UP_BLOCKS + blocks), 0

    def report(line: str) -> None:
        nonlocal lines
        lines += 1
        if progress is not None:
            progress(lines, total)

    run_contest(outcome, blocks, Path(), report)
    for result in outcome.results.values():
        if result.problem:
            raise InputError(f"{outcome.contest.title}, {result.row.name}: {result.problem}")
