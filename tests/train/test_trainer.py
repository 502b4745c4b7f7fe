"""The loop: the recipe's numbers, and that a run stopped anyhow is the run that was never stopped."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from heronry import build
from heronry.checkpoint import load
from heronry.data.token_file import TokenFile, TokenWriter
from heronry.errors import InputError
from heronry.models.baselines import (
    GPT,
    LSTM,
    AFTFull,
    AFTFullConfig,
    AFTSimple,
    AFTSimpleConfig,
    GPTConfig,
    LSTMConfig,
)
from heronry.train.config import read_config
from heronry.train.trainer import Interrupted, Trainer

SMALL = ["model.n_layer=2", "model.n_embd=64", "data.ctx_len=32", "run.batch=2", "run.log_every=1", "optim.lr=3e-3"]
EXACT = [*SMALL, "run.precision=float32"]


def settings(texts: Path, out: Path, *more: str) -> list[str]:
    return [*EXACT, f"data.train={texts}", f"run.out={out}", *more]


def run(texts: Path, out: Path, *more: str) -> Trainer:
    trainer = Trainer(read_config(None, settings(texts, out, *more)))
    trainer.train()
    return trainer


def stopped(texts: Path, out: Path, step: int, *more: str) -> None:
    """A run that Ctrl-C ends while it takes the step after `step`."""
    is_interrupted(Trainer(read_config(None, settings(texts, out, *more))), step)


def is_interrupted(trainer: Trainer, step: int, number: int = signal.SIGINT) -> None:
    """Runs until Ctrl-C, or another signal, ends it while it takes the step after `step`."""
    take = trainer.train_step

    def interrupted() -> tuple[float, float]:
        if trainer.step == step:
            os.kill(os.getpid(), number)
        return take()

    trainer.train_step = interrupted
    with pytest.raises(Interrupted, match=f"stopped at step {step + 1} of {trainer.steps}") as stopped:
        trainer.train()
    assert stopped.value.signal == number


def fails_at(trainer: Trainer, step: int) -> None:
    """Runs until an error ends it while it takes the step after `step`."""
    take = trainer.train_step

    def breaks() -> tuple[float, float]:
        if trainer.step == step:
            raise KeyError
        return take()

    trainer.train_step = breaks
    with pytest.raises(KeyError):
        trainer.train()


def refusal(*options: str) -> str:
    """The one line with which a run is refused."""
    with pytest.raises(InputError) as error:
        Trainer(read_config(None, options))
    assert "\n" not in str(error.value)
    return str(error.value)


def curve(out: Path) -> list[tuple]:
    """What must be equal to the bit: the steps and their losses, gradients and rates."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["tokens"], row["loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load(out).state_dict()


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return curve(a) == curve(b) and x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("generation", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
@pytest.mark.quick_for("rwkv4", "rwkv7")
def test_it_learns(generation, texts, tmp_path):
    trainer = run(texts, tmp_path / "out", f"model.generation={generation}", "run.epochs=6", f"data.eval={texts}")
    losses = [row[2] for row in curve(tmp_path / "out")]
    assert len(losses) == trainer.steps == trainer.step
    assert losses[0] == pytest.approx(math.log(64), abs=0.3)  # nothing is known yet
    assert sum(losses[-5:]) / 5 < 2.7
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < 2.7
    assert trainer.units == sum(trainer.task.sampler.row(i).targets.size for i in range(trainer.steps * 2))


MINIPILE = Path(__file__).parents[2] / "examples" / "minipile.toml"


@pytest.mark.parametrize(
    ("file", "generation", "order", "clip"),
    [
        (None, "rwkv4", "documents", 0.5),
        (None, "rwkv5", "documents", 0.5),
        (None, "rwkv6", "documents", 0.5),
        (None, "rwkv7", "documents", 0.5),
        (None, "rwkv7", "shuffle", 0.5),
        (MINIPILE, "rwkv7", "magic_prime", 1.0),
    ],
)
@pytest.mark.quick_for("rwkv4", "rwkv7")
def test_the_recipe_in_float64(file, generation, order, clip, texts, tmp_path):
    """20 steps against Adam, L2Wrap, clipping, schedule and groups written down here, on the same rows."""
    exact = settings(texts, tmp_path / "out", "run.precision=float64", "run.steps=20", "run.accumulate=2")
    if file is None:
        exact += [f"model.generation={generation}", f"data.order={order}", f"optim.clip={clip}"]
        lr, decay = 3e-3, 0.1
    else:
        exact = [setting for setting in exact if not setting.startswith("optim.")] + ["model.vocab_size=64"]
        lr, decay = 6e-4, 0.001
    trainer = Trainer(read_config(file, exact))
    model = type(trainer.model)(trainer.model.config).double()
    model.load_state_dict(trainer.model.state_dict())
    assert model.name == generation
    assert trainer.config.data.order == order
    rows = [trainer.task.sampler.row(i) for i in range(80)]
    trainer.train()

    class L2Wrap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, logits):
            ctx.save_for_backward(logits)
            return loss

        @staticmethod
        def backward(ctx, grad):
            (logits,) = ctx.saved_tensors
            most, place = logits.max(-1, keepdim=True)
            return grad, torch.zeros_like(logits).scatter_(-1, place, most * 1e-4 / logits[..., 0].numel())

    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    expected = []
    for step in range(20):
        mine = rows[4 * step : 4 * step + 4]
        inputs = torch.cat([torch.as_tensor(row.inputs) for row in mine])
        targets = torch.cat([torch.as_tensor(row.targets) for row in mine])
        cu = sorted({b + sum(len(r.inputs) for r in mine[:i]) for i, row in enumerate(mine) for b in row.starts})
        logits, _ = model(inputs[None], cu_seqlens=[*cu, len(inputs)])
        loss = F.cross_entropy(logits[0], targets)
        expected.append(loss.item())
        L2Wrap.apply(loss, logits).backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        now = lr * (0.01 + 0.99 * step / 10)
        if step >= 10:
            p = (step - 10) / 10
            now = 6e-5 + (lr - 6e-5) * (1 + math.cos(math.pi * p)) / 2
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad * min(1.0, clip / (norm + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(grad, alpha=0.1)
                second.mul_(0.99).add_(grad.square(), alpha=0.01)
                pace = now * (2 if name.endswith(("att.w0", "time_decay")) else 3 if "time_first" in name else 1)
                if p.ndim == 2 and name.endswith(".weight"):
                    p.mul_(1 - pace * decay)
                p -= pace * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-18)
                p.grad = None
    found = [row[2] for row in curve(tmp_path / "out")]
    assert found == pytest.approx(expected, rel=1e-7)
    assert expected[-1] < expected[0] - 0.15


def test_one_batch_or_several(texts, tmp_path):
    """A step of four rows is the same in one pass and in two, and with blocks computed again going back."""
    run(texts, tmp_path / "one", "run.steps=5", "run.batch=4")
    run(texts, tmp_path / "two", "run.steps=5", "run.accumulate=2")
    run(texts, tmp_path / "less", "run.steps=5", "run.batch=4", "run.checkpointing=true")
    one, two, less = (curve(tmp_path / name) for name in ("one", "two", "less"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    assert one == less


def test_stopped_and_gone_on(texts, tmp_path):
    run(texts, tmp_path / "whole", "run.steps=9")
    stopped(texts, tmp_path / "parts", 4, "run.steps=9", "run.log_every=2")
    run(texts, tmp_path / "parts", "run.steps=9", "run.log_every=2")
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert [row[0] for row in parts] == [2, 4, 6, 8, 9]
    assert [row[2] for row in parts][:4] == [(whole[i][2] + whole[i + 1][2]) / 2 for i in (0, 2, 4, 6)]
    assert parts[-1] == whole[-1]
    x, y = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_schedulers_and_closed_terminals_send_loses_nothing(number, texts, tmp_path):
    run(texts, tmp_path / "whole", "run.steps=4")
    trainer = Trainer(read_config(None, settings(texts, tmp_path / "parts", "run.steps=4", "run.save_minutes=100")))
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so in a run
    try:
        is_interrupted(trainer, 1, number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    run(texts, tmp_path / "parts", "run.steps=4")
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_command_ends_with_the_number_of_the_signal(texts, tmp_path):
    options = settings(texts, tmp_path / "out", "run.steps=100000", "run.save_minutes=100")
    command = [sys.executable, "-m", "heronry", "train", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "out" / "log.jsonl"
        while not (log.exists() and log.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "of 100000; the same command resumes from there" in errors.splitlines()[-1]
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 1


def test_muon_goes_on_too(texts, tmp_path):
    trainer = run(texts, tmp_path / "whole", "run.steps=7", "optim.muon=true")
    muon = trainer.optimizer.param_groups[-1]["params"]
    assert len(muon) == 2 * (4 + 2)  # of two blocks: r, k, v, output; key, value
    assert len(muon) + sum(len(g["params"]) for g in trainer.optimizer.param_groups[:-1]) == len(
        list(trainer.model.parameters())
    )
    stopped(texts, tmp_path / "parts", 3, "run.steps=7", "optim.muon=true")
    run(texts, tmp_path / "parts", "run.steps=7", "optim.muon=true")
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert curve(tmp_path / "whole")[-1][2] < curve(tmp_path / "whole")[0][2] - 0.3


@pytest.mark.parametrize(
    "baseline",
    [
        GPT(GPTConfig(64, 2, 64, 96)),
        AFTFull(AFTFullConfig(64, 2, 64, 96, 32, 8)),
        AFTSimple(AFTSimpleConfig(64, 2, 64, 96)),
        LSTM(LSTMConfig(64, 2, 32, 64)),
    ],
    ids=lambda model: model.name,
)
def test_what_rwkv_is_compared_with_learns_by_the_same_loop(baseline, texts, tmp_path):
    torch.manual_seed(0)
    baseline.init_weights()
    options = settings(
        texts, tmp_path / "out", "run.steps=60", "data.order=random", "optim.lr=1e-2", f"data.eval={texts}"
    )
    Trainer(read_config(None, options), model=baseline).train()
    losses = [row[2] for row in curve(tmp_path / "out")]
    assert losses[0] == pytest.approx(math.log(64), abs=0.3)
    assert sum(losses[-5:]) / 5 < 3
    with pytest.raises(InputError, match='"model" must be one of'):
        load(tmp_path / "out")


@pytest.mark.slow
def test_killed_again_and_again(texts, tmp_path):
    """kill -9 at any moment; the same command until it is through."""
    more = ("run.steps=300", "run.save_every=4", "run.keep=2", f"data.eval={texts}", "run.eval_every=7")
    run(texts, tmp_path / "whole", *more)
    command = [sys.executable, "-m", "heronry", "train", *settings(texts, tmp_path / "killed", *more)]
    dice, kills, seen = random.Random(0), 0, 0
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        log, began = tmp_path / "killed" / "log.jsonl", time.monotonic()
        while process.poll() is None and kills < 3:
            if log.exists() and len(log.read_text().splitlines()) > seen and time.monotonic() - began > 1:
                time.sleep(dice.uniform(0, 0.5))
                process.kill()
                kills += 1
                seen = len(log.read_text().splitlines()) + 3
                break
            time.sleep(0.02)
        output = process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, output
    assert kills == 3
    assert same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_runs_in_one_folder(texts, tmp_path):
    """The second one is refused: it would mix its checkpoints, log and model with those of the first."""
    out = tmp_path / "out"
    out.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, out / ".training"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training there; wait for its end, or choose another"):
            run(texts, out, "run.steps=2")
        assert [path.name for path in out.iterdir()] == [".training"]
        other.kill()
    run(texts, out, "run.steps=2")
    assert not (out / ".training").exists()


def test_gradients_that_are_not_finite_move_nothing(texts, tmp_path):
    trainer = Trainer(read_config(None, settings(texts, tmp_path / "out", "run.steps=3")))
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = math.nan
    before = {key: x.clone() for key, x in trainer.model.state_dict().items()}
    assert not math.isfinite(trainer.train_step().grad_norm)
    assert all(torch.equal(before[key], x) or key == "head.weight" for key, x in trainer.model.state_dict().items())
    with pytest.raises(InputError, match="no finite gradients in 20 consecutive steps"):
        Trainer(
            read_config(None, settings(texts, tmp_path / "out", "run.steps=100", "optim.lr=1e30", "optim.clip=0"))
        ).train()


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on(texts, tmp_path):
    """In a process whose files may not grow beyond 100 KB: nothing but the log fits."""
    code = """
        import resource, signal, sys
        from heronry.cli.app import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.argv[0] = "heronry"
        main()
    """
    options = settings(texts, tmp_path / "out", "run.steps=4", "run.save_every=2")
    command = [sys.executable, "-c", textwrap.dedent(code), "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    for step in (2, 4):
        assert f"no checkpoint at step {step}: " in done.stderr
    assert "out: cannot be written (" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [row[0] for row in curve(tmp_path / "out")] == [1, 2, 3, 4]
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("*.part"))


def test_precision_is_what_is_fast_here(texts, tmp_path, monkeypatch):
    for level, expected in (("avx2", "float32"), ("avx512", "bfloat16")):
        monkeypatch.setattr(build, "best_level", lambda level=level: level)
        trainer = Trainer(read_config(None, settings(texts, tmp_path / level, "run.precision=auto", "run.steps=1")))
        assert trainer.precision == expected


def test_what_does_not_fit_in_memory_is_refused(texts, tmp_path):
    options = settings(texts, tmp_path / "out")
    long = refusal(*options, "run.batch=1000000", "data.ctx_len=1000000000")
    tokens = len(TokenFile(texts).tokens)
    assert re.match(
        rf"a pass of 1,000,000 x {tokens:,} tokens takes at least [\d,]+ GB, and cpu has \d+ GB; lower data.ctx_len",
        long,
    )
    large = refusal(*options, "model.n_layer=1000000000", "model.n_embd=1024")
    assert "make 12,582,912.0 billion weights; training them takes at least 201,326,5" in large
    writer = TokenWriter(tmp_path / "long", "uint16")
    writer.write(np.zeros(3_000_000, np.uint16))
    writer.finish({"vocab_size": 50})
    evaluated = (f"data.eval={tmp_path / 'long'}", "data.ctx_len=1000000000", "run.batch=1000")
    assert "a pass of 1,000 x 3,000,000 tokens takes at least " in refusal(*options, *evaluated)
    options = settings(texts, tmp_path / "fits", "run.steps=1", "data.ctx_len=1000000000", "run.batch=1")
    Trainer(read_config(None, options)).train()  # a row is never longer than the data


def test_a_gpu_that_is_not_there_is_told(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:3"):
        message = f"run.device={device}, but PyTorch sees no GPUs here"
        assert message in refusal(*settings(texts, tmp_path / "out", f"run.device={device}"))
    options = settings(texts, tmp_path / "out", "run.device=cpu")
    assert Trainer(read_config(None, options)).accelerator.device.type == "cpu"


def test_what_cannot_be_is_told_first(texts, tmp_path):
    options = settings(texts, tmp_path / "out")
    assert "has token ids up to 49, but the model's vocabulary ends at 39" in refusal(*options, "model.vocab_size=40")
    assert "no such file or folder" in refusal(*options, "model.path=nothing")
    run(texts, tmp_path / "out", "run.steps=2")
    assert "was trained with optim.lr = 0.003, not 0.1; choose another run.out" in refusal(*options, "optim.lr=0.1")
    assert "was trained with model.n_layer = 2, not 3" in refusal(*options, "model.n_layer=3")
    longer = run(texts, tmp_path / "out", "run.steps=4")
    assert [row[0] for row in curve(tmp_path / "out")] == [1, 2, 3, 4]
    assert longer.step == 4


@pytest.mark.slow
def test_two_processes_are_one(texts, tmp_path):
    """gloo, each with half of the rows."""
    run(texts, tmp_path / "one", "run.steps=6", "run.batch=4")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "heronry", "train"]
    options = settings(texts, tmp_path / "two", "run.steps=6")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, env=environment, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [row[:2] for row in one] == [row[:2] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a[2] == pytest.approx(b[2], abs=1e-5)
