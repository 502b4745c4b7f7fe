"""What this machine can do at most: bytes read a second, multiplications a second."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ..memory import Arena
from .ours import Job


class Machine:
    """Runs among the contestants, so that what disturbs them disturbs it too."""

    def load(self) -> None:
        pass

    def read(self, size: int, passes: int) -> Job:
        """Passes over so many bytes, in huge pages where the system grants them."""
        x = Arena().allocate((size // 4,), torch.float32).fill_(1)

        def job() -> None:
            for _ in range(passes):
                x.sum()

        return job

    def multiply(self, dtype: str, size: int) -> Job:
        """One product of square matrices."""
        if dtype == "int8":
            a, b = (torch.randint(-9, 9, (size, size), dtype=torch.int8) for _ in range(2))
            return lambda: torch._int_mm(a, b)
        a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        return lambda: a @ b


def cores() -> int:
    """Physical cores that this process may use; logical ones where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    mine = os.sched_getaffinity(0)
    files = [Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list") for i in mine]
    return len({file.read_text() for file in files}) if all(file.exists() for file in files) else len(mine)


def description() -> dict[str, str | int]:
    """Of the machine and the versions that were measured."""
    processor = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.exists():
        names = [
            line.split(":", 1)[1].strip() for line in about.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
