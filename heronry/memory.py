"""Huge pages for large tensors, and a pool of memory for short-lived ones.

Decoding reads all weights and writes a new state for every token. Huge pages save address translations, and the pool
saves the kernel from allocating and clearing the pages of a state at every step.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86 and most of arm64


class Arena:
    """Allocates uninitialised tensors side by side in large blocks: on a CPU under Linux in huge pages, if enabled.

    A block is freed when all tensors in it are gone, so tensors of the same lifetime should share an arena.
    """

    BLOCK = 64 << 20  # bytes; a tensor of more than half of it gets a block of its own

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.block: mmap.mmap | None = None
        self.used = self.BLOCK

    def allocate(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the arena's device, aligned to 64 bytes."""
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // 64) * 64
        if self.device.type != "cpu" or not count or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device=self.device)
        if size > self.BLOCK // 2:
            return torch.frombuffer(_block(size), dtype=dtype, count=count).view(shape)
        if self.block is None or self.used + size > self.BLOCK:
            self.block, self.used = _block(self.BLOCK), 0
        place, self.used = self.used, self.used + size
        return torch.frombuffer(self.block, dtype=dtype, count=count, offset=place).view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """A copy of `x` in the arena."""
        return self.allocate(x.shape, x.dtype).copy_(x)


def _block(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Pool:
    """Memory for short-lived tensors: a block is reused once no tensor refers to it any more.

    A tensor, or any view of it, keeps its block in use. The pool keeps the SPARE largest blocks, used or not.
    """

    SPARE = 2

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []
        self.lock = threading.Lock()

    def allocate(self, count: int) -> Tensor:
        """An uninitialised float32 tensor [count] on the CPU."""
        size = 4 * count
        if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(count, dtype=torch.float32, device="cpu")
        with self.lock:
            for place in range(len(self.blocks)):
                if sys.getrefcount(self.blocks[place]) == ALONE and len(self.blocks[place]) >= size:
                    return torch.frombuffer(self.blocks[place], dtype=torch.float32, count=count)
            memory = _block(size)
            self.blocks = sorted([*self.blocks, memory], key=len)[-self.SPARE :]
            return torch.frombuffer(memory, dtype=torch.float32, count=count)


def _alone() -> int:
    """The sys.getrefcount of a block that only a list refers to; it differs between versions of Python."""
    blocks = [mmap.mmap(-1, 4096)]
    return sys.getrefcount(blocks[0])


ALONE = _alone()
