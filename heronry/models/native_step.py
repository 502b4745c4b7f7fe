"""The step of a model in C++: few tokens, no gradients, one call for the whole model.

`rwkv7.cpp` is to `rwkv7.py` what a kernel is to an operator: the same numbers to float32 rounding, without the overhead
of Python and dispatching, and with every weight read once for all rows. bfloat16 matrices multiply activations rounded
to bfloat16, packed ones activations rounded to 8 bits (ops/matmul.h); everything else is float32, logits included.

The plain model is the definition: the step replaces it only while the model consists of exactly the modules, settings
and tensors that the step was built for, none of them with hooks.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from .. import build
from ..errors import InputError
from ..memory import Pool, Scratch
from ..ops import arguments, packed
from ..ops.dispatch import has_tangents
from .layers import Linear
from .state import LayerState, State

MAX_TOKENS = 64  # tokens in a call; beyond that the plain model's matrix products are as fast
MAX_CALL_TOKENS = 512  # where PyTorch has no fast products; longer inputs are read in pieces
MAX_HEAD_SIZE = 512  # the largest head that the C++ has room for
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # uint8: packed weights
PLAIN = (Tensor, nn.Parameter)  # a subclass may be anything but numbers in memory


class _Tensor(ctypes.Structure):  # Tensor in ops/matmul.h
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "scales", "dtype", "rows", "columns", "table")]


class _Call(ctypes.Structure):  # Call in native_step.h
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("model", "layers")),
        *((name, ctypes.c_int64) for name in ("layer_count", "threads", "rows", "sequences")),
        *((name, ctypes.c_int64) for name in ("channels", "attention", "heads", "hidden", "vocabulary")),
        *((name, ctypes.c_void_p) for name in ("tokens", "starts", "entering", "att_shift", "wkv", "ffn_shift")),
        ("logits", ctypes.c_void_p),
        ("last_only", ctypes.c_int64),
        ("ln_x_eps", ctypes.c_double),
        ("memory", ctypes.c_void_p),
        ("memory_size", ctypes.c_void_p),
    ]


def has_fast_matmul(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies many rows in this dtype as fast as this processor can: float16 seldom, bfloat16 with
    AVX-512 or AMX; with AVX2 alone it is 5 times slower than float32."""
    return dtype != torch.float16 and (dtype != torch.bfloat16 or build.best_level() != "avx2")


def source_path(name: str) -> Path:
    """The C++ of a model's step."""
    return Path(__file__).parent / f"{name}.cpp"


def settings(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides tensors and modules, as the eps of a norm: numbers that the C++ takes for granted."""
    own = module.__dict__
    return {name: own[name] for name in own if name[0] != "_" and name != "training"}


class NativeStep:
    """The step of one model: the addresses of its weights, and what must stay the same for them to be valid."""

    def __init__(self, model: Any):
        self.modules = list(model.modules())
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors = [x for x in tensors if type(x) in PLAIN]
        self.places = self._places()
        self.parts = [part for m in self.modules for part in (m._parameters, m._buffers, m._modules) if part]
        self.objects = list(chain.from_iterable(map(dict.values, self.parts)))
        self.hooks = [hooks for m in self.modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self.own = [m.__dict__ for m in self.modules[1:]]
        # but for Linear, whose settings only describe its weight: most modules are Linear, and this is read every step
        self.owners = [(m.__dict__, name) for m in self.modules[1:] if type(m) is not Linear for name in settings(m)]
        self.owners.append((model.__dict__, "config"))
        self.settings = [own[name] for own, name in self.owners]
        # The state returned last, while somebody holds it, and the addresses of its tensors: as a rule it is passed in
        # next, and looking at a hundred small tensors takes longer than computing the layers of a small model. One
        # tuple, replaced as a whole, because threads share the step.
        self.last_state: tuple[Callable[[], State | None], list[int]] = (lambda: None, [])
        config = model.config
        head = getattr(config, "head_size", 0)
        fits = len(tensors) == len(self.tensors) and not has_tangents(tensors)
        fits = fits and all(x.device.type == "cpu" and x.is_contiguous() and x.dtype in DTYPES for x in tensors)
        fits = fits and head <= MAX_HEAD_SIZE and model.is_unmodified()
        self.library = build.library(source_path(model.name)) if fits else None
        if self.library is None:
            return
        self.sizes = (config.n_embd, config.dim_att, head and config.dim_att // head, config.dim_ffn, config.vocab_size)
        self.layer_count = config.n_layer
        self.ln_x_eps = getattr(config, "ln_x_eps", 0.0)
        self.states, self.logits, self.scratch = Pool(), Pool(), Scratch()
        self.scratch_sizes: dict[tuple[int, int, bool], int] = {}  # bytes for so many tokens, sequences, and last_only
        every = {"remove_duplicate": False}  # a head that is the embedding has a name of its own
        named = dict(chain(model.named_parameters(**every), model.named_buffers(**every)))
        self.model = self._table(named, self.library.model_names, "")
        layers = [self._table(named, self.library.layer_names, f"blocks.{i}.") for i in range(config.n_layer)]
        self.layers = (_Tensor * (len(layers) * len(layers[0])))(*chain.from_iterable(layers))

    @staticmethod
    def _table(named: dict[str, Tensor], names: Any, prefix: str) -> Any:
        """The tensors in the order of the library's list of names; all fields are 0 for one that a layer lacks."""
        names.restype = ctypes.c_char_p
        fields = names().decode().split()
        table = (_Tensor * len(fields))()
        for place, name in enumerate(fields):
            x = named.get(prefix + name)
            if x is None:
                continue
            if x.dtype == torch.uint8:
                scales = named[prefix + name.removesuffix("weight") + "scales"]
                table[place] = _Tensor(*packed.describe(x, scales, len(x) * packed.TILE))
            else:
                columns = x.shape[-1]
                dtype = arguments.DTYPES.index(x.dtype)
                table[place] = _Tensor(x.data_ptr(), 0, dtype, x.numel() // columns, columns, 0)
        return table

    def is_current(self) -> bool:
        """Whether the model still has the modules, settings and tensors that this step was built for."""
        objects = chain.from_iterable(map(dict.values, self.parts))
        same = all(map(is_, self.objects, objects)) and next(objects, None) is None
        same = same and [own.get(name) for own, name in self.owners] == self.settings
        return same and self._places() == self.places

    def _places(self) -> tuple[list[int], bool, int]:
        """Where the tensors lie in memory, and how: `.data = ...` and `.t_()` change that in the tensors themselves."""
        tensors = self.tensors
        dense = all(map(Tensor.is_contiguous, tensors))
        return [*map(Tensor.data_ptr, tensors)], dense, sum(map(Tensor.numel, tensors))

    def is_available(self) -> bool:
        """Whether there is C++ for this model, and no hooks or replaced `forward` that it would bypass."""
        return self.library is not None and not any(self.hooks) and not any("forward" in own for own in self.own)

    def shapes(self, sequences: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of a layer's state."""
        channels, attention, heads, *_ = self.sizes
        size = attention // heads if heads else 0
        wkv = (sequences, heads, size, size) if heads else (sequences, 3, attention)
        return (sequences, channels), wkv, (sequences, channels)

    def __call__(self, tokens: Tensor, state: State, cu: Sequence[int] | None, last_only: bool) -> tuple[Tensor, State]:
        """As the model's forward: returns float32 logits and the new state."""
        batch, length = tokens.shape
        if batch * length > MAX_CALL_TOKENS:
            return self._in_pieces(tokens, state, last_only)
        tokens = tokens.to(torch.int64).contiguous()
        starts = cu or range(0, batch * length + 1, length)
        sequences = len(starts) - 1
        one = self.shapes(sequences)
        last, pointers = self.last_state
        if state is not last():
            entering = [[x.float().contiguous() for x in layer] for layer in state.layers]
            if any(x.shape != shape for layer in entering for x, shape in zip(layer, one, strict=True)):
                raise InputError("this state is damaged: its tensors do not fit the model")
            pointers = [x.data_ptr() for layer in entering for x in layer]
        count = self.layer_count
        sizes = [count * math.prod(shape) for shape in one]
        room = self.states.allocate(sum(sizes)).split(sizes)
        leaving = LayerState(*(x.view(count, *shape) for x, shape in zip(room, one, strict=True)))
        shape = (1, sequences) if cu else (batch, 1 if last_only else length)
        if cu and not last_only:
            shape = (1, length)
        logits = self.logits.allocate(math.prod(shape) * self.sizes[-1]).view(*shape, -1)
        call = _Call(
            ctypes.addressof(self.model),
            ctypes.addressof(self.layers),
            count,
            torch.get_num_threads(),
            tokens.numel(),
            sequences,
            *self.sizes,
            tokens.data_ptr(),
            ctypes.addressof(begin := (ctypes.c_int64 * len(starts))(*starts)),
            ctypes.addressof(pointer := (ctypes.c_int64 * len(pointers))(*pointers)),
            *(x.data_ptr() for x in leaving),
            logits.data_ptr(),
            last_only,
            self.ln_x_eps,
            None,
            ctypes.addressof(size := ctypes.c_int64()),
        )
        assert self.library is not None
        kind = (tokens.numel(), sequences, last_only)
        if kind not in self.scratch_sizes:
            self.library.step(ctypes.byref(call))  # without memory it only writes the size of what it needs
            self.scratch_sizes[kind] = size.value
        scratch = self.scratch.take(self.scratch_sizes[kind])
        call.memory = scratch.data_ptr()
        self.library.step(ctypes.byref(call))
        self.scratch.give_back(scratch)
        del begin, pointer  # the call has read them
        left = State.from_stacked(leaving, state.fingerprint)
        addresses = [range(x.data_ptr(), x.data_ptr() + x.nbytes, x.nbytes // count) for x in leaving]
        self.last_state = weakref.ref(left), list(chain.from_iterable(zip(*addresses, strict=True)))
        return logits, left

    def _in_pieces(self, tokens: Tensor, state: State, last_only: bool) -> tuple[Tensor, State]:
        """Splits a long input along time and carries the state from piece to piece."""
        logits: list[Tensor] = []
        for piece in tokens.split(MAX_CALL_TOKENS // len(tokens), dim=1):
            output, state = self(piece, state, None, last_only)
            logits = [output] if last_only else [*logits, output]
        return torch.cat(logits, 1), state
