"""Converts a model from any format to any other: reads the source and hands it to the file for its kind of model."""

from __future__ import annotations

from pathlib import Path

from .. import formats
from ..checkpoint import DTYPE_ALIASES, QUANTIZATION_KEYS, identify, locate
from ..errors import InputError
from ..models import Model, VisionModel
from ..progress import Progress
from . import target_formats
from .language_models import convert_language_model, convert_to_onnx
from .result import Converted
from .vision_models import convert_vision_model

SHARD = 2 << 30  # the default for the largest file of a folder, in bytes


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    shard: int = SHARD,
    progress: Progress | None = None,
    *,
    ln_x_eps: float | None = None,
) -> Converted:
    """Writes the model in `source` in another format, and compares the logits of both.

    Args:
        source: a file or folder of any format.
        target: a file, or a new folder. Its suffix shows the format: .pth, .safetensors, .st (web-rwkv), .gguf, .bin
            (rwkv.cpp), .onnx; no suffix means a folder of heronry's.
        to: the format, if the suffix does not show it: a value of SUFFIXES, or one of FOLDERS, GRAPHS or "vision_rwkv".
        dtype: "float32", "bfloat16" or "float16", for GGUF also "q8_0"; None keeps that of the source, as far as the
            format allows.
        tokenizer: as for LLM, for targets that contain one; None = the one beside the source, or recognised by the size
            of the vocabulary.
        shard: the largest size of a file in a folder, in bytes.
        progress: called with (bytes written, bytes in all) while a language model is written.
        ln_x_eps: of the source, as for `heronry.load`; only folders can hold another one than 64e-5.

    Raises:
        InputError: what is wrong with the source, or what the target format does not support. Nothing is left behind,
            except the finished files of a folder after an interruption, with which the same call continues.
    """
    source, target = locate(source), Path(target).expanduser()
    dtype = None if dtype is None else DTYPE_ALIASES.get(dtype, dtype)
    to = to or target_formats.format_of(target)
    if to not in target_formats.ALL:
        raise InputError(f"unknown format {to!r}; choose one of {', '.join(target_formats.ALL)}")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is the source itself; choose another name")
    if shard < 1:
        raise InputError(f"shard must be a positive number of bytes, got {shard}")
    try:
        checkpoint = formats.read(source)
        if any(checkpoint.config.get(key) for key in QUANTIZATION_KEYS):
            raise InputError("its matrices are quantized; convert the original")
        cls, config = identify(checkpoint.tensors, checkpoint.config, ln_x_eps)
        if ln_x_eps is not None:
            checkpoint.config = {**checkpoint.config, "model": cls.name, "ln_x_eps": config.ln_x_eps}
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if issubclass(cls, VisionModel):
        return convert_vision_model(checkpoint, source, target, to, dtype)
    assert issubclass(cls, Model)
    if to in target_formats.VISION:
        raise InputError(f"{source}: is a language model ({cls.name}); {to} is for picture models")
    if to in target_formats.GRAPHS:
        return convert_to_onnx(checkpoint, target, to, dtype)
    return convert_language_model(
        checkpoint, cls, config, source, target, to, dtype, tokenizer=tokenizer, shard=shard, progress=progress
    )
