"""Blocks that are used again, and given back on request."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch

import heronry
from heronry.memory import HUGE_PAGE, Pool

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the pool is for Linux")
COUNT = HUGE_PAGE // 4  # float32 numbers of a block


@on_linux
def test_a_block_is_used_again_only_when_no_view_of_it_is_left():
    pool = Pool()
    first = pool.allocate(COUNT)
    address, view = first.data_ptr(), first[10:20]
    del first
    assert pool.allocate(COUNT).data_ptr() != address
    del view
    assert address in {x.data_ptr() for x in [pool.allocate(COUNT) for _ in range(2)]}


@on_linux
def test_the_largest_blocks_are_kept():
    pool = Pool()
    tensors = [pool.allocate(n * COUNT) for n in (1, 4, 2, 3)]
    del tensors
    assert sorted(len(block) // HUGE_PAGE for block in pool.spare) == [3, 4]
    heronry.release_memory()
    assert pool.spare == []


@on_linux
def test_threads_never_share_a_block():
    """Nothing counts references, which free-threaded Pythons do not count exactly."""
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for _ in range(300):
            x = pool.allocate(COUNT)
            x[::1000] = number
            y = x[::1000]
            del x
            gc.collect(0)
            wrong.extend(y[y != number].tolist())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


BATCH = """
import sys, threading, torch, heronry
from heronry.models import MODELS
cls = MODELS[sys.argv[1]]
model = cls(cls.Config.sized(1000, 6, 512)).eval()
if sys.argv[2] == "int8":
    heronry.quantize(model, "int8")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
@torch.no_grad()
def batch(rows):
    state = None
    for _ in range(4):
        _, state = model(torch.ones(rows, 1, dtype=torch.long), state)
    model(torch.ones(rows, 20, dtype=torch.long))
batch(1)
heronry.release_memory()
before = resident()
for run in (lambda: batch(64), lambda: [t := threading.Thread(target=batch, args=(64,)), t.start(), t.join()]):
    run()
    full = resident()
    heronry.release_memory()
    print(before, full, resident())
"""


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("generation", ["rwkv4", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_memory_of_a_large_batch_is_given_back(generation: str, weights: str):
    done = subprocess.run(
        [sys.executable, "-c", BATCH, generation, weights], capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        before, full, after = map(int, line.split())
        assert full > before + 5e6
        assert after < 1.1 * before


def test_releasing_keeps_what_is_in_use():
    x = Pool().allocate(COUNT)
    x.fill_(3)
    heronry.release_memory()
    assert torch.equal(x, torch.full((COUNT,), 3.0))
