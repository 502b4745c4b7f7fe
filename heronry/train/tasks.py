"""What a process reads in a step, and the states that its lanes carry from row to row.

A step reads as many rows side by side as there are lanes: `batch` of them in each of `accumulate` passes of each group
of processes. A group is one process, or with sequence_parallel the neighbours that share each row, a piece of it each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ..data.batching import Batch, DocumentSampler, LaneSampler, Row, WindowSampler, collate
from ..data.token_file import TokenFile
from ..errors import InputError
from ..models import LayerState, Model, State
from ..models.layers import PackedLinear
from ..models.sequence_parallel import SequenceShard
from .config import Config
from .losses import losses

Chunk = tuple[dict[int, Row], Batch]  # what the model reads at once: a batch, also as rows by their lane
ROWS_MEASURED = 64  # where the configuration does not say


def sampler(config: Config, file: TokenFile, lanes: int = 0) -> DocumentSampler | LaneSampler | WindowSampler:
    """Without lanes, for measuring, documents begin anew in every row."""
    told, seed = config.data, config.run.seed
    if told.order == "carried" and lanes:
        return LaneSampler(file, told.ctx_len, lanes, seed)
    if told.order in ("documents", "carried"):
        return DocumentSampler(file, told.ctx_len, seed)
    return WindowSampler(file, told.ctx_len, seed, told.order)


class Passes:
    """Of one process. Every attribute but `states` is made once.

    Attributes:
        data: the token file.
        a_step: rows that all processes together read in a step.
        states: where they are carried, that of each lane of this process.
    """

    unit = "token"

    def __init__(self, config: Config, file: TokenFile, model: Model, accelerator: Accelerator):
        self.data = file
        self.measured = TokenFile(config.data.eval) if config.data.eval else None
        self.config, self.model, self.accelerator = config, model, accelerator
        self.pieces = config.run.sequence_parallel  # of each row, one a process
        self.group, self.groups = self._group(), accelerator.num_processes // self.pieces
        lanes = config.run.batch * config.run.accumulate * self.groups
        self.rows = sampler(config, file, lanes)
        if self.rows.shortest_row < self.pieces:
            raise InputError(
                f"{config.data.train}: its last row of {config.data.ctx_len} tokens has {self.rows.shortest_row}, "
                f"too few for run.sequence_parallel = {self.pieces}; give another data.ctx_len"
            )
        self.a_step = lanes * config.data.tbptt_chunks
        self.states: dict[int, State] = {}

    def _group(self) -> dist.ProcessGroup | None:
        """The processes that this one shares its rows with."""
        if self.pieces == 1:
            return None
        if not self.model.affine:
            raise InputError(
                f"run.sequence_parallel is not for {self.model.name}: what it reads of its state does not add up"
            )
        if (number := self.accelerator.num_processes) % self.pieces:
            raise InputError(f"run.sequence_parallel = {self.pieces} does not divide the number of processes, {number}")
        return dist.new_subgroups(self.pieces)[0]

    def of(self, step: int) -> Iterator[list[Chunk]]:
        """Those of a step: what one backward pass goes through, one batch after the other, each also as rows by their
        lane."""
        size, mine = self.config.run.batch, self._lanes(self.accelerator.process_index)
        begins = range(step * self.a_step, (step + 1) * self.a_step, self.a_step // self.config.data.tbptt_chunks)
        for i in range(0, len(mine), size):
            chunks = [{lane: self._row(begin + lane) for lane in mine[i : i + size]} for begin in begins]
            yield [(rows, collate(list(rows.values()), self.group)) for rows in chunks]

    def _row(self, i: int) -> Row:
        """What this process has of a row."""
        row = self.rows.row(i)
        return row if self.group is None else row.piece(self.group.rank(), self.pieces)

    def _lanes(self, process: int) -> list[int]:
        """Which rows of those that a step reads side by side are a process's, whole or a piece of each."""
        told, group = self.config.run, process // self.pieces
        return [
            (i * self.groups + group) * told.batch + row for i in range(told.accumulate) for row in range(told.batch)
        ]

    def told(self) -> str:
        """What is read, for the first line of the log."""
        return f"{len(self.data.tokens) / 1e6:.1f} M tokens, rows of {self.config.data.ctx_len} tokens"

    @property
    def tokenizer_file(self) -> Path | None:
        return self.data.tokenizer_file

    @property
    def notes(self) -> dict[str, Any]:
        """For the model's config.json. Windows over texts without marks between them have no opening."""
        notes = dict(self.data.notes)
        if self.config.data.order not in ("documents", "carried") and self.data.metadata.get("end_of_text") is None:
            del notes["opening_tokens"]
        return notes

    def flops(self, model: Model) -> int:
        """Operations of a token's way forward and back: once forward, twice backward; frozen weights have no gradient
        of their own."""
        return flops_a_token(model) * (3 if model.emb.weight.requires_grad else 2)

    def size(self, chunk: Chunk) -> tuple[int, int]:
        """Of a batch: predictions that count in the loss, and all."""
        return counted(chunk[1]), chunk[1].targets.numel()

    def losses(self, model: Any, chunk: Chunk, autocast: AbstractContextManager) -> tuple[Tensor, Tensor]:
        """What a batch loses, and what L2Wrap pulls at: sums as in losses.py."""
        (rows, batch), device = chunk, self.accelerator.device
        with autocast:
            entering = self.enter(rows)
            logits, state = model(batch.inputs.to(device), entering, cu_seqlens=batch.cu_seqlens)
        logits = self.leave(rows, batch, logits, state)
        return losses(logits, batch.targets.to(device), None if batch.mask is None else batch.mask.to(device))

    def measure(self, model: Model, autocast: AbstractContextManager, add: Callable[[Tensor], Tensor]) -> dict:
        """The mean loss of the measured data, its first rows in order, in nats a token that counts. `add` sums over all
        processes."""
        assert self.measured is not None
        told, device = self.config.run, self.accelerator.device
        rows = sampler(self.config, self.measured)
        number, size = min(told.eval_rows or ROWS_MEASURED, rows.rows_per_epoch), told.batch
        mine = range(self.accelerator.process_index, number, self.accelerator.num_processes)
        nats, all_counted = torch.zeros(2, dtype=torch.float64)
        with autocast:
            for i in range(math.ceil(number / (self.accelerator.num_processes * size))):
                numbers = mine[i * size : (i + 1) * size]
                # a model in pieces is called by all together, so that who has no row left takes one that is not counted
                batch = collate([rows.row(j) for j in numbers or [0]])
                logits, _ = model(batch.inputs.to(device), cu_seqlens=batch.cu_seqlens)
                mask = None if batch.mask is None else batch.mask.to(device)
                if numbers:
                    nats += losses(logits, batch.targets.to(device), mask)[0].cpu()
                    all_counted += counted(batch)
        return {"eval_loss": (add(nats) / add(all_counted).clamp_min(1)).item()}

    def enter(self, rows: dict[int, Row]) -> State | None:
        """The states that these rows begin from: one for each document in them."""
        if not isinstance(self.rows, LaneSampler):
            return None
        empty = self.model.initial_state()
        states = []
        for lane, row in rows.items():
            carried = self.states.get(lane) if row.continues else None
            # under the fingerprint of today, for the weights have moved
            first = empty if carried is None else State(carried.layers, empty.fingerprint)
            if carried is not None and self.model.config.time_state:  # every process must have a gradient of it
                first = _with_no_share(first, empty)
            states += [first, *[empty] * (len(row.starts) - 1)]
        return State.stack(states)

    def leave(self, rows: dict[int, Row], batch: Batch, logits: Tensor, state: State) -> Tensor:
        """Keeps the state that each lane ends with. The logits as they are."""
        if isinstance(self.rows, LaneSampler):
            state = state[[end - 1 for end in itertools.accumulate(len(row.starts) for row in rows.values())]]
            if isinstance(batch.cu_seqlens, SequenceShard):
                logits, state = batch.cu_seqlens.broadcast_final_state(logits, state)
            self.states = self.states | {lane: state[i] for i, lane in enumerate(rows)}
        return logits

    def carried(self) -> State | None:
        """The states of all lanes of all processes."""
        if not self.states:
            return None
        own = State.stack([self.states[lane] for lane in self._lanes(self.accelerator.process_index)])
        layers = [LayerState(*(self.accelerator.gather(x.contiguous()) for x in layer)) for layer in own.layers]
        order = [lane for process in range(self.accelerator.num_processes) for lane in self._lanes(process)]
        return State(layers, own.fingerprint)[[order.index(lane) for lane in range(len(order) // self.pieces)]]

    def restore(self, file: Path) -> None:
        """Takes this process's of the states in a file of `carried`."""
        states = State.load(file).to(self.accelerator.device)
        self.states = {lane: states[lane] for lane in self._lanes(self.accelerator.process_index)}


def counted(batch: Batch) -> int:
    """Predictions that count in the loss."""
    return int(batch.targets.numel() if batch.mask is None else batch.mask.sum())


def flops_a_token(model: Model) -> int:
    """Of the forward pass: two for every weight of a matrix, the embedding apart, which is only looked up."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "emb.weight")
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    return 2 * (matrices + packed)


def _with_no_share(state: State, of: State) -> State:
    """The state, whose gradient reaches the other one as zeros."""
    pairs = zip(state.layers, of.layers, strict=True)
    layers = [LayerState(*(x + 0 * y for x, y in zip(*pair, strict=True))) for pair in pairs]
    return State(layers, state.fingerprint)
