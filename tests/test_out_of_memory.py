"""A native function that cannot get memory says so, whichever of its threads it happens to, and is right afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heronry import build
from heronry.ops import dispatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")

NAMES = [f"{name} {direction}" for name in ("wkv6", "wkv7", "biwkv") for direction in ("forward", "backward")]
NAMES += ["wkv4 backward", "world"]  # wkv4's forward pass has no memory of its own
POOLED = ["packed", "rwkv 4", "rwkv 5.2", "rwkv 6", "rwkv 7"]


QUICK = ["wkv7 forward", "rwkv 7", "world"]  # one of each kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (*NAMES, *POOLED)]
)
def test_memory_that_cannot_be_had(name: str):
    if not dispatch.has_native_body("wkv7"):
        pytest.skip("there is no C++ compiler")
    script = Path(__file__).with_name("starve.py")
    # with arenas of their own threads would find memory below the limit
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, env=environment)
    message, after = done.stdout.splitlines() or [done.stderr, ""]
    function = "world_build" if name == "world" else name.replace(" ", "_")
    assert message.startswith("not enough memory: 0." if name in POOLED else f"not enough memory for {function}")
    assert after == "right"


SOURCE = """
#include "threads.h"
EXPORT int fail(int64_t units, int64_t failing, int64_t threads) {
    return status([&] {
        parallel(units, int(threads), [&](int64_t unit) {
            if (unit == failing) throw std::bad_alloc();
        });
    });
}
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_leaves_no_thread(threads: int, tmp_path: Path):
    source = tmp_path / "failing.cpp"
    source.write_text(SOURCE)
    library = build.library(source)
    if library is None:
        pytest.skip("there is no C++ compiler")
    assert library.fail(8, -1, threads) == 0
    for unit in range(8):
        with pytest.raises(MemoryError, match=r"^not enough memory for fail$"):
            library.fail(8, unit, threads)
