"""The training loop: the same on one processor and, through accelerate, on many.

A step reads `accumulate` batches of rows on every process, averages the loss over all tokens that count in all of
them, and moves the weights once. Rows are found by their number (data/batching.py), so that a run that goes on from a
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
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..adapters import WEIGHTS, save_adapter
from ..checkpoint import save, save_time_state
from ..data.token_file import TokenFile
from ..errors import InputError
from ..models import Model, Network
from . import build, checkpointing, fsdp
from .config import Config
from .metrics import Journal
from .optim import optimizer
from .schedule import rate, set_rate
from .tasks import Passes

Sample = Callable[[Model, str], str]  # what a model writes after a prompt
PATIENCE = 20  # steps in a row without finite gradients before the run gives up


class Stopped(Exception):
    """Ctrl-C: what was reached is kept."""


class Run:
    """One run: everything that is made once."""

    def __init__(self, config: Config, quiet: bool = False, model: Network | None = None):
        """model: a new one to train in place of what `config.model` names, like those in models/baselines.py."""
        self.config = config
        self.sample: Sample | None = None  # who can turn ids into text puts it here
        self.out = Path(config.run.out).expanduser()
        views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else every gradient is there twice
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[views])
        self.precision = build.precision(config, self.accelerator.device)
        set_seed(config.run.seed)
        self.plain, self.passes = self._parts(model)
        self.data, self.rows = self.passes.data, self.passes.rows
        self.steps = config.run.steps or math.ceil(config.run.epochs * self.rows.rows_per_epoch / self.passes.a_step)
        self.optimizer = optimizer(self.plain, config.optim)
        self.mean: AveragedModel | None = None
        if config.run.ema:
            self.mean = AveragedModel(self.plain, multi_avg_fn=get_ema_multi_avg_fn(config.run.ema))
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.waiting: list[float] = []  # losses that no line of the log tells yet
        self._find()
        self.plain.gradient_checkpointing = config.run.checkpointing
        self.model: Any = torch.compile(self.plain) if config.run.compile else self.plain
        if not self.plain.sharded:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.journal = Journal(self, quiet or not self.accelerator.is_main_process)

    def _parts(self, model: Any) -> tuple[Any, Any]:
        """The model, on the device, and what it reads."""
        config, device = self.config, self.accelerator.device
        if config.model.is_vision:
            from ..data.image_dataset import ImageDataset
            from .image_classification import PicturePasses

            pictures = ImageDataset(config.data.train)
            if model is None:
                model = build.make_vision(config, len(pictures.class_names), self.precision)
            return model.to(device).train(), PicturePasses(config, pictures, self.accelerator)
        data = TokenFile(config.data.train)
        if model is None:
            model = build.place(config, data.vocab_size, self.precision, self.accelerator)
        else:
            if config.run.shard != "none":
                raise InputError("run.shard is for models that config.model names")
            model = build.fit(model, config, data.vocab_size, self.precision)
        model = model.to(device).train()
        return model, Passes(config, data, model, self.accelerator)

    # ---- going on ------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _find(self) -> None:
        """Goes to where the newest good checkpoint was, if there is one."""
        found = checkpointing.newest(self.checkpoints)
        if found is None:
            if any((self.out / name).exists() for name in ("model.safetensors", checkpointing.TUNED, WEIGHTS)):
                raise InputError(f"{self.out}: holds a model already; give another run.out")
            return
        path, standing = found
        mine = self._decisive()
        for key, value in standing["config"].items():
            if key in mine and mine[key] != value:
                raise InputError(
                    f"{path}: was made with {key} = {value!r}, not {mine[key]!r}; give another run.out to begin anew"
                )
        checkpointing.restore(path, self.plain, self.optimizer, self.mean)
        self.step, self.tokens, self.seconds = (standing[name] for name in ("step", "tokens", "seconds"))
        self.waiting.extend(standing["waiting"])
        if (path / checkpointing.CARRIED).exists():
            self.passes.restore(path / checkpointing.CARRIED)

    def _decisive(self) -> dict[str, Any]:
        """The settings that a run cannot change on its way, for its losses would no longer be those of one run."""
        told = dataclasses.asdict(self.config)
        sections = ("model", "data", "optim", "vision")
        settings = {f"{name}.{key}": value for name in sections for key, value in told[name].items()}
        settings |= {"run.precision": self.precision, "run.seed": self.config.run.seed, "run.ema": self.config.run.ema}
        settings["rows in a step"] = self.passes.a_step
        settings.pop("data.eval")
        settings.pop("vision.workers")
        return json.loads(json.dumps(settings))

    def keep(self) -> None:
        """Writes a checkpoint. Where the disk is full the run goes on with the last one, and says so."""
        carried = self.passes.carried()
        if self.accelerator.is_main_process or self.plain.sharded:
            standing = {"tokens": self.tokens, "seconds": self.seconds, "waiting": self.waiting}
            standing["config"] = self._decisive()
            most, about = self.config.run.keep, (self.passes.tokenizer_file, self.passes.notes)
            try:
                checkpointing.keep(
                    self.checkpoints, self.step, self.plain, self.optimizer, standing, most, *about, carried, self.mean
                )
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
                if self.passes.measured and (end or (told.eval_every and self.step % told.eval_every == 0)):
                    self.journal.measure(self.measure())
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
        return model.eval() if self.mean is not None else self.plain.eval()

    def _whole(self) -> Model:
        """The model, or the mean of its weights; that of pieces is put together on the CPU of the main process, and
        elsewhere has no numbers."""
        if self.mean is not None:
            return self.mean.module  # type: ignore[return-value]
        if not self.plain.sharded:
            return self.plain
        model = build.make(self.config, self.data.vocab_size, self.precision, "meta")
        numbers = fsdp.gathered(self.plain)
        model.load_state_dict(numbers, assign=True, strict=bool(numbers))
        return model

    def _save(self, model: Model) -> None:
        """What the run was for."""
        try:
            if model.state_tuning:
                save_time_state(model, self.out / checkpointing.TUNED, self.passes.notes)
            elif model.adapted_from is not None:
                save_adapter(model, self.out, self.passes.notes)
            else:
                save(model, self.out, self.passes.tokenizer_file, self.passes.notes)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.out}: cannot be written ({error}); the same command goes on") from error

    def take_step(self) -> tuple[float, float]:
        """One move of the weights: the mean loss in nats of a token that counts, and the norm of the gradients. Where
        that is not finite the weights stay what they are."""
        told, device = self.config, self.accelerator.device
        passes, entered = list(self.passes.of(self.step)), self.passes.states
        sizes = torch.tensor([self.passes.size(chunk) for chunks in passes for chunk in chunks], dtype=torch.float64)
        all_counted, positions = self._sum(sizes.sum(0)).tolist()
        set_rate(self.optimizer, rate(self.step, self.steps, told.optim))
        total = torch.zeros((), dtype=torch.float64)
        for i, chunks in enumerate(passes):
            # in pieces the gradients never wait, for whole ones are what no process has room for
            waiting = i < len(passes) - 1 and not self.plain.sharded
            with self.accelerator.no_sync(self.model) if waiting else contextlib.nullcontext():
                ours = torch.zeros((), device=device)
                for chunk in chunks:
                    nats, squares = self.passes.losses(self.model, chunk, self._autocast())
                    pull = told.optim.l2wrap / positions * squares
                    # the processes' gradients are averaged, so each gives its part as often as there are processes
                    ours = ours + (nats / max(1.0, all_counted) + pull) * self.accelerator.num_processes
                    total += nats.detach().double().cpu()
                self.accelerator.backward(ours)
        if self.plain.sharded:
            fsdp.average(self.plain)
        norm = self._norm()
        if math.isfinite(norm):
            self.optimizer.step()
            if self.mean is not None:
                self.mean.update_parameters(self.plain)
            self.passes.states = {lane: state.detach() for lane, state in self.passes.states.items()}
        else:
            self.passes.states = entered  # what is not finite must not be carried on
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(positions)
        return (self._sum(total) / max(1.0, all_counted)).item(), norm

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

    def measure(self) -> dict[str, float]:
        """Of the measured data the "eval_loss", in nats, and what else its kind is measured by; with the mean of the
        weights where there is one."""
        model = self.plain if self.mean is None else self.mean.module
        model.eval()
        with torch.no_grad():
            found = self.passes.measure(model, self._autocast(), self._sum)
        self.plain.train()
        return found

    def evaluate(self) -> float:
        """The mean loss of the measured data, in nats a token that counts."""
        return self.measure()["eval_loss"]

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
