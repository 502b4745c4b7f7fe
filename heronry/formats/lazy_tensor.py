"""Tensors that are read from their file on demand, so that a checkpoint of any size needs no memory of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..memory import drop_file_pages


class LazyTensor:
    """A tensor in a file: shape and dtype are known, `read()` returns the numbers, as often as it is called.

    packed_as: the type of a tensor that the file holds in a quantized form, like "q8_0"; "" for all others.
    mapped: the mapped tensors that `read` reads.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        read: Callable[[], Tensor],
        packed_as: str = "",
        mapped: Sequence[Tensor] = (),
    ):
        self.shape, self.dtype, self.read, self.packed_as = torch.Size(shape), dtype, read, packed_as
        self.mapped = tuple(mapped)

    @classmethod
    def from_tensor(cls, x: Tensor, mapped: bool = False) -> LazyTensor:
        """A tensor in memory, or mapped from a file, as a lazy one."""
        x = x.detach()
        return cls(x.shape, x.dtype, lambda: x, mapped=[x] if mapped else ())

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: torch.dtype) -> LazyTensor:
        """Zeros, which take no memory until they are read."""
        return cls(torch.Size(shape), dtype, lambda: torch.zeros(shape, dtype=dtype))

    @classmethod
    def computed(cls, function: Callable[..., Tensor], *inputs: LazyTensor) -> LazyTensor:
        """function(*inputs), recomputed each time it is read; InputError where their shapes do not allow it.

        The function is also called with tensors on the meta device, where arithmetic would make PyTorch import its
        compiler, for seconds and 100 MB: it may change shapes and dtypes only, else see `deferred`.
        """
        try:
            result = function(*(x.on_meta() for x in inputs))
        except InputError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = " and ".join(str(list(x.shape)) for x in inputs)
            raise InputError(f"a tensor of the shape {shapes} is in the place of one of another shape") from error
        return cls.deferred(result.shape, result.dtype, function, *inputs)

    @classmethod
    def deferred(
        cls, shape: Sequence[int], dtype: torch.dtype, function: Callable[..., Tensor], *inputs: LazyTensor
    ) -> LazyTensor:
        """function(*inputs), which has this shape and dtype, recomputed each time it is read."""
        mapped = [source for x in inputs for source in x.mapped]
        return cls(torch.Size(shape), dtype, lambda: function(*(x.read() for x in inputs)), mapped=mapped)

    def drop_pages(self) -> None:
        """Gives the memory of what was read of a mapped file back: a model that is loaded needs it once."""
        for x in self.mapped:
            drop_file_pages(x)

    def on_meta(self) -> Tensor:
        """A tensor of this shape and dtype without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def map(self, function: Callable[[Tensor], Tensor]) -> LazyTensor:
        """function(self), computed when it is read."""
        return LazyTensor.computed(function, self)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same numbers in another dtype."""
        return self if dtype == self.dtype else self.map(lambda x: x.to(dtype))

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize


Tensors = dict[str, LazyTensor]


def as_lazy(tensors: Mapping[str, Any], mapped: bool = False) -> Tensors:
    """The values of a checkpoint as lazy tensors. mapped: they are as they stand in a mapped file.

    Raises:
        InputError: a value is not a dense tensor of numbers.
    """
    for key, x in tensors.items():
        if isinstance(x, LazyTensor):
            continue
        if not isinstance(x, Tensor):
            raise InputError(f"{key} is {type(x).__name__}, not a floating point tensor; use the original checkpoint")
        if x.layout != torch.strided or x.is_nested or x.is_meta or x.numel() == 0:
            raise InputError(f"{key} is a sparse, nested, meta or empty tensor; save dense tensors")
        if x.nbytes > x.untyped_storage().nbytes():
            raise InputError(f"{key} holds fewer numbers than its shape implies; save contiguous tensors")
    return {key: x if isinstance(x, LazyTensor) else LazyTensor.from_tensor(x, mapped) for key, x in tensors.items()}


def same_numbers(shape: torch.Size, expected: torch.Size) -> bool:
    """Whether a tensor of one shape can be reshaped to the other for a model: they differ by dimensions of size 1, or a
    vector is cut into rows. A transposed matrix has as many numbers, in another order."""
    a, b = ([size for size in sizes if size > 1] for sizes in (shape, expected))
    return a == b or (math.prod(a) == math.prod(b) and min(len(a), len(b)) <= 1)


# Functions for `LazyTensor.map`, used by several formats.


def transposed(x: Tensor) -> Tensor:
    """[..., A, B] -> [..., B, A]."""
    return x.transpose(-2, -1)


def squeezed(x: Tensor) -> Tensor:
    """x without its dimensions of size 1, but with at least one dimension."""
    return x.reshape([size for size in x.shape if size > 1] or [1])


def as_row(x: Tensor) -> Tensor:
    """A vector as [1, 1, C]."""
    return x.reshape(1, 1, -1)


def nth(i: int, count: int, x: Tensor) -> Tensor:
    """Vector i of `count` vectors stored as one tensor, [1, 1, C]."""
    return x.reshape(count, 1, 1, -1)[i]
