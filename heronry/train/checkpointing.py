"""Checkpoints of a run: written completely or not at all, and verified before they are used.

A checkpoint is a folder `step-00001000` that every command accepts as a model (config.json, model.safetensors, the
tokenizer), plus the optimizer state and run.json, with the progress of the run and the hashes of the other files. It is
written under another name and renamed once everything is on disk. If only the initial state is trained,
time_state.safetensors takes the place of the model; if only adapters are, the two files of the adapter. Of a sharded
model (fsdp.py) every process writes its own shards and optimizer state, and such a folder is not a model.
"""

from __future__ import annotations

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
from ..checkpoint import read_time_state, save, save_time_state, time_state
from ..errors import InputError
from ..files import hash_file, read_json
from ..models import Model, Network, State
from . import fsdp

log = logging.getLogger("heronry")

NAME = re.compile(r"step-(\d{8})")
OPTIMIZER, RUN_STATE = "optimizer.safetensors", "run.json"
CARRIED_STATES, EMA = "carried.safetensors", "mean.safetensors"
CUDA_RANDOM = "random_cuda"  # a key beside those of the optimizer's tensors


def save_model(model: Network, folder: Path, tokenizer_file: Path | None, notes: Mapping[str, Any] | None) -> None:
    """Writes what is trained: the model, or only its initial state or its adapters."""
    if isinstance(model, Model) and model.state_tuning:
        save_time_state(model, folder / time_state.FILE, notes)
    elif isinstance(model, Model) and model.adapted_from is not None:
        save_adapter(model, folder, notes)
    else:
        save(model, folder, tokenizer_file, notes)


def save_checkpoint(
    folder: Path,
    step: int,
    model: Network,
    optimizer: torch.optim.Optimizer,
    run_state: Mapping[str, Any],
    max_checkpoints: int,
    *,
    tokenizer_file: Path | None = None,
    notes: Mapping[str, Any] | None = None,
    carried_states: State | None = None,
    ema: nn.Module | None = None,
) -> Path:
    """Writes a checkpoint into `folder` and deletes all but the newest ones.

    It is called by the main process alone, or for a sharded model by all processes together.

    Args:
        run_state: anything else to restore, serializable as JSON.
        max_checkpoints: how many to keep.
        tokenizer_file, notes: see `heronry.save`.
        carried_states: the states at which the next step starts.
        ema: the averaged weights, torch's AveragedModel.

    Returns:
        The folder of the checkpoint.

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
            for shard_hashes in fsdp.run_on_all(lambda: _sync_and_hash(fsdp.save_shards(part, model, optimizer))):
                hashes |= shard_hashes
            if fsdp.rank() != 0:
                return target
        else:
            part.mkdir(parents=True)
            save_model(model, part, tokenizer_file, notes)
            save_file(_optimizer_tensors(model, optimizer), part / OPTIMIZER)
        if carried_states is not None:
            carried_states.save(part / CARRIED_STATES)
        if ema is not None:
            save_file({name: x.detach().cpu().contiguous() for name, x in ema.state_dict().items()}, part / EMA)
        hashes |= _sync_and_hash([file for file in part.iterdir() if file.name not in hashes])
        (part / RUN_STATE).write_text(json.dumps({"step": step, **run_state, "files": hashes}, indent=1) + "\n")
        _sync(part / RUN_STATE)
        shutil.rmtree(target, ignore_errors=True)  # of a run that was resumed from an older checkpoint
        os.replace(part, target)
        _sync(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        if fsdp.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
    for old in _list_checkpoints(folder)[:-max_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def find_latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its `run_state`, with the step; None if there is none.

    It is called by all processes, each of which verifies some of the files.
    """
    for path in reversed(_list_checkpoints(folder)):
        try:
            run_state = read_json(path / RUN_STATE)
            hashes = dict(run_state.pop("files"))
        except (ValueError, KeyError, TypeError):  # InputError is one
            damaged = [RUN_STATE]
        else:
            results = fsdp.run_on_all(partial(_find_damage, path, hashes))
            damaged = [name for name in results if name is not None]
        if not damaged:
            return path, run_state
        if fsdp.rank() == 0:
            log.warning("heronry: ignoring %s, which is damaged (%s)", path, damaged[0])
    return None


def _find_damage(path: Path, hashes: Mapping[str, str]) -> str | None:
    """The first file of this process's share that is missing or has changed, or a file without a hash."""
    for name in fsdp.own_share(sorted(hashes)):
        try:
            if hash_file(path / name) != hashes[name]:
                return name
        except OSError:
            return name
    return next((file.name for file in path.glob("*.safetensors") if file.name not in hashes), None)


def restore_checkpoint(
    path: Path, model: Network, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
) -> None:
    """Loads a checkpoint into a model and its optimizer, and sets the random state. It is called by all processes.

    Raises:
        InputError: it is a checkpoint of another model.
    """
    if model.sharded or any(path.glob(fsdp.SHARD_FILES)):
        fsdp.load_shards(path, model, optimizer)
        return
    try:
        if isinstance(model, Model) and model.state_tuning:
            model.load_state_dict(read_time_state(path / time_state.FILE, model)[0], strict=False)
        elif isinstance(model, Model) and model.adapted_from is not None:
            restore_adapter(model, path)
        else:
            model.load_state_dict(load_file(path / "model.safetensors"))
    except RuntimeError as error:
        raise InputError(f"{path}: a checkpoint of another model ({str(error).splitlines()[-1].strip()})") from error
    tensors = load_file(path / OPTIMIZER)
    torch.set_rng_state(tensors.pop("random"))
    if CUDA_RANDOM in tensors:
        cuda_random = tensors.pop(CUDA_RANDOM)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_random)
    if ema is not None:
        ema.load_state_dict(load_file(path / EMA))
    indices = _parameter_indices(model, optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, _, what = key.rpartition("|")
        if name not in indices:
            raise InputError(f"{path}: has optimizer state for {name}, which is not trained here")
        state.setdefault(indices[name], {})[what] = x
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _optimizer_tensors(model: Network, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer state as "{parameter}|{key}", and the random state."""
    names = {index: name for name, index in _parameter_indices(model, optimizer).items()}
    state = optimizer.state_dict()["state"]
    tensors = {f"{names[i]}|{key}": x.detach().cpu() for i, values in state.items() for key, x in values.items()}
    if torch.cuda.is_available():
        tensors[CUDA_RANDOM] = torch.cuda.get_rng_state()  # of dropout, in the main process
    return {**tensors, "random": torch.get_rng_state()}


def _parameter_indices(model: Network, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The index of each parameter, by name, in the optimizer's state_dict."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


def _list_checkpoints(folder: Path) -> list[Path]:
    """The oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def _sync_and_hash(files: Sequence[Path]) -> dict[str, str]:
    """Makes sure that files are on disk; their hashes by name."""
    for file in files:
        _sync(file)
    return {file.name: hash_file(file) for file in files}


def _sync(path: Path) -> None:
    """Makes sure that a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
