"""What is measured: random weights of a shape, the files they lie in, and what a token costs at least."""

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
    """family: rwkv4 to rwkv7, or gpt2."""

    family: str
    layers: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.name} L{self.layers} D{self.width} V{self.vocabulary}"

    @property
    def name(self) -> str:
        return "GPT-2" if self.family == "gpt2" else f"RWKV-{self.family[-1]}"

    def path(self, kind: str, folder: Path) -> Path:
        return folder / f"{self.name}-{self.layers}-{self.width}-{self.vocabulary}.{kind}"

    def bytes_a_token(self, format: str, position: int = 0) -> int:
        """What decoding one token reads and writes at least: every matrix but the embedding in its format, low-rank
        matrices and vectors in 32 bits for float32 and in 16 for all others, an RWKV's float32 state both ways, a
        Transformer's keys and values of the tokens before."""
        matrices, rest, state = _counts(self)
        size = 4 if format == "float32" else 2
        kept = 2 * self.layers * position * self.width if self.family == "gpt2" else 0
        return matrices * BITS[format] // 8 + (rest + kept) * size + 2 * 4 * state

    def weights(self, format: str) -> int:
        """Bytes of all weights: what is counted above, and the embedding in 16 bits or 32."""
        matrices, rest, _ = _counts(self)
        size = 4 if format == "float32" else 2
        embedding = 1024 * self.width if self.family == "gpt2" else self.vocabulary * self.width
        return matrices * BITS[format] // 8 + (rest + embedding) * size

    def flops(self, tokens: int, logits: int) -> int:
        """Of the matrices, low-rank ones too, in the forward pass of so many tokens with the logits of some."""
        matrices, rest, _ = _counts(self)
        head = self.vocabulary * self.width
        return 2 * ((matrices + rest - head) * tokens + head * logits)


@cache
def _counts(shape: Shape) -> tuple[int, int, int]:
    """Numbers in the matrices that a token is multiplied with, in all else it needs, and in the state."""
    layers, width, vocabulary = shape.layers, shape.width, shape.vocabulary
    if shape.family == "gpt2":  # its head is the embedding, so that it is read whole
        return 12 * layers * width**2 + vocabulary * width, 13 * layers * width + 4 * width, 0
    cls = MODELS[shape.family]
    with torch.device("meta"):
        model = cls(cls.Config.sized(vocabulary, layers, width))
        state = sum(block.att.initial_wkv().numel() + 2 * width for block in model.blocks)
    counted = {name: p.numel() for name, p in model.named_parameters() if name != "emb.weight"}
    matrices = sum(n for name, n in counted.items() if name.endswith(".weight") and "ln" not in name)
    return matrices, sum(counted.values()) - matrices, state


class Maker:
    """Makes a file or folder with random weights, in a process of its own that then gives its memory back.

    kind: "pth" (BlinkDL's names, bfloat16), "int8" or "int4" (as heronry saves them), "F16", "Q8_0" or "Q4_0" (GGUF)
    or "transformers".
    """

    def __init__(self, shape: Shape, kind: str, folder: Path):
        self.shape, self.kind, self.folder = shape, kind, folder

    def load(self) -> None:
        self.make(self.kind)

    def make(self, kind: str) -> Path:
        path = self.shape.path(kind, self.folder)
        if path.exists():
            return path
        part = path.with_name("part-" + path.name)  # whole or not at all
        if kind == "pth":
            torch.save(random_model(self.shape).to(torch.bfloat16).state_dict(), part)
        elif kind in ("int8", "int4"):
            save(quantize(load(self.make("pth")), kind), part)
        elif kind == "transformers":
            pretrained(self.shape).save_pretrained(part)
        elif kind == "F16":
            convert(self.make("pth"), part, to="gguf", dtype="float16")
        else:
            _quantize_gguf(self.make("F16"), part, kind)
        return part.rename(path)


def random_model(shape: Shape) -> Model:
    """One of ours; initialised it would be full of zeros."""
    cls = MODELS[shape.family]
    model = cls(cls.Config.sized(shape.vocabulary, shape.layers, shape.width))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln" in name and name.endswith("weight"):
                p.fill_(1)
            else:
                p.normal_(std=0.02)
    return model


def pretrained(shape: Shape) -> Any:
    """transformers' own model, with its own random weights."""
    transformers: Any = import_module("transformers")
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.width // 64
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.RwkvConfig(
        vocab_size=shape.vocabulary, num_hidden_layers=shape.layers, hidden_size=shape.width, context_length=1024
    )
    return transformers.RwkvForCausalLM(config)


def _quantize_gguf(source: Path, path: Path, kind: str) -> None:
    """By llama.cpp itself; every matrix in `kind`, where it would leave the head in more bits and be slower."""
    llama_cpp: Any = import_module("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    params.pure = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")
