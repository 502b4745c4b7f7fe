"""The levels of this processor that tests run at: the best and AVX2, which most have; the others are slow, because all
C++ is compiled for each."""

from __future__ import annotations

import pytest

from heronry import build

QUICK = [level for level in build.levels() if level in (build.best_level(), "avx2")]
LEVELS = [level if level in QUICK else pytest.param(level, marks=pytest.mark.slow) for level in build.levels()]
