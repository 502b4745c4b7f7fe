"""Huge pages for large tensors, and a pool of memory for short-lived ones.

Decoding reads all weights and writes a new state for every token. Huge pages save address translations, and the pool
saves the kernel from allocating and clearing the pages of a state at every step. `release_memory` empties the pools.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import weakref

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
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _not_enough(size) from error
    with contextlib.suppress(OSError):  # the kernel has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def drop_file_pages(x: Tensor) -> None:
    """Gives the memory under a tensor that is mapped from a file, and unchanged, back to the system: what is read of it
    later comes from the file again. For tensors in memory of their own this would lose the numbers."""
    if sys.platform == "linux":
        begin = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # pages shared with a neighbour are read again
        size = x.data_ptr() + x.nbytes - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _not_enough(size: int) -> MemoryError:
    return MemoryError(f"not enough memory: {size / 1e6:.1f} MB more cannot be had")


class Pool:
    """Memory for short-lived tensors: a block is used again once no tensor refers to it any more.

    A tensor, or any view of it, keeps its block in use. Of the blocks that are not in use the pool keeps the SPARE
    largest. Threads may share it.
    """

    SPARE = 2

    def __init__(self) -> None:
        self.spare: list[mmap.mmap] = []
        _pools.add(self)

    def allocate(self, count: int) -> Tensor:
        """An uninitialised float32 tensor [count] on the CPU, aligned to 64 bytes."""
        size = 4 * count
        if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                return torch.empty(count, dtype=torch.float32, device="cpu")
            except RuntimeError as error:
                raise _not_enough(size) from error
        block = self._take(size) or _block(size)
        view = memoryview(block)  # the tensor's own: it goes when the last tensor on this memory goes
        weakref.finalize(view, self._give_back, block)
        return torch.frombuffer(view, dtype=torch.float32, count=count)

    def _take(self, size: int) -> mmap.mmap | None:
        """A spare block of at least this size; whoever removes one from the list has it."""
        for block in sorted(self.spare, key=len):
            if len(block) >= size:
                with contextlib.suppress(ValueError):  # another thread has taken it
                    self.spare.remove(block)
                    return block
        return None

    def _give_back(self, block: mmap.mmap) -> None:
        # without a lock: this runs wherever a tensor goes, in the middle of any other method too
        self.spare.append(block)
        while len(self.spare) > self.SPARE:
            with contextlib.suppress(ValueError):  # another thread has taken it
                self.spare.remove(min(self.spare, key=len))

    def release(self) -> None:
        """Frees the spare blocks."""
        self.spare.clear()


class Scratch:
    """Working memory for one call after another: the block that the last one gave back serves the next. Threads may
    share it."""

    def __init__(self) -> None:
        self.spare: list[Tensor] = []
        _pools.add(self)

    def take(self, size: int) -> Tensor:
        """A tensor of at least so many bytes, uninitialised, aligned to 64 bytes."""
        with contextlib.suppress(IndexError):  # none, or another thread was faster
            if (block := self.spare.pop()).nbytes >= size:
                return block
        if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.frombuffer(_block(size), dtype=torch.uint8)
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise _not_enough(size) from error

    def give_back(self, block: Tensor) -> None:
        self.spare[:] = [block]

    def release(self) -> None:
        """Frees the spare block."""
        self.spare.clear()


_pools: weakref.WeakSet[Pool | Scratch] = weakref.WeakSet()


def release_memory() -> None:
    """Gives the memory that heronry and the C library keep for the next call back to the system, as after a large
    batch. What models, states and other tensors hold stays; the next step takes a little longer."""
    for pool in list(_pools):
        pool.release()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
