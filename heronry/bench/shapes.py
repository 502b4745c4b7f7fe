"""Sizes of the models that are measured: their files with random weights, and the least that a token costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load, save
from ..convert import convert
from ..models import MODELS, Model
from ..quantization import quantize

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4, "F16": 16, "Q8_0": 8, "Q4_0": 4}


@dataclass(frozen=True)
class Shape:
    """A model's sizes. family: rwkv4 to rwkv7, or gpt2."""

    family: str
    n_layer: int
    n_embd: int
    vocab_size: int

    def __str__(self) -> str:
        return f"{self.name} L{self.n_layer} D{self.n_embd} V{self.vocab_size}"

    @property
    def name(self) -> str:
        return "GPT-2" if self.family == "gpt2" else f"RWKV-{self.family[-1]}"

    def path(self, kind: str, folder: Path) -> Path:
        """Where CheckpointWriter puts its file of this kind."""
        return folder / f"{self.name}-{self.n_layer}-{self.n_embd}-{self.vocab_size}.{kind}"

    def bytes_per_token(self, format: str, position: int = 0) -> int:
        """The least that decoding one token reads and writes, in bytes.

        Every matrix but the embedding in its format; low-rank matrices and vectors in 32 bits for float32, else in 16;
        the float32 state of an RWKV, read and written; the keys and values of a Transformer at `position`.
        """
        matrices, others, state = _count_elements(self)
        size = 4 if format == "float32" else 2
        cache = 2 * self.n_layer * position * self.n_embd if self.family == "gpt2" else 0
        return matrices * BITS[format] // 8 + (others + cache) * size + 2 * 4 * state

    def weight_bytes(self, format: str) -> int:
        """Bytes of all weights: those that a token reads, and the embedding in 32 bits for float32, else in 16."""
        matrices, others, _ = _count_elements(self)
        size = 4 if format == "float32" else 2
        embedding = 1024 * self.n_embd if self.family == "gpt2" else self.vocab_size * self.n_embd
        return matrices * BITS[format] // 8 + (others + embedding) * size

    def flops(self, tokens: int, logits: int) -> int:
        """Operations of all matrices, low-rank ones too, in a forward pass that gives `logits` rows of logits."""
        matrices, others, _ = _count_elements(self)
        head = self.vocab_size * self.n_embd
        return 2 * ((matrices + others - head) * tokens + head * logits)


@cache
def _count_elements(shape: Shape) -> tuple[int, int, int]:
    """The number of elements that a token needs: of matrices but the embedding, of other parameters, of the state."""
    n_layer, n_embd, vocab_size = shape.n_layer, shape.n_embd, shape.vocab_size
    if shape.family == "gpt2":  # its head is the embedding, so all of it is read
        return 12 * n_layer * n_embd**2 + vocab_size * n_embd, 13 * n_layer * n_embd + 4 * n_embd, 0
    cls = MODELS[shape.family]
    with torch.device("meta"):
        model = cls(cls.Config.sized(vocab_size, n_layer, n_embd))
        state = sum(block.att.initial_wkv().numel() + 2 * n_embd for block in model.blocks)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name != "emb.weight"}
    matrices = sum(n for name, n in sizes.items() if name.endswith(".weight") and "ln" not in name)
    return matrices, sum(sizes.values()) - matrices, state


class CheckpointWriter:
    """Writes a file or folder with random weights; a contestant, so that its process frees the memory afterwards.

    Args:
        kind: "pth" (BlinkDL's names, bfloat16), "int8" or "int4" (as heronry saves them), "F16", "Q8_0" or "Q4_0"
            (GGUF) or "transformers".
        folder: where it goes, under the name that `Shape.path` gives.
    """

    def __init__(self, shape: Shape, kind: str, folder: Path):
        self.shape, self.kind, self.folder = shape, kind, folder

    def load(self) -> None:
        self.write(self.kind)

    def write(self, kind: str) -> Path:
        path = self.shape.path(kind, self.folder)
        if path.exists():
            return path
        part = path.with_name("part-" + path.name)  # whole or not at all
        if kind == "pth":
            torch.save(random_model(self.shape).to(torch.bfloat16).state_dict(), part)
        elif kind in ("int8", "int4"):
            save(quantize(load(self.write("pth")), kind), part)
        elif kind == "transformers":
            transformers_model(self.shape).save_pretrained(part)
        elif kind == "F16":
            convert(self.write("pth"), part, to="gguf", dtype="float16")
        else:
            _quantize_gguf(self.write("F16"), part, kind)
        return part.rename(path)


def random_model(shape: Shape) -> Model:
    """A model of this package with random weights; its own initialisation would leave many at zero."""
    cls = MODELS[shape.family]
    model = cls(cls.Config.sized(shape.vocab_size, shape.n_layer, shape.n_embd))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln" in name and name.endswith("weight"):
                p.fill_(1)
            else:
                p.normal_(std=0.02)
    return model


def transformers_model(shape: Shape) -> Any:
    """The model of transformers, with the random weights that it is initialised with."""
    transformers: Any = import_module("transformers")
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocab_size, n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_embd // 64
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.RwkvConfig(
        vocab_size=shape.vocab_size, num_hidden_layers=shape.n_layer, hidden_size=shape.n_embd, context_length=1024
    )
    return transformers.RwkvForCausalLM(config)


def _quantize_gguf(source: Path, path: Path, kind: str) -> None:
    """Quantize a GGUF file with llama.cpp: every matrix to `kind`, also the head, which its default keeps larger and
    slower."""
    llama_cpp: Any = import_module("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    params.pure = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")
