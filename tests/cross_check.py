"""Compiles all C++ for the systems that are not here, with zig (`pip install ziglang`), which has their headers.

`make cross-check` calls it. Nothing is linked or run: a workflow on these systems does that. Arguments choose targets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # torch is not needed here, so neither is an installed package

from heronry import compiler  # noqa: E402

TARGETS = {  # zig's name: sys.platform there, the levels that are compiled
    "aarch64-macos": ("darwin", ("neon", "dotprod")),
    "x86_64-windows-gnu": ("win32", ("avx2", "avx512_bf16")),
    "aarch64-linux-gnu": ("linux", ("neon", "dotprod")),
    "x86_64-linux-musl": ("linux", ("sse4",)),
}


def compile_for(target: str, level: str, source: Path) -> str:
    """The compiler's errors, empty where there are none."""
    flags = [flag for flag in compiler.flags(level, TARGETS[target][0]) if flag != "-shared"]
    flags = [flag.replace("-march=x86-64-", "-march=x86_64_") for flag in flags]  # zig's own names
    flags = [flag.replace("-march=armv8.2-a+dotprod", "-march=baseline+dotprod") for flag in flags]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, f"-I{compiler.HEADERS}"]
        command += ["-c", str(source), "-o", f"{folder}/x.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def main() -> None:
    wanted = sys.argv[1:] or list(TARGETS)
    jobs = [(t, level, s) for t in wanted for level in TARGETS[t][1] for s in compiler.sources()]
    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (target, level, source), errors in zip(jobs, pool.map(lambda job: compile_for(*job), jobs), strict=True):
            print(
                f"{target} {level} {compiler.name_of(source)}: {'failed' if errors else 'ok'}\n{errors}",
                end="",
                flush=True,
            )
            failed |= bool(errors)
    sys.exit(failed)


if __name__ == "__main__":
    main()
