"""Every generation gives the logits of PyPI's rwkv package, to the rounding of float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import heronry
from heronry import State

pytest.importorskip("rwkv", reason="PyPI's rwkv, which these tests compare with, is not installed")

TOKENS, CUT, TOLERANCE = 150, 67, 2e-5
CASES = {  # name -> what random_checkpoint is given
    "4": {"version": "4", "layers": 3},
    "5.0": {"version": "5.0"},  # heads of 32
    "5.0, raw bonus": {"version": "5.0 r2", "heads": 6},
    "5.1": {"version": "5.1", "heads": 6, "layers": 3},
    "5.2": {"version": "5.2"},
    "5.2, heads of 64": {"version": "5.2", "width": 128, "heads": 2, "ffn": 100},
    "5.2, tuned state": {"version": "5.2", "width": 48, "heads": 2, "tuned": True},
    "6": {"version": "6", "layers": 3},
    "6, tuned state": {"version": "6", "width": 80, "heads": 5, "rank": 5, "tuned": True},
    "7": {"version": "7", "layers": 3},
    "7, heads of 64": {"version": "7", "width": 192, "heads": 3, "rank": 5},
    "7, heads of 16": {"version": "7", "width": 80, "heads": 5},
    "7a": {"version": "7", "width": 80, "heads": 5, "deep": 32},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, random_checkpoint) -> dict[str, tuple[Path, list[int], np.ndarray]]:
    """Case -> checkpoint, tokens and rwkv's logits; a process for RWKV-7, one for 7a, one for the others."""
    folder = tmp_path_factory.mktemp("pip")
    jobs = {}
    for i, (case, sizes) in enumerate(CASES.items()):
        path = folder / f"{i}.pth"
        torch.save(random_checkpoint(**sizes, seed=i), path)
        tokens = torch.randint(101, (TOKENS,), generator=torch.Generator().manual_seed(i)).tolist()
        jobs[case] = {"model": str(path), "tokens": tokens, "cut": CUT, "out": str(folder / f"{i}.npy")}
    kinds = {"": ("4", "5", "6"), "7": ("7",), "7a": ("7a",)}  # of which rwkv must know before it is imported
    for kind, names in kinds.items():
        batch = [job for case, job in jobs.items() if (case.split(",")[0] if kind else case[0]) in names]
        # compiling costs more than it saves here; RWKV-7 compiles regardless
        seven = str(int(bool(kind)))
        environment = {**os.environ, "RWKV_V7_ON": seven, "RWKV_JIT_ON": seven, "RWKV_CUDA_ON": "0"}
        environment["RWKV_DE_VERSION"] = str(int(kind == "7a"))
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("pip_worker.py"))]
        done = subprocess.run(command, input=json.dumps(batch), text=True, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
    return {case: (Path(job["model"]), job["tokens"], np.load(job["out"])) for case, job in jobs.items()}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits(case, expected):
    path, tokens, logits = expected[case]
    model = heronry.load(path)
    row = torch.tensor([tokens])
    whole, end = model(row)
    steps, state = [], None
    for t in range(TOKENS):
        y, state = model(row[:, t : t + 1], state)
        steps.append(y)
    first, middle = model(row[:, :CUT])
    second, _ = model(row[:, CUT:], State.stack([middle]))
    ours = np.stack([whole[0].numpy(), torch.cat(steps, 1)[0].numpy(), torch.cat([first, second], 1)[0].numpy()])
    difference = np.abs(ours - logits).max(axis=(1, 2))
    print(f"{case}: whole {difference[0]:.1e}, token by token {difference[1]:.1e}, halves {difference[2]:.1e}")
    assert logits.std() > 0.3
    assert difference.max() < TOLERANCE
    for a, b in zip(end.layers[-1], state.layers[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
