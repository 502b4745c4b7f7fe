"""Compiles the C++ that the tests run, side by side; else each test waits for its own. `python tests/compile_all.py`

With --all also at the levels that only slow tests run.
"""

import sys

from levels import QUICK

from heronry import build

if __name__ == "__main__":
    build.compile_all(at=build.levels() if "--all" in sys.argv else QUICK)
