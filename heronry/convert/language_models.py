"""Language models in another format.

Reads one tensor at a time and writes it, so that a model is never in memory as a whole. The target takes its place only
after its logits were compared with those of the source, for the same tokens, in float32 and matrix by matrix. How far
rounding moves them depends on the model, so the source's numbers are rounded like the file's before the comparison that
decides.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..checkpoint import DTYPES, assemble, identify, load, load_checkpoint, save, select_notes
from ..errors import InputError
from ..files import atomic_write, check_free_space
from ..formats import folder, ggml, gguf, huggingface, pth, safetensors_file, webrwkv
from ..formats.lazy_tensor import LazyTensor, Tensors
from ..models import Model
from ..progress import ByteCounter, Progress
from ..text.chat_templates import G1, WORLD, usual_template
from ..text.jinja_templates import JinjaTemplate
from ..text.template_choice import AnyTemplate, find_template, in_jinja, model_template
from . import onnx
from .new_folder import new_folder
from .result import Converted
from .streamed_logits import compute_logits, sample_tokens
from .target_formats import SUFFIXES
from .tokenizer_files import TokenizerFiles

log = logging.getLogger("heronry")

LIMIT = 1e-4  # of the largest logit; what is left are the decays that rwkv.cpp stores exponentiated
END_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a config.json: the id that ends a text
Q8_0_STEP = 1 / 127  # of the largest number of a matrix: as far as rounding to Q8_0 moves any of them


def convert_language_model(
    checkpoint: formats.Checkpoint,
    cls: type[Model],
    config: Any,
    source: Path,
    target: Path,
    to: str,
    dtype: str | None,
    *,
    tokenizer: str | Path | None,
    shard: int,
    progress: Progress | None,
) -> Converted:
    """As `convert`, for a checkpoint that was read from `source` and identified as a `cls` with `config`."""
    if to == "fla" and cls.name != "rwkv7":
        raise InputError(f"{source}: fla is a layout of RWKV-7; {cls.name} goes into the format huggingface")
    if getattr(config, "ln0_folded", False) and to not in ("heronry", "fla"):
        raise InputError(f"{source}: the format {to} always applies ln0, which this model's embedding already holds")
    notes = select_notes(checkpoint.config)
    tokenizer_files = TokenizerFiles(source, checkpoint.tokenizer, config.vocab_size, tokenizer)
    chosen = model_template(source, notes, checkpoint.template)
    if chosen is not None and to not in huggingface.LAYOUTS:  # where it is a file of its own
        notes["chat_template"] = chosen.text if isinstance(chosen, JinjaTemplate) else chosen
    if chosen is None and tokenizer_files.name == "world":  # which only chat models have
        chosen = usual_template(cls.name, world=True)
    has_template = to in (*huggingface.LAYOUTS, "gguf")  # as text, so it must not be damaged
    template = find_template(chosen) if has_template and chosen is not None else None
    stops = {} if template is None else {"stop_strings": list(template.stops)}
    tensors = _cast(checkpoint.tensors, to, dtype)
    matrix_dtype = dtype or str(tensors["emb.weight"].dtype).removeprefix("torch.")
    if to == "gguf":
        gguf.check_supported(tensors, config, matrix_dtype)
    if to == "ggml":
        ggml.check_supported(tensors, matrix_dtype)
    size = sum(x.nbytes for x in tensors.values())
    check_free_space(size * (2 if to == "blinkdl" else 1), target)
    counter = ByteCounter(size, progress)

    def write(part: Path) -> None:
        if to == "blinkdl":
            pth.write(tensors, part, counter)
        elif to == "safetensors":
            safetensors_file.write(tensors, part, counter)
        elif to == "webrwkv":
            safetensors_file.write(webrwkv.from_blinkdl(tensors), part, counter)
        elif to == "ggml":
            ggml.write(tensors, part, DTYPES[matrix_dtype], counter)
        elif to == "gguf":
            vocabulary, text = tokenizer_files.vocabulary(), tokenizer_files.json_text()
            end = tokenizer_files.end_of_text()
            chat = _gguf_template(template)
            gguf.write(tensors, config, part, matrix_dtype, vocabulary, text, end, *chat, notes, counter)
        else:
            if to in huggingface.LAYOUTS:
                write_huggingface(part)
            else:
                folder.write(tensors, part, counter, shard)
                tokenizer_files.write(part)
                write_json(part / "config.json", {"model": cls.name, **asdict(config), **notes})

    def write_huggingface(part: Path) -> None:
        folder.write(huggingface.from_blinkdl(tensors, to), part, counter, shard)
        end = tokenizer_files.end_of_text()
        config_json = huggingface.config_json(cls.name, config, notes, DTYPES[matrix_dtype], to)
        config_json |= {key: end for key in END_KEYS if key in config_json}
        if own := " and ".join(key for key in ("ln_x_eps", "time_state") if key in config_json):
            log.warning("heronry: %s: only heronry reads its %s; for other programs it is another model", target, own)
        write_json(part / "config.json", config_json)
        tokenizer_files.write_for_transformers(part, None if template is None else in_jinja(template))
        generation = dict.fromkeys(END_KEYS, end) | {"use_cache": True}
        write_json(part / "generation_config.json", generation | stops)

    expected = compute_logits(cls, config, checkpoint.tensors)
    stamp = json.dumps([str(source.resolve()), os.stat(source).st_mtime_ns, size, to, matrix_dtype, shard])
    with atomic_write(target) if to in SUFFIXES.values() else new_folder(target, stamp) as part:
        try:
            write(part)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
        try:
            written = formats.read(part)
            logits = compute_logits(cls, identify(written.tensors, written.config)[1], written.tensors)
            result = Converted.compare(to, part, expected, logits)
            if not math.isfinite(result.difference):
                raise InputError(f"logits contain NaN or infinity, {matrix_dtype} is too small for these weights")
            rounded = _round_like(checkpoint.tensors, written.tensors, matrix_dtype)
            if rounded != checkpoint.tensors:
                expected = compute_logits(cls, config, rounded)
            difference = (logits - expected).abs().max().item()
            if not difference <= LIMIT * result.largest:
                raise InputError(f"read again it is another model, its logits are off by {difference:.2g}")
        except InputError as error:
            raise InputError(f"{target}: not written: {error}") from error
    return result


def _gguf_template(template: AnyTemplate | None) -> tuple[str | None, bool]:
    """A template in Jinja, None for that of World and G1, which llama.cpp has; and whether an empty line ends an
    answer."""
    if template is None or template in (WORLD, G1):
        return None, True
    text = template.text if isinstance(template, JinjaTemplate) else in_jinja(template)
    return text, any(stop.startswith("\n\n") for stop in template.stops)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _round_like(source: Tensors, written: Tensors, dtype: str) -> Tensors:
    """The tensors of the source, rounded as in a file whose matrices have this dtype and that was read as `written`."""
    if dtype == "q8_0":
        near = {name: x for name, x in written.items() if x.numel() == source[name].numel()}
        return source | {name: LazyTensor.computed(_take_near, source[name], x) for name, x in near.items()}
    return {name: x.to(written[name].dtype) if name in written else x for name, x in source.items()}


def _take_near(x: Tensor, quantized: Tensor) -> Tensor:
    """The numbers of `quantized` that can come from those of x, and x where they cannot."""
    quantized = quantized.reshape(x.shape)
    return quantized.where((quantized - x.float()).abs() <= Q8_0_STEP * x.abs().max(), x.float())


@torch.inference_mode()
def convert_packed_model(
    source: Path,
    target: Path,
    to: str,
    dtype: str | None,
    ln_x_eps: float | None,
    tokenizer: str | Path | None,
    progress: Progress | None,
) -> Converted:
    """Writes a model whose matrices are packed in 8 or 4 bits, as they are, as a folder of heronry's."""
    if to != "heronry":
        raise InputError("its matrices are quantized, which only a folder of heronry's can hold; convert the original")
    model, checkpoint = load_checkpoint(source, dtype, ln_x_eps=ln_x_eps, progress=progress)
    tokenizer_files = TokenizerFiles(source, checkpoint.tokenizer, model.config.vocab_size, tokenizer)
    check_free_space(sum(x.nbytes for x in (*model.parameters(), *model.buffers())), target)
    tokens = sample_tokens(model.config.vocab_size)
    with new_folder(target, json.dumps([str(source.resolve()), os.stat(source).st_mtime_ns, to])) as part:
        save(model, part, notes=select_notes(checkpoint.config))
        tokenizer_files.write(part)
        return Converted.compare(to, part, model(tokens)[0], load(part)(tokens)[0])


def convert_to_onnx(checkpoint: formats.Checkpoint, target: Path, to: str, dtype: str | None) -> Converted:
    """Writes a language model as an ONNX graph and compares onnxruntime's logits. `to`: "onnx" or "onnx-step"."""
    if dtype not in (None, "float32"):
        raise InputError(f"ONNX files are float32, not {dtype}")
    model = assemble(checkpoint.tensors, checkpoint.config, torch.float32)
    check_free_space(sum(p.nbytes for p in model.parameters()), target)
    tokens = sample_tokens(model.config.vocab_size)
    with torch.no_grad():
        expected = model(tokens)[0]
    with atomic_write(target) as part:
        onnx.write(model, part, target.name, step=to == "onnx-step")
        result = Converted.compare(to, part, expected, onnx.run_graph(part, tokens, model))
        if not result.difference <= 1e-4 * max(1.0, result.largest):
            raise InputError(f"{target}: not written: onnxruntime's logits differ by {result.difference:.2g}")
    return result


def _cast(tensors: Tensors, to: str, dtype: str | None) -> Tensors:
    """The tensors in the dtype of the target; for gguf and ggml, which choose a type for each tensor, only those in
    float8 change."""
    if to == "webrwkv":
        if dtype not in (None, "float16"):
            raise InputError(f"web-rwkv's files are float16, not {dtype}")
        dtype = "float16"
    narrow = {x.dtype for x in tensors.values()} - set(DTYPES.values())
    if narrow and dtype is None:
        name = str(narrow.pop()).removeprefix("torch.")
        raise InputError(f"its weights are {name}, in which models cannot compute; give a dtype (--dtype)")
    if to in ("gguf", "ggml"):
        return {name: x.to(torch.float32) if x.dtype in narrow else x for name, x in tensors.items()}
    if dtype is None:
        return tensors
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    return {name: x.to(DTYPES[dtype]) for name, x in tensors.items()}
