"""Models in pieces: what two or three processes do together is what one does, and what they keep any of them reads.

Starting processes takes seconds, so that they are started once for everything and the tests look at what they left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from many_runs import most_likely
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpointing import made
from test_trainer import curve, same, settings

from heronry.checkpoint import load, save
from heronry.errors import InputError
from heronry.models import MODELS
from heronry.train.checkpointing import find_latest_checkpoint, restore_checkpoint
from heronry.train.config import read_config
from heronry.train.trainer import Trainer

pytestmark = pytest.mark.slow  # a minute of three processes; test_carried.py and test_trainer.py keep two

KEPT = ["run.steps=3", "run.save_every=2", "run.keep=9"]
CARRIED = [
    *KEPT,
    "model.generation=rwkv6",
    "model.n_layer=1",
    "data.order=carried",
    "data.ctx_len=8",
    "data.tbptt_chunks=2",
]
TUNED = [*KEPT, "model.tune=state", "data.order=carried", "data.ctx_len=8"]
TWELVE = [*KEPT, "run.accumulate=2"]  # rows in a step: batch=6 alone, 3 of two processes, 2 of three
LOOKING = ["run.sample_every=2", "run.eval_every=2", "run.eval_rows=7"]


def alone(texts: Path, out: Path, *more: str) -> list[tuple]:
    trainer = Trainer(read_config(None, settings(texts, out, *more)))
    trainer.generate_sample = most_likely
    trainer.train()
    return curve(out)


def base(generation: str, folder: Path, broken: int | None = None) -> Path:
    """A model whose weights and whose initial state are anything; one token's embedding may be no number."""
    cls = MODELS[generation]
    torch.manual_seed(0)
    model = cls(cls.Config.sized(64, 1, 64))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        if broken is not None:
            model.emb.weight[broken] = torch.nan
        else:
            for name, p in model.tune_state().named_parameters():
                if name in model.time_states():
                    p.normal_(std=0.3)
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory) -> Path:
    """one/ is what one process did, two/ what two did, three/ what three made of the checkpoints of two or of one."""
    here = tmp_path_factory.mktemp("shards")
    tuned, broken = base("rwkv5", here / "tuned"), base("rwkv7", here / "broken", broken=49)
    runs = {
        "rwkv7": [*TWELVE, *LOOKING, f"data.eval={texts}"],
        "rwkv4": [*TWELVE, "model.generation=rwkv4", "model.n_layer=1", "run.checkpointing=true"],
        "carried": CARRIED,
        "state": [*TUNED, f"model.path={tuned}"],
        "all": [*KEPT, f"model.path={tuned}", "optim.clip=0"],
        "broken": [*KEPT, f"model.path={broken}", "data.ctx_len=3", "run.steps=4"],
    }
    for name, more in runs.items():
        alone(texts, here / "one" / name, *more, "run.batch=6")

    def told(number: str, name: str, more: list[str], kind: str, batch: int, **besides: object) -> dict:
        these = settings(texts, here / number / name, *more, f"run.shard={kind}", f"run.batch={batch}")
        return {"settings": these, **besides}

    def kept(number: str, name: str, *steps: int) -> list[str]:
        return [str(here / number / name / "checkpoints" / f"step-{step:08}") for step in steps]

    kinds = {"rwkv4": "gradients", "all": "gradients"}
    two = [told("two", name, more, kinds.get(name, "full"), 3) for name, more in runs.items()]
    two += [
        told("two", "again", runs["carried"], "full", 3, **{"from": kept("two", "carried", 2)}),
        told("two", "full", runs["rwkv4"], "full", 3, **{"process 1": "full disk"}),
        told("two", "killed", runs["rwkv4"], "full", 3, **{"process 1": "killed"}),
    ]
    steps = kept("two", "rwkv4", 2, 3)
    three = [
        told("three", "rwkv4", runs["rwkv4"], "full", 2, **{"from": steps, "damage": steps[1]}),
        told("three", "carried", CARRIED, "full", 2, **{"from": kept("two", "carried", 2)}),
        told("three", "all", runs["all"], "gradients", 2, **{"from": kept("one", "all", 2)}),
    ]
    command = [sys.executable, str(Path(__file__).with_name("many_runs.py")), json.dumps([[2, two], [3, three]])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=500)
    (here / "told").write_text(done.stderr)
    # what a process that dies was printing may stand in front of it
    failed = re.findall(r"process \d+ terminated with .*|-- Process .*", done.stderr)
    assert failed == ["process 1 terminated with signal SIGKILL"], done.stderr[-3000:]
    return here


def close(found: list[tuple], expected: list[tuple]) -> bool:
    """Steps, tokens and rates are the same, losses to 1e-5, gradients to a 1e-4th of them."""
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a[2] == pytest.approx(b[2], abs=1e-5)
        assert a[3:] == pytest.approx(b[3:], rel=1e-4, nan_ok=True)
    return True


@pytest.mark.parametrize("name", ["rwkv7", "rwkv4", "carried", "state", "all"])
def test_two_processes_are_one(name, folder):
    one, two = folder / "one" / name, folder / "two" / name
    assert len(curve(one)) == 3
    assert close(curve(two), curve(one))
    if name == "state":
        a, b = (load_file(out / "time_state.safetensors") for out in (one, two))
    else:
        a, b = load(one).state_dict(), load(two).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5) for key in a)


def test_what_is_looked_at_on_the_way(folder):
    a, b = ([json.loads(x) for x in (folder / n / "rwkv7" / "log.jsonl").open()] for n in ("one", "two"))
    for key in ("eval_loss", "sample"):
        found, expected = ([row[key] for row in rows if key in row] for rows in (b, a))
        assert len(expected) == 2
        assert found == (expected if key == "sample" else pytest.approx(expected, abs=1e-5))


def test_gradients_of_one_process_that_are_not_finite_move_nothing(folder):
    one, two = curve(folder / "one" / "broken"), curve(folder / "two" / "broken")
    finite = [row[2] is not None for row in one]
    assert any(finite)
    assert not all(finite)
    assert [row[2] is not None for row in two] == finite
    assert [row[2] for row in two if row[2]] == pytest.approx([row[2] for row in one if row[2]], abs=1e-5)
    for out in ("one", "two"):
        model = load(folder / out / "broken").state_dict()
        assert {key for key, x in model.items() if not x.isfinite().all()} == {"emb.weight"}
        assert int(model["emb.weight"].isnan().any(1).sum()) == 1


def test_every_process_writes_its_own_without_a_pickle(folder):
    path = folder / "two" / "rwkv7" / "checkpoints" / "step-00000002"
    pieces = sorted(path.glob("shard-*.safetensors"))
    assert {file.name for file in path.iterdir()} == {"run.json", *(file.name for file in pieces)}
    assert len(pieces) == 2
    key, numbers = "blocks.1.ffn.key.weight", []
    for piece in pieces:
        with safe_open(piece, "pt") as file:
            assert file.get_slice(key).get_shape() == [128, 64]
            assert file.get_slice(f"{key}|exp_avg").get_shape() == [128, 64]
            numbers.append(sum(file.get_tensor(name).numel() for name in file.keys()))  # noqa: SIM118
    assert max(numbers) < 1.1 * min(numbers)
    with pytest.raises(InputError, match=r"no config\.json in the folder, only the shards of a training run"):
        load(path)


def test_going_on_as_before_is_the_same_to_the_bit(folder):
    a, b = load(folder / "two" / "again").state_dict(), load(folder / "two" / "carried").state_dict()
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert curve(folder / "two" / "again") == curve(folder / "two" / "carried")[2:]


@pytest.mark.parametrize("name", ["rwkv4", "carried", "all"])
def test_three_go_on(name, folder):
    """Where two have stopped, or (all) one that had everything; the newest checkpoint of rwkv4 is damaged."""
    assert close(curve(folder / "three" / name), curve(folder / "one" / name)[2:])
    damaged = [line for line in (folder / "told").read_text().splitlines() if "which is damaged" in line]
    assert len(damaged) == 1
    assert "step-00000003, which is damaged (shard-00002-model-00001-of-00001.safetensors)" in damaged[0]


@pytest.mark.parametrize("name", ["rwkv7", "carried", "state"])
def test_one_goes_on(name, folder, texts, tmp_path, caplog):
    """And reads only what belongs to the checkpoint, all of it."""
    out = tmp_path / "out"
    path = folder / "tuned" if name == "state" else ""
    more = [*{"rwkv7": TWELVE, "carried": CARRIED, "state": TUNED}[name], "run.batch=6", f"model.path={path}"]
    shutil.copytree(folder / "two" / name / "checkpoints", out / "checkpoints")
    last = out / "checkpoints" / "step-00000003"
    if name == "rwkv7":
        (last / "shard-00002-model-00001-of-00001.safetensors").unlink()
    else:
        shutil.copy(last / "shard-00002-model-00001-of-00001.safetensors", last / "shard-00003.safetensors")
    assert close(alone(texts, out, *more), curve(folder / "one" / name)[2:])
    assert caplog.text.count("step-00000003, which is damaged (shard-0000") == 1


def test_pieces_of_another_model_are_refused(folder):
    path = folder / "two" / "rwkv7" / "checkpoints" / "step-00000002"
    with pytest.raises(InputError, match=r"step-00000002: a checkpoint of another model .blocks.2.*is missing"):
        restore_checkpoint(path, *made(layers=3))
    with pytest.raises(
        InputError, match=r"step-00000002: has optimizer state for blocks.1.*, which is not trained here"
    ):
        restore_checkpoint(path, *made(layers=1))


def test_killed_while_it_writes(folder, texts):
    out = folder / "two" / "killed"
    assert [row[0] for row in curve(out)] == [1, 2, 3]
    assert not (out / "model.safetensors").exists()
    found = find_latest_checkpoint(out / "checkpoints")
    assert found is not None
    assert found[0].name == "step-00000002"
    more = [*TWELVE, "model.generation=rwkv4", "model.n_layer=1", "run.checkpointing=true"]
    assert close(alone(texts, out, *more, "run.batch=6"), curve(folder / "one" / "rwkv4"))
    assert not list((out / "checkpoints").glob(".*"))


def test_a_full_disk_of_one_process(folder):
    output = (folder / "told").read_text()
    for step in (2, 3):
        assert output.count(f"no checkpoint at step {step}: ") == 1
    out = folder / "two" / "full"
    assert not list((out / "checkpoints").iterdir())
    assert same(out, folder / "two" / "rwkv4")  # whether the weights are put together once or twice is all the same
