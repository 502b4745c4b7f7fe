"""The step in C++ of every generation is the plain model, only faster."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from levels import LEVELS
from ops.cases import threads
from steps import PACK, farthest, plain, same, tokens
from torch import Tensor
from torch.nn import functional as F

from heronry import State, build
from heronry.checkpoint import assemble
from heronry.models import MODELS, LayerState, Model, base, native_step

SHAPES = {  # what random_checkpoint is given
    "heads of 32": {},
    "heads of 64": {"width": 128, "heads": 2, "ffn": 300, "rank": 16},
    "odd heads": {"width": 85, "heads": 5, "ffn": 77, "vocab": 103},
    "tiny heads": {"width": 21, "heads": 7, "ffn": 3, "rank": 1, "layers": 3},
    "one layer, one head": {"width": 70, "heads": 1, "ffn": 64, "layers": 1},
    "heads of 300": {"width": 600, "heads": 2, "ffn": 129, "rank": 33},
}


def wide(model: Model) -> Model:
    """The same in float64, which the C++ leaves to the plain model."""
    copied = type(model)(model.config).double().eval()
    copied.load_state_dict(model.state_dict())
    return copied


def widened(state: State, model: Model) -> State:
    """A state in float64, for `model`."""
    return State([LayerState(*(x.double() for x in layer)) for layer in state.layers], model.fingerprint)


def step(
    model: Model, text: Tensor, state: State | None = None, cu_seqlens=None, last_only: bool = False
) -> tuple[Tensor, State]:
    """What the C++ gives, for packs too, which `forward` hands to it in quantized models only."""
    state, cu = model.validate_inputs(text, state, cu_seqlens)
    native = native_step.NativeStep(model)
    assert native.is_available()
    return native(text, state, cu, last_only)


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
@pytest.mark.quick_for("heads of 32", "odd heads", "one layer, one head")
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


def test_weights_with_two_names(version, random_checkpoint):
    """A head that is the embedding, and a matrix that two layers share."""
    model = assemble(random_checkpoint(version))
    model.head.weight = model.emb.weight
    model.blocks[1].att.key.weight = model.blocks[0].att.key.weight
    model.invalidate_fingerprint()
    with torch.no_grad():
        assert farthest(step(model, tokens(2, 5)), plain(model, tokens(2, 5))) < 1e-5


def test_tuned_state(version, random_checkpoint):
    if version == "4":
        return  # has none
    check(assemble(random_checkpoint(version, tuned=True)))


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("shape", ["heads of 64", "odd heads"])
@pytest.mark.quick_for("4", "6", "7")
def test_levels(level, version, shape, random_checkpoint, monkeypatch):
    class Step(native_step.NativeStep):  # the operators of the plain model stay as they are
        def __init__(self, model):
            with monkeypatch.context() as patch:
                patch.setattr(build, "level", level)
                super().__init__(model)

    monkeypatch.setattr(native_step, "NativeStep", Step)
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
        patch.setattr(base.Linear, "forward", rounded)
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
@pytest.mark.quick_for("4", "7")
def test_threads_change_nothing(version, dtype, random_checkpoint):
    model = assemble(random_checkpoint(version, width=170, heads=5, ffn=333), dtype=dtype)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append([step(model, text, **options) for text, options in uses()])
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


@torch.inference_mode()
def test_states_that_are_written_past_the_caches(random_checkpoint):
    """Those of 64 sequences and 9 layers, 18 MB: each is the one that it is alone."""
    model = assemble(random_checkpoint("7", layers=9, width=128, heads=2, ffn=64))
    tokens = torch.randint(101, (64, 3), generator=torch.Generator().manual_seed(0))
    _, state = model(tokens[:, :2])
    many, after = model(tokens[:, 2:], state)
    assert after.nbytes > 18e6
    for row in (0, 17, 63):
        one, alone = model(tokens[row : row + 1, 2:], state[row])
        assert torch.equal(many[row], one[0])
        assert all(torch.equal(x[row], y[0]) for x, y in zip(after.tensors(), alone.tensors(), strict=True))
