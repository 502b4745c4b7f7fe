"""Compiles all C++ that the tests run, side by side; else each test waits for its own. `python tests/compile_all.py`"""

from heronry import build

if __name__ == "__main__":
    build.compile_all(at=build.levels())
