"""From logits to a token: the distribution that `Sampling` describes, and the draw from it.

- a token weighs a whole number, 2^34 times its probability relative to that of the most likely one: sums of up to 2^19
  weights are exact in float64, so they depend neither on the order nor on the processor
- what is cut off is decided by a threshold on the weight, so tokens that are equally likely stay or go together
- the draw runs over the ids in their own order, so that rounding which swaps two close tokens hardly ever changes it
- this file is the definition; C++ (draw.cpp) does the same to the bit, some 12 times faster
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import build
from ..errors import InputError
from ..memory import Scratch

if TYPE_CHECKING:
    from .sampling import Sampling

COLDEST, HOTTEST = 1e-30, 1e30  # float32 takes what is far below for 0, and what is far above for infinity
BEST = 2.0**34  # the weight of the most likely token
BLOCK = 256  # in draw.cpp
SHARED = 1 << 18  # logits in all that are worth a second thread
scratch = Scratch()


class Options(ctypes.Structure):  # Options in draw.cpp
    """The fields of a `Sampling` that a draw needs."""

    _fields_ = [
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("inverse", ctypes.c_float),
        ("tempered_first", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, sampling: Sampling) -> Options:
        return cls(
            min(sampling.top_k, 1 << 62),
            sampling.top_p,
            sampling.min_p,
            sampling.temperature and 1,
            _inverse(sampling.temperature) if sampling.temperature else 0,
            sampling.order == "temperature-first",
        )


class Drawing(NamedTuple):
    """A token that is to be drawn.

    logits: float32 [V], contiguous, on the CPU.
    random: evenly distributed over 0 to 1; what it falls on is drawn.
    options: of the sampling.
    """

    logits: Tensor
    sampling: Sampling
    random: float
    options: Options


def draw(logits: Tensor, sampling: Sampling, random: float) -> int:
    """The token that `random`, evenly distributed over 0 to 1, falls on. logits: float32 [V], contiguous, on the CPU.

    Raises:
        InputError: NaN, infinity, or nothing but minus infinity.
    """
    [token] = draw_rows([Drawing(logits, sampling, random, Options.of(sampling))])
    if isinstance(token, InputError):
        raise token
    return token


def draw_rows(drawings: Sequence[Drawing]) -> list[int | InputError]:
    """The tokens, each as if it were drawn alone, from logits of the same size; why there is none in place of one that
    cannot be drawn."""
    function = _native()
    if function is None:
        return [find_fault(x.logits) or draw_in_python(*x[:3]) for x in drawings]
    if not drawings:
        return []
    count, size = len(drawings), len(drawings[0].logits)
    logits, _, randoms, options = zip(*drawings, strict=True)
    threads = min(count, torch.get_num_threads()) if count * size >= SHARED else 1
    memory = scratch.take(threads * 12 * (size + BLOCK))
    tokens = (ctypes.c_int64 * count)()
    function(
        (ctypes.c_void_p * count)(*map(Tensor.data_ptr, logits)),
        count,
        size,
        (Options * count)(*options),
        (ctypes.c_double * count)(*randoms),
        tokens,
        memory.data_ptr(),
        threads,
    )
    scratch.give_back(memory)
    return [token if token >= 0 else find_fault(x.logits) or token for token, x in zip(tokens, drawings, strict=True)]


@cache
def _native() -> Any:
    library = build.library(Path(__file__).with_suffix(".cpp"))
    if library is None:
        return None
    function, pointer, number = library.draw_rows, ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, number, pointer, pointer, pointer, pointer, number]
    return function


def draw_in_python(logits: Tensor, sampling: Sampling, random: float) -> int:
    """As `draw`, which it defines."""
    check_logits(logits)
    if sampling.temperature == 0:
        return int(logits.numpy().argmax())
    weights, stays = _weights_and_cut(logits, sampling)
    total = np.where(stays, weights, 0).cumsum(dtype=np.float64)
    point = min(random * total[-1], total[-1] - 1)
    return int(total.searchsorted(point, side="right"))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution over the next token: logits [V] -> [V], what is cut off exactly 0. What is less likely than
    2^-35 of the best is never drawn."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1)
    logits = logits.float()
    stays = torch.from_numpy(_weights_and_cut(logits, sampling)[1])
    tempered = (logits - logits.max()) * _inverse(sampling.temperature)
    return torch.softmax(tempered.masked_fill_(~stays, -torch.inf), 0)


def check_logits(logits: Tensor) -> None:
    """InputError for logits that no token can be drawn from."""
    if fault := find_fault(logits):
        raise fault


def find_fault(logits: Tensor) -> InputError | None:
    """Why no token can be drawn from these logits."""
    most = float(logits.max())
    if not most < torch.inf:  # NaN is not smaller either
        return InputError("the logits contain NaN or infinity: load the model in float32 or bfloat16, not float16")
    if most == -torch.inf:
        return InputError("no token is left to choose: logit_bias, mask, grammar or min_tokens bans them all")
    return None


def _inverse(temperature: float) -> float:
    """Of a temperature that is not 0."""
    return float(np.float32(1 / min(max(temperature, COLDEST), HOTTEST)))


def _weights_and_cut(logits: Tensor, sampling: Sampling) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The weights of all tokens [V], and which of them stay."""
    tempered_first = sampling.order == "temperature-first"
    weights = _weigh(logits.numpy(), _inverse(sampling.temperature))
    sizes = weights if tempered_first else _weigh(logits.numpy(), 1)
    ordered = np.sort(sizes)[::-1]
    total = ordered.cumsum(dtype=np.float64)
    least, mass = sampling.min_p * BEST, sampling.top_p * total[-1]
    if 0 < sampling.top_k < len(ordered):
        least = max(least, float(ordered[sampling.top_k - 1]))
        if tempered_first:  # then top_p counts only what top_k left
            mass = sampling.top_p * total[sampling.top_k - 1]
    if sampling.top_p < 1:
        least = max(least, float(ordered[total.searchsorted(mass)]))
    return weights, sizes >= least


def _weigh(logits: NDArray[np.float32], inverse: float) -> NDArray[np.float32]:
    """BEST * exp((logits - max) * inverse), rounded to whole numbers, step by step as in draw.cpp."""
    f = np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.maximum((logits - logits.max()) * f(inverse), f(-87.4))
    magic = f(12582912)  # 1.5 * 2^23: adding it rounds to whole numbers
    n = (x * f(1.44269504) + magic) - magic
    r = x - n * f(0.693359375) + n * f(2.12194440e-4)
    p = np.full_like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f(c)
    p = p * r * r + r + f(1)
    weights: NDArray[np.float32] = np.rint(np.ldexp(p, n.astype(np.int32) + 34))
    return weights
