"""The training loop: the same on one processor and, through accelerate, on many.

A step reads `accumulate` batches of rows on every process, averages the loss over all tokens that count in all of
them, and moves the weights once. Rows are found by their number (sampling.py), so that a run that goes on from a
checkpoint reads exactly what is left. On a CPU in float32 its losses are to the bit those of a run never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from torch import Tensor

from ..checkpoint import load, save
from ..errors import InputError
from ..models import MODELS, Model
from . import keeping
from .config import Config
from .journal import Journal
from .optim import losses, optimizer, rate, set_rate
from .sampling import Batch, Documents, Windows, collate
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
        set_seed(config.run.seed)
        self.plain = self._model()
        self.rows = self._sampler(self.data)
        self.a_step = config.run.batch * config.run.accumulate * self.accelerator.num_processes  # rows
        self.steps = config.run.steps or math.ceil(config.run.epochs * self.rows.rows_an_epoch / self.a_step)
        self.optimizer = optimizer(self.plain, config.optim)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.waiting: list[float] = []  # losses that no line of the log tells yet
        self._find()
        self.plain.gradient_checkpointing = config.run.checkpointing
        model = torch.compile(self.plain) if config.run.compile else self.plain
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.journal = Journal(self, quiet or not self.accelerator.is_main_process)

    def _model(self) -> Model:
        told, vocabulary = self.config.model, self.data.vocab_size
        if told.path:
            model = load(told.path, "float64" if self.config.run.precision == "float64" else "float32")
            if model.quantization is not None:
                raise InputError(f"{told.path}: is quantised, and packed weights cannot be trained")
        else:
            cls = MODELS[told.generation]
            size = told.vocab_size or -(-vocabulary // 64) * 64
            model = cls(cls.Config.sized(size, told.n_layer, told.n_embd))
            model.init_weights()
        if model.config.vocab_size < vocabulary:
            raise InputError(
                f"{self.config.data.train}: has token ids up to {vocabulary - 1}, the model's vocabulary ends at "
                f"{model.config.vocab_size - 1}"
            )
        return model.to(self.accelerator.device, getattr(torch, self._wide)).train()

    @property
    def _wide(self) -> str:
        """The dtype of the weights."""
        return "float64" if self.config.run.precision == "float64" else "float32"

    def _sampler(self, file: TokenFile) -> Documents | Windows:
        told, seed = self.config.data, self.config.run.seed
        if told.order == "documents":
            return Documents(file, told.ctx_len, seed)
        return Windows(file, told.ctx_len, seed, told.order)

    @property
    def notes(self) -> dict[str, Any]:
        """For the model's config.json. Windows over texts without marks between them have no opening."""
        notes = dict(self.data.notes)
        if self.config.data.order != "documents" and self.data.about.get("end_of_text") is None:
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
            if (self.out / "model.safetensors").exists():
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

    def _decisive(self) -> dict[str, Any]:
        """The settings that a run cannot change on its way, for its losses would no longer be those of one run."""
        told = dataclasses.asdict(self.config)
        own = ("batch", "accumulate", "precision", "seed")
        settings = {f"{name}.{key}": value for name in ("model", "data", "optim") for key, value in told[name].items()}
        settings |= {f"run.{key}": told["run"][key] for key in own}
        settings.pop("data.eval")
        return json.loads(json.dumps(settings))

    def keep(self) -> None:
        """Writes a checkpoint. Where the disk is full the run goes on with the last one, and says so."""
        if self.accelerator.is_main_process:
            standing = {"tokens": self.tokens, "seconds": self.seconds, "waiting": self.waiting}
            standing["config"] = self._decisive()
            most, about = self.config.run.keep, (self.data.tokenizer_file, self.notes)
            try:
                keeping.keep(self.checkpoints, self.step, self.plain, self.optimizer, standing, most, *about)
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
        if self.accelerator.is_main_process:
            save(self.plain, self.out, self.data.tokenizer_file, self.notes)
        return self.plain.eval()

    def take_step(self) -> tuple[float, float]:
        """One move of the weights: the mean loss in nats of a token that counts, and the norm of the gradients. Where
        that is not finite the weights stay what they are."""
        told, device = self.config, self.accelerator.device
        batches = list(self._batches())
        counts = [_counted(batch) for batch in batches]
        counted = self._sum(torch.tensor(float(sum(counts))))
        positions = self._sum(torch.tensor(float(sum(batch.targets.numel() for batch in batches))))
        set_rate(self.optimizer, rate(self.step, self.steps, told.optim))
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model), self._autocast():
                logits, _ = self.model(batch.inputs.to(device), cu_seqlens=batch.cu_seqlens)
                mask = None if batch.mask is None else batch.mask.to(device)
                nats, squares = losses(logits, batch.targets.to(device), mask)
                pull = told.optim.l2wrap / positions.item() * squares
                # the processes' gradients are averaged, so each gives its part as often as there are processes
                ours = (nats / max(1.0, counted.item()) + pull) * self.accelerator.num_processes
            self.accelerator.backward(ours)
            total += nats.detach().double().cpu()
        norm = self._norm()
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(positions.item())
        return (self._sum(total) / max(1.0, counted.item())).item(), norm

    def _batches(self) -> Iterator[Batch]:
        """Those of this step and process."""
        first = self.step * self.a_step + self.accelerator.process_index * self.config.run.batch
        for _ in range(self.config.run.accumulate):
            yield collate([self.rows.row(first + i) for i in range(self.config.run.batch)])
            first += self.config.run.batch * self.accelerator.num_processes

    def _norm(self) -> float:
        clip = self.config.optim.clip or math.inf
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), clip))

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, self.config.run.precision == "bfloat16")

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
        nats, counted = torch.zeros(2, dtype=torch.float64)
        self.plain.eval()
        with torch.no_grad(), self._autocast():
            for first in range(0, len(mine), size):
                batch = collate([sampler.row(i) for i in mine[first : first + size]])
                device = self.accelerator.device
                logits, _ = self.plain(batch.inputs.to(device), cu_seqlens=batch.cu_seqlens)
                mask = None if batch.mask is None else batch.mask.to(device)
                nats += losses(logits, batch.targets.to(device), mask)[0].cpu()
                counted += _counted(batch)
        self.plain.train()
        return (self._sum(nats) / self._sum(counted).clamp_min(1)).item()

    def write(self) -> str:
        """A sampled text. The run's own random numbers are left as they were."""
        assert self.sample is not None
        random = torch.get_rng_state()
        self.plain.eval()
        try:
            with torch.inference_mode():
                return self.sample(self.plain, self.config.run.sample_prompt)
        finally:
            self.plain.train()
            torch.set_rng_state(random)


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
