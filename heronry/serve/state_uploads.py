"""States in bytes that came from anywhere: a file of `State.save`, or a tuned initial state, BlinkDL's .pth or a
safetensors file. Nothing in them is run, and nothing is taken that does not fit the model."""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
import zipfile
from pathlib import Path

import torch

from ..checkpoint import read_time_state
from ..errors import InputError
from ..formats.pth import is_pth
from ..models import Model, State


def read_upload(data: bytes, model: Model) -> State:
    """A state of one row for this model, float32 on the CPU.

    Raises:
        InputError: the bytes are no state, a damaged one, one of several rows, or one of another model.
    """
    if _is_state(data):
        return fit(State.from_bytes(data), model)
    if not is_pth(data) and not _is_safetensors(data):
        raise InputError("not a state: a safetensors file or a .pth file is expected")
    _check_archive(data)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("upload.pth" if is_pth(data) else "upload.safetensors")
        file.write_bytes(data)
        try:
            tensors = read_time_state(file, model)[0]
        except InputError as error:
            raise InputError(str(error).replace(f"{file}: ", "").replace(str(file), "the file")) from None
        return fit(model.initial_state(time_states={name: x.clone() for name, x in tensors.items()}), model)


def read_inline(text: str, model: Model) -> State:
    """The same in base64."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the state is not base64 ({error})") from None
    return read_upload(data, model)


def fit(state: State, model: Model) -> State:
    """A state from outside as one that this model can continue beside others, whose batch it must not spoil."""
    if len(state) != 1:
        raise InputError(f"a state of one sequence is expected, got one of {len(state)}")
    if state.fingerprint != model.fingerprint:
        raise InputError("this state belongs to another model")
    given, expected = state.to_tensors(), model.initial_state().to_tensors()
    shapes = [{name: x.shape for name, x in y.items() if name.startswith("blocks.")} for y in (given, expected)]
    if shapes[0] != shapes[1] or not model.accepts_contexts(state.contexts):
        raise InputError("this state is damaged: its tensors do not fit the model")
    numbers = {name: x.to(torch.float32) if x.is_floating_point() else x for name, x in given.items()}
    try:
        return State.from_tensors(numbers, state.fingerprint, [*state.texts])
    except ValueError as error:
        raise InputError(f"this state is damaged: {error}") from None


def _header(data: bytes) -> bytes:
    return data[8 : 8 + min(int.from_bytes(data[:8], "little"), len(data))]


def _is_safetensors(data: bytes) -> bool:
    return len(data) > 8 and data[8:9] == b"{"


def _is_state(data: bytes) -> bool:
    return _is_safetensors(data) and b'"heronry.state"' in _header(data)


def _check_archive(data: bytes) -> None:
    """InputError for an archive that would grow when it is read: PyTorch never compresses."""
    if not data.startswith(b"PK"):
        return
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"a damaged .pth file ({error})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > len(data)
    ):
        raise InputError("a compressed .pth file; PyTorch writes none")
