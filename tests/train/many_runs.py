"""For test_fsdp.py: `python many_runs.py '[[2, [...]], [3, [...]]]'` does runs one after the other in the same two
processes, then others in three. They are forked, for importing torch takes them longer than all they do.

A run is told as {"settings": [...], "from": [checkpoints to copy first], "damage": one of them, "process 1": what
happens to it}.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from accelerate import PartialState
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from heronry.models import Model
from heronry.train import checkpointing
from heronry.train.config import read_config
from heronry.train.trainer import Trainer


def most_likely(model: Model, prompt: str) -> str:
    """How a text goes on, as ids."""
    ids = [1, 2]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return str(ids)


def flip(file: Path) -> None:
    """A bit of the last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def full_disk() -> None:
    """No file may grow beyond 10 KB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def killed() -> None:
    """When the pieces of step 3 are written and not all of its checkpoint is."""
    whole = checkpointing.hash_file

    def hashed(file: Path) -> str:
        if "step-00000003" in str(file):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(file)

    checkpointing.hash_file = hashed


def work(rank: int, processes: int, runs: list[dict]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    together = PartialState(cpu=True)
    for options in runs:
        config = read_config(None, options["settings"])
        for path in map(Path, options.get("from", []) if rank == 0 else []):
            copy = Path(shutil.copytree(path, Path(config.run.out) / "checkpoints" / path.name))
            if path == Path(options.get("damage", "")):
                flip(sorted(copy.glob("shard-*"))[1])
        together.wait_for_everyone()
        if rank == 1 and "process 1" in options:
            {"full disk": full_disk, "killed": killed}[options["process 1"]]()
        trainer = Trainer(config)
        trainer.generate_sample = most_likely
        trainer.train()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    for processes, runs in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ["LOCAL_WORLD_SIZE"] = str(processes)
        try:
            start_processes(work, (processes, runs), processes, start_method="fork")
        except (ProcessExitedException, ProcessRaisedException) as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
