"""Libraries of compiled C++: those that came with the wheel, or compiled on first use into the user's cache.

A source that does not include simd.h is the same for every processor and is loaded without importing torch. Where
nothing can be loaded or compiled there is no library: the caller runs its Python code instead, and a warning says so.

    python -m heronry.build [NAME ...]    compiles now what would be compiled on first use
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from . import compiler
from .faults import exit_with_a_line

log = logging.getLogger("heronry")

PREBUILT = Path(__file__).parent / "_kernels"  # of a wheel for one platform; a checkout has none
OPENMP = (  # the fields of OpenMP in ops/threads.h
    "omp_get_thread_num",
    "omp_get_num_threads",
    "GOMP_parallel",
    "__kmpc_fork_call",
    "__kmpc_push_num_threads",
    "__kmpc_global_thread_num",
)

level: str | None = None  # one of compiler.LEVELS instead of the best that this processor has
_locks: dict[tuple[Path, str], threading.Lock] = {}


def library(source: Path) -> Library | None:
    """The compiled `source`; None, with one warning, where there is no way to get it."""
    if not compiler.uses_vectors(source):
        return _library(source, "portable")
    return _library(source, compiler.distinct_level(source, level or best_level()))


@cache
def levels() -> list[str]:
    """Names of the levels that this processor runs, best first."""
    import torch  # heavy; and sources without vectors do without

    has = dict(getattr(torch.cpu, "get_capabilities", dict)())  # unknown to torch below 2.10
    best = torch.backends.cpu.get_cpu_capability()
    has |= {"avx512": best == "AVX512", "avx2": best in ("AVX2", "AVX512"), "dotprod": _has_dotprod()}
    return compiler.runnable_levels(compiler.machine(), has)


def best_level() -> str:
    """The level with the widest vectors of this processor."""
    return levels()[0]


def _has_dotprod() -> bool:
    """Whether an ARM processor multiplies bytes four at a time, as all of Apple's do."""
    cpuinfo = Path("/proc/cpuinfo")
    return sys.platform == "darwin" or (cpuinfo.exists() and " asimddp" in cpuinfo.read_text(errors="replace"))


@cache
def _library(source: Path, level: str) -> Library | None:
    with _locks.setdefault((source, level), threading.Lock()):
        error: OSError | None = None
        for get in _ways(source, level):
            try:
                if file := get():
                    return _load(file)
            except OSError as failure:  # unreadable, made for another libc, on a disk that nothing may run from, ...
                error = failure
                log.info("heronry: %s: %s", compiler.name_of(source), error)
        name = compiler.name_of(source)
        log.warning("heronry: no native %s, slower Python code runs instead (%s)", name, error)
        return None


def _ways(source: Path, level: str) -> Iterator[Callable[[], Path | None]]:
    """What may give the library, in the order to be tried: the wheel, the cache folders, compiling into one of them."""
    folders = cache_folders()
    for folder in (PREBUILT, *folders):
        yield partial(compiler.find_library, source, level, folder)
    for i, folder in enumerate(folders):
        yield partial(_compile, source, level, folder, announce=i == 0)


def _compile(source: Path, level: str, folder: Path, announce: bool) -> Path:
    """Compiles the library into a cache folder; OSError where that cannot be."""
    compiler.find_compilers()  # fails before anything is announced
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if announce:
        log.warning("heronry: compiling %s for this processor; this happens once", compiler.name_of(source))
    return compiler.compile_library(source, level, folder)


class Library(ctypes.CDLL):
    """A compiled library. Its functions raise MemoryError where they return -1 (EXPORT in ops/platform.h)."""

    def __getitem__(self, name: str) -> Any:  # every first access to a function comes here
        function = super().__getitem__(name)
        function.errcheck = _check_status
        return function


def _check_status(result: Any, function: Any, _: object) -> Any:
    if result == -1:
        raise MemoryError(f"not enough memory for {function.__name__}")
    return result


def _load(file: Path) -> Library:
    loaded = Library(str(file))
    if hasattr(loaded, "use_openmp"):
        loaded.use_openmp(torch_openmp())
    return loaded


@cache
def torch_openmp() -> ctypes.Array[ctypes.c_void_p]:
    """The functions of the OpenMP runtime that torch has loaded."""
    import torch  # heavy

    folder = Path(torch.__file__).parent / "lib"
    if sys.platform == "win32":
        runtimes = [*folder.glob("libiomp5md.dll"), *folder.glob("libomp*.dll")]
    else:  # a look into torch_cpu is a look into all that it was linked with
        runtimes = [*folder.glob(f"libtorch_cpu{compiler.SUFFIX}")]
    functions = openmp_functions(ctypes.CDLL(str(runtimes[0])) if runtimes else None)
    if not functions[0]:
        log.warning("heronry: no OpenMP found in torch, so native code runs on one thread")
    return functions


def openmp_functions(runtime: ctypes.CDLL | None) -> ctypes.Array[ctypes.c_void_p]:
    """The struct OpenMP of ops/threads.h: addresses in `runtime`, all null where it cannot start a team."""
    functions = [getattr(runtime, name, None) for name in OPENMP]
    addresses = [ctypes.cast(function, ctypes.c_void_p) if function else ctypes.c_void_p() for function in functions]
    if not (addresses[0] and addresses[1] and (addresses[2] or all(addresses[3:]))):
        addresses = [ctypes.c_void_p()] * len(OPENMP)
    return (ctypes.c_void_p * len(OPENMP))(*addresses)


def compiled(source: Path, level: str) -> Path:
    """The library of `source`, compiled if it is not there yet; OSError where that cannot be."""
    error = OSError("there is no folder to compile into")
    for get in _ways(source, level):
        try:
            if file := get():
                return file
        except OSError as failure:
            error = failure
    raise error


def cache_folders() -> list[Path]:
    """Where compiled code is kept: the user's cache, or where that is missing or read-only, a temporary folder that
    nobody else can write."""
    folders = []
    with suppress(RuntimeError):  # no home directory
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heronry")
    temporary = Path(tempfile.gettempdir()) / "heronry"
    if sys.platform != "win32":  # which has a folder of each user for temporary files
        temporary = temporary.with_name(f"heronry-{os.getuid()}")
        if temporary.exists() and (temporary.stat().st_uid != os.getuid() or temporary.stat().st_mode & 0o022):
            return folders
    return [*folders, temporary]


def compile_all(names: Collection[str] = (), at: Collection[str] = ()) -> list[Path]:
    """Compiles the sources with these names (default: all) at these levels (default: the best of this processor), side
    by side. Returns the libraries."""
    wanted = {
        (source, compiler.distinct_level(source, level))
        for source in compiler.sources()
        for level in at or (best_level(),)
        if not names or compiler.name_of(source) in names
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: compiled(*pair), sorted(wanted)))


if __name__ == "__main__":
    known = [compiler.name_of(source) for source in compiler.sources()]
    if not set(sys.argv[1:]) <= set(known):
        print(f"heronry: expected names out of {', '.join(known)}, got {' '.join(sys.argv[1:])}", file=sys.stderr)
        sys.exit(2)
    with exit_with_a_line():
        compile_all(sys.argv[1:])
