"""States that go from row to row: a document of any length, in rows of any length, is one text."""

from __future__ import annotations

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from binidx import write_binidx
from test_sequence_parallel import spread
from test_trainer import curve, run, same, settings, stopped, weights

from heronry.data.batching import LaneSampler
from heronry.data.token_file import TokenFile
from heronry.errors import InputError
from heronry.train.config import read_config
from heronry.train.trainer import Trainer

CARRIED = ["data.order=carried", "run.batch=3", "model.n_layer=1", "run.precision=float64", "optim.l2wrap=0"]


@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_every_lane_reads_on(lanes, texts):
    """Row after row of a lane are the documents without a gap; all lanes together read every token once an epoch."""
    file = TokenFile(texts)
    rows = LaneSampler(file, 16, lanes, seed=3)
    seen = []
    for lane in range(lanes):
        number = (lane + 1) * rows.rows_per_epoch // lanes - lane * rows.rows_per_epoch // lanes
        mine = [rows.row(step * lanes + lane) for step in range(number)]
        seen += [row.targets for row in mine]
        assert not mine[0].continues
        for before, after in pairwise(mine):
            if after.continues:
                assert after.inputs[0] == before.targets[-1]
            else:
                assert after.inputs[0] == file.end_of_text
        assert not rows.row(number * lanes + lane).continues  # the next epoch
    assert np.array_equal(np.sort(np.concatenate(seen)), np.sort(file.tokens))
    with pytest.raises(InputError, match=f"too small: {rows.rows_per_epoch} rows of 16 tokens for 1000 lanes"):
        LaneSampler(file, 16, 1000)


@pytest.mark.parametrize("generation", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_gradients_go_through_the_cut(generation, tmp_path):
    """Rows of 8 tokens, 4 of them in a step, are rows of 32: the loss, and how all weights move, in float64."""
    more = [*CARRIED, f"model.generation={generation}", "run.steps=4"]
    one = write_binidx(tmp_path / "one", [np.arange(3 * 4 * 32) * 7 % 50])
    for name, *how in (("a", "data.ctx_len=32"), ("b", "data.ctx_len=8", "data.tbptt_chunks=4")):
        run(one, tmp_path / name, *more, *how)
    a, b = curve(tmp_path / "a"), curve(tmp_path / "b")
    assert len(a) == 4
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-9)
    x, y = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(x[key], y[key], rtol=1e-7, atol=1e-9) for key in x)
    cut = run(one, tmp_path / "c", *more, "data.ctx_len=8", "run.steps=16")
    assert curve(tmp_path / "c")[-1][3] != pytest.approx(a[-1][3], rel=1e-3)
    assert cut.step == 16


def test_what_is_carried_counts(tmp_path):
    """A step learns nothing, but its loss is that of the whole document read at once."""
    one = write_binidx(tmp_path / "one", [np.arange(128) * 7 % 50])
    trainer = Trainer(
        read_config(None, settings(one, tmp_path / "out", *CARRIED[2:], "data.order=carried", "run.batch=1"))
    )
    text = torch.tensor([[0, *(np.arange(128) * 7 % 50)]])
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        whole = torch.nn.functional.cross_entropy(trainer.model(text[:, :-1])[0][0], text[0, 1:], reduction="none")
    found = []
    for group in trainer.optimizer.param_groups:
        group["base_lr"] = 0.0
    for _ in range(4):
        found.append(trainer.train_step().loss)
    assert found == pytest.approx(whole.view(4, 32).mean(1).tolist(), rel=1e-9)


def test_what_is_not_finite_is_not_carried(texts, tmp_path):
    trainer = Trainer(read_config(None, settings(texts, tmp_path / "out", "data.order=carried", "data.ctx_len=8")))
    trainer.train_step()
    before = trainer.task.states
    weight = trainer.model.head.weight
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] = torch.nan
        trainer.model.blocks[0].ln1.weight[0] = torch.nan
    assert np.isnan(trainer.train_step().grad_norm)
    assert trainer.task.states is before
    with torch.no_grad():
        weight[0, 0] = kept
        trainer.model.blocks[0].ln1.weight[0] = 1
    assert np.isfinite(trainer.train_step()).all()
    assert all(x.isfinite().all() for state in trainer.task.states.values() for layer in state.layers for x in layer)


def test_stopped_and_gone_on(texts, tmp_path):
    more = ["data.order=carried", "data.tbptt_chunks=2", "data.ctx_len=8", "run.steps=7", "run.accumulate=2"]
    run(texts, tmp_path / "whole", *more)
    stopped(texts, tmp_path / "parts", 3, *more)
    run(texts, tmp_path / "parts", *more)
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_are_one(texts, tmp_path):
    """And one goes on where two have stopped, with the states of all lanes."""
    more = ["data.order=carried", "data.ctx_len=8", "data.tbptt_chunks=2"]
    run(texts, tmp_path / "one", *more, "run.steps=6", "run.batch=2", "run.accumulate=2")
    options = settings(texts, tmp_path / "two", *more, "run.steps=6", "run.batch=1", "run.accumulate=2")
    assert spread((2, [[*options, "run.save_every=3", "run.keep=9"]])) == []
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a[2] == pytest.approx(b[2], abs=1e-5)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")  # back to step 3, alone
    (tmp_path / "two" / "model.safetensors").unlink()
    run(texts, tmp_path / "two", *more, "run.steps=6", "run.batch=2", "run.accumulate=2")
    again = curve(tmp_path / "two")
    assert [row[0] for row in again] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, again, strict=True):
        assert a[2] == pytest.approx(b[2], abs=1e-5)
