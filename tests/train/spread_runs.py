"""Runs over several processes: argv is JSON [[processes, [settings, ...]], ...]. Prints the refusals of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from heronry.errors import InputError
from heronry.train.config import read_config
from heronry.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import together


def take(runs: list[list[str]]) -> None:
    for settings in runs:
        try:
            run = Trainer(read_config(None, settings))
        except InputError as error:
            if dist.get_rank() == 0:
                print(error)
        else:
            run.train()


for processes, runs in json.loads(sys.argv[1]):
    together(processes, take, runs)
