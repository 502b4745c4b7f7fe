"""Processes that speak gloo, forked when all is imported: torchrun imports everything in each, for seconds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from heronry.models import RWKV7

RWKV7(RWKV7.Config.sized(64, 1, 64))(torch.ones(1, 5, dtype=torch.long))  # a first forward imports the most


def together(number: int, function: Callable, *args: Any) -> None:
    """function(*args) in so many processes at once; an error in one ends all."""
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{Path(folder) / 'meeting'}"
        multiprocessing.start_processes(_join, (number, where, function, args), number, start_method="fork")


def _join(rank: int, number: int, where: str, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # which accelerate asks for, though they have met
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=number)
    function(*args)
    dist.destroy_process_group()
