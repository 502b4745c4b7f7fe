"""What wkv4, wkv6 and wkv7 in C++ have in common as custom operators of PyTorch.

- forward(*tensors, state, cu, keep) -> y, the final state, the saved states
- backward(*tensors, saved states, dy, dfinal, cu) -> the gradients of the tensors and of the initial state
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def register_backward(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Makes `backward` the gradient of `forward`, and `empty_gradients` what `backward` returns for fake tensors."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.cu, _ = inputs
        ctx.save_for_backward(*tensors, output[2])

    def gradients(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(*ctx.saved_tensors, dy, dfinal, ctx.cu), None, None

    forward.register_autograd(gradients, setup_context=save)
    backward.register_fake(empty_gradients)


def empty_gradients(*inputs: Any) -> Any:
    """What a backward with these inputs returns, a tuple of tensors of the right shapes, not yet filled."""
    *tensors, _, _, dfinal, _ = inputs
    return tuple(x.new_empty(x.shape) for x in (*tensors, dfinal))


def count_chunks(batch: int, tokens: int, cu: Sequence[int] | None, length: int) -> int:
    """How many chunks of at most `length` tokens all sequences are cut into."""
    lengths = [tokens] * batch if cu is None else [end - start for start, end in pairwise(cu)]
    return sum(-(-n // length) for n in lengths)
