"""Training on several sources: what each has given is logged and kept, and a run that resumes is the same run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_sequence_parallel import assert_same, spread
from test_trainer import EXACT, refusal, same, stopped
from test_trainer import run as run_one

from heronry.data.token_file import TokenWriter
from heronry.errors import InputError
from heronry.train.config import WeightedSource, from_dict, read_config
from heronry.train.trainer import Trainer

TRAINED = ["run.steps=6", "model.n_layer=1", "data.ctx_len=8"]
CARRIED = [*TRAINED, "data.order=carried", "data.tbptt_chunks=2", "run.accumulate=2"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two token files, the second with a mask and so small that it is read several times."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    for name, lengths in (("large", [30] * 12), ("small", [50, 7, 33])):
        writer = TokenWriter(folder / name, "uint16")
        for n in lengths:
            ids = random.integers(0, 50, n)
            writer.write(ids, ids % 4 > 0 if name == "small" else None)
        writer.finish({})
    return [folder / "large", folder / "small"]


def mixture(sources: list[Path], *weights: float) -> str:
    items = [f'{{path="{path}", weight={weight}}}' for path, weight in zip(sources, weights, strict=True)]
    return f"[{', '.join(items)}]"


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "more", [TRAINED, CARRIED, [*TRAINED, "data.order=shuffle"]], ids=["documents", "carried", "shuffle"]
)
def test_a_run_that_resumes_is_the_run_that_was_never_stopped(sources, tmp_path, more):
    train = mixture(sources, 1, 2)
    trainer = run_one(train, tmp_path / "whole", *more)
    stopped(train, tmp_path / "parts", 2, *more)
    run_one(train, tmp_path / "parts", *more)
    assert same(tmp_path / "whole", tmp_path / "parts")
    last, rows = lines(tmp_path / "whole")[-1], trainer.task.sampler
    found = [row for row in lines(tmp_path / "parts") if "loss" in row]
    assert [row[f"tokens/{sources[0]}"] + row[f"tokens/{sources[1]}"] for row in found] == [
        row["tokens"] for row in found
    ]
    read = [rows.row(i) for i in range(6 * trainer.task.rows_per_step)]
    for number, (path, size) in enumerate(zip(sources, (360, 90), strict=True)):
        tokens = sum(len(row.targets) for row in read if row.source == number)
        targets = size - (more[-1] == "data.order=shuffle")  # no window has the first token as a target
        assert (last[f"tokens/{path}"], last[f"epochs/{path}"]) == (tokens, tokens / targets)
    kept = json.loads((tmp_path / "parts" / "checkpoints" / "step-00000006" / "run.json").read_text())
    assert kept["sources"] == {key: last[key] for key in last if "/" in key}
    assert kept["config"]["data.train"] == [
        {"path": str(sources[0]), "weight": 1.0},
        {"path": str(sources[1]), "weight": 2.0},
    ]


def test_what_is_carried_is_of_the_same_source(sources, tmp_path):
    """With weights that never move, the loss of a carried row is that of its source read alone, from its beginning."""
    options = [
        *EXACT,
        "run.precision=float64",
        "optim.l2wrap=0",
        "model.n_layer=1",
        "data.order=carried",
        "run.batch=1",
    ]
    options += ["data.ctx_len=8", f"run.out={tmp_path / 'out'}"]

    def losses(train: str | Path, steps: int) -> list[float]:
        trainer = Trainer(read_config(None, [*options, f"data.train={train}"]), quiet=True)
        for group in trainer.optimizer.param_groups:
            group["base_lr"] = 0.0
        return [trainer.train_step()[0] for _ in range(steps)]

    alone = [losses(path, 12) for path in sources]
    trainer = Trainer(read_config(None, [*options, f"data.train={mixture(sources, 1, 1)}"]), quiet=True)
    order = [trainer.task.sampler.row(i).source for i in range(12)]
    assert {*order} == {0, 1}
    expected = [alone[source][order[:i].count(source)] for i, source in enumerate(order)]
    assert losses(mixture(sources, 1, 1), 12) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_two_processes_are_one_and_one_resumes_what_two_have_kept(sources, tmp_path):
    train = mixture(sources, 1, 2)
    for name, more in (("documents", TRAINED), ("carried", CARRIED)):
        accumulate = "run.accumulate=2" if name == "carried" else "run.accumulate=1"
        run_one(train, tmp_path / name, *more, "run.batch=2", accumulate)
        options = [*EXACT, f"data.train={train}", f"run.out={tmp_path / name}-2", *more, "run.batch=1", accumulate]
        assert spread((2, [[*options, "run.steps=3"]])) == []
        (tmp_path / f"{name}-2" / "model.safetensors").unlink()
        run_one(train, tmp_path / f"{name}-2", *more, "run.batch=2", accumulate)
        assert_same(tmp_path / name, tmp_path / f"{name}-2")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("full", TRAINED), ("gradients", CARRIED)], ids=["full", "gradients"])
def test_a_sharded_run_reads_the_same_and_resumes(kind, more, sources, tmp_path):
    train = mixture(sources, 1, 2)
    run_one(train, tmp_path / "one", *more, "run.batch=2")
    options = [*EXACT, f"data.train={train}", f"run.out={tmp_path / 'two'}", *more, "run.batch=1", f"run.shard={kind}"]
    assert spread((2, [[*options, "run.steps=3"], options])) == []
    assert_same(tmp_path / "one", tmp_path / "two")
    read = [
        [{key: x for key, x in row.items() if "/" in key} for row in lines(tmp_path / name) if "loss" in row]
        for name in ("one", "two")
    ]
    assert read[0] == read[1]
    assert len(read[0]) == 6


def test_a_source_that_has_changed_is_noticed(sources, tmp_path):
    names = []
    for path in sources:
        for suffix in (".bin", ".idx", ".json", ".mask"):
            if path.with_name(path.name + suffix).exists():
                (tmp_path / (path.name + suffix)).write_bytes(path.with_name(path.name + suffix).read_bytes())
        names.append(tmp_path / path.name)
    run_one(mixture(names, 1, 2), tmp_path / "out", *TRAINED)
    options = [*EXACT, *TRAINED, f"run.out={tmp_path / 'out'}"]
    assert "was trained with data.train = [{'path': " in refusal(*options, f"data.train={mixture(names, 1, 3)}")
    writer = TokenWriter(names[1], "uint16")
    writer.write(np.arange(40))
    writer.finish({})
    message = refusal(*options, f"data.train={mixture(names, 1, 2)}")
    assert "the sources of data.train have changed in size since; choose another run.out to start over" in message


def test_how_a_mixture_is_written(tmp_path):
    expected = (WeightedSource("a", 3.0), WeightedSource("b c", 0.5))
    assert read_config(None, ['data.train=[{path="a", weight=3}, {path="b c", weight=0.5}]']).data.train == expected
    for text in (
        '[data]\ntrain = [{path = "a", weight = 3}, {path = "b c", weight = 0.5}]\n',
        '[[data.train]]\npath = "a"\nweight = 3\n\n[[data.train]]\npath = "b c"\nweight = 0.5\n',
    ):
        (tmp_path / "run.toml").write_text(text)
        config = read_config(tmp_path / "run.toml")
        assert config.data.train == expected
        assert from_dict(json.loads(json.dumps(asdict(config)))) == config
        assert read_config(tmp_path / "run.toml", ["data.train=d"]).data.train == "d"
    assert read_config(None, ["data.train=[1984]x"]).data.train == "[1984]x"  # the name of a file


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ('[{path="a", weight=0}]', "data.train: the weight of a must be positive, got 0.0"),
        ('[{path="a", weight=1}, {path="b", weight=-2}]', "data.train: the weight of b must be positive, got -2.0"),
        ('[{path="a", weight=nan}]', "data.train: the weight of a must be positive, got nan"),
        ('[{path="a", weight=inf}]', "data.train: the weight of a must be positive, got inf"),
        ('[{path="a", weight="1"}]', "data.train[0].weight must be a number, got '1'"),
        ('[{path="a", weight=true}]', "data.train[0].weight must be a number, got True"),
        ("[{path=3, weight=1}]", "data.train[0].path must be a string, got 3"),
        ('[{path="", weight=1}]', "data.train: a path is empty"),
        ('[{path="a"}]', "data.train[0] has no weight"),
        ('[{path="a", wieght=1}]', "unknown data.train setting 'wieght'; did you mean 'weight'?"),
        ('["a", "b"]', "data.train[0] must be a table, {path = ..., weight = ...}, got 'a'"),
        ('[{path="a", weight=1}, {path="a", weight=2}]', "data.train: a is there twice; add up its weights"),
        ("[]", "data.train is missing"),
        ("[{path=a,weight=1}]", "data.train is no list of TOML: '[{path=a,weight=1}]'; write it as 'data.train=["),
    ],
)
def test_a_mixture_that_cannot_be_is_named_before_any_time_is_spent(train, message):
    with pytest.raises(InputError) as refused:
        read_config(None, [f"data.train={train}"])
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_images_are_no_mixture():
    with pytest.raises(InputError, match=r"data.train must be one folder or data set of images for vrwkv"):
        read_config(None, ["model.generation=vrwkv", 'data.train=[{path="a", weight=1}]'])
