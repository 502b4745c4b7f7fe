"""The step in C++ sees every change of the model, and steps aside wherever it could not be the plain one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import shutil

import pytest
import torch
from steps import PACK, distance, farthest, plain, same, tokens
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

from heronry import State, build
from heronry.checkpoint import assemble
from heronry.models import Model, base, native_step
from heronry.quantization import quantize

LEVELS = build.levels()


# ---- the weights of now ---------------------------------------------------------------------------------------------


@pytest.fixture
def other(version, random_checkpoint) -> Model:
    """The same sizes, other weights."""
    return assemble(random_checkpoint(version, seed=1))


def load(model: Model, other: Model) -> None:
    model.load_state_dict(other.state_dict())


def transpose(model: Model, other: Model) -> None:
    model.blocks[0].att.key.weight.t_()
    weight = model.blocks[1].att.output.weight
    weight.data = weight.data.t()


def expand(model: Model, other: Model) -> None:
    weight = model.blocks[1].ln1.weight
    weight.data = weight.data[:1].expand(weight.shape)


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
    transpose,
    expand,
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
    assert len(taken) == (1 if change in (transpose, expand) else 2)  # C++ reads dense rows only
    fresh = type(model)(model.config).to(model.emb.weight.dtype).eval()
    fresh.load_state_dict(model.state_dict())
    expected = fresh(text)
    assert same(found, expected) if len(taken) == 3 else farthest(found, expected) < 1e-5
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
    for copied in (copy.deepcopy(model), copy.copy(model), torch.load(file, weights_only=False)):
        assert same(copied(text), expected)
    copied = copy.deepcopy(model)
    copied(text)
    copied.load_state_dict(other.state_dict())
    assert same(model(text), expected)
    assert same(copied(text), (other(text)[0], copied(text)[1]))


# ---- where the plain model runs -------------------------------------------------------------------------------------


class Negated(base.Linear):
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


def norms(model: Model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]


@torch.no_grad()
@pytest.mark.quick_for("4", "7")
def test_the_eps_of_every_norm_is_seen(model, taken):
    text = tokens(2, 3)
    first, _ = model(text)
    for name in norms(model):
        norm = model.get_submodule(name)
        eps, norm.eps = norm.eps, 0.3
        found = model(text)
        assert farthest(found, plain(model, text)) < 1e-5, name
        assert distance(found[0], first.double()) > 1e-4, name
        norm.eps = eps
    assert len(taken) == 1
    assert torch.equal(model(text)[0], first)
    assert len(taken) == 2


@torch.no_grad()
def test_every_setting_is_seen(model, taken):
    """Whatever number a module or the configuration holds: once changed, the plain model runs, or refuses."""
    text = tokens(2, 3)
    expected = model(text)
    for name, module in [("", model), *model.named_modules()]:
        for setting, value in native_step.settings(module).items() if name else ():
            if isinstance(value, int | float):
                setattr(module, setting, not value if isinstance(value, bool) else 2 * value + 1)
                taken.clear()
                with contextlib.suppress(RuntimeError, AttributeError, ValueError, TypeError):
                    model(text)
                assert not taken, f"{name}.{setting}"
                setattr(module, setting, value)
    config = model.config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("time_state", "version", "log_bonus", "deep_rank", "dea_rank", "dea_dim"):
            changed = copy.copy(config)
            object.__setattr__(changed, field.name, not value if isinstance(value, bool) else 2 * value)
            model.config = changed
            model.invalidate_fingerprint()
            taken.clear()
            with contextlib.suppress(RuntimeError, ValueError):
                model(text)
            assert not taken, field.name
    model.config = config
    model.invalidate_fingerprint()
    assert same(model(text), expected)


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
def test_hooks_of_every_module(model, taken):
    text = tokens(2, 3)
    expected = model(text)
    double = lambda module, args, y: 2 * y if isinstance(module, nn.LayerNorm) else None  # noqa: E731
    with nn.modules.module.register_module_forward_hook(double):
        found = model(text)
        assert farthest(found, plain(model, text)) < 1e-5
    assert distance(found[0], expected[0].double()) > 1e-4
    assert len(taken) == 1


class Doubled(Tensor):
    """A weight that counts twice."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * y if "linear" in str(function) else y


class Wrapped(Tensor):
    """A weight without memory of its own, as those of torchao."""

    @staticmethod
    def __new__(cls, x: Tensor):
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, strides=x.stride())

    def __init__(self, x: Tensor):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        y = function(*[x.x if isinstance(x, Wrapped) else x for x in args], **(kwargs or {}))
        return Wrapped(y) if function == torch.ops.aten.detach.default else y


@pytest.mark.parametrize("wrap", [lambda x: x.as_subclass(Doubled), Wrapped], ids=["doubled", "wrapped"])
@torch.no_grad()
def test_tensors_that_are_more_than_numbers(wrap, model, taken):
    text = tokens(2, 3)
    model(text)
    model.head.weight = nn.Parameter(wrap(model.head.weight.data), requires_grad=False)
    model.native_step_enabled = False
    expected = model(text)
    model.native_step_enabled = True
    assert farthest(model(text), expected) == 0
    assert len(taken) == 1


@torch.no_grad()
def test_forward_mode_differentiation(model, taken):
    """Which no_grad does not end: the derivative by the state and by a weight, against finite differences."""
    model.double()
    text = tokens(2, 3)
    _, before = model(text)
    weight = model.blocks[0].att.key.weight
    along = torch.randn_like(weight), [torch.randn_like(layer.wkv) for layer in before.layers]

    def logits(weight: Tensor, states: list[Tensor]) -> Tensor:
        layers = [layer._replace(wkv=wkv) for layer, wkv in zip(before.layers, states, strict=True)]
        parameters = {"blocks.0.att.key.weight": weight}
        y, _ = functional_call(model, parameters, (text, State(layers, before.fingerprint)))
        return y

    states = [layer.wkv for layer in before.layers]
    step = 1e-6
    moved = [
        logits(weight + s * along[0], [x + s * a for x, a in zip(states, along[1], strict=True)]) for s in (step, -step)
    ]
    expected = (moved[0] - moved[1]) / (2 * step)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        model.to(dtype)
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x.to(dtype), a.to(dtype)) for x, a in zip(states, along[1], strict=True)]
            y = logits(forward_ad.make_dual(weight.to(dtype), along[0].to(dtype)), dual)
            tangent = forward_ad.unpack_dual(y).tangent
            by_state = forward_ad.unpack_dual(logits(weight.to(dtype), dual)).tangent
        assert distance(tangent, expected) < tolerance
        assert by_state is not None
    assert not taken


@torch.no_grad()
def test_rows(model, taken):
    """A batch of up to ROWS tokens; a pack never, whose size would decide who reads a prompt in it."""
    assert native_step.MAX_TOKENS == 64
    model(tokens(8, 8))
    model(tokens(1, 64))
    assert len(taken) == 2
    model(tokens(1, 65))
    model(tokens(65, 1))
    model(tokens(1, 20), cu_seqlens=PACK)
    assert len(taken) == 2


@pytest.mark.parametrize("format", ["int8", "int4"])
@torch.no_grad()
def test_rows_of_a_quantized_model(format, version, random_checkpoint, taken):
    model = quantize(assemble(random_checkpoint(version, ffn=192)), format)
    text = tokens(1, native_step.MAX_CALL_TOKENS)
    half = native_step.MAX_CALL_TOKENS // 2
    for options in ({}, {"cu_seqlens": [0, half, native_step.MAX_CALL_TOKENS]}):
        found = model(text, **options)
        assert distance(found[0], plain(model, text, **options)[0].double()) < 2e-2
    assert len(taken) == 2
    taken.clear()
    long = tokens(3, native_step.MAX_CALL_TOKENS // 3 + 9)
    whole, end = model(long)
    assert len(taken) == 3  # the whole, and two pieces of it
    first, middle = model(long[:, : native_step.MAX_CALL_TOKENS // 3])
    second, state = model(long[:, native_step.MAX_CALL_TOKENS // 3 :], middle)
    assert same((torch.cat([first, second], 1), state), (whole, end))
    assert torch.equal(model(long, last_only=True)[0], whole[:, -1:])
    taken.clear()
    model(tokens(1, native_step.MAX_CALL_TOKENS + 1), cu_seqlens=[0, 1, native_step.MAX_CALL_TOKENS + 1])
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
@pytest.mark.quick_for("4", "7")
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
        with caplog.at_level(logging.WARNING, "heronry"):
            for seed in range(2):
                model = assemble(random_checkpoint(version, seed=seed))
                for _ in range(2):
                    found = model(tokens(2, 3))
                assert farthest(found, plain(model, tokens(2, 3))) < 1e-5
    finally:
        build._library.cache_clear()
    messages = [record.message for record in caplog.records if f"no native {model.name}," in record.message]
    assert len(messages) == 1
    assert "compiler" in messages[0]
    assert not taken
