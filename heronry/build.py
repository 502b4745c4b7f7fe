"""Compiles the C++ of an operator or a model on first use.

The result lies in the user's cache under a name that says what it was made from: source and headers, compiler,
flags, torch. Without a compiler there is no library: whoever asked takes the PyTorch body instead, and that is told.
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
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("heronry")

HEADERS = Path(__file__).parent / "ops"  # simd.h, matmul.h, team.h
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the order of Dtype in simd.h
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
    return _library(source, level or best_level())


@cache
def best_level() -> str:
    """The widest vectors of this processor."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "portable"
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
                "heronry: no native %s, slower PyTorch code runs instead (%s)", _name(source), told.strip()[:200]
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
    if level == "avx512":
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to torch below 2.10 or so
        flags += [
            flag for flag, name in (("-mavx512vnni", "avx512_vnni"), ("-mavx512bf16", "avx512_bf16")) if has.get(name)
        ]
    key = hashlib.sha256()
    for file in _included(source):
        key.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key.update(repr((flags[:-1], version, torch.__version__, sys.platform, platform.machine())).encode())
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


def array(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """The fields of an Array of simd.h for x [B, T, H, N] or [B, T, A], whose last axis must be dense."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2] if x.ndim == 4 else 0, DTYPES.index(x.dtype)


def call(function: Any, tensors: Iterable[torch.Tensor], cu: Sequence[int] | None, *numbers: int) -> None:
    """function(Arrays of the tensors, boundaries of packed sequences or null, numbers ..., threads) of a library."""
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    arrays = [number for x in dense for number in array(x)]
    function(
        (ctypes.c_int64 * len(arrays))(*arrays),
        None if cu is None else (ctypes.c_int64 * len(cu))(*cu),
        *map(ctypes.c_int64, (*numbers, torch.get_num_threads())),
    )
