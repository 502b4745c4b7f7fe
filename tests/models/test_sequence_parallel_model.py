"""Sequence parallelism: rows over several processes are the rows in one, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # several processes

CASES = [
    *product(("5.1", "5.2", "6", "7"), ("float64",), ("one document", "two documents", "many rows, carried"), (3,)),
    *product(("6", "7"), ("float32",), ("many rows, carried",), (2, 3)),
]


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, dict[str, float]], str]:
    """Of every case the errors of logits, of states and of all gradients; and how RWKV-4 is refused."""
    worker = Path(__file__).parent / "sequence_parallel_worker.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("version", "dtype", "rows", "processes"), CASES)
def test_pieces_are_the_whole(version, dtype, rows, processes, found):
    """Documents cut, ending and beginning at every place; pieces of one token, of other lengths; in float32 with
    checkpointing."""
    errors = found[0][f"{version}, {dtype}, {rows}, {processes} processes"]
    assert {"logits", "states", "emb.weight", "blocks.1.att.output.weight", "blocks.0.att.time_state"} <= errors.keys()
    assert ("0.wkv" in errors) == ("carried" in rows)
    bound = 1e-10 if dtype == "float64" else 1e-5
    assert {name: error for name, error in errors.items() if not error < bound} == {}


def test_rwkv4_is_refused_by_name(found):
    assert found[1].startswith("rwkv4 cannot run with sequence parallelism")
    assert len(found[0]) == len(CASES)
