"""The limits of this machine: bytes read per second, multiplications per second."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ..memory import Arena
from .contestants import Job


class Machine:
    """Measures the limits, in turn with the contestants, so that whatever slows them down slows it down too."""

    def load(self) -> None:
        pass

    def read(self, size: int, passes: int) -> Job:
        """Read `size` bytes `passes` times, from huge pages where the system grants them."""
        x = Arena().allocate((size // 4,), torch.float32).fill_(1)

        def job() -> None:
            for _ in range(passes):
                x.sum()

        return job

    def multiply(self, dtype: str, size: int) -> Job:
        """One product of two matrices [size, size]."""
        if dtype == "int8":
            a, b = (torch.randint(-9, 9, (size, size), dtype=torch.int8) for _ in range(2))
            return lambda: torch._int_mm(a, b)
        a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        return lambda: a @ b


def physical_cores() -> int:
    """Physical cores that this process may use; logical ones where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list") for i in cpus]
    return len({file.read_text() for file in siblings}) if all(file.exists() for file in siblings) else len(cpus)


def describe_machine() -> dict[str, str | int]:
    """Processor, vector instructions, cores, system, and the versions of Python and PyTorch."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": physical_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
