"""A text model run so that one can look inside, and change what passes from block to block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import Model
from ..ops.recording import Call, record_calls

MAX_NUMBERS = 1 << 28  # in the arrays of one view; 1 GB in float32
P = ParamSpec("P")
Found = TypeVar("Found")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """In the `with` block the model runs in eval mode; after it every part is in the mode that it was in, as some may
    be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_eval_mode(function: Callable[P, Found]) -> Callable[P, Found]:
    """The function with its first argument, a model, in eval mode: adapters that are trained may have dropout, which
    would make of every number a random one."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> Found:
        model: object = args[0] if args else options["model"]
        assert isinstance(model, nn.Module)
        with eval_mode(model):
            return function(*args, **options)

    return run


@contextmanager
def plain_modules(model: Model) -> Iterator[None]:
    """In the `with` block the model runs in eval mode and as modules, each once: not as the C++ step that hooks cannot
    see, nor again for the gradients."""
    native, checkpointing = model.native_step_enabled, model.gradient_checkpointing
    model.native_step_enabled = model.gradient_checkpointing = False
    try:
        with eval_mode(model):
            yield
    finally:
        model.native_step_enabled, model.gradient_checkpointing = native, checkpointing


@contextmanager
def edit_stream(model: Model, edits: Sequence[Callable[[Tensor], Tensor | None] | None]) -> Iterator[None]:
    """In the `with` block edits[0] sees the input of the first block [B, T, C], edits[i + 1] the output of block i, and
    what they return takes its place."""
    with ExitStack() as hooks:
        if (first := edits[0]) is not None:
            hooks.enter_context(model.blocks[0].register_forward_pre_hook(lambda _, inputs: _replaced(first, inputs)))
        for block, edit in zip(model.blocks, edits[1:], strict=True):
            if edit is not None:
                hooks.enter_context(
                    block.register_forward_hook(lambda _, _inputs, outputs, edit=edit: _replaced(edit, outputs))
                )
        yield


def _replaced(edit: Callable[[Tensor], Tensor | None], values: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The values with the first one edited, as hooks return them; None where nothing changes."""
    x = edit(values[0])
    return None if x is None else (x, *values[1:])


def residual_stream(model: Model, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """The input of the first block and the output of every block, L + 1 of [B, T, C], and the logits after the last
    token [B, 1, V]."""
    stream: list[Tensor] = []
    with plain_modules(model), edit_stream(model, [stream.append] * (len(model.blocks) + 1)):
        logits, _ = model(tokens, last_only=True)
    return stream, logits


@torch.no_grad()
def operator_calls(model: Model, tokens: Tensor) -> list[Call]:
    """The call of its operator by every layer, for a text [1, T] that begins from nothing.

    Raises:
        InputError: a text that is too long.
    """
    check_size(8 * len(model.blocks) * tokens.numel() * model.config.n_embd, "what all operators are called with")
    with plain_modules(model), record_calls() as calls:
        model(tokens, last_only=True)
    return calls


def as_row(model: Model, tokens: Sequence[int], at_least: int = 1) -> Tensor:
    """Token ids as the model takes them, [1, T].

    Raises:
        InputError: fewer than `at_least`.
    """
    if len(tokens) < at_least:
        raise InputError(f"a text of at least {at_least} tokens is needed, got {len(tokens)}")
    return torch.tensor([list(tokens)], device=model.device)


def is_rwkv4(model: Model) -> bool:
    """Whether it has channels, each with two sums, where the later generations have heads with a matrix."""
    return model.name == "rwkv4"


def check_size(n: int, what: str) -> None:
    """InputError if arrays of n numbers in all are too large for the memory."""
    if n > MAX_NUMBERS:
        raise InputError(f"{what} would have {n:,} numbers, more than {MAX_NUMBERS:,}: take a shorter text")
