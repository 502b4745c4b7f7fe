"""The loss against cross_entropy over all positions at once, and the memory it takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import curve, run
from torch.nn import functional as F

from heronry.data.token_file import TokenFile, TokenWriter
from heronry.train import losses
from heronry.train.config import read_config
from heronry.train.losses import sum_losses
from heronry.train.trainer import Trainer


def by_hand(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide, targets.flatten(), reduction="none")
    return (nats if mask is None else nats * mask.flatten()).sum(), 0.5 * wide.max(-1).values.square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])  # a position at a time, a few, all
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(dtype, chunk, masked, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    random = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(3, 17, 33, generator=random)).to(dtype).requires_grad_()
    targets = torch.randint(33, (3, 17), generator=random)
    mask = torch.rand(3, 17, generator=random) < 0.4 if masked else None
    before = logits.detach().clone()
    found, expected = [], []
    for results, (nats, squares) in (
        (found, sum_losses(logits, targets, mask)),
        (found, sum_losses(logits * 1, targets, mask, overwrite=True)),
        (found, sum_losses(logits.transpose(0, 1), targets.T, None if mask is None else mask.T)),
        (expected, by_hand(logits, targets, mask)),
    ):
        (gradient,) = torch.autograd.grad(nats / 7 + 1e-2 * squares, logits)
        results.append((nats.detach(), squares.detach(), gradient))
    assert torch.equal(logits, before)
    for result in found:
        for a, b in zip(result, expected[0], strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_logits_that_are_overwritten_do_not_serve_twice():
    logits = torch.randn(1, 4, 5, requires_grad=True) * 1
    nats, _ = sum_losses(logits, torch.zeros(1, 4, dtype=torch.int64), None, overwrite=True)
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nats.backward()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_takes_the_memory_of_a_chunk(dtype):
    code = f"""
    import re
    from pathlib import Path
    import torch
    from heronry.train import losses

    def memory(name):
        return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    targets = torch.randint(4096, (1, 40_000))
    mask = torch.rand(1, 40_000) < 0.5
    leaf = torch.randn(1, 40_000, 4096).to(torch.{dtype}).requires_grad_()
    losses.sum_losses(leaf[:, :100] * 1, targets[:, :100], mask[:, :100], overwrite=True)[0].backward()  # warm
    leaf.grad = None
    losses.CHUNK = 1 << 24  # 64 MiB of 610 in all
    logits = leaf.detach().requires_grad_() * 1
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    nats, squares = losses.sum_losses(logits, targets, mask, overwrite=True)
    gradient, = torch.autograd.grad(nats + squares, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    print((memory("VmHWM") - before) / 64)
    """
    output = subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)])
    assert float(output) < 1.3, output


@pytest.fixture
def rarely_counted(tmp_path):
    """Ten documents of 32 tokens; only in the sixth and seventh some count."""
    writer = TokenWriter(tmp_path / "rare", "uint16")
    for i in range(10):
        writer.write(np.arange(32) % 7 + i, np.full(32, i in (5, 6)) & (np.arange(32) > 20))
    writer.finish({"vocab_size": 50})
    return tmp_path / "rare"


@pytest.mark.parametrize("order", ["documents", "carried"])
def test_a_step_in_which_nothing_counts_has_no_loss_and_changes_nothing(order, rarely_counted, tmp_path):
    sizes = ["model.n_layer=1", "model.n_embd=64", "data.ctx_len=32", "run.batch=1", "run.steps=10"]
    more = [f"data.order={order}", "optim.weight_decay=1.0", "optim.warmup=0", "run.precision=float32"]
    config = read_config(None, [f"data.train={rarely_counted}", f"run.out={tmp_path}", *sizes, *more])
    trainer = Trainer(config, quiet=True)
    counted = [bool(trainer.task.sampler.row(i).mask.any()) for i in range(10)]
    assert sum(counted) == 2
    for counts in counted:
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        states = trainer.task.states
        step = trainer.train_step()
        loss = step.loss
        assert math.isfinite(step.grad_norm)
        assert (loss is not None) == counts
        assert loss is None or 1 < loss < 5
        moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
        assert bool(moved) == counts
        assert order == "documents" or trainer.task.states is not states  # they have been read all the same


@pytest.mark.parametrize("accumulate", [1, 5])
def test_the_logged_mean_is_over_the_tokens_that_count(rarely_counted, accumulate, tmp_path):
    """Between two lines of the log, whichever steps they are in, just as an evaluation counts them."""
    file = TokenFile(rarely_counted)
    writer = TokenWriter(tmp_path / "uneven", "uint16")
    for i in range(10):
        writer.write(file.document(i), np.arange(32) < 3 * i)
    writer.finish({"vocab_size": 50})
    uneven = tmp_path / "uneven"
    more = ("run.batch=1", f"run.accumulate={accumulate}", f"run.steps={10 // accumulate}", "run.log_every=10")
    rate = ("optim.lr=1e-12", "optim.lr_final=1e-12", f"data.eval={uneven}", "run.eval_rows=10")
    run(uneven, tmp_path / "out", *more, *rate)
    ((*_, logged, _, _),) = curve(tmp_path / "out")
    assert logged == pytest.approx(evaluation(tmp_path / "out"), rel=1e-6)


def test_the_logged_mean_is_of_the_steps_with_a_loss(rarely_counted, tmp_path):
    rate = ("optim.lr=1e-12", "optim.lr_final=1e-12", f"data.eval={rarely_counted}", "run.eval_rows=10")
    run(rarely_counted, tmp_path / "out", "run.batch=1", "run.steps=10", "run.log_every=10", *rate)
    ((*_, logged, _, _),) = curve(tmp_path / "out")
    assert logged == pytest.approx(evaluation(tmp_path / "out"), rel=1e-5)


def evaluation(out: Path) -> float | None:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return next(row["eval_loss"] for row in rows if "eval_loss" in row)


def test_an_evaluation_in_which_nothing_counts_is_no_zero(rarely_counted, texts, tmp_path):
    file = TokenFile(rarely_counted)
    writer = TokenWriter(tmp_path / "none", "uint16")
    writer.write(file.document(0), np.zeros(32, bool))
    writer.finish({"vocab_size": 50})
    run(texts, tmp_path / "out", "run.steps=1", f"data.eval={tmp_path / 'none'}")
    assert evaluation(tmp_path / "out") is None
