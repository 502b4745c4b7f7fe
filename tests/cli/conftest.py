"""A small model, and a machine without the configuration and the models of whoever runs the tests."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

SMALL = {"vocab": 256, "width": 64, "heads": 1, "layers": 2, "ffn": 64, "rank": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_checkpoint) -> Path:
    path = tmp_path_factory.mktemp("models")
    torch.save(random_checkpoint("7", **SMALL), path / "m.pth")
    (path / "t.txt").write_text("hello world")
    return path


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("HERONRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("heronry").setLevel(logging.NOTSET)
