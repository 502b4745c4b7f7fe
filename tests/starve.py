"""A native function runs out of memory, in a process of its own: `python starve.py NAME`.

Prints the error, then "right" if the same call gives the right numbers once there is memory again.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from conftest import random_checkpoint
from ops.cases import BY_NAME, draw, run, to

from heronry import build
from heronry.checkpoint import assemble
from heronry.memory import Pool, Scratch, release_memory
from heronry.ops import arguments, packed
from heronry.ops.biwkv import biwkv
from heronry.quantization import quantize_int8
from heronry.text import world

SMALL = 8000  # bytes of the pieces that can still be had: enough for what Python needs, too little for any buffer
hungry = False  # the native functions find no memory


@contextmanager
def starved() -> Iterator[None]:
    """Almost no memory can be had in here, while the test is `hungry`."""
    if not hungry:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = libc.malloc.argtypes = [ctypes.c_size_t]
    holes, kept = zip(*((libc.malloc(SMALL), libc.malloc(SMALL)) for _ in range(500)), strict=True)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), unlimited[1]))
    large = 0  # pieces, each with the address of the one before
    while piece := libc.malloc(2 * SMALL):
        ctypes.c_size_t.from_address(piece).value = large
        large = piece
    for piece in holes:
        libc.free(piece)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        while large:
            piece, large = large, ctypes.c_size_t.from_address(large).value
            libc.free(piece)
        for piece in kept:
            libc.free(piece)


def starving(function: Callable[..., Any], which: str = "") -> Callable[..., Any]:
    """`function`, starved; with `which` only where its first argument is a native function of this name."""

    def call(*args: Any) -> Any:
        if which and args[0].__name__ != which:
            return function(*args)
        with starved():
            return function(*args)

    return call


def operator(name: str, direction: str) -> Callable[[], list[Tensor]]:
    inputs = to(draw(BY_NAME[name], 3, 40, 2, 64), torch.float32)
    sys.modules[f"heronry.ops.{name}.cpu"].call = starving(arguments.call, f"{name}_{direction}")  # type: ignore
    return lambda: list(run(BY_NAME[name], inputs, "cpu").values())


def picture(direction: str) -> Callable[[], list[Tensor]]:
    sys.modules["heronry.ops.biwkv.cpu"].call = starving(arguments.call, f"biwkv_{direction}")  # type: ignore
    random = torch.Generator().manual_seed(0)
    inputs = [
        torch.rand(shape, generator=random).requires_grad_() for shape in ((64,), (3, 40, 64), (3, 40, 64), (64,))
    ]

    def call() -> list[Tensor]:
        y = biwkv(-inputs[0], *inputs[1:], impl="cpu")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    return call


def step(version: str) -> Callable[[], list[Tensor]]:
    model = assemble(random_checkpoint(version))
    tokens = torch.arange(30).view(3, 10)

    def call() -> list[Tensor]:
        with torch.no_grad():
            logits, state = model(tokens)
        return [logits, *state.layers[1]]

    Pool.allocate, Scratch.take = starving(Pool.allocate), starving(Scratch.take)  # type: ignore[method-assign]
    return call


def product() -> Callable[[], list[Tensor]]:
    matrix = packed.tile(*quantize_int8(torch.ones(3, 320)))
    Scratch.take = starving(Scratch.take)  # type: ignore[method-assign]
    return lambda: [packed.packed_matmul(torch.arange(16000.0).view(50, 320), *matrix, 3)]


def tokenizer() -> Callable[[], list[Tensor]]:
    library = build.library(Path(world.__file__).with_suffix(".cpp"))
    library.world_build = starving(library.world_build)  # type: ignore
    return lambda: [torch.tensor(world.NativeEncoder(library, *world.read_file())(b"The heron stands still."))]


MAKERS: dict[str, Callable[..., Callable[[], list[Tensor]]]] = {
    **{name: lambda direction, name=name: operator(name, direction) for name in ("wkv4", "wkv6", "wkv7")},
    "biwkv": picture,
    "rwkv": step,
    "packed": product,
    "world": tokenizer,
}

if __name__ == "__main__":
    torch.set_num_threads(2)
    name, *how = sys.argv[1].split()
    call = MAKERS[name](*how)
    expected = call()
    release_memory()
    hungry = True
    try:
        call()
        print("no error")
    except MemoryError as error:
        print(error)
    hungry = False
    print("right" if all(map(torch.equal, call(), expected)) else "wrong")
