"""Random checkpoints of every generation, under BlinkDL's names and in his shapes, and texts to learn from."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes wait for each other far longer than they work
    os.environ["OMP_NUM_THREADS"] = "1"

import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from binidx import write_binidx
from hypothesis import HealthCheck, settings
from torch import Tensor

# shells start jobs in the background with Ctrl-C ignored, nohup without SIGHUP: what tests start would inherit it
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# the same examples every time: a failure in one run is a failure in all, on a busy machine too
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """quick_for("7"): of a test's cases, those that have one of these names are quick, all others slow."""
    for item in items:
        mark = item.get_closest_marker("quick_for")
        if mark is not None and not {*mark.args} & {*item.callspec.id.split("-")}:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


VERSIONS = ("4", "5.0", "5.0 r2", "5.1", "5.2", "6", "7")


def random_checkpoint(
    version: str,
    *,
    vocab: int = 101,
    width: int = 96,
    heads: int = 3,
    layers: int = 2,
    ffn: int = 200,
    rank: int = 7,
    tuned: bool = False,
    deep: int = 0,
    dea: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights that no initialisation gives, so that every parameter moves the logits; about 1 in size where it
    enters a product, decays from slow to fast. The four LoRA ranks of RWKV-7 are rank .. rank + 3. `deep`: of an
    RWKV-7a, the rows of a token's matrix. `dea`: of an RWKV-7b, the numbers that a key is kept as; a query has 3 more
    than twice as many."""
    random = torch.Generator().manual_seed(seed)
    size = width // heads

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=random)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return normal(rows, columns, std=gain * columns**-0.5)

    def mix() -> Tensor:
        return torch.rand(1, 1, width, generator=random) * 1.2 - 0.1

    def norm(name: str, size: int = width) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(size, mean=1.0, std=0.2), f"{name}.bias": normal(size, std=0.2)}

    def time_mix() -> dict[str, Tensor]:
        names = ["receptance", "key", "value", "output"]
        if version in ("5.1", "5.2", "6"):
            names.append("gate")
        tensors = {f"{name}.weight": matrix(width, width) for name in names}
        if version == "4":
            tensors |= {"time_decay": normal(width, std=1.5), "time_first": normal(width)}
        elif version in ("5.0", "5.0 r2", "5.1"):
            bonus = "time_first" if version == "5.0" else "time_faaaa"
            tensors |= {"time_decay": normal(heads, mean=-1.5), bonus: normal(heads)}
        elif version == "5.2":
            tensors |= {"time_decay": normal(heads, size, mean=-1.5), "time_faaaa": normal(heads, size)}
        elif version == "6":
            tensors |= {
                "time_decay": normal(1, 1, width, mean=-1.5),
                "time_decay_w1": normal(width, rank + 3, std=width**-0.5),
                "time_decay_w2": normal(rank + 3, width, std=0.5),
                "time_faaaa": normal(heads, size),
                "time_maa_w1": normal(width, 5 * rank, std=width**-0.5),
                "time_maa_w2": normal(5, rank, width, std=0.2),
            }
        else:
            lora = {"w": rank, "a": rank + 1, "v": rank + 2, "g": rank + 3}
            for name, columns in lora.items():
                tensors |= {
                    f"{name}1": normal(width, columns, std=width**-0.5),
                    f"{name}2": normal(columns, width, std=0.5),
                }
                if name != "g":
                    tensors[f"{name}0"] = normal(1, 1, width)
            tensors |= {"k_k": normal(1, 1, width), "k_a": normal(1, 1, width), "r_k": normal(heads, size, std=0.3)}
        mixes = {
            "4": ["time_mix_k", "time_mix_v", "time_mix_r"],
            "5": [f"time_mix_{name}" for name in ("kvrg" if "gate.weight" in tensors else "kvr")],
            "6": [f"time_maa_{name}" for name in "xwkvrg"],
            "7": [f"x_{name}" for name in "rwkvag"],
        }
        tensors |= {name: mix() for name in mixes[version[0]]}
        if version != "4":
            tensors |= norm("ln_x")
        if tuned:
            tensors["time_state"] = normal(2, width) if version == "4" else normal(heads, size, size)
        return tensors

    def channel_mix() -> dict[str, Tensor]:
        tensors = {"key.weight": matrix(ffn, width), "value.weight": matrix(width, ffn)}
        if version != "7":
            tensors["receptance.weight"] = matrix(width, width)
        mixes = {"4": ["time_mix_k", "time_mix_r"], "6": ["time_maa_k", "time_maa_r"], "7": ["x_k"]}
        tensors |= {name: mix() for name in mixes.get(version[0], mixes["4"])}
        if deep:
            tensors |= {
                "s_emb.weight": normal(vocab, deep * deep, std=deep**-0.5),
                "s0": normal(ffn, mean=1.0, std=0.3),
            }
            tensors |= {
                "s_emb_x.weight": matrix(deep * deep, width, gain=deep**-0.5),
                "s1": normal(width, deep, std=0.1),
            }
            tensors["s2"] = normal(deep, ffn, std=0.3)
        return tensors

    def attention() -> dict[str, Tensor]:
        dim = 2 * dea + 3
        tensors = {"qq.weight": matrix(dim, width), **norm("lnq", dim), **norm("lnk", dim), **norm("lnv")}
        for name, size in (("k", dim), ("v", width)):
            tensors |= {f"{name}1": normal(width, dea, std=width**-0.5), f"{name}2": normal(dea, size, std=dea**-0.5)}
            tensors |= {f"{name}_emb.weight": normal(vocab, size), f"{name}_emb_x.weight": matrix(size, width)}
            tensors[f"x_{name}"] = torch.rand(1, 1, size, generator=random) * 1.2 - 0.1
        return tensors | {"x_q": torch.rand(1, 1, dim, generator=random) * 1.2 - 0.1}

    weights = {"emb.weight": normal(vocab, width), **norm("blocks.0.ln0")}
    for i in range(layers):
        weights |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2")
        weights |= {f"blocks.{i}.att.{name}": x for name, x in time_mix().items()}
        weights |= {f"blocks.{i}.ffn.{name}": x for name, x in channel_mix().items()}
        if dea:
            weights |= {f"blocks.{i}.qkv.{name}": x for name, x in attention().items()}
    return weights | norm("ln_out") | {"head.weight": matrix(vocab, width)}


@pytest.fixture(name="random_checkpoint", scope="session")
def _random_checkpoint():
    """The function `random_checkpoint(version, ...)`: name -> tensor."""
    return random_checkpoint


@pytest.fixture(params=VERSIONS)
def version(request) -> str:
    """Every generation and sub-version in turn."""
    return request.param


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command of heronry's in this process: (exit code, standard output, standard error)."""
    from heronry.cli.app import main

    def run(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["heronry", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small file system at tmp_path/small, for root only."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mounted(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("only root can mount a file system")
        return folder

    yield mounted
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)  # a test that failed may have left files open


@pytest.fixture
def one_thread():
    """Models this small only wait for one another's threads, and long where other work is running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """60 documents of 1 to 40 tokens below 50, with something to learn: the next token is mostly the last one + 1."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(60):
        start, length = random.integers(50), random.integers(1, 41)
        noise = random.integers(0, 50, length) * (random.random(length) < 0.1)
        documents.append((start + np.arange(length) + noise) % 50)
    return write_binidx(tmp_path_factory.mktemp("texts") / "texts", documents)
