"""The training loop: the same in one process and, through accelerate, in many.

A step reads `accumulate` batches of rows in every process, averages the loss over all tokens in them that count, and
updates the weights once. Rows are found by number (data/batching.py), so a run that resumes from a checkpoint reads
exactly the remaining ones. On a CPU in float32 it gives bit for bit the losses of a run that was never stopped.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..adapters import WEIGHTS
from ..checkpoint import check_folder_name, time_state
from ..data.mixture import Mixture
from ..errors import InputError, count
from ..files import only_process
from ..models import Model, Network
from . import build, checkpointing, fsdp
from .config import Config
from .language_modeling import LanguageModeling
from .metrics import MetricsLogger, Progression, RunInfo
from .optim import build_optimizer
from .schedule import lr_factor, set_lr
from .tasks import Autocast, Task

GenerateSample = Callable[[Network, str], str]  # continues a prompt with a model
# signals after which a run saves a checkpoint and ends; Windows has no SIGHUP
STOPPING = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MAX_BAD_STEPS = 20  # in a row without finite gradients, after which the run gives up


class Interrupted(Exception):
    """A signal has ended the run; a checkpoint has been saved.

    Attributes:
        signal: its number: that of SIGINT (Ctrl-C), SIGTERM or SIGHUP.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class Step(NamedTuple):
    """What a step has computed, in all processes together.

    Attributes:
        nats: the cross entropy, summed over the tokens (or images) that count.
        n_counted: how many count.
        grad_norm: of the gradients, before clipping.
    """

    nats: float
    n_counted: int
    grad_norm: float

    @property
    def loss(self) -> float | None:
        """The mean, in nats; None if nothing counts."""
        return self.nats / self.n_counted if self.n_counted else None


class Trainer:
    """One run.

    Attributes:
        config: its configuration.
        out: the folder for the model, its checkpoints and the log.
        model: what is trained.
        wrapped_model: the same, compiled or distributed as configured.
        ema: the averaged weights (torch's AveragedModel), or None.
        task: what is learned and from which data, see tasks.py.
        step, steps: completed steps, and steps in the whole run.
        units: tokens or images read so far.
        seconds: spent in steps so far.
        generate_sample: set this to log samples of what the model generates; the trainer knows no tokenizer.
    """

    def __init__(self, config: Config, quiet: bool = False, model: Network | None = None):
        """Prepares a run, or resumes it from the newest checkpoint in `run.out`.

        Args:
            config: see config.py.
            quiet: no log and no progress bar.
            model: a new model to train instead of the one that `config.model` names, like those in
                models/baselines/.

        Raises:
            InputError: files that cannot be read, settings that do not fit them, or a `run.out` of another run.
        """
        self.config = config.check()
        self.generate_sample: GenerateSample | None = None
        self.out = Path(config.run.out).expanduser()
        check_folder_name(self.out)
        views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # otherwise gradients are stored twice
        self.accelerator = Accelerator(cpu=not build.uses_cuda(config.run.device), kwargs_handlers=[views])
        self.precision = build.resolve_precision(config, self.accelerator.device)
        torch.manual_seed(config.run.seed)  # of new weights, which are the same in every process
        self.model, self.task = self._build_vision(model) if config.model.is_vision else self._build_language(model)
        self.steps = config.run.steps or math.ceil(
            config.run.epochs * self.task.rows_per_epoch / self.task.rows_per_step
        )
        self.optimizer = build_optimizer(self.model, config.optim)
        self.ema: AveragedModel | None = None
        if config.run.ema:
            average = get_ema_multi_avg_fn(config.run.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average)
        self.step = self.units = 0
        self.seconds = 0.0
        unlogged = self._resume()
        self.model.gradient_checkpointing = config.run.checkpointing
        self.wrapped_model: Any = torch.compile(self.model) if config.run.compile else self.model
        if not self.model.sharded:
            self.wrapped_model, self.optimizer = self.accelerator.prepare(self.wrapped_model, self.optimizer)
        quiet = quiet or not self.accelerator.is_main_process
        self.logger = MetricsLogger(self._run_info(), self._progression(), unlogged, quiet)

    def _build_language(self, model: Network | None) -> tuple[Network, Task[Any]]:
        """The model, on the device, and the task."""
        config, accelerator = self.config, self.accelerator
        sources = config.data.sources
        data = Mixture([source.path for source in sources], [source.weight for source in sources])
        if model is None:
            build.check_model_memory(config, 2 * (config.model.vocab_size or data.vocab_size), accelerator.device)
            built = build.build_on_devices(config, data.vocab_size, self.precision, accelerator)
        elif config.run.shard != "none":
            raise InputError("run.shard only works for models named by config.model")
        elif not isinstance(model, Model):
            raise InputError(f"{config.data.name}: is a token file, but {model.name} is not a language model")
        else:
            built = build.prepare_model(model, config, data.vocab_size, self.precision)
        built = built.to(accelerator.device).train()
        task = LanguageModeling(config, data, built, accelerator)
        longest = max(len(file.tokens) for file in data.files)
        row = min(config.data.ctx_len, longest) // config.run.sequence_parallel * config.data.tbptt_chunks
        self._check_memory(built, row, f"{row:,} tokens", "lower data.ctx_len or run.batch", config.run.checkpointing)
        if task.eval_data is not None:  # without gradients, nothing of a block is kept
            row = min(config.data.ctx_len, len(task.eval_data.tokens))
            self._check_memory(built, row, f"{row:,} tokens", "lower data.ctx_len or run.batch", keeps_little=True)
        return built, task

    def _build_vision(self, model: Network | None) -> tuple[Network, Task[Any]]:
        """The model, on the device, and the task."""
        from ..data.image_dataset import ImageDataset  # needs optional packages
        from .image_classification import ImageClassification

        config, device = self.config, self.accelerator.device
        images = ImageDataset(config.data.name)
        if model is None:
            n_patches = (config.vision.size // config.vision.patch_size) ** 2
            build.check_model_memory(config, len(images.class_names) + n_patches, device)
            model = build.build_vision_model(config, len(images.class_names), self.precision)
        n_patches = (config.vision.size // model.config.patch_size) ** 2
        pixels = f"{config.vision.size:,} x {config.vision.size:,} pixels"
        self._check_memory(model, n_patches, pixels, "lower run.batch or vision.size", config.run.checkpointing)
        return model.to(self.accelerator.device).train(), ImageClassification(config, images, self.accelerator)

    def _check_memory(self, model: Network, n_tokens: int, row: str, advice: str, keeps_little: bool) -> None:
        """See `build.check_pass_memory`. n_tokens: of a row; row: the same in words."""
        batch, itemsize = self.config.run.batch, getattr(torch, self.precision).itemsize
        what, device = f"{batch:,} x {row}", self.accelerator.device
        build.check_pass_memory(model, batch * n_tokens, itemsize, keeps_little, device, what, advice)

    def _run_info(self) -> RunInfo:
        config = self.config
        n_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return RunInfo(
            out=self.out,
            description=f"{self.model.name}: {count(n_trained, 'parameter')} to train, {self.task.describe()}, "
            f"{count(self.steps, 'step')} of {self.task.rows_per_step}",
            unit=self.task.unit,
            steps=self.steps,
            log_every=config.run.log_every,
            eval_data=config.data.eval,
            wandb=config.run.wandb,
            flops_per_unit=self.task.flops_per_unit(self.model),
            device=self.accelerator.device,
            precision=self.precision,
            processes=self.accelerator.num_processes,
        )

    def _progression(self) -> Progression:
        return Progression(self.step, self.units, self.seconds)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.out / "checkpoints"

    def _resume(self) -> tuple[float, int]:
        """Restores the newest undamaged checkpoint, if there is one. Returns the losses that no line of the log covers
        yet: their sum, and the number of predictions."""
        latest = checkpointing.find_latest_checkpoint(self.checkpoints)
        self._resumed_from = None if latest is None else latest[0]
        if latest is None:
            if any((self.out / name).exists() for name in ("model.safetensors", time_state.FILE, WEIGHTS)):
                raise InputError(f"{self.out}: already contains a model; choose another run.out")
            return 0.0, 0
        path, run_state = latest
        settings = self._fixed_settings()
        for key, value in run_state["config"].items():
            if key in settings and settings[key] != value:
                raise InputError(
                    f"{path}: was trained with {key} = {value!r}, not {settings[key]!r}; choose another run.out to "
                    "start over"
                )
        if run_state["sources"] != self.task.source_metrics(run_state["step"]):
            raise InputError(
                f"{path}: the sources of data.train have changed in size since; choose another run.out to start over"
            )
        checkpointing.restore_checkpoint(path, self.model, self.optimizer, self.ema)
        self.step, self.units, self.seconds = (run_state[key] for key in ("step", "units", "seconds"))
        if (path / checkpointing.CARRIED_STATES).exists():
            self.task.load_carried_states(path / checkpointing.CARRIED_STATES)
        nats, n_counted = run_state["unlogged"]
        return nats, n_counted

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and the model is saved."""
        names = ("model.safetensors", "model.safetensors.index.json", time_state.FILE, WEIGHTS)
        saved = [path.stat().st_mtime_ns for name in names if (path := self.out / name).exists()]
        if self.step < self.steps or self._resumed_from is None or not saved:
            return False
        return max(saved) >= self._resumed_from.stat().st_mtime_ns  # not by a shorter run

    def _fixed_settings(self) -> dict[str, Any]:
        """The settings that cannot change during a run, because its losses would no longer be those of one run."""
        config = dataclasses.asdict(self.config)
        sections = ("model", "data", "optim", "vision")
        settings = {f"{name}.{key}": value for name in sections for key, value in config[name].items()}
        settings |= {"run.precision": self.precision, "run.seed": self.config.run.seed, "run.ema": self.config.run.ema}
        settings["rows per step"] = self.task.rows_per_step
        settings.pop("data.eval")
        settings.pop("vision.workers")
        as_json: dict[str, Any] = json.loads(json.dumps(settings))
        return as_json

    def save_checkpoint(self) -> None:
        """Saves a checkpoint. If the disk is full, the run continues with the previous one and prints a message."""
        carried_states = self.task.carried_states()
        if self.accelerator.is_main_process or self.model.sharded:
            run_state = {
                "units": self.units,
                "seconds": self.seconds,
                "unlogged": (self.logger.nats, self.logger.n_counted),
                "sources": self.task.source_metrics(self.step),
                "config": self._fixed_settings(),
            }
            try:
                checkpointing.save_checkpoint(
                    self.checkpoints,
                    self.step,
                    self.model,
                    self.optimizer,
                    run_state,
                    self.config.run.keep,
                    tokenizer_file=self.task.tokenizer_file,
                    notes=self.task.notes,
                    carried_states=carried_states,
                    ema=self.ema,
                )
            except OSError as error:
                self.logger.print(f"no checkpoint at step {self.step}: {error}")
        self.accelerator.wait_for_everyone()

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self) -> Network:
        """Trains to the end, or until Ctrl-C, SIGTERM or SIGHUP, and saves the model in `run.out`.

        Returns:
            The trained model, in eval mode.

        Raises:
            Interrupted: a signal came; a checkpoint has been saved.
            InputError: the gradients are not finite any more, the model cannot be saved, or another process trains in
                `run.out`.
        """
        if not self.accelerator.is_main_process:
            return self._train()
        message = f"{self.out}: another process is training there; wait for its end, or choose another run.out"
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(only_process(self.out / ".training", message))
            except OSError as error:
                raise InputError(f"{self.out}: cannot be written ({error.strerror or error})") from error
            return self._train()

    def _train(self) -> Network:
        run = self.config.run
        last_checkpoint, bad_steps = time.monotonic(), 0
        with catch_signals() as signals, self.logger:
            while self.step < self.steps:
                start = time.perf_counter()
                nats, n_counted, grad_norm = self.train_step()
                self.seconds += time.perf_counter() - start
                bad_steps = 0 if math.isfinite(grad_norm) else bad_steps + 1
                if bad_steps == MAX_BAD_STEPS:
                    raise InputError(f"no finite gradients in {MAX_BAD_STEPS} consecutive steps; lower optim.lr")
                lr, sources = self.optimizer.param_groups[0]["lr"], partial(self.task.source_metrics, self.step)
                self.logger.log_step(self._progression(), nats, n_counted, grad_norm, lr, sources)
                ends = self.step == self.steps
                if self.task.can_evaluate and (ends or (run.eval_every and self.step % run.eval_every == 0)):
                    self.logger.log_evaluation(self.step, self.evaluate())
                if self.generate_sample and run.sample_every and (ends or self.step % run.sample_every == 0):
                    self.logger.log_sample(self.step, self.sample())
                due = run.save_every and self.step % run.save_every == 0
                late = time.monotonic() - last_checkpoint > 60 * run.save_minutes
                late, *stopping = self._any_process(late, *(number in signals for number in STOPPING))
                if due or late or ends or any(stopping):
                    self.save_checkpoint()
                    last_checkpoint = time.monotonic()
                if any(stopping):
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.steps}; the same command resumes from there",
                        STOPPING[stopping.index(True)],
                    )
        model = self._full_model()
        if self.accelerator.is_main_process:
            try:
                checkpointing.save_model(model, self.out, self.task.tokenizer_file, self.task.notes)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.out}: cannot be written ({error}); the same command tries again") from error
        return model.eval() if self.ema is not None else self.model.eval()

    def train_step(self) -> Step:
        """Updates the weights once. If no token counts or the norm of the gradients is not finite, nothing changes but
        the carried states.
        """
        config, device = self.config, self.accelerator.device
        passes = list(self.task.batches(self.step))
        counts = torch.tensor(
            [self.task.count_targets(batch) for part in passes for batch in part], dtype=torch.float64
        )
        n_counted, n_targets = self._sum_over_processes(counts.sum(0)).tolist()
        set_lr(self.optimizer, lr_factor(self.step, self.steps, config.optim))
        l2wrap = config.optim.l2wrap / n_targets if n_counted else 0.0
        total_nats = torch.zeros((), dtype=torch.float64)
        for i, batches in enumerate(passes):
            # gradients are exchanged once, after the last pass; if sharded, no process could hold them until then
            accumulates = i < len(passes) - 1 and not self.model.sharded
            with self.accelerator.no_sync(self.wrapped_model) if accumulates else contextlib.nullcontext():
                loss = torch.zeros((), device=device)
                for j, batch in enumerate(batches):
                    self._seed_pass(i, j)
                    nats, squares = self.task.compute_loss(self.wrapped_model, batch, self._autocast())
                    # the gradients of the processes are averaged, but have to be summed
                    loss = loss + (nats / max(1.0, n_counted) + l2wrap * squares) * self.accelerator.num_processes
                    total_nats += nats.detach().double().cpu()
                self.accelerator.backward(loss)
        if self.model.sharded:
            fsdp.average_unsharded_gradients(self.model)
        grad_norm = self._clip_gradients()
        finite = math.isfinite(grad_norm)
        if finite and n_counted:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        self.task.finish_step(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.units += int(n_targets)
        total_nats = self._sum_over_processes(total_nats)
        return Step(total_nats.item(), int(n_counted), grad_norm)

    def _seed_pass(self, *numbers: int) -> None:
        """Seeds dropout, drop path and augmentation: every forward pass of every process draws its own numbers, which
        depend on nothing else, so that a run that is resumed draws the same."""
        key = (self.step, *numbers, self.accelerator.process_index)
        seed = np.random.SeedSequence(self.config.run.seed, spawn_key=key).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))

    def _clip_gradients(self) -> float:
        """Clips the gradients of all processes together; returns their norm before that."""
        max_norm = self.config.optim.clip or math.inf
        return float(self.accelerator.clip_grad_norm_(self.wrapped_model.parameters(), max_norm))

    def _autocast(self) -> Autocast:
        # gathered weights must not stay in autocast's cache
        enabled, cache_enabled = self.precision == "bfloat16", not self.model.sharded
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled, cache_enabled)

    def _sum_over_processes(self, x: Tensor) -> Tensor:
        """The sum, on the CPU of every process."""
        total: Tensor = self.accelerator.reduce(x.to(self.accelerator.device), "sum")
        return total.cpu()

    def _any_process(self, *conditions: bool) -> list[bool]:
        """Which of the conditions hold in any of the processes."""
        counts: list[float] = self._sum_over_processes(torch.tensor(conditions, dtype=torch.float32)).tolist()
        return [count > 0 for count in counts]

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Metrics on the evaluation data, with the averaged weights if there are any.

        Returns:
            "eval_loss", in nats per token that counts or per image, and for images "eval_accuracy".
        """
        model = self.model if self.ema is None else self._averaged_model(self.ema)
        model.eval()
        with torch.no_grad():
            metrics = self.task.evaluate(model, self._autocast(), self._sum_over_processes)
        self.model.train()
        return metrics

    def sample(self) -> str:
        """What `generate_sample` makes of `run.sample_prompt`, in the main process; "" in the others.

        The random state of the run is preserved.
        """
        assert self.generate_sample is not None
        random_state, model = torch.get_rng_state(), self._full_model()
        if not self.accelerator.is_main_process:
            return ""
        model.eval()
        try:
            with torch.inference_mode():
                return self.generate_sample(model, self.config.run.sample_prompt)
        finally:
            self.model.train()
            torch.set_rng_state(random_state)

    def _full_model(self) -> Network:
        """The model, or the one with the averaged weights. A sharded model is gathered on the CPU of the main process;
        in the others the result has no weights."""
        if self.ema is not None:
            return self._averaged_model(self.ema)
        if not self.model.sharded:
            return self.model
        model = build.build_model(self.config, self.model.config.vocab_size, self.precision, "meta")
        state_dict = fsdp.gather_state_dict(self.model)
        model.load_state_dict(state_dict, assign=True, strict=bool(state_dict))
        return model

    def _averaged_model(self, ema: AveragedModel) -> Network:
        model = ema.module
        assert isinstance(model, Network)
        return model


@contextlib.contextmanager
def catch_signals() -> Iterator[set[int]]:
    """The numbers of the signals in STOPPING that have come: the first of a kind only adds its number, so that the
    current step is completed; the second one acts as it would have before."""
    received: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    # nohup lets processes ignore that their terminal is gone
    numbers = [number for number in STOPPING if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.getsignal(number) for number in numbers}

    def handle_first(number: int, frame: object) -> None:
        received.add(number)
        signal.signal(number, previous[number])

    for number in numbers:
        signal.signal(number, handle_first)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
