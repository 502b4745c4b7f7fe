"""Kept states of prompts' beginnings: found where they should be, and never changing a bit."""

from __future__ import annotations

import random
import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from heronry import State
from heronry.checkpoint import assemble
from heronry.engine import prefill
from heronry.engine.prefix_keys import CacheRoot, cache_root, choose_cuts, prefix_keys
from heronry.engine.state_cache import StateCache
from heronry.models import RWKV7, LayerState, Model
from heronry.stores.disk import DiskStore
from heronry.stores.store import Key

ROOT = CacheRoot(bytes(32), 64)


def make_state(number: float, size: int = 8) -> State:
    """One row of size * 4 bytes."""
    return State([LayerState(*(torch.full((1, n), float(number)) for n in (1, size - 2, 1)))], "f" * 32)


def small(random_checkpoint, version: str = "7", kind: str = "float32") -> Model:
    quantize = kind if kind.startswith("int") else None
    weights = random_checkpoint(version, width=128, heads=2, ffn=256)
    return assemble(weights, dtype=None if quantize else getattr(torch, kind), quantize=quantize)


def read(
    model: Model, cache: StateCache, root: CacheRoot, prompt: list[int], borders=()
) -> tuple[int, torch.Tensor, State]:
    """Reads a prompt as a scheduler does: from what is known, cut where its states are to be kept."""
    position, state = cache.lookup(root, prompt) or (0, None)
    cached = position
    for cut in cache.cut_positions(root, prompt, borders, position):
        _, state = prefill(model, [prompt[position:cut]], state)
        cache.put(root, prompt, cut, state)
        position = cut
    logits, state = prefill(model, [prompt[position:]], state)
    return cached, logits, state


@pytest.mark.parametrize("kind", ["float32", "bfloat16", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_hit_changes_no_bit(random_checkpoint, kind, one_thread):
    model = small(random_checkpoint, kind=kind)
    cache = StateCache(1 << 30)
    root = cache_root(model)
    draw = random.Random(kind)
    system = [draw.randrange(101) for _ in range(300)]
    hits = 0
    for _ in range(20):
        prompt = system[: draw.randrange(301)] + [draw.randrange(101) for _ in range(draw.randrange(1, 99))]
        for _ in range(2):
            cached, logits, state = read(model, cache, root, prompt, [len(system)])
            expected, after = prefill(model, [prompt])
            assert torch.equal(logits, expected)
            assert all(torch.equal(x, y) for x, y in zip(state.tensors(), after.tensors(), strict=True))
            hits += cached > 0
        assert cached == (len(prompt) - 1) // root.grid * root.grid
    assert hits >= 20


def test_the_third_prompt_that_begins_alike_finds_a_state():
    """Without borders: the second one shows where they part."""
    cache = StateCache(1 << 20)
    prompts = [[1] * 200 + [n] * 100 for n in (2, 3, 4)]
    assert cache.cut_positions(ROOT, prompts[0]) == [256]
    assert cache.lookup(ROOT, prompts[1]) is None
    assert cache.cut_positions(ROOT, prompts[1]) == [192, 256]
    cache.put(ROOT, prompts[1], 192, make_state(1))
    assert cache.lookup(ROOT, prompts[2])[0] == 192
    assert cache.cut_positions(ROOT, prompts[2], start=192) == [256]


def test_the_last_token_is_always_read():
    cache = StateCache(1 << 20)
    cache.put(ROOT, [1] * 128, 128, make_state(1))
    cache.put(ROOT, [1] * 64, 64, make_state(2))
    assert cache.lookup(ROOT, [1] * 128)[0] == 64
    assert cache.lookup(ROOT, [1] * 129)[0] == 128
    assert cache.lookup(ROOT, [1] * 64) is None
    assert cache.lookup(ROOT, []) is None
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.cached_tokens, stats.prompt_tokens) == (2, 2, 192, 321)


def test_cuts():
    assert choose_cuts(1, 64, [], 0, 0) == []
    assert choose_cuts(64, 64, [], 0, 0) == []
    assert choose_cuts(65, 64, [], 0, 0) == [64]
    assert choose_cuts(1000, 64, [100, 300, 500, 700, 900, 1000], 0, 0) == [64, 640, 896, 960]
    assert choose_cuts(1000, 64, [100, 300, 500, 700, 900], 640, 300) == [896, 960]
    assert choose_cuts(1000, 64, [], 0, 5000) == [960]
    assert choose_cuts(1000, 64, [-5, 0, 2000], 0, 300) == [256, 960]


def test_keys_are_of_the_tokens_and_the_root():
    keys = prefix_keys(ROOT, [1] * 200)
    assert len(keys) == len(set(keys)) == 3
    assert prefix_keys(ROOT, [1] * 128 + [2] * 64)[:2] == keys[:2]
    assert prefix_keys(ROOT, [1] * 127 + [2])[0] == keys[0] != prefix_keys(ROOT, [2] + [1] * 63)[0]
    assert not {*keys} & {*prefix_keys(CacheRoot(b"1" * 32, 64), [1] * 200)}
    assert not {*keys} & {*prefix_keys(CacheRoot(bytes(32), 128), [1] * 256)}


def test_roots(random_checkpoint):
    """Whatever changes the numbers, changes the root; the same model, loaded again, has the same."""
    model = small(random_checkpoint)
    root = cache_root(model)
    assert cache_root(small(random_checkpoint)) == root == cache_root(model, model.initial_state())
    _, other = prefill(model, [[1, 2, 3]])
    roots = [root, cache_root(model, other), cache_root(model, salt="a"), cache_root(model, salt="b")]
    roots += [cache_root(small(random_checkpoint, kind=kind)) for kind in ("bfloat16", "float16", "int8")]
    plain = small(random_checkpoint)
    plain.native_step_enabled = False
    roots.append(cache_root(plain))
    assert len({root.digest for root in roots}) == len(roots) == 8


def test_a_tuned_initial_state_has_a_root_of_its_own():
    """Its model has the fingerprint of the one that it came from."""
    model = RWKV7(replace(RWKV7.Config.sized(64, 1, 64), time_state=True))
    root, fingerprint = cache_root(model), model.fingerprint
    with torch.no_grad():
        model.blocks[0].att.time_state[0, 0, 0] = 0.5
    model.invalidate_fingerprint()
    assert model.fingerprint == fingerprint
    assert cache_root(model) != root


def test_memory_is_bounded_by_bytes():
    cache = StateCache(100)  # three states of 32 bytes
    prompts = [[n] * 65 for n in range(5)]
    for prompt in prompts[:3]:
        cache.put(ROOT, prompt, 64, make_state(1))
    assert cache.lookup(ROOT, prompts[0])
    cache.put(ROOT, prompts[3], 64, make_state(1))
    assert [cache.lookup(ROOT, prompt) is not None for prompt in prompts] == [True, False, True, True, False]
    cache.put(ROOT, prompts[4], 64, make_state(1, size=25))  # of 100 bytes
    assert [cache.lookup(ROOT, prompt) is not None for prompt in prompts] == [False] * 4 + [True]
    cache.put(ROOT, prompts[4], 64, make_state(1, size=26))
    assert cache.stats.ram_bytes == 0


def test_a_part_of_a_larger_tensor_is_not_kept_whole():
    cache = StateCache(1000)
    many = torch.zeros(100, 8)
    cache.put(ROOT, [1] * 64, 64, State([LayerState(many[:1, :1], many[:1, 1:7], many[:1, 7:])], "f" * 32))
    [layer] = cache.lookup(ROOT, [1] * 65)[1].layers
    assert [x.untyped_storage().nbytes() for x in layer] == [4, 24, 4]


@pytest.mark.parametrize("position", [0, 63, 128, -64])
def test_only_states_on_the_grid_are_kept(position):
    with pytest.raises(ValueError, match="cannot be kept"):
        StateCache(1000).put(ROOT, [1] * 100, position, make_state(1))


def test_states_outlive_the_process(tmp_path, random_checkpoint, one_thread):
    """Written in the background, found again by the longest beginning, and exact."""
    model = small(random_checkpoint)
    root = cache_root(model)
    prompt = [(7 * i * i + i) % 101 for i in range(300)]
    expected, _ = prefill(model, [prompt])
    with closing(DiskStore(tmp_path, 1 << 30)) as store:
        first = StateCache(0, store)
        read(model, first, root, prompt, [130, 200])
        first.close()
        assert first.stats.store_bytes > 0
    with closing(DiskStore(tmp_path, 1 << 30)) as store:
        cache = StateCache(1 << 30, store)
        assert cache.lookup(root, prompt[:150])[0] == 128
        position, state = cache.lookup(root, prompt)
        assert position == 256
        logits, _ = prefill(model, [prompt[256:]], state)
        assert torch.equal(logits, expected)
        assert cache.lookup(cache_root(model, salt="other"), prompt) is None
        store.delete(Key("prefix", "", prefix_keys(root, prompt)[256 // root.grid - 1]))
        assert cache.lookup(root, prompt)[0] == 256  # it is in RAM now
        cache.close()


@pytest.mark.slow
def test_every_generation_from_the_store(tmp_path, random_checkpoint, version, one_thread):
    model = small(random_checkpoint, version)
    root = cache_root(model)
    prompt = [(7 * i * i + i) % 101 for i in range(300)]
    with closing(DiskStore(tmp_path, 1 << 30)) as store:
        cache = StateCache(0, store)
        assert read(model, cache, root, prompt)[0] == 0
        assert cache.flush(60)
        cached, logits, state = read(model, cache, root, prompt)
        cache.close()
    expected, after = prefill(model, [prompt])
    assert cached == 256
    assert torch.equal(logits, expected)
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), after.tensors(), strict=True))
    for one, other in zip(state.contexts, after.contexts, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_damage_in_the_store_is_a_shorter_beginning(tmp_path):
    store = DiskStore(tmp_path, 1 << 20)
    cache = StateCache(0, store)
    prompt = [1] * 300
    cache.put(ROOT, prompt, 64, make_state(1))
    assert cache.flush(10)
    cache.put(ROOT, prompt, 256, make_state(2))
    cache.flush()
    newest = max(tmp_path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1])
    position, state = cache.lookup(ROOT, prompt)
    assert (position, float(state.layers[0].wkv[0, 0])) == (64, 1)
    store.put(Key("prefix", "", prefix_keys(ROOT, prompt)[3]), b"no state at all")
    assert cache.lookup(ROOT, prompt)[0] == 64
    cache.close()


def test_what_ram_answers_for_is_in_use_in_the_store(tmp_path):
    size = len(make_state(1).to_bytes())
    store = DiskStore(tmp_path, 3 * size)
    cache = StateCache(1000, store)
    prompts = [[n] * 65 for n in range(4)]
    for prompt in prompts[:3]:
        cache.put(ROOT, prompt, 64, make_state(1))
        assert cache.flush(10)
    cache.lookup(ROOT, prompts[0])
    assert cache.flush(10)
    cache.put(ROOT, prompts[3], 64, make_state(1))
    cache.close()
    again = StateCache(0, store)
    assert [again.lookup(ROOT, prompt) is not None for prompt in prompts] == [True, False, True, True]
    again.close()


class SlowStore(DiskStore):
    """Writes when it may."""

    def __init__(self, folder, may_write: threading.Event):
        super().__init__(folder, 1 << 20)
        self.may_write = may_write

    def put(self, key, data, about=None):
        self.may_write.wait()
        if float(State.from_bytes(data).layers[0].wkv[0, 0]) == 3:
            raise ValueError("as a bug would")
        return super().put(key, data, about)


def test_a_slow_store_holds_nobody_up(tmp_path, monkeypatch, caplog):
    """States that wait are found; those it has no room for are left out and counted."""
    monkeypatch.setattr("heronry.engine.state_cache.MAX_PENDING", 100)
    may_write = threading.Event()
    cache = StateCache(0, SlowStore(tmp_path, may_write))
    prompts = [[n] * 65 for n in range(5)]
    for n, prompt in enumerate(prompts):
        cache.put(ROOT, prompt, 64, make_state(n))
    assert [cache.lookup(ROOT, prompt) is not None for prompt in prompts] == [True] * 3 + [False] * 2
    assert cache.stats.dropped == 2
    assert not cache.flush(0.01)
    may_write.set()
    assert cache.flush(10)
    cache.put(ROOT, prompts[3], 64, make_state(3))
    cache.put(ROOT, prompts[4], 64, make_state(4))
    cache.close()
    assert "could not be stored" in caplog.text
    assert caplog.text.count("ValueError: as a bug would") == 1
    assert [cache.lookup(ROOT, prompt) is not None for prompt in prompts] == [True, True, True, False, True]
    cache.put(ROOT, prompts[3], 64, make_state(3))
    assert cache.stats.dropped == 3


def test_from_many_threads(tmp_path):
    """What is found is always what was put for that beginning."""
    cache = StateCache(1000, DiskStore(tmp_path, 100_000))
    wrong: list[object] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(150):
            n = draw.randrange(40)
            prompt = [n] * 65
            found = cache.lookup(ROOT, prompt)
            if found is not None and (found[0], float(found[1].layers[0].wkv[0, 0])) != (64, n):
                wrong.append(found)
            cache.cut_positions(ROOT, prompt)
            cache.put(ROOT, prompt, 64, make_state(n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    stats = cache.stats
    assert not wrong
    assert stats.hits + stats.misses == 600
    assert stats.ram_bytes <= 1000


def test_what_is_remembered_of_prompts_is_bounded(monkeypatch):
    """The longest unshared ends are forgotten first."""
    monkeypatch.setattr("heronry.engine.state_cache.SEEN", 10)
    cache = StateCache(0)
    cache.cut_positions(ROOT, [1] * 640 + [2])
    cache.cut_positions(ROOT, [2] * 128)
    assert len(cache._seen) == 10
    assert cache.cut_positions(ROOT, [1] * 700) == [512, 640]
