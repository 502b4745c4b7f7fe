"""From logits to a token.

- `probabilities` is the whole of it: one function from logits to the distribution that is drawn from
- what is cut off is decided by a threshold on the probability, so tokens that are equally likely stay or go together
- the draw runs over the ids in their own order, so that rounding which swaps two close tokens hardly ever changes it
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

if TYPE_CHECKING:
    from typing_extensions import Unpack

ORDERS = ("temperature-first", "top-p-first")
COLDEST, HOTTEST = 1e-30, 1e30  # float32 takes what is far below for 0, and what is far above for infinity
LARGEST = 1e38  # of a logit; float32 ends at 3.4e38
UNCOUNTED = " \t0123456789"  # what the PyPI package rwkv leaves out of the counts: every token within this text
OFTEN_ENOUGH = 256  # a nucleus is rarely larger; taking the best 256 costs a tenth of sorting all of World

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
        self._decode = decode
        self._prompt, self._earlier = prompt, earlier
        self._drawn = torch.zeros(0, dtype=torch.bool, device="cpu")  # [V] once logits have shown how many
        self._repeated = self._drawn  # [V], drawn or in the prompt
        self._counts = torch.zeros(0, dtype=torch.float64, device="cpu")  # [V], how often each was drawn, faded
        # not torch's: on a CPU that takes the last 32 bits of a seed, so that two seeds give one stream
        self._random = np.random.default_rng(sampling.seed)

    def pick(
        self, logits: Tensor, mask: Tensor | None = None, banned: Collection[int] = (), grammar: Tensor | None = None
    ) -> int:
        """The next token for logits [V]. mask, grammar: bool [V], the tokens that are allowed; banned: ids that are
        not."""
        logits = self._adjust(logits, mask, banned, grammar)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            total = probabilities(logits, self.sampling).cumsum(0, dtype=torch.float64)
            point = self._random.random() * total[-1]
            token = min(int(torch.searchsorted(total, point, right=True)), len(total) - 1)
        self.count(token, len(logits))
        return token

    def _adjust(self, logits: Tensor, mask: Tensor | None, banned: Collection[int], grammar: Tensor | None) -> Tensor:
        """Logits with penalties, bias and then the mask, float32 on the CPU; the caller's tensor stays as it is."""
        options = self.sampling
        logits = logits.detach().to("cpu", torch.float32, copy=True)
        if not logits.max() < math.inf:  # NaN is not smaller either
            raise InputError("the logits contain NaN or infinity: load the model in float32 or bfloat16, not float16")
        size = len(logits)
        self._begin(size)
        if options.repetition_penalty != 1:
            penalty = torch.where(logits > 0, 1 / options.repetition_penalty, options.repetition_penalty)
            logits = torch.where(self._repeated, logits * penalty, logits)
        for token, bias in options.logit_bias.items():
            logits[token] += float(bias)  # torch takes no whole number beyond 64 bits
        if options.presence_penalty or options.frequency_penalty:
            often = options.frequency_penalty * self._counts.float()
            logits -= torch.where(self._drawn, options.presence_penalty + often, 0.0)
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise InputError(f"a mask must be a torch.Tensor, bool [{size}], got {type(mask).__name__}")
            if mask.dtype != torch.bool or mask.shape != logits.shape:
                kind = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                raise InputError(f"a mask must be bool [{size}], got {kind}")
            logits.masked_fill_(~mask.cpu(), -math.inf)
        if grammar is not None:
            logits.masked_fill_(~grammar, -math.inf)
        if banned:
            logits[list(banned)] = -math.inf
        logits.clamp_(max=LARGEST)  # what a bias or a penalty of 1e39 makes is infinite in float32
        if logits.max() == -math.inf:
            raise InputError("no token is left to choose: logit_bias, mask, grammar or min_tokens bans them all")
        return logits

    def _begin(self, size: int) -> None:
        """Makes room for counts of so many tokens, once."""
        if not len(self._counts):
            self._counts = self._counts.new_zeros(size)
            self._drawn, self._repeated = self._drawn.new_zeros(size), self._drawn.new_zeros(size)
            if self.sampling.repetition_penalty != 1 and self._prompt:
                self._repeated[list(self._prompt)] = True
            for token in self._earlier:
                self.count(token, size)

    def count(self, token: int, vocab_size: int) -> None:
        """Takes a token as drawn, for the penalties."""
        self._begin(vocab_size)
        options = self.sampling
        if options.repetition_penalty != 1:
            self._repeated[token] = True
        if options.presence_penalty or options.frequency_penalty:
            self._counts *= options.penalty_decay
            self._drawn[token] = True
            if options.penalize_digits or self._decode is None or self._decode(token) not in UNCOUNTED:
                self._counts[token] += 1


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution over the next token: logits [V] -> [V], what is cut off exactly 0."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1)
    logits = logits - logits.max()  # so that no temperature overflows
    tempered = logits / min(max(sampling.temperature, COLDEST), HOTTEST)
    tempered_first = sampling.order == "temperature-first"
    p = torch.softmax(tempered if tempered_first else logits, 0)
    threshold = _threshold(p, sampling, mass_of_top_k=tempered_first)
    if threshold == 0:
        return torch.softmax(tempered, 0)
    return torch.softmax(tempered.masked_fill_(p < threshold, -math.inf), 0)


def _threshold(p: Tensor, sampling: Sampling, mass_of_top_k: bool) -> float:
    """The probability below which tokens are cut off. mass_of_top_k: top_p counts only what top_k left."""
    threshold = sampling.min_p * float(p.max()) if sampling.min_p else 0.0
    mass = sampling.top_p
    if 0 < sampling.top_k < len(p):
        best = p.topk(sampling.top_k).values
        threshold = max(threshold, float(best[-1]))
        if mass_of_top_k:
            mass *= float(best.sum(dtype=torch.float64))
    if sampling.top_p < 1:
        threshold = max(threshold, _nucleus(p, mass))
    return threshold


def _nucleus(p: Tensor, mass: float) -> float:
    """The least likely token's probability in the smallest set of most likely tokens that reaches `mass`."""
    best = p.topk(min(OFTEN_ENOUGH, len(p))).values
    total = best.cumsum(0, dtype=torch.float64)
    if total[-1] < mass:
        possible = p[p > (1 - mass) / len(p)]  # all others together do not make up what may be missing
        best = torch.from_numpy(np.sort(possible.numpy())[::-1].copy())  # three times as fast as torch.sort
        total = best.cumsum(0, dtype=torch.float64)
    return float(best[min(int(torch.searchsorted(total, mass)), len(best) - 1)])


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
