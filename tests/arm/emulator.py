"""Native functions on an emulated ARM processor: compiled for aarch64, called in qemu on a copy of this memory."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from heronry import compiler

COMPILER, QEMU, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
PROCESSORS = {"neon": "cortex-a53", "dotprod": "cortex-a76"}  # the oldest that runs a level


def missing() -> str:
    """Which of the programs that this needs are not installed."""
    return ", ".join(program for program in (COMPILER, QEMU) if shutil.which(program) is None)


class Emulator:
    """Compiles sources for one level into `folder` and calls their functions."""

    def __init__(self, folder: Path, level: str):
        self.folder, self.level = folder, level
        self.driver = folder / "call"
        if not self.driver.exists():
            driver = Path(__file__).with_name("call.cpp")
            subprocess.run([COMPILER, "-O1", str(driver), "-o", str(self.driver), "-ldl"], check=True)

    def library(self, source: Path) -> Path:
        """`source` compiled for the level; once for all tests."""
        library = self.folder / f"{compiler.name_of(source)}-{self.level}.so"
        if not library.exists():
            command = [COMPILER, *compiler.flags(self.level, "linux"), f"-I{compiler.HEADERS}"]
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
        return library

    def call(
        self,
        source: Path,
        function: str,
        arguments: Iterable[int],
        memory: Iterable[tuple[int, int]],
        constant: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Calls `function` with integers and addresses. `memory` and `constant`, as (address, bytes), are all it may
        touch; words in them that are addresses in them are pointers. What it wrote to `memory` is copied back."""
        constant = set(constant)
        blocks = sorted({*memory, *constant})

        def place(address: int) -> tuple[int, int] | None:
            """The block and offset of an address."""
            for i, (start, size) in enumerate(blocks):
                if start <= address < start + size:
                    return i, address - start
            return None

        contents = [ctypes.string_at(start, size) for start, size in blocks]
        pointers = []
        for i, content in enumerate(contents):
            if len(content) > 100_000:  # weights and activations, without pointers
                continue
            for offset in range(0, len(content) - 7, 8):
                (word,) = struct.unpack_from("<q", content, offset)
                target = place(word) if word > 1 << 20 else None
                if target:
                    pointers += [i, offset, *target]
        values = [n for x in arguments for n in (place(x) or (-1, x))]
        values += [-1, 0] * (10 - len(values) // 2)
        numbers = [len(blocks), *(size for _, size in blocks), len(pointers) // 4, *pointers, *values]
        request = struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(contents)
        command = [
            QEMU,
            "-L",
            ROOT,
            "-cpu",
            PROCESSORS[self.level],
            str(self.driver),
            str(self.library(source)),
            function,
        ]
        done = subprocess.run(command, input=request, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert len(done.stdout) == sum(map(len, contents))
        at = 0
        for start, size in blocks:
            if (start, size) not in constant:  # where the pointers are those of the emulator now
                ctypes.memmove(start, done.stdout[at : at + size], size)
            at += size


def span(x: Tensor) -> tuple[int, int]:
    """Where the numbers of a tensor lie: address and bytes."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (last + 1) * x.element_size() if x.numel() else 0
