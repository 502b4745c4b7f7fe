"""The contestants from this package: a model in one of its formats, a model in training, an operator by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint import load
from ..models import Model
from ..ops.biwkv import biwkv
from ..ops.biwkv6 import biwkv6
from ..ops.wkv4 import wkv4
from ..ops.wkv5 import wkv5
from ..ops.wkv6 import wkv6
from ..ops.wkv7 import wkv7
from .shapes import Shape, random_model

OPERATORS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (wkv4, wkv5, wkv6, wkv7, biwkv, biwkv6)}

Job = Callable[[], object]  # what is timed; a method of a contestant returns it


class Heronry:
    """A model of this package.

    Args:
        file: its checkpoint.
        format: the dtype to load it in, or "int8" or "int4" if it was quantized to that.
    """

    model: Model

    def __init__(self, file: Path, format: str):
        self.file = file
        self.dtype = format if format.startswith(("float", "bfloat")) else None

    def load(self) -> None:
        self.model = load(self.file, self.dtype)

    def decode(self, tokens: int, sequences: int = 1) -> Job:
        """Steps of one token in each of `sequences`, continuing from the previous block."""
        steps = torch.randint(self.model.config.vocab_size, (tokens, sequences, 1))
        state = None

        @torch.inference_mode()
        def job() -> None:
            nonlocal state
            for step in steps:
                _, state = self.model(step, state)

        return job

    def prefill(self, tokens: int) -> Job:
        """A prompt up to its last logits."""
        prompt = torch.randint(self.model.config.vocab_size, (1, tokens))

        @torch.inference_mode()
        def job() -> None:
            self.model(prompt, last_only=True)

        return job


class Training:
    """A new model of this package in training, with float32 parameters."""

    model: torch.nn.Module

    def __init__(self, shape: Shape):
        self.shape = shape

    def load(self) -> None:
        self.model = random_model(self.shape)

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V] for tokens [B, T]."""
        logits: Tensor = self.model(tokens)[0]
        return logits

    def step(self, batch: int, tokens: int, dtype: str) -> Job:
        """Forward and backward of a batch; dtype "bfloat16" means autocast."""
        text = torch.randint(self.shape.vocab_size, (batch, tokens + 1))

        def job() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = self.logits(text[:, :-1])
            torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten()))
            self.model.zero_grad()

        return job


class Operator:
    """One of wkv4 to wkv7 over a batch of sequences, or biwkv or biwkv6 over a batch of pictures, with heads of 64.

    Args:
        name: of the operator in heronry.ops.
        width: channels.
        dtype: of r, k and v, as the models pass them; RWKV-4 and Vision-RWKV pass everything in float32.
    """

    def __init__(self, name: str, batch: int, tokens: int, width: int, dtype: str):
        self.name, self.batch, self.tokens, self.width = name, batch, tokens, width
        self.dtype = getattr(torch, dtype)

    def load(self) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape)

        batch, tokens, width, heads = self.batch, self.tokens, self.width, self.width // 64
        if self.name == "wkv4":
            self.inputs = [
                -normal(width).exp(),
                normal(batch, tokens, width),
                normal(batch, tokens, width),
                normal(width),
            ]
            return
        if self.name == "biwkv":  # its decays are relative to the number of tokens
            k, v = normal(batch, tokens, width), normal(batch, tokens, width)
            self.inputs = [torch.linspace(5, -3, width) / tokens, k, v, normal(width) / tokens]
            return
        r, k, v, a, b = (normal(batch, tokens, heads, 64).to(self.dtype) for _ in range(5))
        if self.name == "wkv7":
            kappa = F.normalize(a.float(), dim=-1)
            self.inputs = [r, -0.6 * torch.sigmoid(b.float()), k, v, -kappa, kappa * torch.sigmoid(b)]
        else:
            log_w = -normal(heads, 64).exp() if self.name == "wkv5" else -normal(batch, tokens, heads, 64).exp()
            self.inputs = [r, log_w, k, v, normal(heads, 64)]

    def forward(self, impl: str, times: int = 1) -> Job:
        """The forward pass, `times` in a row; impl: "reference", "chunked", "cpu" or "auto"."""
        operator = OPERATORS[self.name]

        @torch.inference_mode()
        def job() -> None:
            for _ in range(times):
                operator(*self.inputs, impl=impl)

        return job

    def backward(self, impl: str, times: int = 1) -> Job:
        """Forward and backward, `times` in a row."""
        operator = OPERATORS[self.name]
        inputs = [x.clone().requires_grad_() for x in self.inputs]

        def job() -> None:
            for _ in range(times):
                out = operator(*inputs, impl=impl)
                y = out[0] if isinstance(out, tuple) else out  # without the state
                torch.autograd.grad(y.sum(), inputs)

        return job
