"""Dropout, drop path and augmentation: every pass of every process draws numbers of its own, interrupted or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_image_classification import COLOURS, noisy
from test_image_classification import SMALL as SMALL_IMAGES
from test_trainer import EXACT

import heronry
from heronry.models import RWKV7, RWKV7Config
from heronry.train.config import read_config
from heronry.train.trainer import Trainer


def draws(out: Path, settings: list[str], processes: int = 2) -> list[list[float]]:
    """What each process drew, pass by pass."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, str(Path(__file__).with_name("random_streams.py")), str(out), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture
def settings(request, texts, tmp_path) -> list[str]:
    if request.param == "images":
        for name, colour in COLOURS.items():
            (tmp_path / "images" / name).mkdir(parents=True)
            for i in range(8):
                noisy(colour, i).save(tmp_path / "images" / name / f"{i}.png")
        return [*SMALL_IMAGES, f"data.train={tmp_path / 'images'}", "run.batch=2", "vision.drop_path=0.2"]
    model = RWKV7(RWKV7Config.sized(64, 1, 64))
    model.init_weights()
    heronry.save(model, tmp_path / "base")
    lora = ["model.tune=lora", "model.dropout=0.5", f"model.path={tmp_path / 'base'}"]
    return [*(x for x in EXACT if "n_" not in x), f"data.train={texts}", *lora]


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["images", "lora"], indirect=True)
def test_every_pass_of_every_process_draws_its_own(settings, tmp_path):
    settings += ["run.accumulate=2", f"run.out={tmp_path / 'run'}"]
    first = draws(tmp_path / "first", [*settings, "run.steps=2"])
    again = draws(tmp_path / "again", [*settings, "run.steps=3"])  # resumes at step 2
    assert [len(x) for x in first] == [4, 4]
    assert [len(x) for x in again] == [2, 2]
    assert len({x for process in first + again for x in process}) == 12
    whole = draws(tmp_path / "whole", [*settings, "run.steps=3", f"run.out={tmp_path / 'other'}"])
    assert whole == [a + b for a, b in zip(first, again, strict=True)]


def test_any_seed(texts, tmp_path):
    """NumPy's own generators take 32 bits only."""
    starts = set()
    for seed in (0, 1, 2**32, 2**64 - 1):
        out = tmp_path / str(seed)
        trainer = Trainer(read_config(None, [*EXACT, f"data.train={texts}", f"run.out={out}", f"run.seed={seed}"]))
        starts.add(trainer.train_step().loss)
    assert len(starts) == 4
