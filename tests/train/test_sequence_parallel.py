"""Rows that several processes share: the losses are those of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from binidx import write_binidx
from test_trainer import curve, refusal, run, settings

from heronry.data.batching import Row

SHARED = "run.sequence_parallel=2"


def spread(*rounds: tuple[int, list[list[str]]]) -> list[str]:
    """The lines that runs in so many processes print, one after the other."""
    worker = Path(__file__).parent / "spread_runs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, worker, json.dumps(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def assert_same(one: Path, several: Path, tolerance: float = 1e-5) -> None:
    a, b = curve(one), curve(several)
    assert [row[:2] for row in a] == [row[:2] for row in b]
    assert [row[2] for row in a] == pytest.approx([row[2] for row in b], abs=tolerance)
    assert [row[3] for row in a] == pytest.approx([row[3] for row in b], rel=10 * tolerance)


@pytest.mark.slow
def test_processes_that_share_rows_are_one(texts, tmp_path):
    """Two for each row, and four as two groups. What two have kept one goes on from."""
    runs = {
        "documents": ["run.accumulate=2", "run.steps=6"],
        "carried": [
            "model.generation=rwkv6",
            "data.order=carried",
            "data.ctx_len=8",
            "data.tbptt_chunks=2",
            "run.steps=6",
        ],
        "windows": ["model.generation=rwkv5", "data.order=shuffle", "run.steps=6", "run.checkpointing=true"],
        "rounded": ["run.precision=bfloat16", "run.steps=3"],
        "tuned": ["model.tune=state", f"model.path={tmp_path / 'documents'}", "run.steps=3"],
        "adapted": ["model.tune=lora", "model.rank=4", f"model.path={tmp_path / 'documents'}", "run.steps=3"],
        "in pieces": ["run.accumulate=2", "run.shard=full", "run.steps=3"],
    }
    for name, more in runs.items():
        run(texts, tmp_path / name, *more)
    two = [settings(texts, tmp_path / f"{name}-2", *more, SHARED, "run.save_every=3") for name, more in runs.items()]
    odd = write_binidx(tmp_path / "odd", [np.arange(9), np.arange(8)])
    two.append(settings(odd, tmp_path / "never", SHARED, "data.ctx_len=16"))
    two.append(settings(texts, tmp_path / "never", "run.sequence_parallel=4"))
    four = settings(texts, tmp_path / "carried-4", *runs["carried"], SHARED, "run.batch=1", f"data.eval={texts}")
    assert spread((2, two), (4, [four])) == [
        f"{odd}: the last row of 16 tokens has only 1, too few for run.sequence_parallel = 2; change data.ctx_len",
        "run.sequence_parallel = 4 does not divide the number of processes, 2",
    ]
    for name in runs:
        assert_same(tmp_path / name, tmp_path / f"{name}-2", 1e-5 if name != "rounded" else 3e-3)
    assert_same(tmp_path / "carried", tmp_path / "carried-4")
    shutil.rmtree(tmp_path / "carried-2" / "checkpoints" / "step-00000006")  # back to step 3, alone
    (tmp_path / "carried-2" / "model.safetensors").unlink()
    run(texts, tmp_path / "carried-2", *runs["carried"])
    assert_same(tmp_path / "carried", tmp_path / "carried-2")


@pytest.mark.parametrize("length", [3, 7, 12])
@pytest.mark.parametrize("starts", [(0,), (0, 2), (0, 1, 2), (0, 2, 3)])
def test_pieces_of_a_row(length, starts):
    """Laid together they are the row, and each knows whether it begins inside a document."""
    tokens = np.arange(length)
    starts = tuple(start for start in starts if start < length)
    for continues in (False, True):
        row = Row(tokens, tokens + 1, tokens % 2 == 0, starts, continues)
        pieces = [row.piece(i, 3) for i in range(3)]
        assert np.array_equal(np.concatenate([piece.inputs for piece in pieces]), row.inputs)
        assert np.array_equal(np.concatenate([piece.targets for piece in pieces]), row.targets)
        assert np.array_equal(np.concatenate([piece.mask for piece in pieces]), row.mask)
        assert max(len(piece.inputs) for piece in pieces) - min(len(piece.inputs) for piece in pieces) <= 1
        begin, found = 0, []
        for i, piece in enumerate(pieces):
            assert piece.starts[0] == 0
            found += [begin + start for start in piece.starts[i > 0 and piece.continues :]]
            begin += len(piece.inputs)
        assert tuple(found) == starts
        assert pieces[0].continues == continues


def test_what_cannot_be_is_told_first(texts, tmp_path):
    options = settings(texts, tmp_path / "out")
    assert refusal(*options, "run.sequence_parallel=0") == "run.sequence_parallel must be positive, got 0"
    assert refusal(*options, SHARED) == "run.sequence_parallel = 2 does not divide the number of processes, 1"
    assert refusal(*options, SHARED, "model.generation=rwkv4").startswith("run.sequence_parallel is not for rwkv4: ")
    uneven = refusal(*options, "run.sequence_parallel=3")
    assert uneven == "data.ctx_len is 32, not a multiple of run.sequence_parallel = 3"
    compiled = refusal(*options, SHARED, "run.compile=true", "data.order=shuffle")
    assert compiled == "run.compile does not work with run.sequence_parallel"
