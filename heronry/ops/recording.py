"""What operators are called with, for those who look inside a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of an operator, with what its body got and returned."""

    operator: str  # "wkv7"
    inputs: tuple[Any, ...]  # in the order of its signature: the tensors, the state, cu_seqlens
    output: Any  # (y, final state), of biwkv and biwkv6 y alone


_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """The calls that this thread makes in the `with` block, in order; of a model, one for each layer. The C++ step of a
    whole model calls no operator."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def record(operator: str, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps a call if this thread records them."""
    if (calls := _calls.get()) is not None:
        calls.append(Call(operator, inputs, output))
