"""Tuned initial states in files: `blocks.i.att.time_state` of every layer and nothing else.

Either BlinkDL's .pth, web-rwkv's and Ai00's .st, or a .safetensors of `save_time_state`, whose metadata also hold the
model's fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..files import atomic_write
from ..formats.safetensors_file import read_metadata
from ..models import Model, State
from .notes import read_notes

FORMAT = "heronry.time_state"  # "format" in the metadata
FILE = "time_state.safetensors"  # in the folder of a training run


def save_time_state(model: Model, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes the tuned initial state of a model as a .safetensors file (atomically), under BlinkDL's names.

    notes: as for `save`.
    """
    if not model.config.time_state:
        raise InputError("this model has no tuned initial state; tune_state() adds one")
    tensors = {name: model.get_parameter(name).detach().cpu().contiguous() for name in model.time_states()}
    metadata = {"format": FORMAT, "fingerprint": model.fingerprint, "notes": json.dumps(dict(notes or {}))}
    with atomic_write(Path(path).expanduser()) as part:
        save_file(tensors, part, metadata=metadata)


def read_time_state(path: str | Path, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tuned initial state for this model, and the notes saved with it.

    path: a file of `save_time_state`, or the folder of a training run, which holds one; or a file of BlinkDL's or
        web-rwkv's, of which only the shapes are checked.

    Returns:
        tensors by name, [H, N_v, N_k] (RWKV-4: [2, A]), float32 (float64 for a float64 model), on the model's device;
        and the notes.

    Raises:
        InputError: the file does not exist, is damaged, is not a tuned state, contains NaN or infinity, or belongs to
            another model.
    """
    path = Path(path).expanduser()
    if os.path.isdir(path):
        path /= FILE
    try:
        if not os.path.exists(path):
            raise InputError("no such state file")
        tensors = formats.read(path).tensors
        expected = model.time_states()
        if tensors.keys() != expected.keys():
            names = (", ".join(list(tensors)[:2]) or "nothing") + (", ..." if len(tensors) > 2 else "")
            expected_names = f"blocks.0 to {len(expected) - 1}.att.time_state"
            raise InputError(f"not a tuned state of this model: it holds {names} instead of {expected_names}")
        for name, shape in expected.items():
            x = tensors[name]
            if not x.is_floating_point or x.shape != shape:
                raise InputError(f"a tuned state of another model: {name} is {list(x.shape)} instead of {list(shape)}")
        metadata = read_metadata(path)
        if metadata.get("fingerprint", model.fingerprint) != model.fingerprint:
            raise InputError("this state was tuned on another model")
        notes = read_notes(metadata)
        numbers = {name: x.read() for name, x in tensors.items()}
        for name, values in numbers.items():
            if not values.isfinite().all():
                raise InputError(f"{name} contains NaN or infinity")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    weight = model.emb.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return {name: values.to(weight.device, dtype) for name, values in numbers.items()}, notes


def initial_state(path: str | Path, model: Model) -> State:
    """The tuned state in a file of `read_time_state` as the state of one sequence, from which a text can start. The
    model is not changed."""
    return model.initial_state(time_states=read_time_state(path, model)[0])
