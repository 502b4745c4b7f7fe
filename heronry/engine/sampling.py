"""How tokens are drawn: the options, and what is kept of a sequence for them; draw.py has the distribution.

- penalties touch only the tokens that they are about, not the whole vocabulary
- logits that nothing changes are read where they are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, show, unknown_name
from .draw import COLDEST, HOTTEST, Drawing, Options, check_logits, draw_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

ORDERS = ("temperature-first", "top-p-first")
LARGEST = 1e38  # of a logit; float32 ends at 3.4e38
UNCOUNTED = " \t0123456789"  # what the PyPI package rwkv leaves out of the counts: every token within this text

# Which tokens may come next: called with the token ids generated so far, returns bool [V], or None for all.
Mask = Callable[[list[int]], "Tensor | None"]


class UnseededOptions(TypedDict, total=False):
    """The fields of `Sampling` but for the seed, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    penalty_decay: float
    penalize_digits: bool
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    order: str


class SamplingOptions(UnseededOptions, total=False):
    """The fields of `Sampling` as keyword arguments."""

    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How one sequence's tokens are drawn.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely; 0 = all.
    top_p: only the smallest set of most likely tokens that together reach this probability; 0 = only the best.
    min_p: only tokens at least this share as likely as the best one.
    presence_penalty: taken from the logit of every token that was generated before.
    frequency_penalty: the same, times how often; the counts fade by `penalty_decay` a token.
    penalize_digits: False keeps digits, spaces and tabs out of these counts, as the PyPI package rwkv does, so that
        numbers may repeat their digits; presence_penalty still counts them.
    repetition_penalty: divides the positive logits of tokens in the prompt or the output so far, and multiplies the
        negative ones; 1 = off. As in transformers and vLLM.
    logit_bias: token id -> what is added to its logit; -inf bans it.
    seed: the same seed draws the same tokens, whatever else is in the batch; None draws new ones each time.
    order: "temperature-first" cuts the tempered distribution, by top_p among what top_k left (as transformers
        does); "top-p-first" cuts the untempered one, each cut on its own, and tempers what is left (as the PyPI
        package rwkv does).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    penalize_digits: bool = True
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    order: str = "temperature-first"

    def __post_init__(self) -> None:
        _expect("temperature", self.temperature, 0, math.inf)
        _expect("top_p", self.top_p, 0, 1)
        _expect("min_p", self.min_p, 0, 1)
        _expect("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _expect("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _expect("penalty_decay", self.penalty_decay, 0, 1)
        _expect("repetition_penalty", self.repetition_penalty, COLDEST, HOTTEST)
        _expect("top_k", self.top_k, 0, math.inf, whole=True)
        if self.seed is not None:
            _expect("seed", self.seed, 0, 2**64 - 1, whole=True)
        if not isinstance(self.penalize_digits, bool):
            raise InputError(f"penalize_digits must be True or False, got {show(self.penalize_digits)}")
        if self.order not in ORDERS:
            raise InputError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias must be a dict, token id -> what is added, got {show(self.logit_bias)}")
        for token, bias in self.logit_bias.items():
            _expect("a token in logit_bias", token, 0, math.inf, whole=True)
            if bias != -math.inf:
                _expect(f"logit_bias of token {token}", bias, -math.inf, math.inf)

    def replace(self, **changes: Unpack[SamplingOptions]) -> Sampling:
        """A copy with some fields replaced.

        Raises:
            InputError: an unknown field, or a value out of range.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise unknown_name("sampling option", name, known)
        return replace(self, **changes)


class Sampler:
    """Draws the tokens of one sequence; holds its random numbers and what it has drawn so far.

    prompt: the ids that `repetition_penalty` counts beside those drawn.
    decode: the text of a token; needed where `penalize_digits` is False.
    earlier: ids that were drawn before, which the penalties count.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        decode: Callable[[int], str] | None = None,
        earlier: Sequence[int] = (),
    ):
        if decode is None and not sampling.penalize_digits:
            raise InputError("penalize_digits=False needs a tokenizer to know digits by")
        self.sampling = sampling
        self._options = Options.of(sampling)
        self._decode = decode
        self._bias = np.array([*sampling.logit_bias], np.int64), _float32([*sampling.logit_bias.values()])
        self._changes = bool(
            sampling.repetition_penalty != 1
            or sampling.logit_bias
            or sampling.presence_penalty
            or sampling.frequency_penalty
        )
        self._drawn, self._repeated = _Counts(), _Counts()  # what was drawn; that and the prompt
        if sampling.repetition_penalty != 1:
            self._repeated = _Counts(dict.fromkeys(prompt))
        for token in earlier:
            self.count(token)
        # not torch's: on a CPU that takes the last 32 bits of a seed, so that two seeds give one stream
        self._random = np.random.default_rng(sampling.seed)

    def pick(
        self, logits: Tensor, mask: Tensor | None = None, banned: Collection[int] = (), grammar: Tensor | None = None
    ) -> int:
        """The next token for logits [V]; see `prepare`."""
        drawing = self.prepare(logits.detach().to("cpu", torch.float32).contiguous(), mask, banned, grammar)
        [token] = draw_rows([drawing])
        if isinstance(token, InputError):
            raise token
        self.count(token)
        return token

    def prepare(
        self, logits: Tensor, mask: Tensor | None = None, banned: Collection[int] = (), grammar: Tensor | None = None
    ) -> Drawing:
        """What the next token, which is to be counted, is drawn from.

        logits: float32 [V], contiguous, on the CPU.
        mask, grammar: bool [V], the tokens that are allowed; banned: ids that are not.
        """
        if self._changes or mask is not None or grammar is not None or banned:
            logits = self._adjust(logits, mask, banned, grammar)
        return Drawing(logits, self.sampling, self._random.random() if self.sampling.temperature else 0, self._options)

    def _adjust(self, logits: Tensor, mask: Tensor | None, banned: Collection[int], grammar: Tensor | None) -> Tensor:
        """A copy of the logits with penalties, bias and then the masks."""
        check_logits(logits)
        options = self.sampling
        logits = logits.clone()
        x = logits.numpy()  # the same memory
        with np.errstate(over="ignore", invalid="ignore"):
            if options.repetition_penalty != 1:
                found = x[self._repeated.ids]
                penalty = np.where(found > 0, _float32(1 / options.repetition_penalty), options.repetition_penalty)
                x[self._repeated.ids] = found * _float32(penalty)
            ids, bias = self._bias
            x[ids] += bias
            if options.presence_penalty or options.frequency_penalty:
                often = _float32(options.frequency_penalty) * _float32(self._drawn.counts)
                x[self._drawn.ids] -= _float32(options.presence_penalty) + often
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise InputError(f"a mask must be a torch.Tensor, bool [{len(x)}], got {type(mask).__name__}")
            if mask.dtype != torch.bool or mask.shape != logits.shape:
                kind = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                raise InputError(f"a mask must be bool [{len(x)}], got {kind}")
            logits.masked_fill_(~mask.cpu(), -math.inf)
        if grammar is not None:
            logits.masked_fill_(~grammar, -math.inf)
        x[list(banned)] = -math.inf
        return logits.clamp_(max=LARGEST)  # what a bias or a penalty of 1e39 makes is infinite in float32

    def count(self, token: int) -> None:
        """Takes a token as drawn, for the penalties."""
        options = self.sampling
        if options.repetition_penalty != 1:
            self._repeated.add(token, 0)
        if options.presence_penalty or options.frequency_penalty:
            counted = options.penalize_digits or self._decode is None or self._decode(token) not in UNCOUNTED
            self._drawn.counts *= options.penalty_decay
            self._drawn.add(token, int(counted))


class _Counts:
    """Different token ids, and for each a count."""

    def __init__(self, ids: Collection[int] = ()):
        self.ids = np.array([*ids], np.int64)
        self.counts = np.zeros(len(ids))
        self._places = {token: i for i, token in enumerate(ids)}

    def add(self, token: int, count: float) -> None:
        if token not in self._places:
            self._places[token] = len(self.ids)
            self.ids, self.counts = np.append(self.ids, token), np.append(self.counts, 0.0)
        self.counts[self._places[token]] += count


def _float32(x: Any) -> Any:
    """Infinite beyond what float32 holds."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(np.float32)


def _expect(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kind = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or not -1e300 < value < 1e300  # an int may be larger than any float
        or not low <= value <= high
    ):
        what = "a whole number" if whole else "a number"
        bounds = f" of at least {low}" if high == math.inf else f" from {low} to {high}"
        raise InputError(f"{name} must be {what}{bounds if low > -math.inf else ''}, got {show(value)}")
