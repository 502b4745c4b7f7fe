"""Processes that speak gloo, forked once everything is imported: torchrun imports it anew in each, for seconds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def together(number: int, function: Callable, *args: Any) -> None:
    """function(*args) in so many processes at once; an error in one ends all."""
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{Path(folder) / 'meeting'}"
        multiprocessing.start_processes(_join, (number, where, function, args), number, start_method="fork")


def _join(rank: int, number: int, where: str, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate wants them; the file is the meeting
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=number)
    function(*args)
    dist.destroy_process_group()
