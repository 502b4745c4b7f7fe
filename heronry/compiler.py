"""How the C++ of operators and models is compiled: levels of processors, flags, the compiler itself.

Needs neither PyTorch nor the rest of the package, so that the build of a wheel (hatch_build.py) can use it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
HEADERS = PACKAGE / "ops"  # platform.h, simd.h, threads.h, matmul.h, team.h
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
DIGITS = 16  # of digests in file names
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}  # other names of the same


@dataclass(frozen=True)
class Level:
    """What a library may take for granted of a processor."""

    machine: str  # "" is any
    needs: tuple[str, ...]  # names of capabilities
    flags: tuple[str, ...]


V4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
LEVELS = {  # best first
    "avx512_bf16": Level("x86_64", ("avx512", "avx512_vnni", "avx512_bf16"), (*V4, "-mavx512vnni", "-mavx512bf16")),
    "avx512_vnni": Level("x86_64", ("avx512", "avx512_vnni"), (*V4, "-mavx512vnni")),
    "avx512": Level("x86_64", ("avx512",), V4),
    "avx2": Level("x86_64", ("avx2",), ("-march=x86-64-v3",)),
    "sse4": Level("x86_64", ("sse4_2",), ("-march=x86-64-v2",)),
    "dotprod": Level("aarch64", ("dotprod",), ("-march=armv8.2-a+dotprod",)),
    "neon": Level("aarch64", (), ()),
    "portable": Level("", (), ()),  # for what cannot run any other
}


def machine() -> str:
    """The architecture of this machine: x86_64, aarch64, ..."""
    return MACHINES.get(platform.machine(), platform.machine())


def levels_of(machine: str) -> list[str]:
    """Names of the LEVELS of an architecture, best first; a wheel holds all of them."""
    return [name for name, level in LEVELS.items() if level.machine == machine]


def runnable_levels(machine: str, capabilities: Mapping[str, bool]) -> list[str]:
    """Names of the LEVELS that such a processor runs, best first."""
    own = [name for name in levels_of(machine) if all(capabilities.get(need) for need in LEVELS[name].needs)]
    return own or ["portable"]


@cache
def uses_vectors(source: Path) -> bool:
    """Whether `source` includes simd.h, so that it differs from level to level."""
    return HEADERS / "simd.h" in files_of(source)


@cache
def distinct_level(source: Path, level: str) -> str:
    """The level at which `source` gives the same library as at `level`: AVX-512's extensions are only in matmul.h."""
    if not uses_vectors(source):
        return "portable"
    return "avx512" if level.startswith("avx512") and HEADERS / "matmul.h" not in files_of(source) else level


def sources() -> list[Path]:
    """All C++ of the package; every file becomes a library of its own."""
    return sorted(PACKAGE.rglob("*.cpp"))


def name_of(source: Path) -> str:
    """wkv7 for ops/wkv7/cpu.cpp, rwkv7 for models/rwkv7.cpp."""
    return source.parent.name if source.stem == "cpu" else source.stem


def files_of(file: Path) -> list[Path]:
    """`file` and the headers of the package that it includes, from beside it or from HEADERS."""
    files = [file]
    for name in re.findall(r'^#include "(.+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
        beside = file.parent / name
        for included in files_of(beside if beside.exists() else HEADERS / name):
            if included not in files:
                files.append(included)
    return files


def library_stem(source: Path, level: str) -> str:
    """What the name of a library begins with: it changes with the source, its headers and the flags."""
    key = hashlib.sha256(repr(flags(level)).encode())
    for file in files_of(source):
        key.update(file.read_bytes())
    return f"{name_of(source)}-{level}-{key.hexdigest()[:DIGITS]}"


def flags(level: str, system: str = sys.platform) -> list[str]:
    """What every compiler is told, for a level and an operating system as sys.platform names it."""
    common = ["-std=c++17", "-O3", "-shared", "-fno-math-errno", "-fno-trapping-math"]
    if system != "win32":
        common += ["-fPIC", "-fvisibility=hidden"]
    if system == "linux":
        common += ["-Wno-psabi"]
    if system == "darwin":
        common += ["-mmacosx-version-min=11.0"]
    return [*common, *LEVELS[level].flags]


def find_compilers() -> list[str]:
    """The paths of the compilers that there are; OSError without one. GCC for Windows puts wide vectors on a stack that
    is not aligned for them, and Microsoft's cl has no vectors of this kind: there it must be Clang."""
    names = ("clang++",) if sys.platform == "win32" else ("g++", "clang++", "c++")
    compilers = [path for name in names if (path := shutil.which(name))]
    if not compilers:
        raise OSError(f"no C++ compiler found: install {' or '.join(names[:2])}")
    return compilers


def compile_library(source: Path, level: str, folder: Path, more: Iterable[str] = ()) -> Path:
    """Writes the library into the folder, whole or not at all, and returns its path: see `find_library`.

    more: flags besides those of the level.

    Raises:
        OSError: with the first error of the first compiler, if none of them can.
    """
    errors = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as temporary:
        unfinished = Path(temporary) / f"library{SUFFIX}"
        for compiler in find_compilers():
            command = [compiler, *flags(level), *more, f"-I{HEADERS}", str(source), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode == 0:
                break
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
            errors.append(next((line for line in lines if "error" in line and "collect2" not in line), lines[0])[:200])
        else:
            raise OSError(errors[0])
        with open(unfinished, "rb+") as file:
            digest = hashlib.sha256(file.read()).hexdigest()[:DIGITS]
            os.fsync(file.fileno())
        library = folder / f"{library_stem(source, level)}.{digest}{SUFFIX}"
        unfinished.replace(library)  # another process may have been as quick
    return library


def find_library(source: Path, level: str, folder: Path) -> Path | None:
    """The library in the folder, if there is one that is whole: its name ends with a digest of its content, for loading
    a damaged one can end the process. OSError if the folder cannot be read."""
    for library in sorted(folder.glob(f"{library_stem(source, level)}.*{SUFFIX}")):
        if hashlib.sha256(library.read_bytes()).hexdigest().startswith(library.name.split(".")[1]):
            return library
    return None
