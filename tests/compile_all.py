"""Compiles all C++ that the tests run, side by side; else each test waits for its own. `python tests/compile_all.py`"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import heronry
from heronry import build


def main() -> None:
    room = Path(heronry.__file__).parent
    sources = [*room.glob("ops/*/*.cpp"), *room.glob("models/*.cpp")]
    levels = list(build.LEVELS)[list(build.LEVELS).index(build.best_level()) :]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: build._compiled(*pair), [(source, level) for level in levels for source in sources]))


if __name__ == "__main__":
    main()
