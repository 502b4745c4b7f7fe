"""Checkpoints: what comes back is what was kept, and what is damaged is never taken."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from heronry.checkpoint import load
from heronry.errors import InputError
from heronry.models import RWKV7, RWKV7Config
from heronry.train.checkpointing import find_latest_checkpoint, restore_checkpoint, save_checkpoint
from heronry.train.config import OptimSection
from heronry.train.optim import build_optimizer


def made(seed: int = 0, layers: int = 2) -> tuple[RWKV7, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = RWKV7(RWKV7Config.sized(64, layers, 64))
    model.init_weights()
    return model, build_optimizer(model, OptimSection(eps=1e-8))


def step(model: RWKV7, optim: torch.optim.Optimizer) -> float:
    tokens = torch.randint(64, (2, 9))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optim.step()
    optim.zero_grad()
    return loss.item()


def test_kept_is_found_again_to_the_bit(tmp_path):
    model, optim = made()
    for _ in range(3):
        step(model, optim)
    save_checkpoint(tmp_path, 3, model, optim, {"tokens": 48}, 2)
    expected = [step(model, optim) for _ in range(3)]
    other, its = made(seed=1)
    found = find_latest_checkpoint(tmp_path)
    assert found is not None
    path, run_state = found
    assert run_state == {"step": 3, "tokens": 48}
    restore_checkpoint(path, other, its)
    assert [step(other, its) for _ in range(3)] == expected
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert load(path).config == model.config  # a folder like any other


def test_the_oldest_leave(tmp_path):
    model, optim = made()
    for number in (1, 2, 3, 10):
        save_checkpoint(tmp_path, number, model, optim, {}, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def cut(file: Path) -> None:
    with open(file, "rb+") as data:
        data.truncate(file.stat().st_size - 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "run.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_what_is_damaged_is_left_aside(name, damage, tmp_path, caplog):
    model, optim = made()
    for number in (1, 2):
        save_checkpoint(tmp_path, number, model, optim, {}, 2)
    if name == "run.json" and damage is flip:
        (tmp_path / "step-00000002" / name).write_text("{}")
    else:
        damage(tmp_path / "step-00000002" / name)
    with caplog.at_level(logging.WARNING, "heronry"):
        found = find_latest_checkpoint(tmp_path)
    if name == "run.json" and damage is cut:  # the last byte is the end of its last line
        assert found is not None
        assert found[0].name == "step-00000002"
        return
    assert found is not None
    assert found[0].name == "step-00000001"
    assert "step-00000002, which is damaged" in caplog.text
    shutil.rmtree(tmp_path / "step-00000001")
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / "nothing") is None


def test_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, *made(), {}, 1)
    found = find_latest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(InputError, match="step-00000001: a checkpoint of another model"):
        restore_checkpoint(found[0], *made(layers=3))


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(tmp_path):
    """In a process of its own, whose files may not grow beyond 100 KB."""
    save_checkpoint(tmp_path, 1, *made(), {}, 2)
    code = """
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_checkpointing import made
        from heronry.train.checkpointing import save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(Path(sys.argv[1]), 2, *made(), {}, 2)
        except OSError:
            print("refused")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_latest_checkpoint(tmp_path) is not None
