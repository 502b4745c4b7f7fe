"""Language modelling: rows of token files, and the states that lanes carry from row to row.

A step reads one row per lane (or `tbptt_chunks` of them): there are `batch` lanes in each of `accumulate` backward
passes of each group of processes. A group is a single process or, with sequence_parallel, the processes that share each
row, a piece each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.batching import Batch, DocumentSampler, LaneSampler, Row, WindowSampler, collate
from ..data.mixture import Mixture, MixtureSampler, SourceSampler
from ..data.token_file import TokenFile
from ..errors import InputError, count
from ..models import LayerState, Model, Network, State
from ..models.layers import PackedLinear
from ..models.sequence_parallel import SequenceShard
from .config import Config
from .losses import sum_losses
from .tasks import Autocast, Reduce

LaneBatch = tuple[dict[int, Row], Batch]  # the rows of one forward pass by their lane, and the same as a batch
EVAL_ROWS = 64  # if the configuration does not say


def build_sampler(config: Config, file: TokenFile, lanes: int = 0) -> SourceSampler:
    """The sampler for `data.order`. Without lanes, for evaluation, no state is carried from row to row."""
    data, seed = config.data, config.run.seed
    if data.order == "carried" and lanes:
        return LaneSampler(file, data.ctx_len, lanes, seed)
    if data.order in ("documents", "carried"):
        return DocumentSampler(file, data.ctx_len, seed)
    return WindowSampler(file, data.ctx_len, seed, data.order)


class LanguageModeling:
    """Predicts the next token. See `tasks.Task`.

    Attributes:
        data: the token files.
        sampler: gives their rows by number.
        states: with carried states, that of each source in each lane of this process, where it has been read.
    """

    unit = "token"

    def __init__(self, config: Config, data: Mixture, model: Model, accelerator: Accelerator):
        """
        Raises:
            InputError: the evaluation data cannot be read, or the configuration does not fit the data, the model or the
                number of processes.
        """
        self.data, self.carries = data, config.data.order == "carried"
        self.eval_data = TokenFile(config.data.eval) if config.data.eval else None
        self.config, self.model, self.accelerator = config, model, accelerator
        self.pieces = config.run.sequence_parallel  # of each row, one per process
        self.group, self.groups = self._process_group(), accelerator.num_processes // self.pieces
        lanes = config.run.batch * config.run.accumulate * self.groups
        samplers = [build_sampler(config, file, lanes) for file in data.files]
        self.sampler: SourceSampler | MixtureSampler = samplers[0]
        if len(samplers) > 1:
            self.sampler = MixtureSampler(samplers, data.weights, config.run.seed, lanes if self.carries else 0)
        if self.sampler.shortest_row < self.pieces:
            raise InputError(
                f"{config.data.name}: the last row of {config.data.ctx_len} tokens has only "
                f"{self.sampler.shortest_row}, too few for run.sequence_parallel = {self.pieces}; change data.ctx_len"
            )
        self.rows_per_step = lanes * config.data.tbptt_chunks
        self.rows_per_epoch = self.sampler.rows_per_epoch
        if self.carries and model.initial_state().contexts:
            raise InputError(f"data.order=carried is not for {model.generation}, whose state grows: use documents")
        self.states: dict[tuple[int, int], State] = {}  # by source and lane
        self._states_before = self.states  # at the start of the current step

    def _process_group(self) -> dist.ProcessGroup | None:
        """The processes that share the rows of this one."""
        if self.pieces == 1:
            return None
        if not self.model.affine:
            raise InputError(
                f"run.sequence_parallel is not for {self.model.generation}: its output is not affine in the state"
            )
        if (n_processes := self.accelerator.num_processes) % self.pieces:
            raise InputError(
                f"run.sequence_parallel = {self.pieces} does not divide the number of processes, {n_processes}"
            )
        group: dist.ProcessGroup = dist.new_subgroups(self.pieces)[0]
        return group

    @property
    def tokenizer_file(self) -> Path | None:
        return self.data.tokenizer_file

    @property
    def notes(self) -> dict[str, Any]:
        """Those of the data; windows over texts without an end of text between them need no opening token."""
        notes = dict(self.data.notes)
        windows = self.config.data.order not in ("documents", "carried")
        if windows and not self.data.has_end_of_text:
            del notes["opening_tokens"]
        return notes

    @property
    def can_evaluate(self) -> bool:
        return self.eval_data is not None

    def describe(self) -> str:
        number = len(self.data.files)
        sources = f" in {number} sources" if number > 1 else ""
        return f"{count(self.data.n_tokens, 'token')}{sources}, rows of {self.config.data.ctx_len} tokens"

    def source_metrics(self, step: int) -> dict[str, float]:
        if not isinstance(self.sampler, MixtureSampler):
            return {}
        metrics: dict[str, float] = {}
        tokens_read = self.sampler.tokens_read(step * self.rows_per_step)
        for source, sampler, n in zip(self.config.data.sources, self.sampler.samplers, tokens_read, strict=True):
            metrics |= {f"tokens/{source.path}": n, f"epochs/{source.path}": n / sampler.tokens_per_epoch}
        return metrics

    def flops_per_unit(self, model: Network) -> int:
        """The backward pass takes twice the operations of the forward pass, or as many if the weights are frozen."""
        embedding = model.get_parameter("emb.weight")
        return forward_flops_per_token(model) * (3 if embedding.requires_grad else 2)

    def batches(self, step: int) -> Iterator[list[LaneBatch]]:
        self._states_before = self.states
        size, lanes = self.config.run.batch, self._lanes(self.accelerator.process_index)
        lanes_in_all = self.rows_per_step // self.config.data.tbptt_chunks
        first_rows = range(step * self.rows_per_step, (step + 1) * self.rows_per_step, lanes_in_all)
        for i in range(0, len(lanes), size):
            chunks = [{lane: self._row(first + lane) for lane in lanes[i : i + size]} for first in first_rows]
            yield [(rows, collate(list(rows.values()), self.group)) for rows in chunks]

    def _row(self, i: int) -> Row:
        """What this process reads of row i."""
        row = self.sampler.row(i)
        return row if self.group is None else row.piece(self.group.rank(), self.pieces)

    def _lanes(self, process: int) -> list[int]:
        """The lanes of a process, whose rows it reads completely or a piece of."""
        run, group = self.config.run, process // self.pieces
        return [(i * self.groups + group) * run.batch + row for i in range(run.accumulate) for row in range(run.batch)]

    def count_targets(self, batch: LaneBatch) -> tuple[int, int]:
        return count_in_loss(batch[1]), batch[1].targets.numel()

    def compute_loss(self, model: nn.Module, batch: LaneBatch, autocast: Autocast) -> tuple[Tensor, Tensor]:
        (rows, tensors), device = batch, self.accelerator.device
        with autocast:
            logits, state = model(tensors.inputs.to(device), self._initial_states(rows), cu_seqlens=tensors.cu_seqlens)
        logits = self._keep_final_states(rows, tensors, logits, state)
        mask = None if tensors.mask is None else tensors.mask.to(device)
        return sum_losses(logits, tensors.targets.to(device), mask, overwrite=True)

    def finish_step(self, applied: bool) -> None:
        """Keeps the states without their gradients, or goes back to those before a step that was skipped."""
        if applied:
            self.states = {key: state.detach() for key, state in self.states.items()}
        else:
            self.states = self._states_before

    def evaluate(self, model: Network, autocast: Autocast, reduce: Reduce) -> dict[str, float]:
        """The mean loss of the first rows of the evaluation data, in nats per token that counts; nan if none does."""
        assert self.eval_data is not None
        run, device, n_processes = self.config.run, self.accelerator.device, self.accelerator.num_processes
        sampler = build_sampler(self.config, self.eval_data)
        n_rows = min(run.eval_rows or EVAL_ROWS, sampler.rows_per_epoch)
        own_rows = range(self.accelerator.process_index, n_rows, n_processes)
        nats, n_counted = torch.zeros(2, dtype=torch.float64)
        with autocast:
            for i in range(math.ceil(n_rows / (n_processes * run.batch))):
                indices = own_rows[i * run.batch : (i + 1) * run.batch]
                # all processes must call a sharded model together, so one without rows reads a row that is not counted
                batch = collate([sampler.row(j) for j in indices or [0]])
                logits, _ = model(batch.inputs.to(device), cu_seqlens=batch.cu_seqlens)
                mask = None if batch.mask is None else batch.mask.to(device)
                if indices:
                    nats += sum_losses(logits, batch.targets.to(device), mask)[0].cpu()
                    n_counted += count_in_loss(batch)
        return {"eval_loss": (reduce(nats) / reduce(n_counted)).item()}

    def _initial_states(self, rows: dict[int, Row]) -> State | None:
        """The states at which the documents in these rows start; None: all start at the model's initial state."""
        if not self.carries:
            return None
        empty = self.model.initial_state()
        states = []
        for lane, row in rows.items():
            carried = self.states.get((row.source, lane)) if row.continues else None
            # with the current fingerprint, as the weights have changed since
            first = empty if carried is None else State(carried.layers, empty.fingerprint)
            if carried is not None and self.model.config.time_state:  # every process needs a gradient of it
                first = _with_zero_gradient(first, empty)
            states += [first, *[empty] * (len(row.starts) - 1)]
        return State.stack(states)

    def _keep_final_states(self, rows: dict[int, Row], batch: Batch, logits: Tensor, state: State) -> Tensor:
        """Stores the state at the end of each lane's row. Returns the logits, through which the gradients of states
        that other processes use have to flow."""
        if self.carries:
            state = state[[end - 1 for end in itertools.accumulate(len(row.starts) for row in rows.values())]]
            if isinstance(batch.cu_seqlens, SequenceShard):
                logits, state = batch.cu_seqlens.broadcast_final_state(logits, state)
            self.states = self.states | {(row.source, lane): state[i] for i, (lane, row) in enumerate(rows.items())}
        return logits

    def carried_states(self) -> State | None:
        """Those of all lanes, in order; of a mixture all those of the first source, then those of the second, ..."""
        if not self.states:
            return None
        nothing = self.model.initial_state().detach()  # in the place of a source that has not been read in a lane
        own = State.stack([self.states.get(key, nothing) for key in self._keys(self.accelerator.process_index)])
        layers = [LayerState(*(self.accelerator.gather(x.contiguous()) for x in layer)) for layer in own.layers]
        order = [key for process in range(self.accelerator.num_processes) for key in self._keys(process)]
        return State(layers, own.fingerprint)[[order.index(key) for key in sorted(set(order))]]

    def load_carried_states(self, file: Path) -> None:
        states, n_lanes = (
            State.load(file).to(self.accelerator.device),
            self.rows_per_step // self.config.data.tbptt_chunks,
        )
        keys = self._keys(self.accelerator.process_index)
        self.states = {(source, lane): states[source * n_lanes + lane] for source, lane in keys}

    def _keys(self, process: int) -> list[tuple[int, int]]:
        """The sources and lanes whose states a process carries."""
        return [(source, lane) for source in range(len(self.data.files)) for lane in self._lanes(process)]


def count_in_loss(batch: Batch) -> int:
    """The number of predictions that count in the loss."""
    return int(batch.targets.numel() if batch.mask is None else batch.mask.sum())


def forward_flops_per_token(model: nn.Module) -> int:
    """Two for every weight of a matrix, without the embeddings, which are only looked up; those of RWKV-7b's attention,
    which depend on the text before, are not counted."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    return 2 * (matrices + packed)


def _with_zero_gradient(state: State, other: State) -> State:
    """The same state, but with a gradient of zero for `other`."""
    pairs = zip(state.layers, other.layers, strict=True)
    layers = [LayerState(*(x + 0 * y for x, y in zip(*pair, strict=True))) for pair in pairs]
    return State(layers, state.fingerprint)
