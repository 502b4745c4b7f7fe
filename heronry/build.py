"""Compiles the C++ of an operator or a model on first use.

The result lies in the user's cache under a name that says what it was made from: source and headers, compiler,
flags, torch. A source that does not include simd.h is the same for every processor: it is built without OpenMP and
loaded without importing torch. Without a compiler there is no library: the caller runs its Python code instead, and a
warning says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

log = logging.getLogger("heronry")

HEADERS = Path(__file__).parent / "ops"  # simd.h, matmul.h, team.h
LEVELS = {
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")

level: str | None = None  # one of LEVELS instead of the best that this processor has
_lock = threading.Lock()


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None, said once, where it cannot be compiled."""
    return _library(source, (level or best_level()) if uses_vectors(source) else "portable")


@cache
def uses_vectors(source: Path) -> bool:
    """Whether `source` includes simd.h, so that it differs from level to level."""
    return HEADERS / "simd.h" in _included(source)


@cache
def best_level() -> str:
    """The widest vectors of this processor."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "portable"
    import torch  # heavy

    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")


@cache
def _library(source: Path, level: str) -> ctypes.CDLL | None:
    with _lock:
        try:
            return ctypes.CDLL(str(_compiled(source, level)))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            lines = [line for line in reason.splitlines() if line.strip()] or [reason]
            told = next((line for line in lines if "error" in line), lines[0])
            log.warning(
                "heronry: no native %s, slower Python code runs instead (%s)", _name(source), told.strip()[:200]
            )
            return None


def _name(source: Path) -> str:
    """wkv7 for ops/wkv7/cpu.cpp, rwkv7 for models/rwkv7.cpp."""
    return source.parent.name if source.stem == "cpu" else source.stem


def _compiled(source: Path, level: str) -> Path:
    compiler = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler: install g++ or clang++")
    flags = [*FLAGS, *LEVELS[level], f"-I{HEADERS}"]
    torch_version = ""
    if uses_vectors(source):
        import torch  # heavy

        torch_version = torch.__version__
    else:
        flags.remove("-fopenmp")
    if level == "avx512":
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to torch below 2.10 or so
        flags += [
            flag for flag, name in (("-mavx512vnni", "avx512_vnni"), ("-mavx512bf16", "avx512_bf16")) if has.get(name)
        ]
    key = hashlib.sha256()
    for file in _included(source):
        key.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key.update(repr((flags[:-1], version, torch_version, sys.platform, platform.machine())).encode())
    kept = cache_folder() / f"{_name(source)}-{level}-{key.hexdigest()[:16]}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    log.warning("heronry: compiling %s for this processor; this happens once", _name(source))
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".building-") as folder:
        made = Path(folder) / kept.name
        subprocess.run([compiler, *flags, str(source), "-o", str(made)], capture_output=True, text=True, check=True)
        os.replace(made, kept)  # whole or not at all; another process may have been as quick
    return kept


def _included(file: Path) -> list[Path]:
    """`file` and the headers of ours that it includes, from beside it or from HEADERS."""
    files = [file]
    for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
        beside = file.parent / name
        for found in _included(beside if beside.exists() else HEADERS / name):
            if found not in files:
                files.append(found)
    return files


def cache_folder() -> Path:
    """Where compiled code is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "heronry"
