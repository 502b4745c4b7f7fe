"""Looks at an installed wheel with prebuilt libraries and runs it without a compiler.

`make wheel-test` and cibuildwheel call it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import heronry
from heronry import build, compiler
from heronry.ops import dispatch
from heronry.ops.wkv7 import wkv7

# The newest that a library may ask of Linux. PyTorch's wheels ask for glibc 2.28 too; the libraries of a release are
# built in that image, those of `make wheel-test` on this system, whose exp() may be of glibc 2.29.
NEWEST = {"GLIBC": (2, 29), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}


def check_content() -> None:
    """The wheel has every source at every level, without an OpenMP of its own and without what older systems lack."""
    expected = {
        compiler.library_stem(source, compiler.distinct_level(source, level))
        for source in compiler.sources()
        for level in compiler.levels_of(compiler.machine())
    }
    libraries = {file.name: file.read_bytes() for file in build.PREBUILT.iterdir()}
    stems = {name.split(".")[0] for name in libraries}
    assert stems == expected, sorted(stems ^ expected)
    for name, content in libraries.items():
        assert not re.search(rb"lib(gomp|omp|iomp5)\b", content), f"{name} is linked with OpenMP"
        for library, newest in NEWEST.items():
            for version in re.findall(rb"\b%s_([0-9.]+)\0" % library.encode(), content):
                assert tuple(map(int, version.split(b"."))) <= newest, f"{name} needs {library}_{version.decode()}"
    print(f"{len(libraries)} libraries, {sum(map(len, libraries.values())) / 2**20:.1f} MB")


def check_numbers() -> None:
    """The native code of the best level runs, on several threads, and agrees with the reference."""
    for operator in ("wkv4", "wkv5", "wkv6", "wkv7", "biwkv", "packed"):
        assert dispatch.has_native_body(operator), operator
    torch.set_num_threads(2)
    inputs = torch.randn(6, 1, 100, 4, 16, generator=torch.Generator().manual_seed(1)) / 4
    inputs[1] = -inputs[1].abs() - 0.5  # log_w
    state = torch.zeros(1, 4, 16, 16)
    y, _ = wkv7(*inputs, state, impl="cpu")
    assert torch.allclose(y, wkv7(*inputs, state, impl="reference")[0], atol=1e-5)
    if sys.platform == "linux":
        files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        assert any(
            f"_kernels/wkv7-{compiler.distinct_level(dispatch.source('wkv7'), build.best_level())}-" in f for f in files
        )
        runtimes = [file for file in files if re.search(r"/lib(gomp|omp|iomp5)[-.]", file)]
        assert len(runtimes) == 1, runtimes
    print(f"level {build.best_level()}: native code runs")


def check_command() -> None:
    """`heronry generate` tells its story and says nothing of compiling or of slower code."""
    command = [sys.executable, "-m", "heronry", "generate", "Once upon a time", "--max-tokens", "20", "--seed", "1"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5, done.stdout
    assert not re.search("compil|slower|warn", done.stderr), done.stderr
    print(f"heronry generate: {' '.join(done.stdout.split())}")


def main() -> None:
    assert Path(sys.prefix) in Path(heronry.__file__).parents, f"{heronry.__file__} is not the installed wheel"
    os.environ["PATH"] = str(Path(sys.executable).parent)  # where no compiler is
    for name in ("g++", "clang++", "c++"):
        assert shutil.which(name) is None, f"{name} is in PATH"
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("heronry").addHandler(handler)
    check_content()
    check_numbers()
    check_command()
    assert not records, records


if __name__ == "__main__":
    main()
