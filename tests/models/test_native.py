"""The step in C++ of every generation is the plain model, only faster, and steps aside wherever it could not be."""

from __future__ import annotations

import copy
import io
import logging
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rookery import State
from rookery.checkpoint import assemble
from rookery.models import MODELS, LayerState, Model, native, parts
from rookery.ops import build
from rookery.quantize import quantize

SHAPES = {  # what random_checkpoint is given
    "heads of 32": {},
    "heads of 64": {"width": 128, "heads": 2, "ffn": 300, "rank": 16},
    "odd heads": {"width": 85, "heads": 5, "ffn": 77, "vocab": 103},
    "tiny heads": {"width": 21, "heads": 7, "ffn": 3, "rank": 1, "layers": 3},
    "one layer, one head": {"width": 70, "heads": 1, "ffn": 64, "layers": 1},
    "heads of 300": {"width": 600, "heads": 2, "ffn": 129, "rank": 33},
}
PACK = [0, 1, 8, 9, 20]  # boundaries
LEVELS = list(build.LEVELS)[list(build.LEVELS).index(build.best_level()) :]  # that this processor has


@pytest.fixture
def model(version, random_checkpoint) -> Model:
    """Float32."""
    return assemble(random_checkpoint(version))


@pytest.fixture(autouse=True)
def taken(monkeypatch) -> list[native.Step]:
    """One entry for every call that the C++ has done."""
    calls: list[native.Step] = []
    done = native.Step.__call__

    def call(step, *args):
        calls.append(step)
        return done(step, *args)

    monkeypatch.setattr(native.Step, "__call__", call)
    return calls


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def plain(model: Model, *args, **options) -> tuple[Tensor, State]:
    """What the modules give: they run wherever somebody could ask for gradients."""
    with torch.enable_grad():
        logits, state = model(*args, **options)
    return logits.detach(), state.detach()


def wide(model: Model) -> Model:
    """The same in float64, which the C++ leaves to the plain model."""
    made = type(model)(model.config).double().eval()
    made.load_state_dict(model.state_dict())
    return made


def widened(state: State, model: Model) -> State:
    """A state in float64, for `model`."""
    return State([LayerState(*(x.double() for x in layer)) for layer in state.layers], model.fingerprint)


def step(
    model: Model, text: Tensor, state: State | None = None, cu_seqlens=None, last_only: bool = False
) -> tuple[Tensor, State]:
    """What the C++ gives, for packs too, which `forward` hands to it in quantised models only."""
    state, cu = model.enter(text, state, cu_seqlens)
    made = native.Step(model)
    assert made.runs()
    return made(text, state, cu, last_only)


def distance(x: Tensor, y: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    assert x.shape == y.shape
    return float((x.double() - y).abs().max() / y.abs().max())


def farthest(x: tuple[Tensor, State], y: tuple[Tensor, State]) -> float:
    """The largest distance of logits and state."""
    pairs = [(x[0], y[0])]
    for a, b in zip(x[1].layers, y[1].layers, strict=True):
        pairs += zip(a, b, strict=True)
    return max(distance(a, b) for a, b in pairs)


def same(x: tuple[Tensor, State], y: tuple[Tensor, State]) -> bool:
    """To the last bit."""
    tensors = [[logits, *(x for layer in state.layers for x in layer)] for logits, state in (x, y)]
    return all(map(torch.equal, *tensors))


def uses() -> list[tuple[Tensor, dict]]:
    """Tokens and options of every kind of call."""
    return [
        (tokens(1, 1), {}),
        (tokens(3, 1), {}),
        (tokens(1, 5), {}),
        (tokens(2, 5), {"last_only": True}),
        (tokens(4, 16), {}),
        (tokens(1, 20), {"cu_seqlens": PACK}),
        (tokens(1, 20), {"cu_seqlens": torch.tensor(PACK), "last_only": True}),
        (tokens(1, 4), {"cu_seqlens": [0, 1, 2, 3, 4]}),
    ]


def sequences(text: Tensor, options: dict) -> int:
    return len(options["cu_seqlens"]) - 1 if options.get("cu_seqlens") is not None else len(text)


@torch.no_grad()
def check(model: Model) -> None:
    """Every kind of call, from the beginning and from a state, is float64's to the rounding of float32: as near as
    the plain model, which shows how much a case loses by nature."""
    reference = wide(model)
    single = copy.deepcopy(reference).float()
    for text, options in uses():
        _, begun = step(model, tokens(sequences(text, options), 3, seed=1))
        for state in (model.initial_state(sequences(text, options)), begun):
            found = step(model, text, state, **options)
            assert found[0].dtype == torch.float32
            exact = reference(text, widened(state, reference), **options)
            rounding = farthest(plain(single, text, State(state.layers, single.fingerprint), **options), exact)
            assert farthest(found, exact) < 2e-6 + 8 * rounding
            assert rounding < 5e-5


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(version, shape, random_checkpoint):
    check(assemble(random_checkpoint(version, **SHAPES[shape])))


@pytest.mark.parametrize("name", MODELS)
def test_attention_of_another_width(name):
    """n_embd and dim_att differ in no checkpoint that BlinkDL has published; the code can."""
    cls = MODELS[name]
    sizes = {"vocab_size": 50, "n_layer": 2, "n_embd": 40, "dim_att": 72, "dim_ffn": 90}
    if name != "rwkv4":
        sizes["head_size"] = 24
    if name == "rwkv6":
        sizes |= {"mix_rank": 5, "decay_rank": 6}
    if name == "rwkv7":
        sizes |= {"decay_rank": 5, "iclr_rank": 6, "value_rank": 7, "gate_rank": 8}
    torch.manual_seed(0)
    model = cls(cls.Config(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5)
        text = tokens(2, 5) % 50
        assert farthest(step(model, text), wide(model)(text)) < 1e-5


def test_tuned_state(version, random_checkpoint):
    if version == "4":
        return  # has none
    check(assemble(random_checkpoint(version, tuned=True)))


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("shape", ["heads of 64", "odd heads"])
def test_levels(level, version, shape, random_checkpoint, monkeypatch):
    class Step(native.Step):  # the operators of the plain model stay as they are
        def __init__(self, model):
            with monkeypatch.context() as patch:
                patch.setattr(build, "level", level)
                super().__init__(model)

    monkeypatch.setattr(native, "Step", Step)
    for dtype in (torch.float32, torch.float16):
        check(assemble(random_checkpoint(version, **SHAPES[shape]), dtype=dtype))
    check_bfloat16(assemble(random_checkpoint(version, **SHAPES[shape]), dtype=torch.bfloat16), monkeypatch)


def test_float16_weights(version, random_checkpoint):
    """The arithmetic is that of float32: only the weights are rounded."""
    check(assemble(random_checkpoint(version), dtype=torch.float16))


@torch.no_grad()
def check_bfloat16(model: Model, monkeypatch) -> None:
    """Against the float64 model with the same weights whose matrices read activations rounded to bfloat16. A number
    halfway between two can be rounded the other way, and then a row differs; most rows meet none."""

    def rounded(linear, x):
        return F.linear(x.bfloat16().to(x.dtype), linear.weight)

    reference, text = wide(model), tokens(40, 1)
    _, state = step(model, tokens(40, 1, seed=1))
    found, end = step(model, text, state)
    assert found.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(parts.Linear, "forward", rounded)
        expected, expected_end = reference(text, widened(state, reference))
    distances = [farthest((found[i], end[i]), (expected[i], expected_end[i])) for i in range(40)]
    assert sorted(distances)[20] < 2e-6
    assert max(distances) < 2e-2


def test_bfloat16_weights(version, random_checkpoint, monkeypatch):
    model = assemble(random_checkpoint(version), dtype=torch.bfloat16)
    check_bfloat16(model, monkeypatch)
    with torch.no_grad():
        text = tokens(40, 4)
        exact, _ = wide(model)(text)
        errors = [(run(text)[0] - exact).norm(dim=-1).median() for run in (partial(step, model), partial(plain, model))]
        assert errors[0] < 0.75 * errors[1]


def test_weights_of_several_dtypes(model):
    for i, p in enumerate(model.parameters()):
        p.data = p.data.to((torch.float32, torch.float16)[i % 2])
    check(model)


# ---- to the last bit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_threads_change_nothing(version, dtype, random_checkpoint):
    model = assemble(random_checkpoint(version, width=170, heads=5, ffn=333), dtype=dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([step(model, text, **options) for text, options in uses()])
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*found, strict=True):
        assert all(same(one, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_batch_is_its_rows(version, dtype, random_checkpoint, taken):
    model = assemble(random_checkpoint(version), dtype=dtype)
    _, state = model(tokens(5, 2, seed=3))
    for length in (1, 3):
        text = tokens(5, length)
        taken.clear()
        logits, end = model(text, state)
        packed = step(model, text.reshape(1, -1), state, range(0, 5 * length + 1, length))
        assert same((logits.reshape(1, -1, 101), end), packed)
        for i in range(5):
            assert same((logits[i : i + 1], end[i]), model(text[i : i + 1], state[i]))
        assert len(taken) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_row_is_the_same_in_any_company(dtype, random_checkpoint):
    """Of as many rows as go through the kernel in one way or another, and of matrices that it cuts into columns."""
    model = assemble(random_checkpoint("7", ffn=1100), dtype=dtype)
    _, state = model(tokens(64, 2, seed=3))
    text = tokens(64, 1)
    alone = [model(text[i : i + 1], state[i]) for i in range(64)]
    for rows in (2, 3, 4, 5, 7, 13, 64):
        logits, end = model(text[:rows], State.stack([state[i] for i in range(rows)]))
        for i in range(rows):
            assert same((logits[i : i + 1], end[i]), alone[i])


@torch.no_grad()
def test_two_halves_are_the_whole(model, taken):
    text = tokens(2, 11)
    whole, end = model(text)
    for cut in (1, 4):
        first, middle = model(text[:, :cut])
        second, state = model(text[:, cut:], middle)
        assert same((torch.cat([first, second], 1), state), (whole, end))
        assert torch.equal(model(text[:, cut:], middle, last_only=True)[0], whole[:, -1:])
    assert len(taken) == 7


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_how_tokens_lie_in_memory(mode, model, taken):
    text = tokens(3, 4)
    with mode():
        expected = model(text)
        assert same(model(text.int()), expected)
        assert same(model(text.T.contiguous().T), expected)
    assert len(taken) == 3


# ---- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 64])  # 64: states and logits so large that their memory is used again
@torch.no_grad()
def test_states_are_never_changed(rows, version, random_checkpoint, taken):
    """Neither the one that goes in nor any that came out before, nor what somebody kept of one."""
    model = assemble(random_checkpoint(version, width=128, heads=2, vocab=9000))
    state, kept, slices = None, [], []
    for t in range(12):
        logits, state = model(tokens(rows, 1, seed=t), state)
        if t % 5 == 0:
            kept.append((logits, state, logits.clone(), state.clone()))
        elif t % 2:
            row = state.layers[-1].wkv[1, 0]
            slices += [(row, row.clone()), (logits[0], logits[0].clone())]
    del state, logits
    for _ in range(3):
        model(tokens(rows, 1))
    for logits, state, logits_then, state_then in kept:
        assert same((logits, state), (logits_then, state_then))
    assert all(torch.equal(x, then) for x, then in slices)
    assert len(taken) == 15


@torch.no_grad()
def test_state_saves_loads_indexes_and_stacks(model, tmp_path, taken):
    _, state = model(tokens(3, 4))
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    again = State.stack([state[2], state[:2]])[[1, 2, 0]]
    text = tokens(3, 1, seed=1)
    expected = model(text, state)
    assert same(model(text, loaded), expected)
    assert same(model(text, again), expected)
    assert len(taken) == 4
    assert farthest(expected, plain(model, text, state)) < 1e-5


def test_state_of_inference_mode(model, taken):
    text = tokens(2, 2)
    with torch.inference_mode():
        _, state = model(text)
    with torch.no_grad():
        found = model(text, state)
    assert len(taken) == 2
    assert farthest(found, plain(model, text, state.clone())) < 1e-5


@torch.no_grad()
def test_state_that_lies_apart(model, taken):
    """A state whose tensors are strided, as somebody's own code may make them."""
    _, state = model(tokens(2, 3))
    apart = [LayerState(*(torch.stack([x, x], -1)[..., 0] for x in layer)) for layer in state.layers]
    text = tokens(2, 1)
    assert same(model(text, State(apart, state.fingerprint)), model(text, state))
    assert len(taken) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_state_of_another_dtype(model, dtype):
    """As the plain model takes it."""
    _, state = model(tokens(2, 3))
    other = State([LayerState(*(x.to(dtype) for x in layer)) for layer in state.layers], state.fingerprint)
    text = tokens(2, 1)
    found, expected = model(text, other), plain(model, text, other)
    assert farthest(found, expected) < 1e-5


# ---- the weights of now ---------------------------------------------------------------------------------------------


@pytest.fixture
def other(version, random_checkpoint) -> Model:
    """The same sizes, other weights."""
    return assemble(random_checkpoint(version, seed=1))


def load(model: Model, other: Model) -> None:
    model.load_state_dict(other.state_dict())


def assign(model: Model, other: Model) -> None:
    model.load_state_dict(other.state_dict(), assign=True)


def change_in_place(model: Model, other: Model) -> None:
    with torch.no_grad():
        model.blocks[1].att.key.weight.mul_(-2)
        model.blocks[0].ln2.bias.add_(1)
        model.emb.weight.copy_(other.emb.weight)


def change_data(model: Model, other: Model) -> None:
    model.head.weight.data = other.head.weight.data
    for p in model.blocks.parameters():
        p.data = p.data * 1.1


def replace_parameters(model: Model, other: Model) -> None:
    model.blocks[1].ffn.key.weight = nn.Parameter(torch.randn_like(model.blocks[1].ffn.key.weight))
    model.ln_out.bias = other.ln_out.bias


def replace_modules(model: Model, other: Model) -> None:
    model.blocks[0].att = other.blocks[0].att
    model.head = other.head


def replace_by_degrees(model: Model, other: Model) -> None:
    """The new one may lie where the old one lay."""
    state = other.blocks[1].ffn.state_dict()
    model.blocks[1].ffn = None
    model.blocks[1].ffn = type(other.blocks[1].ffn)(model.config)
    model.blocks[1].ffn.load_state_dict(state)


def to_bfloat16(model: Model, other: Model) -> None:
    model.to(torch.bfloat16)


def to_float16(model: Model, other: Model) -> None:
    model.half()


CHANGES = [
    load,
    assign,
    change_in_place,
    change_data,
    replace_parameters,
    replace_modules,
    replace_by_degrees,
    to_bfloat16,
    to_float16,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_are_read_anew(change, model, other, taken):
    text = tokens(2, 3)
    before, _ = model(text)
    change(model, other)
    found = model(text)
    assert len(taken) == 2
    fresh = type(model)(model.config).to(model.emb.weight.dtype).eval()
    fresh.load_state_dict(model.state_dict())
    assert same(found, fresh(text))
    assert distance(found[0], before.double()) > 1e-5


def test_training_moves_the_weights(model, taken):
    text = tokens(2, 9)
    with torch.no_grad():
        before, _ = model(text)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, _ = model(text[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    assert len(taken) == 1
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(text)
    assert len(taken) == 2
    assert farthest(found, plain(model, text)) < 1e-5
    assert distance(found[0], before.double()) > 1e-4


@torch.no_grad()
def test_copies(model, other, taken):
    """A copy goes its own way, and a model that has made steps can be copied and pickled."""
    text = tokens(2, 3)
    expected = model(text)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (copy.deepcopy(model), copy.copy(model), torch.load(file, weights_only=False)):
        assert same(made(text), expected)
    made = copy.deepcopy(model)
    made(text)
    made.load_state_dict(other.state_dict())
    assert same(model(text), expected)
    assert same(made(text), (other(text)[0], made(text)[1]))


# ---- where the plain model runs -------------------------------------------------------------------------------------


class Negated(parts.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def negate(model: Model) -> None:
    c = model.config
    model.head = Negated(c.n_embd, c.vocab_size)
    nn.init.normal_(model.head.weight)


def wrap(model: Model) -> None:
    """As adapters do; no parameter has its old name."""
    model.blocks[0].att.key = nn.Sequential(model.blocks[0].att.key, nn.Tanh())


def bias(model: Model) -> None:
    model.head = nn.Linear(model.config.n_embd, model.config.vocab_size)


@pytest.mark.parametrize("change", [negate, wrap, bias])
@torch.no_grad()
def test_changed_modules(change, model, taken):
    text = tokens(2, 3)
    before, _ = model(text)
    change(model)
    found, expected = model(text), plain(model, text)
    assert farthest(found, expected) < 1e-5
    assert distance(found[0], before.double()) > 1e-4


@torch.no_grad()
def test_hooks(model, taken):
    text = tokens(2, 3)
    expected = model(text)
    module = model.blocks[1].ffn.key
    seen = []
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        with register(lambda *args: seen.append(args)):
            assert farthest(model(text), expected) < 1e-5
    assert len(seen) == 2
    with module.register_forward_hook(lambda module, args, y: 2 * y):
        found = model(text)
        assert farthest(found, plain(model, text)) < 1e-5
    assert distance(found[0], expected[0].double()) > 1e-4
    assert len(taken) == 1
    assert same(model(text), expected)
    assert len(taken) == 2


@torch.no_grad()
def test_rows(model, taken):
    """A batch of up to ROWS tokens; a pack never, whose size would decide who reads a prompt in it."""
    assert native.ROWS == 64
    model(tokens(8, 8))
    model(tokens(1, 64))
    assert len(taken) == 2
    model(tokens(1, 65))
    model(tokens(65, 1))
    model(tokens(1, 20), cu_seqlens=PACK)
    assert len(taken) == 2


@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.no_grad()
def test_rows_of_a_quantised_model(format, version, random_checkpoint, taken):
    model = quantize(assemble(random_checkpoint(version, ffn=192)), format)
    text = tokens(1, native.MOST_ROWS)
    half = native.MOST_ROWS // 2
    for options in ({}, {"cu_seqlens": [0, half, native.MOST_ROWS]}):
        found = model(text, **options)
        assert distance(found[0], plain(model, text, **options)[0].double()) < 2e-2
    assert len(taken) == 2
    taken.clear()
    long = tokens(3, native.MOST_ROWS // 3 + 9)
    whole, end = model(long)
    assert len(taken) == 3  # the whole, and two pieces of it
    first, middle = model(long[:, : native.MOST_ROWS // 3])
    second, state = model(long[:, native.MOST_ROWS // 3 :], middle)
    assert same((torch.cat([first, second], 1), state), (whole, end))
    assert torch.equal(model(long, last_only=True)[0], whole[:, -1:])
    taken.clear()
    model(tokens(1, native.MOST_ROWS + 1), cu_seqlens=[0, 1, native.MOST_ROWS + 1])
    assert not taken


@torch.no_grad()
def test_rows_where_torch_is_slow(version, random_checkpoint, taken, monkeypatch):
    """bfloat16 on a processor with AVX2 alone: prompts and packs are the step's."""
    model = assemble(random_checkpoint(version), dtype=torch.bfloat16)
    text, pack = tokens(1, 100), tokens(1, 20)
    for level, calls in (("avx512", 0), ("avx2", 2)):
        monkeypatch.setattr(build, "best_level", lambda level=level: level)
        monkeypatch.setattr(build, "level", LEVELS[0])  # what compiles stays what this processor has
        model(text)
        model(pack, cu_seqlens=PACK)
        assert len(taken) == calls


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(model, precision, taken):
    with torch.autocast("cpu", precision):
        logits, _ = model(tokens(2, 3))
    assert logits.dtype == precision
    assert not taken


def test_gradients(model, taken):
    logits, _ = model(tokens(2, 3))
    assert logits.requires_grad
    with torch.no_grad():
        model(tokens(2, 3))
    with torch.enable_grad():
        model(tokens(2, 3))
    assert len(taken) == 1


@torch.no_grad()
def test_other_dtypes(model, taken):
    model.double()
    logits, _ = model(tokens(2, 3))
    assert logits.dtype == torch.float64
    assert not taken


@torch.no_grad()
def test_torch_compile(model, taken):
    text = tokens(2, 3)
    expected = plain(model, text)
    found = torch.compile(model, backend="eager")(text)
    assert farthest(found, expected) < 1e-5
    assert not taken


@torch.no_grad()
def test_without_a_compiler(version, random_checkpoint, taken, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "rookery"):
            for seed in range(2):
                model = assemble(random_checkpoint(version, seed=seed))
                for _ in range(2):
                    found = model(tokens(2, 3))
                assert farthest(found, plain(model, tokens(2, 3))) < 1e-5
    finally:
        build._library.cache_clear()
    told = [record.message for record in caplog.records if f"no native {model.name}," in record.message]
    assert len(told) == 1
    assert "compiler" in told[0]
    assert not taken
