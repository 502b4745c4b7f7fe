"""Settings: what is not known, or cannot be, is named in one line before any time is spent."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from heronry.data.batching import magic_prime
from heronry.errors import InputError
from heronry.models import MODELS, RWKV7, VISION_MODELS, RWKV7Config
from heronry.models.vision import SHIFTS
from heronry.quantization import FORMATS
from heronry.train.config import (
    GENERATIONS,
    VISION_GENERATIONS,
    Config,
    ModelSection,
    OptimSection,
    VisionSection,
    from_dict,
    parse_arguments,
    read_config,
)
from heronry.train.optim import build_optimizer
from heronry.train.schedule import lr_factor, set_lr

WRONG = [
    ("optimizer.lr=1", "unknown section 'optimizer'; did you mean 'optim'?"),
    ("optim.rate=1", "unknown optim setting 'rate'; choose from lr, lr_final"),
    ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
    ("optim.lr=0", "optim.lr must be positive, got 0.0"),
    ("optim.betas=[0.9]", "optim.betas must be 2 numbers, got [0.9]"),
    ("optim.betas=[0.9, 1.0]", "optim.betas must be in [0, 1), got [0.9, 1.0]"),
    ("run.batch=1.5", "run.batch must be a whole number, got 1.5"),
    ("run.batch=true", "run.batch must be a whole number, got True"),
    ("run.compile=1", "run.compile must be true or false, got 1"),
    ("run.shard=half", "run.shard is 'half'; known: none, gradients, full"),
    ("run.precision=int8", "run.precision is 'int8'; known: auto, bfloat16, float32, float64"),
    ("run.steps=-1", "run.steps must not be negative, got -1"),
    ("model.generation=rwkv3", "model.generation is 'rwkv3'; known: rwkv4, rwkv5, rwkv6, rwkv7"),
    (
        "data.order=sorted",
        "data.order is 'sorted'; known: documents, carried, shuffle, magic_prime, random, sequential",
    ),
    ("data.train=", "data.train is missing"),
    ("data.ctx_len=0", "data.ctx_len must be positive, got 0"),
    ("optim.lr=nan", "optim.lr must be finite, got nan"),
    ("optim.clip=inf", "optim.clip must be finite, got inf"),
    ("optim.betas=[nan, 0.9]", "optim.betas must be finite, got [nan, 0.9]"),
    ("optim.eps=1" + "0" * 400, "optim.eps must be finite, got inf"),
    ("run.seed=-1", "run.seed must be from 0 to 2^64 - 1, got -1"),
    ("run.seed=18446744073709551616", "run.seed must be from 0 to 2^64 - 1, got 18446744073709551616"),
    ("run.ema=1", "run.ema must be in [0, 1), got 1.0"),
    ("run.device=tpu", "run.device is 'tpu'; known: auto, cpu, cuda, cuda:0, cuda:1"),
    ("run.device=cuda:x", "run.device is 'cuda:x'"),
    ("run.epochs=1e308", "run.epochs must be from 0 to 1,000,000, got 1e+308"),
    ("run.accumulate=1000000000", "run.accumulate must be from 1 to 1,000,000, got 1000000000"),
    ("model.rank=0", "model.rank must be positive, got 0"),
    ("run.epochs=0", "run.steps and run.epochs are both 0, so there is nothing to do"),
    ("model.vocab_size=-1", "model.vocab_size must not be negative, got -1"),
    ("model.targets=key", "model.targets must be a list of strings, got 'key'"),
    ("vision.workers=-2", "vision.workers must be -1 or more, got -2"),
    ("vision.rand_augment=31", "vision.rand_augment must be from 0 to 30, got 31"),
    ("lr", "'lr' is not a setting; write section.key=value"),
    ("lr=1", "'lr=1' is not a setting"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG)
def test_what_is_wrong_is_named(setting, message):
    with pytest.raises(InputError) as refusal:
        read_config(None, ["data.train=some", setting])
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.shard=full", "model.tune=lora", "model.path=x"], "run.shard does not work with model.tune=lora"),
        (["run.shard=gradients", "optim.muon=true"], "optim.muon does not work with run.shard"),
    ],
)
def test_what_does_not_go_together_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        read_config(None, ["data.train=some", *settings])


def test_a_file_and_settings_on_top(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[data]\ntrain = "texts"\n[optim]\nlr = 1\nbetas = [0.9, 0.95]\n[run]\nbatch = 4\n')
    config = read_config(file, ["run.batch=2", "data.eval=held=out", "optim.lr_final=1e-4"])
    assert config.optim == OptimSection(lr=1.0, lr_final=1e-4, betas=(0.9, 0.95))
    assert (config.run.batch, config.data.train, config.data.eval) == (2, "texts", "held=out")
    assert from_dict(asdict(config)) == config
    assert Config().run.batch == 8


def test_what_a_string_may_be_without_quotes():
    config = read_config(None, ["data.train=1984", "run.out=1e3", "run.wandb=true", 'run.sample_prompt="\\t"'])
    run = config.run
    assert (config.data.train, run.out, run.wandb, run.sample_prompt) == ("1984", "1e3", "true", "\t")


def test_arguments(tmp_path, monkeypatch):
    """A file or a setting comes first, and what is neither is told."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_bytes(b'\xef\xbb\xbf[data]\ntrain = "texts"\n')  # with the mark that Notepad writes
    Path("a=b.toml").write_text('[data]\ntrain = "others"\n')
    assert parse_arguments(["run.toml", "run.batch=2"]).run.batch == 2
    assert parse_arguments(["a=b.toml"]).data.train == "others"
    assert parse_arguments(["data.train=c"]).data.train == "c"
    for arguments, message in (
        (["data.train"], "data.train has no value; write data.train=VALUE"),
        (["data.trein"], "data.trein: no such file; a setting is written data.train=VALUE"),
        (["none.toml"], "none.toml: no such file"),
        (["run.toml", "data.train"], "'data.train' is not a setting; write section.key=value, like optim.lr=1e-3"),
        ([], "data.train is missing: "),
    ):
        with pytest.raises(InputError) as refusal:
            parse_arguments(arguments)
        assert str(refusal.value).startswith(message)


def test_the_help_has_every_setting_with_its_default(command):
    code, out, _ = command("train", "--help")
    assert code == 0
    found = {}
    for line in out.splitlines():
        if header := re.match(r"  \[(\w+)\] ", line):
            section = found[header[1]] = {}
        elif line.startswith("    ") and (entry := re.match(r"    (\w+) = (.*?)  +\S", line)):
            section[entry[1]] = json.loads(entry[2])
    assert found == json.loads(json.dumps(asdict(Config())))
    help_of = [key.metadata["help"] for section in fields(Config) for key in fields(section.default_factory)]
    assert all(help_of)
    assert max(map(len, out.splitlines())) <= 104


def test_the_names_here_are_those_of_the_models():
    assert (*MODELS,) == GENERATIONS
    assert (*VISION_MODELS,) == VISION_GENERATIONS
    known = {key.name: key.metadata["known"] for section in (ModelSection, VisionSection) for key in fields(section)}
    assert known["shift"] == SHIFTS
    assert known["quantize"] == (*FORMATS,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run", "not TOML"),
        ("run = 1", "run is a section, not a value: write [run] and its settings below, or run.KEY = ..."),
        ("[[optim]]\nlr = 1", "optim is a section, not a value"),
        ("[optim.lr]\na = 1", "optim.lr must be a number, got {'a': 1}"),
        ("[optim]\nlr = 2020-01-01", "optim.lr must be a number, got datetime.date(2020, 1, 1)"),
        ("lr = 1", "unknown section 'lr'"),
    ],
)
def test_a_file_that_cannot_be(text, message, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    for path, line in ((file, message), (tmp_path / "none.toml", "cannot be read")):
        with pytest.raises(InputError) as refusal:
            read_config(path)
        assert f"{path}: {line}" in str(refusal.value)


def test_the_published_recipe_of_minipile():
    """What RWKV-LM's script for MiniPile gives: sizes, rates, and the prime that its rows are counted by."""
    config = read_config(Path(__file__).parents[2] / "examples" / "minipile.toml", ["data.train=minipile"])
    model, data, optim, steps = config.model, config.data, config.optim, config.run
    assert (model.generation, model.n_layer, model.n_embd, model.vocab_size) == ("rwkv7", 12, 768, 65536)
    assert (data.order, data.ctx_len, steps.batch * steps.accumulate, steps.precision) == (
        "magic_prime",
        512,
        16,
        "bfloat16",
    )
    assert (optim.lr, optim.lr_final, optim.warmup, optim.weight_decay) == (6e-4, 6e-5, 10, 0.001)
    assert (optim.betas, optim.eps, optim.clip, optim.l2wrap) == ((0.9, 0.99), 1e-18, 1.0, 1e-4)
    assert steps.steps == math.ceil(1498226207 / (16 * 512))
    assert 40320 % (steps.log_every * steps.batch) == 0  # lines of the log that add up to a published mean
    assert [magic_prime(1498226207 // length - 1) for length in (512, 2048, 4096)] == [2926181, 731531, 365759]
    with torch.device("meta"):
        network = RWKV7(RWKV7Config.sized(model.vocab_size, model.n_layer, model.n_embd))
    assert network.blocks[0].att.w1.shape[1] == network.blocks[0].att.a1.shape[1] == 64
    assert (network.blocks[1].att.v1.shape[1], network.blocks[0].att.g1.shape[1]) == (32, 128)


def test_the_learning_rate():
    """The published curve, written down independently: a linear warm-up from 1%, then half a cosine."""
    of = OptimSection(lr=6e-4, lr_final=6e-5, warmup=10)
    steps = 1000
    found = [of.lr * lr_factor(step, steps, of) for step in range(steps + 1)]
    for step in range(10):
        assert math.isclose(found[step], 6e-4 * (0.01 + 0.99 * step / 10), rel_tol=1e-12)
    for step in (10, 200, 505, 900, 1000):
        p = (step - 10) / 990
        assert math.isclose(found[step], 6e-5 + (6e-4 - 6e-5) * (1 + math.cos(math.pi * p)) / 2, rel_tol=1e-12)
    assert max(found) == found[10] == 6e-4
    assert math.isclose(found[-1], 6e-5)
    assert lr_factor(5, 5, OptimSection(warmup=0)) == pytest.approx(0.1)  # nothing divides by zero
    assert lr_factor(0, 1, OptimSection(warmup=0, lr_final=0)) == 1


def test_every_group_keeps_its_pace():
    model = RWKV7(RWKV7Config.sized(64, 2, 64))
    optimizer = build_optimizer(model, OptimSection(lr=1e-3, weight_decay=0.2))
    set_lr(optimizer, 0.5)
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    fast = [name for name, _ in model.named_parameters() if name.endswith("att.w0")]
    matrices = [name for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim == 2]
    everything = len(list(model.parameters()))
    rest = everything - len(fast) - len(matrices)
    assert found == {(5e-4, 0.0): rest, (1e-3, 0.0): len(fast), (5e-4, 0.2): len(matrices)}
