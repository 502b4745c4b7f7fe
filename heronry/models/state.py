"""The whole memory of an RWKV: a few tensors per layer, the same size after ten tokens or ten million.

RWKV-7b is the exception: its attention looks back at every token, so its state also has a `Context` for each sequence,
which grows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError, show
from ..files import atomic_write

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of what is read from files
T = TypeVar("T", "LayerState", "Context")


class LayerState(NamedTuple):
    """One layer's memory for S sequences, float32."""

    att_shift: Tensor  # [S, C], the last normalised input of the time mix
    wkv: Tensor  # [S, H, N_v, N_k]; RWKV-4: [S, 3, A], the triple (a, b, p)
    ffn_shift: Tensor  # [S, C], the last normalised input of the channel mix


class Context(NamedTuple):
    """What RWKV-7b keeps of the T tokens that one sequence has read: 2 R numbers a token and layer, float32."""

    tokens: Tensor  # [T] int64
    kc: Tensor  # [L, T, R], of which its keys are computed
    vc: Tensor  # [L, T, R], of which its values are computed
    q: Tensor  # [L, D], the last query


class State:
    """The memory of S sequences after the tokens they have read. Models return new states and never modify old ones,
    so a reference is a snapshot. A state created under inference_mode must be cloned before it can be trained from.

    rows: the number of sequences; len() gives the same, but not while a model is exported for any number of them.
    fingerprint: of the model it belongs to; another model refuses it.
    texts: what each row stands for, where known; "" where not.
    contexts: of RWKV-7b, one for each row, of unequal lengths: its state grows by `bytes_per_token`. () for the others.
    """

    def __init__(
        self,
        layers: Iterable[LayerState],
        fingerprint: str,
        texts: Sequence[str] | None = None,
        contexts: Iterable[Context] = (),
    ):
        self._layers: tuple[LayerState, ...] | None = tuple(layers)
        self._stacks: LayerState | None = None
        self.rows = self._layers[0].wkv.shape[0]
        self.fingerprint = fingerprint
        self._texts = None if texts is None else tuple(texts)
        self.contexts = tuple(contexts)
        if self._texts is not None and len(self._texts) != self.rows:
            raise ValueError(f"{len(self._texts)} texts for {self.rows} rows")
        if self.contexts and len(self.contexts) != self.rows:
            raise ValueError(f"{len(self.contexts)} contexts for {self.rows} rows")

    @classmethod
    def from_stacked(cls, stacks: LayerState, fingerprint: str) -> State:
        """From tensors that hold all layers, [L, S, ...]. They are split on first access to `layers`: a decode
        loop never needs that, and splitting takes as long as a step of a small model."""
        state = cls.__new__(cls)
        state._layers, state._stacks = None, stacks
        state.rows = stacks.wkv.shape[1]
        state.fingerprint, state._texts, state.contexts = fingerprint, None, ()
        return state

    @property
    def texts(self) -> tuple[str, ...]:
        return ("",) * self.rows if self._texts is None else self._texts

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """One LayerState per layer."""
        if self._layers is None:
            assert self._stacks is not None
            self._layers = tuple(map(LayerState, *(x.unbind(0) for x in self._stacks)))
        return self._layers

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which would write all layers for each of them where they are views of one tensor."""
        return self.compact().__dict__

    def __repr__(self) -> str:
        size = f"{self.nbytes / 1e6:.3g} MB"
        if self.contexts:
            lengths = ", ".join(str(len(context.tokens)) for context in self.contexts)
            size += f" after {lengths} tokens, growing by {self.bytes_per_token:,} bytes a token"
        return f"State({self.rows} rows, {len(self.layers)} layers, {size})"

    def __len__(self) -> int:
        """The number of sequences (rows)."""
        return self.rows

    def __getitem__(self, rows: int | slice | Sequence[int]) -> State:
        """Some of the rows, as a State; state[i] has one row."""
        if isinstance(rows, slice):
            picked = list(range(len(self)))[rows]
        else:
            numbers = [rows] if isinstance(rows, int) else list(rows)
            if any(isinstance(i, bool) or getattr(i, "dtype", None) == torch.bool for i in numbers):
                raise TypeError("rows are picked by number, not by a mask")
            picked = [range(len(self))[i] for i in numbers]
        texts = None if self._texts is None else [self._texts[i] for i in picked]
        if self._stacks is not None and texts is None:
            index = torch.tensor(picked, device=self._stacks.wkv.device)
            return State.from_stacked(LayerState(*(x.index_select(1, index) for x in self._stacks)), self.fingerprint)
        layers = (LayerState(*(x[picked] for x in layer)) for layer in self.layers)
        contexts = [self.contexts[i] for i in picked] if self.contexts else ()
        return State(layers, self.fingerprint, texts, contexts)

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """Concatenates the rows of several states of one model."""
        if not states:
            raise ValueError("nothing to stack")
        if len({state.fingerprint for state in states}) > 1:
            raise InputError("these states belong to different models and cannot be stacked")
        layers = (
            LayerState(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
            for rows in zip(*(state.layers for state in states), strict=True)
        )
        texts = [text for state in states for text in state.texts]
        contexts = [context for state in states for context in state.contexts]
        return State(layers, states[0].fingerprint, texts, contexts)

    def tensors(self) -> Iterator[Tensor]:
        """Those that hold a row each of all sequences, [S, ...], layer by layer; the contexts of RWKV-7b apart."""
        return chain.from_iterable(self.layers)

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        layers = (LayerState(*(change(x) for x in layer)) for layer in self.layers)
        contexts = (Context(*(change(x) for x in context)) for context in self.contexts)
        return State(layers, self.fingerprint, self._texts, contexts)

    def clone(self) -> State:
        """A copy with memory of its own."""
        return self._map(torch.clone)

    def compact(self) -> State:
        """The same numbers, in no more memory than they need: what is part of a larger tensor is copied."""
        return self._map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)

    def detach(self) -> State:
        """The same tensors without a gradient history."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self._map(lambda x: x.to(device))

    def with_texts(self, texts: Sequence[str]) -> State:
        """The same rows with other texts."""
        return State(self.layers, self.fingerprint, texts, self.contexts)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for part in (*self.layers, *self.contexts) for x in part)

    @property
    def bytes_per_token(self) -> int:
        """By how much a row grows with every token that it reads: 0, but for RWKV-7b."""
        if not self.contexts:
            return 0
        tokens, kc, vc, _ = self.contexts[0]
        return tokens.itemsize + sum(x.shape[0] * x.shape[2] * x.itemsize for x in (kc, vc))

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU: `blocks.i.{att_shift,wkv,ffn_shift}`, and for RWKV-7b
        `rows.i.{tokens,kc,vc,q}`."""
        parts = [(f"blocks.{i}", layer._asdict()) for i, layer in enumerate(self.layers)]
        parts += [(f"rows.{i}", context._asdict()) for i, context in enumerate(self.contexts)]
        return {f"{part}.{name}": x.detach().cpu().contiguous() for part, fields in parts for name, x in fields.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], fingerprint: str, texts: Any) -> State:
        """Undoes `to_tensors`.

        Raises:
            ValueError: the tensors are not those of a state or contain NaN or infinity, or texts is no list of as many
                texts as there are rows.
        """

        def parts(prefix: str, kind: type[T]) -> list[T]:
            count = len({name.split(".")[1] for name in tensors if name.startswith(prefix)})
            names = [[f"{prefix}{i}.{name}" for name in kind._fields] for i in range(count)]
            expected.update(name for part in names for name in part)
            return [kind(*(tensors.get(name, nothing) for name in part)) for part in names]

        expected: set[str] = set()
        nothing = torch.empty(0)
        layers, contexts = parts("blocks.", LayerState), parts("rows.", Context)
        if not layers or expected != tensors.keys():
            raise ValueError("its tensors are not those of a state")
        rows = len(layers[0].wkv) if layers[0].wkv.ndim else 0
        for name, x in tensors.items():
            is_row = name.startswith("rows.")  # at whose shapes the model looks when it is given the state
            if not is_row and (x.dtype not in DTYPES or x.ndim < 2 or len(x) != rows):
                dtype = str(x.dtype).removeprefix("torch.")
                raise ValueError(f"{name} is {dtype} {list(x.shape)}, which is no part of a state of {rows} rows")
            if x.dtype in DTYPES and not x.isfinite().all():
                raise ValueError(f"{name} contains NaN or infinity")
        if not isinstance(texts, list) or len(texts) != rows or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"its texts are {show(texts)}, not those of {rows} rows")
        return State(layers, fingerprint, texts, contexts)

    def _metadata(self) -> dict[str, str]:
        return {"format": "heronry.state", "fingerprint": self.fingerprint, "texts": json.dumps(self.texts)}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (atomically): `to_tensors`, fingerprint and texts."""
        with atomic_write(Path(path).expanduser()) as part:
            safetensors.torch.save_file(self.to_tensors(), part, metadata=self._metadata())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return safetensors.torch.save(self.to_tensors(), metadata=self._metadata())

    @staticmethod
    def is_saved_state(path: str | Path) -> bool:
        """Whether the file was written by `save`."""
        try:
            with safe_open(Path(path).expanduser(), "pt") as file:
                return (file.metadata() or {}).get("format") == "heronry.state"
        except (SafetensorError, OSError):
            return False

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> State:
        """Reads what `save` wrote. The model checks the fingerprint when it is given the state."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such state file")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                names = file.keys()
                return State._from_saved(file.metadata(), lambda: {name: file.get_tensor(name) for name in names})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged or truncated state file ({error})") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @staticmethod
    def from_bytes(data: bytes) -> State:
        """Undoes `to_bytes`; the bytes may come from anywhere.

        Raises:
            InputError: they are no state, or a damaged one.
        """
        try:
            tensors = safetensors.torch.load(data)  # which checks the header
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except (SafetensorError, ValueError, LookupError, RecursionError) as error:
            raise InputError(f"damaged or truncated state file ({error})") from error
        return State._from_saved(header.get("__metadata__"), lambda: tensors)

    @staticmethod
    def _from_saved(about: Mapping[str, str] | None, read: Callable[[], Mapping[str, Tensor]]) -> State:
        """From what stands in a safetensors file: metadata, and a function that reads the tensors."""
        if about is None or about.get("format") != "heronry.state":
            raise InputError("not a heronry state file")
        try:
            return State.from_tensors(read(), about["fingerprint"], json.loads(about["texts"]))
        except (ValueError, LookupError, RecursionError) as error:
            raise InputError(f"damaged or truncated state file ({error})") from error
