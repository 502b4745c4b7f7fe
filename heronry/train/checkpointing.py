"""Checkpoints of a run: written whole or not at all, verified before they are trusted.

A checkpoint is a folder `step-00001000` that every command takes as a model (config.json, model.safetensors, the
tokenizer), with the optimiser's tensors beside it and run.json, which knows where the run stood and what the other
files hash to. It is made under another name and renamed when all of it is on the disk. Where only the initial state
is trained, time_state.safetensors stands for the model, and where only adapters are, the two files of the adapter. Of a
model in pieces (fsdp.py) every process writes its own, the optimiser's with them, and such a folder is no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters import restore_adapter, save_adapter
from ..checkpoint import read_time_state, save, save_time_state
from ..errors import InputError
from ..models import Model, State
from . import fsdp

log = logging.getLogger("heronry")

NAME = re.compile(r"step-(\d{8})")
OPTIMIZER, STANDING, TUNED = "optimizer.safetensors", "run.json", "time_state.safetensors"
CARRIED, MEAN = "carried.safetensors", "mean.safetensors"
CUDA_RANDOM = "random_cuda"  # among the optimiser's tensors


def keep(
    folder: Path,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    standing: Mapping[str, Any],
    most: int,
    tokenizer_file: Path | None = None,
    notes: Mapping[str, Any] | None = None,
    carried: State | None = None,
    mean: nn.Module | None = None,
) -> Path:
    """Writes the checkpoint of a step into `folder` and removes all but the `most` newest. By the main process alone;
    of a model in pieces, by all together.

    Args:
        standing: what else is to be found again, as JSON can say it.
        carried: the states that the next step begins from.
        mean: the mean of the weights, torch's AveragedModel.

    Raises:
        OSError: the disk is full; nothing has changed.
    """
    target = folder / f"step-{step:08}"
    part = folder / f".{target.name}.part"
    if fsdp.rank() == 0:
        for old in folder.glob(".step-*.part"):  # of a run that was killed
            shutil.rmtree(old, ignore_errors=True)
    hashes: dict[str, str] = {}
    try:
        if model.sharded:
            for settled in fsdp.together(lambda: _settled(fsdp.write(part, model, optimizer))):
                hashes |= settled
            if fsdp.rank() != 0:
                return target
        else:
            part.mkdir(parents=True)
            if model.state_tuning:
                save_time_state(model, part / TUNED, notes)
            elif model.adapted_from is not None:
                save_adapter(model, part, notes)
            else:
                save(model, part, tokenizer_file, notes)
            save_file(_tensors(model, optimizer), part / OPTIMIZER)
        if carried is not None:
            carried.save(part / CARRIED)
        if mean is not None:
            save_file({name: x.detach().cpu().contiguous() for name, x in mean.state_dict().items()}, part / MEAN)
        hashes |= _settled([file for file in part.iterdir() if file.name not in hashes])
        (part / STANDING).write_text(json.dumps({"step": step, **standing, "files": hashes}, indent=1) + "\n")
        _to_disk(part / STANDING)
        shutil.rmtree(target, ignore_errors=True)  # of a run that went on from an older one
        os.replace(part, target)
        _to_disk(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        if fsdp.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
    for old in _all(folder)[:-most]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is as it was written, and its `standing` with the step; None where there is none. By
    all processes, each of which reads its share of the files."""
    for path in reversed(_all(folder)):
        try:
            standing = json.loads((path / STANDING).read_text())
            hashes = dict(standing.pop("files"))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            damaged = [STANDING]
        else:
            found = fsdp.together(partial(_damaged, path, hashes))
            damaged = [name for name in found if name is not None]
        if not damaged:
            return path, standing
        if fsdp.rank() == 0:
            log.warning("heronry: %s is damaged (%s) and left aside", path, damaged[0])
    return None


def _damaged(path: Path, hashes: Mapping[str, str]) -> str | None:
    """A file of this process's share that is not as it was written, or that was not written with the others."""
    for name in fsdp.share(sorted(hashes)):
        try:
            if _hash(path / name) != hashes[name]:
                return name
        except OSError:
            return name
    return next((file.name for file in path.glob("*.safetensors") if file.name not in hashes), None)


def restore(path: Path, model: Model, optimizer: torch.optim.Optimizer, mean: nn.Module | None = None) -> None:
    """Puts the numbers of a checkpoint, random state included, where they were. By all processes."""
    if model.sharded or any(path.glob(fsdp.FILES)):
        fsdp.read(path, model, optimizer)
        return
    try:
        if model.state_tuning:
            model.load_state_dict(read_time_state(path / TUNED, model)[0], strict=False)
        elif model.adapted_from is not None:
            restore_adapter(model, path)
        else:
            model.load_state_dict(load_file(path / "model.safetensors"))
    except RuntimeError as error:
        raise InputError(f"{path}: is a checkpoint of another model ({str(error).splitlines()[-1].strip()})") from error
    tensors = load_file(path / OPTIMIZER)
    torch.set_rng_state(tensors.pop("random"))
    if CUDA_RANDOM in tensors:
        there = tensors.pop(CUDA_RANDOM)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(there)
    if mean is not None:
        mean.load_state_dict(load_file(path / MEAN))
    names = _names(model, optimizer)
    found = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, _, what = key.rpartition("|")
        if name not in names:
            raise InputError(f"{path}: its optimiser knows {name}, which is not trained here")
        state.setdefault(names[name], {})[what] = x
    optimizer.load_state_dict({**found, "state": state})


def _tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {place: name for name, place in _names(model, optimizer).items()}
    state = optimizer.state_dict()["state"]
    tensors = {f"{names[i]}|{what}": x.detach().cpu() for i, parts in state.items() for what, x in parts.items()}
    if torch.cuda.is_available():
        tensors[CUDA_RANDOM] = torch.cuda.get_rng_state()  # dropout's, of the main process
    return {**tensors, "random": torch.get_rng_state()}


def _names(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The number that the optimiser's state_dict gives to each parameter."""
    named = {p: name for name, p in model.named_parameters()}
    return {named[p]: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


def _all(folder: Path) -> list[Path]:
    """Checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def _settled(files: Sequence[Path]) -> dict[str, str]:
    """What these files, which are now on the disk, hash to."""
    for file in files:
        _to_disk(file)
    return {file.name: _hash(file) for file in files}


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
