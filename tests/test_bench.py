"""The benchmarks: what they count and what they report. Never a time."""

from __future__ import annotations

import json
import os

import pytest

from heronry import RWKV4, RWKV7, InputError
from heronry.bench.contest import Contest, Row
from heronry.bench.contestants import Heronry, Operator
from heronry.bench.machine import Machine
from heronry.bench.run import TOPICS, run_contests, run_topics
from heronry.bench.shapes import Shape
from heronry.bench.worker import Contestant, ContestantError, Worker
from heronry.models import RWKV4Config, RWKV7Config

TINY = Shape("rwkv7", 2, 64, 300)


class NotInstalled:
    """A peer that is not installed."""

    package, module = "no-such-package", "no_such_module"


class Dies:
    """A peer whose process exits while loading."""

    def load(self) -> None:
        print("something is very wrong", flush=True)
        os._exit(3)


@pytest.mark.parametrize(
    ("family", "model"),
    [("rwkv7", RWKV7(RWKV7Config.sized(300, 2, 64))), ("rwkv4", RWKV4(RWKV4Config.sized(300, 2, 64)))],
)
def test_a_token_reads_the_weights_without_the_embedding_and_the_state_twice(family, model):
    shape = Shape(family, 2, 64, 300)
    weights = sum(p.nbytes for p in model.parameters())
    assert shape.weight_bytes("float32") == weights
    assert shape.bytes_per_token("float32") == weights - model.emb.weight.nbytes + 2 * model.initial_state().nbytes
    assert shape.bytes_per_token("int4") < shape.bytes_per_token("int8") < shape.bytes_per_token("bfloat16")


def test_every_row_is_compared_with_rows_of_its_contest():
    for topic in TOPICS.values():
        for contest in topic(False, True):
            names = [row.name for row in contest.rows]
            assert len(set(names)) == len(names)
            for row in contest.rows:
                assert {*row.against, *filter(None, (row.limit, row.part_of))} <= set(names)


@pytest.mark.parametrize("name", ["wkv4", "wkv5", "wkv6", "wkv7", "biwkv", "biwkv6"])
def test_every_operator_runs(name):
    operator = Operator(name, 2, 6, 64, "float32")
    operator.load()
    operator.forward("chunked", 2)()
    operator.backward("reference", 2)()


@pytest.mark.slow
def test_figures_and_table(tmp_path, capsys):
    out = tmp_path / "figures.json"

    def row(name, job, options, **more):
        return Row(name, Contestant(Heronry, ("float32",)), job, options, file=(TINY, "pth"), units=2, **more)

    size = TINY.bytes_per_token("float32")
    rows = [
        Row("reading", Contestant(Machine), "read", (size, 1), cost=size),
        row(
            "one",
            "decode",
            (2,),
            cost=2 * size,
            limit="reading",
            against=("two",),
            weights=TINY.weight_bytes("float32"),
        ),
        row("two", "decode", (1, 2)),
        row("three", "decode", (1, -2)),
        Row("absent", Contestant(NotInstalled), "decode"),
    ]
    figures = run_contests([Contest("decode", "tiny", "token", rows, memory=True)], blocks=2, out=out)

    assert json.loads(out.read_text()) == figures
    assert {"processor", "cores", "torch"} <= figures["machine"].keys()
    (contest,) = figures["contests"]
    assert (contest["topic"], contest["title"], contest["unit"]) == ("decode", "tiny", "token")
    limit, one, two, failed, missing = contest["rows"]
    assert limit["best_per_second"] > 0
    assert one["ms"] == pytest.approx(1000 / one["per_second"])
    assert len(one["blocks"]) == 2
    assert one["share"] > 0
    assert one["times_as_fast_as"]["two"] > 0
    assert one["load_seconds"] > 0
    if os.path.exists("/proc/self/status"):
        assert one["peak_bytes"] >= one["resident_bytes"] > one["anonymous_bytes"] > 0
        assert one["beyond_weights_bytes"] == one["resident_bytes"] - TINY.weight_bytes("float32")
    assert two["ms"] > 0
    assert failed["name"] == "three"
    assert failed["problem"].startswith("RuntimeError: ")
    assert missing == {"name": "absent", "problem": "not installed: pip install no-such-package"}
    printed = capsys.readouterr().out
    assert "pip install no-such-package" in printed
    assert "| one" in printed


def test_a_contestant_that_dies_is_reported():
    with pytest.raises(ContestantError, match="exit code 3: something is very wrong"):
        Worker(Contestant(Dies))


@pytest.mark.parametrize("options", [{"topics": ["speed"]}, {"blocks": 0}])
def test_bad_options(options):
    with pytest.raises(InputError):
        run_topics(**options)
