"""The peers: PyPI's rwkv, transformers' RWKV-4 and GPT-2, llama.cpp; imported when a worker starts."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contestants import Job, Training
from .shapes import Shape, transformers_model


class PypiRwkv:
    """PyPI's rwkv, in its faster setting (TorchScript)."""

    package, module = "rwkv", "rwkv"

    def __init__(self, file: Path, format: str, shape: Shape):
        os.environ["RWKV_JIT_ON"] = "1"
        if shape.family == "rwkv7":
            os.environ["RWKV_V7_ON"] = "1"
        self.model_class: Any = import_module("rwkv.model").RWKV
        self.file, self.vocab_size = file, shape.vocab_size
        self.strategy = {"float32": "cpu fp32", "bfloat16": "cpu bf16"}[format]

    def load(self) -> None:
        self.model = self.model_class(model=str(self.file.with_suffix("")), strategy=self.strategy)

    def decode(self, tokens: int) -> Job:
        steps = torch.randint(self.vocab_size, (tokens,)).tolist()
        state = None

        def job() -> None:
            nonlocal state
            for token in steps:
                _, state = self.model.forward([token], state)

        return job

    def prefill(self, tokens: int) -> Job:
        prompt = torch.randint(self.vocab_size, (tokens,)).tolist()
        return lambda: self.model.forward(prompt, None)


class Transformers:
    """RWKV-4 or GPT-2 in transformers."""

    package, module = "transformers", "transformers"

    def __init__(self, file: Path, format: str, shape: Shape):
        transformers: Any = import_module("transformers")
        self.model_class = transformers.GPT2LMHeadModel if shape.family == "gpt2" else transformers.RwkvForCausalLM
        self.file, self.dtype, self.vocab_size = file, getattr(torch, format), shape.vocab_size

    def load(self) -> None:
        self.model = self.model_class.from_pretrained(self.file, dtype=self.dtype).eval()

    def decode(self, tokens: int, position: int = 0) -> Job:
        """Steps of one token: RWKV continues from the previous block, GPT-2 starts after `position` each time."""
        steps = torch.randint(self.vocab_size, (tokens, 1, 1))
        if position:
            return self._decode_at(position, steps)
        state = None

        @torch.inference_mode()
        def job() -> None:
            nonlocal state
            for step in steps:
                state = self.model(step, state=state, use_cache=True).state

        return job

    def _decode_at(self, position: int, steps: Tensor) -> Job:
        with torch.inference_mode():
            text = torch.randint(self.vocab_size, (1, position))
            cache = self.model(text, use_cache=True, logits_to_keep=1).past_key_values

        @torch.inference_mode()
        def job() -> None:
            for step in steps:
                self.model(step, past_key_values=cache, use_cache=True)
            cache.crop(-len(steps))

        return job

    def prefill(self, tokens: int) -> Job:
        prompt = torch.randint(self.vocab_size, (1, tokens))

        @torch.inference_mode()
        def job() -> None:
            self.model(prompt, use_cache=True, logits_to_keep=1)

        return job


class TransformersTraining(Training):
    """A new RWKV-4 or GPT-2 of transformers in training."""

    package, module = "transformers", "transformers"

    def load(self) -> None:
        self.model = transformers_model(self.shape).train()

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


class LlamaCpp:
    """llama.cpp through the bindings of its C API, used as its own tools use it."""

    package, module = "llama-cpp-python", "llama_cpp"
    needs_torch = False

    def __init__(self, file: Path, format: str, shape: Shape):
        self.api: Any = import_module("llama_cpp")
        self.file, self.vocab_size = file, shape.vocab_size
        self.api.llama_backend_init()

    def load(self) -> None:
        params = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(str(self.file).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {self.file.name}")

    def _context(self, tokens: int, sequences: int) -> Any:
        """A context for batches of `tokens`, with as many threads as PyTorch."""
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max(2048, tokens), tokens, tokens
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp could not create a context")
        return context

    def _batch(self, tokens: list[int], sequences: int) -> Any:
        """A batch of one token in each of many sequences, or of the tokens of one; asks for the last logits."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.n_seq_id[i] = token, 1
            batch.pos[i], batch.seq_id[i][0] = (0, i) if sequences > 1 else (i, 0)
            batch.logits[i] = sequences > 1 or i == len(tokens) - 1
        return batch

    def _run(self, context: Any, batch: Any) -> None:
        """Process a batch and wait for its last logits."""
        if self.api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode a batch")
        self.api.llama_get_logits_ith(context, batch.n_tokens - 1)  # waits for the result

    def decode(self, tokens: int, sequences: int = 1) -> Job:
        context = self._context(max(sequences, 32), sequences)
        batches = [self._batch(row, sequences) for row in torch.randint(self.vocab_size, (tokens, sequences)).tolist()]
        position = 0

        def job() -> None:
            nonlocal position
            for batch in batches:
                for i in range(sequences):
                    batch.pos[i] = position
                position += 1
                self._run(context, batch)

        return job

    def prefill(self, tokens: int) -> Job:
        context = self._context(tokens, 1)
        batch = self._batch(torch.randint(self.vocab_size, (tokens,)).tolist(), 1)

        def job() -> None:
            self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
            self._run(context, batch)

        return job
