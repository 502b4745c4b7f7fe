"""The training loop: the same on one processor and, through accelerate, on many.

A step reads `accumulate` batches of rows on every process, averages the loss over all tokens that count in all of
them, and moves the weights once. Rows are found by their number (sampling.py), so that a run that goes on from a
checkpoint reads exactly what is left. On a CPU in float32 its losses are to the bit those of a run never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import load, save, save_time_state
from ..errors import InputError
from ..models import MODELS, LayerState, Model, State
from ..models.native import fast_in_torch
from . import keeping, shards
from .config import Config
from .journal import Journal
from .optim import losses, optimizer, rate, set_rate
from .sampling import Batch, Documents, Lanes, Row, Windows, collate
from .tokens import TokenFile

Sample = Callable[[Model, str], str]  # what a model writes after a prompt
PATIENCE = 20  # steps in a row without finite gradients before the run gives up


class Stopped(Exception):
    """Ctrl-C: what was reached is kept."""


class Run:
    """One run: everything that is made once."""

    def __init__(self, config: Config, quiet: bool = False):
        self.config = config
        self.sample: Sample | None = None  # who can turn ids into text puts it here
        self.out = Path(config.run.out).expanduser()
        self.data = TokenFile(config.data.train)
        self.measured = TokenFile(config.data.eval) if config.data.eval else None
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.precision = self._precision()
        set_seed(config.run.seed)
        self.plain = self._placed()
        lanes = config.run.batch * config.run.accumulate * self.accelerator.num_processes
        self.rows = self._sampler(self.data, lanes)
        self.a_step = lanes * config.data.through  # rows
        self.states: dict[int, State] = {}  # of each lane of this process, where they are carried
        self.steps = config.run.steps or math.ceil(config.run.epochs * self.rows.rows_an_epoch / self.a_step)
        self.optimizer = optimizer(self.plain, config.optim)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.waiting: list[float] = []  # losses that no line of the log tells yet
        self._find()
        self.plain.gradient_checkpointing = config.run.checkpointing
        self.model: Any = torch.compile(self.plain) if config.run.compile else self.plain
        if not self.plain.sharded:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.journal = Journal(self, quiet or not self.accelerator.is_main_process)

    def _placed(self) -> Model:
        """The model on the device of this process, or in pieces on those of all."""
        kind, device = self.config.run.shard, self.accelerator.device
        if kind == "none" or self.accelerator.num_processes == 1:
            return self._model().to(device).train()
        model = self._model("cpu" if self.accelerator.is_main_process else "meta")
        return shards.shard(model, kind, device).train()

    def _model(self, device: str = "cpu") -> Model:
        """On the meta device it has no numbers."""
        told, vocabulary = self.config.model, self.data.vocab_size
        wide = torch.float64 if self.precision == "float64" else torch.float32
        if told.path:
            model = load(told.path, wide, device)
            if model.quantization is not None:
                raise InputError(f"{told.path}: is quantised, and packed weights cannot be trained")
            if told.tune == "state":
                model.tune_state()
        else:
            cls = MODELS[told.generation]
            size = told.vocab_size or -(-vocabulary // 64) * 64
            with torch.device(device):
                model = cls(cls.Config.sized(size, told.n_layer, told.n_embd))
            if device != "meta":
                model.init_weights()
        if model.config.vocab_size < vocabulary:
            raise InputError(
                f"{self.config.data.train}: has token ids up to {vocabulary - 1}, the model's vocabulary ends at "
                f"{model.config.vocab_size - 1}"
            )
        return model.to(wide)

    def _precision(self) -> str:
        """Of the activations."""
        if self.config.run.precision != "auto":
            return self.config.run.precision
        fast = self.accelerator.device.type != "cpu" or fast_in_torch(torch.bfloat16)
        return "bfloat16" if fast else "float32"

    def _sampler(self, file: TokenFile, lanes: int = 0) -> Documents | Lanes | Windows:
        """Without lanes, for measuring, documents begin anew in every row."""
        told, seed = self.config.data, self.config.run.seed
        if told.order == "carried" and lanes:
            return Lanes(file, told.ctx_len, lanes, seed)
        if told.order in ("documents", "carried"):
            return Documents(file, told.ctx_len, seed)
        return Windows(file, told.ctx_len, seed, told.order)

    @property
    def notes(self) -> dict[str, Any]:
        """For the model's config.json. Windows over texts without marks between them have no opening."""
        notes = dict(self.data.notes)
        if self.config.data.order not in ("documents", "carried") and self.data.about.get("end_of_text") is None:
            del notes["opening_tokens"]
        return notes

    # ---- going on ------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _find(self) -> None:
        """Goes to where the newest good checkpoint was, if there is one."""
        found = keeping.newest(self.checkpoints)
        if found is None:
            if any((self.out / name).exists() for name in ("model.safetensors", keeping.TUNED)):
                raise InputError(f"{self.out}: holds a model already; give another run.out")
            return
        path, standing = found
        mine = self._decisive()
        for key, value in standing["config"].items():
            if key in mine and mine[key] != value:
                raise InputError(
                    f"{path}: was made with {key} = {value!r}, not {mine[key]!r}; give another run.out to begin anew"
                )
        keeping.restore(path, self.plain, self.optimizer)
        self.step, self.tokens, self.seconds = (standing[name] for name in ("step", "tokens", "seconds"))
        self.waiting.extend(standing["waiting"])
        if (path / keeping.CARRIED).exists():
            states = State.load(path / keeping.CARRIED).to(self.accelerator.device)
            self.states = {lane: states[lane] for lane in self._lanes(self.accelerator.process_index)}

    def _decisive(self) -> dict[str, Any]:
        """The settings that a run cannot change on its way, for its losses would no longer be those of one run."""
        told = dataclasses.asdict(self.config)
        settings = {f"{name}.{key}": value for name in ("model", "data", "optim") for key, value in told[name].items()}
        settings |= {"run.precision": self.precision, "run.seed": self.config.run.seed, "rows in a step": self.a_step}
        settings.pop("data.eval")
        return json.loads(json.dumps(settings))

    def _carried(self) -> State | None:
        """The states of all lanes of all processes."""
        if not self.states:
            return None
        own = State.stack([self.states[lane] for lane in self._lanes(self.accelerator.process_index)])
        layers = [LayerState(*(self.accelerator.gather(x.contiguous()) for x in layer)) for layer in own.layers]
        order = [lane for process in range(self.accelerator.num_processes) for lane in self._lanes(process)]
        return State(layers, own.fingerprint)[[order.index(lane) for lane in range(len(order))]]

    def keep(self) -> None:
        """Writes a checkpoint. Where the disk is full the run goes on with the last one, and says so."""
        carried = self._carried()
        if self.accelerator.is_main_process or self.plain.sharded:
            standing = {"tokens": self.tokens, "seconds": self.seconds, "waiting": self.waiting}
            standing["config"] = self._decisive()
            most, about = self.config.run.keep, (self.data.tokenizer_file, self.notes)
            try:
                keeping.keep(self.checkpoints, self.step, self.plain, self.optimizer, standing, most, *about, carried)
            except OSError as error:
                self.journal.say(f"no checkpoint at step {self.step}: {error}")
        self.accelerator.wait_for_everyone()

    # ---- the loop ------------------------------------------------------------------------------------------------

    def __call__(self) -> Model:
        """Trains to the end, or until Ctrl-C; the model, also saved in `run.out`."""
        told = self.config.run
        last_kept, bad = time.monotonic(), 0
        with interruptible() as stop, self.journal:
            while self.step < self.steps:
                began = time.perf_counter()
                loss, norm = self.take_step()
                self.seconds += time.perf_counter() - began
                bad = 0 if math.isfinite(norm) else bad + 1
                if bad == PATIENCE:
                    raise InputError(f"{PATIENCE} steps in a row had no finite gradients; lower optim.lr")
                self.journal.step(loss, norm)
                end = self.step == self.steps
                if self.measured and (end or (told.eval_every and self.step % told.eval_every == 0)):
                    self.journal.measure(self.evaluate())
                if self.sample and told.sample_every and (end or self.step % told.sample_every == 0):
                    self.journal.text(self.write())
                due = told.save_every and self.step % told.save_every == 0
                late = self._anybody(time.monotonic() - last_kept > 60 * told.save_minutes)
                stopping = self._anybody(stop.is_set())
                if due or late or end or stopping:
                    self.keep()
                    last_kept = time.monotonic()
                if stopping:
                    raise Stopped(f"kept at step {self.step} of {self.steps}; the same command goes on from here")
        model = self._whole()
        if self.accelerator.is_main_process:
            self._save(model)
        return self.plain.eval()

    def _whole(self) -> Model:
        """The model; that of pieces is put together on the CPU of the main process, and elsewhere has no numbers."""
        if not self.plain.sharded:
            return self.plain
        model, numbers = self._model("meta"), shards.gathered(self.plain)
        model.load_state_dict(numbers, assign=True, strict=bool(numbers))
        return model

    def _save(self, model: Model) -> None:
        """What the run was for."""
        try:
            if model.state_tuning:
                save_time_state(model, self.out / keeping.TUNED, self.notes)
            else:
                save(model, self.out, self.data.tokenizer_file, self.notes)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.out}: cannot be written ({error}); the same command goes on") from error

    def take_step(self) -> tuple[float, float]:
        """One move of the weights: the mean loss in nats of a token that counts, and the norm of the gradients. Where
        that is not finite the weights stay what they are."""
        told, device = self.config, self.accelerator.device
        passes, entered = list(self._passes()), self.states
        batches = [[collate(list(rows.values())) for rows in chunks] for chunks in passes]
        counted = self._sum(torch.tensor(float(sum(_counted(batch) for some in batches for batch in some))))
        positions = self._sum(torch.tensor(float(sum(batch.targets.numel() for some in batches for batch in some))))
        set_rate(self.optimizer, rate(self.step, self.steps, told.optim))
        total = torch.zeros((), dtype=torch.float64)
        for i, chunks in enumerate(passes):
            # in pieces the gradients never wait, for whole ones are what no process has room for
            waiting = i < len(passes) - 1 and not self.plain.sharded
            with self.accelerator.no_sync(self.model) if waiting else contextlib.nullcontext():
                ours = torch.zeros((), device=device)
                for rows, batch in zip(chunks, batches[i], strict=True):
                    with self._autocast():
                        logits, state = self.model(
                            batch.inputs.to(device), self._enter(rows), cu_seqlens=batch.cu_seqlens
                        )
                    self._leave(rows, state)
                    mask = None if batch.mask is None else batch.mask.to(device)
                    nats, squares = losses(logits, batch.targets.to(device), mask)
                    pull = told.optim.l2wrap / positions.item() * squares
                    # the processes' gradients are averaged, so each gives its part as often as there are processes
                    ours = ours + (nats / max(1.0, counted.item()) + pull) * self.accelerator.num_processes
                    total += nats.detach().double().cpu()
                self.accelerator.backward(ours)
        if self.plain.sharded:
            shards.average(self.plain)
        norm = self._norm()
        if math.isfinite(norm):
            self.optimizer.step()
            self.states = {lane: state.detach() for lane, state in self.states.items()}
        else:
            self.states = entered  # what is not finite must not be carried on
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(positions.item())
        return (self._sum(total) / max(1.0, counted.item())).item(), norm

    def _passes(self) -> Iterator[list[dict[int, Row]]]:
        """Those of this step and process: what one backward pass goes through, one batch after the other, each as rows
        by their lane."""
        size, mine = self.config.run.batch, self._lanes(self.accelerator.process_index)
        begins = range(self.step * self.a_step, (self.step + 1) * self.a_step, self.a_step // self.config.data.through)
        for i in range(0, len(mine), size):
            yield [{lane: self.rows.row(begin + lane) for lane in mine[i : i + size]} for begin in begins]

    def _lanes(self, process: int) -> list[int]:
        """Which rows of those that a step reads side by side are a process's."""
        told, processes = self.config.run, self.accelerator.num_processes
        return [
            (i * processes + process) * told.batch + row for i in range(told.accumulate) for row in range(told.batch)
        ]

    def _enter(self, rows: dict[int, Row]) -> State | None:
        """The states that these rows begin from: one for each document in them."""
        if not isinstance(self.rows, Lanes):
            return None
        empty = self.plain.initial_state()
        states = []
        for lane, row in rows.items():
            carried = self.states.get(lane) if row.continues else None
            # under the fingerprint of today, for the weights have moved
            first = empty if carried is None else State(carried.layers, empty.fingerprint)
            if carried is not None and self.plain.config.time_state:  # every process must have a gradient of it
                first = _with_no_share(first, empty)
            states += [first, *[empty] * (len(row.starts) - 1)]
        return State.stack(states)

    def _leave(self, rows: dict[int, Row], state: State) -> None:
        """Keeps the state that each lane ends with."""
        if isinstance(self.rows, Lanes):
            ends = itertools.accumulate(len(row.starts) for row in rows.values())
            self.states = self.states | {lane: state[end - 1] for lane, end in zip(rows, ends, strict=True)}

    def _norm(self) -> float:
        clip = self.config.optim.clip or math.inf
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), clip))

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled, cached = self.precision == "bfloat16", not self.plain.sharded  # whole weights are not to be held
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled, cached)

    def _sum(self, x: Tensor) -> Tensor:
        """Over all processes."""
        return self.accelerator.reduce(x.to(self.accelerator.device), "sum").cpu()

    def _anybody(self, wants: bool) -> bool:
        return bool(self._sum(torch.tensor(float(wants))).item())

    # ---- looking -------------------------------------------------------------------------------------------------

    def evaluate(self) -> float:
        """The mean loss of the measured data, its first rows in order, in nats a token that counts."""
        assert self.measured is not None
        sampler = self._sampler(self.measured)
        number, size = min(self.config.run.eval_rows, sampler.rows_an_epoch), self.config.run.batch
        mine = range(self.accelerator.process_index, number, self.accelerator.num_processes)
        passes = math.ceil(number / (self.accelerator.num_processes * size))
        nats, counted = torch.zeros(2, dtype=torch.float64)
        self.plain.eval()
        with torch.no_grad(), self._autocast():
            for i in range(passes):
                rows = mine[i * size : (i + 1) * size]
                # a model in pieces is called by all together, so that who has no row left takes one that is not counted
                batch = collate([sampler.row(row) for row in rows or [0]])
                device = self.accelerator.device
                logits, _ = self.plain(batch.inputs.to(device), cu_seqlens=batch.cu_seqlens)
                mask = None if batch.mask is None else batch.mask.to(device)
                if rows:
                    nats += losses(logits, batch.targets.to(device), mask)[0].cpu()
                    counted += _counted(batch)
        self.plain.train()
        return (self._sum(nats) / self._sum(counted).clamp_min(1)).item()

    def write(self) -> str:
        """A text that the main process samples. The run's own random numbers are left as they were."""
        assert self.sample is not None
        random, model = torch.get_rng_state(), self._whole()
        if not self.accelerator.is_main_process:
            return ""
        model.eval()
        try:
            with torch.inference_mode():
                return self.sample(model, self.config.run.sample_prompt)
        finally:
            self.plain.train()
            torch.set_rng_state(random)


def _with_no_share(state: State, of: State) -> State:
    """The state, whose gradient reaches the other one as zeros."""
    pairs = zip(state.layers, of.layers, strict=True)
    layers = [LayerState(*(x + 0 * y for x, y in zip(*pair, strict=True))) for pair in pairs]
    return State(layers, state.fingerprint)


def _counted(batch: Batch) -> int:
    return int(batch.targets.numel() if batch.mask is None else batch.mask.sum())


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step ends before anything is kept; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def first(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
