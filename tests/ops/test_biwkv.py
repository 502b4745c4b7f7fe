"""Bi-WKV against the softmax it equals, written out: every body, every gradient, and the keys and decays that hurt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from levels import LEVELS
from torch import Tensor

from heronry import build
from heronry.ops import dispatch
from heronry.ops.biwkv import BODIES, biwkv
from heronry.ops.biwkv import recurrent as streaming

from .cases import Arguments, Recorder, assert_close, assert_same_for_any_threads, to
from .cases import run_without_state as run
from .test_native import last_axis_dense, scattered

pytestmark = pytest.mark.skipif(not dispatch.has_native_body("biwkv"), reason="there is no C++ compiler")

# of float64; the exponents of the chunked body grow with the tokens, and the recurrent one gathers anew at 1e-6
EXACT = {"reference": 1e-11, "chunked": 1e-8, "recurrent": 5e-6, "cpu": 1e-11}


def draw(batch: int, tokens: int, channels: int, log_w: float | None = None, keys: float = 1.0, seed: int = 0):
    """Arguments in float64, decays up to `log_w` a token; as Vision-RWKV begins without it, of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    h = torch.linspace(0, 1, channels, dtype=torch.float64)
    return {
        "log_w": (5 - 8 * h**0.7) / tokens if log_w is None else log_w * (1 + h) / 2,
        "k": keys * noise(batch, tokens, channels),
        "v": noise(batch, tokens, channels),
        "u": noise(channels),
    }


def softmax(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """Every token's weights over all others and itself, one softmax a channel."""
    t = torch.arange(k.shape[1])
    distance = (t[:, None] - t[None]).abs()[..., None]
    exponent = torch.where(distance == 0, u, (distance - 1) * log_w) + k[:, None]  # [B, T, T, A]
    return (exponent.softmax(2) * v[:, None]).sum(2)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 32, 33, 196])
@pytest.mark.parametrize("log_w", [None, -20.0, -3.0, -0.1, 0.0, 0.02])
def test_equals_a_softmax(impl: str, tokens: int, log_w: float | None):
    arguments = draw(2, tokens, 5, log_w, keys=3)
    expected = run(softmax, arguments)
    assert_close(run(biwkv, arguments, impl=impl), expected, EXACT[impl])
    rounded = to(arguments, torch.float32)
    assert_close(run(biwkv, rounded, impl=impl), run(softmax, to(rounded, torch.float64)), 2e-5)


@pytest.mark.parametrize("impl", BODIES)
def test_many_tokens(impl: str):
    arguments = to(draw(1, 1000, 4), torch.float32)
    expected = run(softmax, to(arguments, torch.float64))
    assert_close(run(biwkv, to(arguments, torch.float64), impl=impl), expected, EXACT[impl])
    assert_close(run(biwkv, arguments, impl=impl), expected, 2e-5)


@pytest.mark.parametrize("channels", [1, 16, 40, 300])
def test_any_number_of_channels(channels: int):
    arguments = draw(3, 70, channels, keys=2)
    assert_close(run(biwkv, arguments, impl="cpu"), run(softmax, arguments), 1e-11)
    rounded = to(arguments, torch.float32)
    assert_close(run(biwkv, rounded, impl="cpu"), run(softmax, to(rounded, torch.float64)), 2e-5)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 33, 196])
@pytest.mark.parametrize("log_w", [-20.0, -1.0, -1e-3, 0.0, 0.02])
def test_huge_keys(impl: str, tokens: int, log_w: float):
    arguments = draw(1, tokens, 6, log_w)
    arguments["k"] = 60 * arguments["k"].sign() + arguments["v"].round()
    arguments = to(to(arguments, torch.float32), torch.float64)
    expected = run(softmax, arguments)
    assert_close(run(biwkv, arguments, impl=impl), expected, EXACT[impl])
    assert_close(run(biwkv, to(arguments, torch.float32), impl=impl), expected, 2e-5)


@pytest.mark.parametrize("u", [-200.0, -17.0, 17.0, 60.0, 200.0])
@pytest.mark.parametrize("log_w", [-200.0, -0.5, 0.5])
def test_bonuses_and_decays_beyond_the_room_of_a_run(u: float, log_w: float):
    """In C++ several tokens share a unit only where decays and bonuses leave float32 its digits."""
    arguments = draw(2, 70, 20, log_w, keys=10)
    arguments["u"][1::2] = u
    arguments["log_w"][::5] = -torch.inf
    arguments = to(to(arguments, torch.float32), torch.float64)
    expected = run(biwkv, arguments, impl="reference")
    assert_close(run(biwkv, arguments, impl="cpu"), expected, 1e-11)
    assert_close(run(biwkv, to(arguments, torch.float32), impl="cpu"), expected, 2e-5)


@pytest.mark.parametrize("impl", BODIES)
def test_equal_keys_have_finite_gradients(impl: str):
    """Ties of the maximum, where 0/0 and inf - inf lurk, and values that are all the same."""
    arguments = draw(1, 40, 4, 0.0, keys=0)
    arguments["v"][..., 0] = 3
    actual = run(biwkv, arguments, impl=impl)
    assert_close(actual, run(softmax, arguments), 1e-10)
    v, bonus = arguments["v"], arguments["u"].exp()
    assert_close({"y": actual["y"]}, {"y": (v.sum(1, keepdim=True) + (bonus - 1) * v) / (39 + bonus)}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
def test_masked_tokens_weigh_nothing(impl: str):
    """A key of -1e38, as padding has it."""
    arguments = draw(1, 45, 4)
    arguments["k"][:, 40:] = -1e38
    y = biwkv(**to(arguments, torch.float32), impl=impl)[:, :40]
    alone = {name: x[:, :40] if x.ndim == 3 else x for name, x in arguments.items()}
    assert_close({"y": y}, {"y": softmax(**alone)}, 1e-5)


@pytest.mark.parametrize("impl", ["chunked", "recurrent", "cpu"])
def test_slow_decay_keeps_its_digits(impl: str):
    """What one decay loses by rounding would come back at each of 4000 tokens. (The plain loop loses it: its unit is
    rounded at every token.)"""
    tokens = 4000
    log_w = -torch.logspace(-7, -3, 16)
    k = torch.full((1, tokens, 16), -60.0)
    k[:, [0, -1]] = 60
    v = torch.zeros_like(k)
    v[:, 0] = 1
    y = biwkv(log_w, k, v, torch.zeros(16), impl=impl)[0]
    assert_close({"y": y[-1]}, {"y": (log_w.double() * (tokens - 2)).sigmoid()}, 1e-5)
    middle = torch.arange(1, tokens - 1)[:, None]
    assert_close({"y": y[1:-1]}, {"y": (log_w.double() * (2 * middle - tokens + 1)).sigmoid()}, 1e-5)


@pytest.mark.parametrize("impl", BODIES)
def test_gradients_by_finite_differences(impl: str):
    arguments = draw(2, 5, 2, -0.3)
    inputs = [x.requires_grad_() for x in arguments.values()]
    assert torch.autograd.gradcheck(partial(biwkv, impl=impl), inputs)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(impl: str, dtype: torch.dtype):
    arguments = to(draw(2, 70, 16, keys=3), dtype)
    actual = run(biwkv, arguments, impl=impl)
    assert all(x.dtype == dtype for x in actual.values())
    assert torch.equal(actual["y"], biwkv(**to(arguments, torch.float32), impl=impl).to(dtype))
    assert_close(actual, run(softmax, to(arguments, torch.float64)), 2**-7 if dtype == torch.bfloat16 else 2**-9)


@pytest.mark.parametrize("impl", BODIES)
def test_a_flipped_picture_gives_a_flipped_output(impl: str):
    arguments = draw(2, 50, 6)
    flipped = arguments | {name: arguments[name].flip(1) for name in ("k", "v")}
    actual, expected = biwkv(**flipped, impl=impl), biwkv(**arguments, impl=impl).flip(1)
    assert_close({"y": actual}, {"y": expected}, EXACT[impl])


@pytest.mark.parametrize("impl", BODIES)
def test_pictures_do_not_meet(impl: str):
    arguments = draw(3, 50, 40)
    together = biwkv(**arguments, impl=impl)
    for row in range(3):
        alone = {name: x[row : row + 1] if x.ndim == 3 else x for name, x in arguments.items()}
        y = biwkv(**alone, impl=impl)
        assert_close({"y": y}, {"y": together[row : row + 1]}, 0 if impl == "cpu" else EXACT[impl])


@pytest.mark.parametrize("impl", BODIES)
def test_inputs_stay_as_they_are(impl: str):
    arguments = draw(2, 40, 3)
    before = {name: x.clone() for name, x in arguments.items()}
    biwkv(**arguments, impl=impl)
    assert all(torch.equal(x, before[name]) for name, x in arguments.items())


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_inside(impl: str, dtype: torch.dtype):
    arguments = to(draw(2, 40, 8), torch.float32)
    y = biwkv(**arguments, impl=impl)
    with torch.autocast("cpu", dtype):
        assert torch.equal(biwkv(**arguments, impl=impl), y)


def test_auto_runs_the_native_body():
    arguments = draw(2, 40, 8)
    assert torch.equal(biwkv(**arguments), biwkv(**arguments, impl="cpu"))


# ---- the native body ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 100, 72), (1, 70, 192), (8, 40, 600)], ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, int, int]):
    arguments = to(draw(*shape), torch.float32)
    arguments["log_w"][::40] = -3  # runs of a few tokens there
    assert_same_for_any_threads(lambda: run(biwkv, arguments, impl="cpu"))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_same_numbers(level: str, monkeypatch):
    monkeypatch.setattr(build, "level", level)
    arguments = to(draw(2, 70, 21, keys=3), torch.bfloat16)
    arguments["log_w"][3] = -2
    exact = run(softmax, to(arguments, torch.float64))
    assert_close(run(biwkv, to(arguments, torch.float64), impl="cpu"), exact, 1e-11)
    assert_close(run(biwkv, to(arguments, torch.float32), impl="cpu"), exact, 2e-5)
    assert_close(run(biwkv, arguments, impl="cpu"), exact, 2**-7)


@pytest.mark.parametrize("shift", range(4))
def test_each_input_may_have_its_own_dtype(shift: int):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    exact = draw(2, 40, 20)
    arguments = {name: x.to(dtypes[(i + shift) % 4]) for i, (name, x) in enumerate(exact.items())}
    actual = run(biwkv, arguments, impl="cpu")
    assert actual["y"].dtype == arguments["v"].dtype
    for name, x in arguments.items():
        assert actual[f"gradient of {name}"].dtype == x.dtype
    assert_close(actual, run(softmax, to(arguments, torch.float64)), 2**-7)


@pytest.mark.parametrize("view", [scattered, last_axis_dense])
def test_views_are_read_where_they_lie(view: Callable[[Tensor], Tensor]):
    arguments = to(draw(2, 40, 24), torch.float32)
    expected = run(biwkv, arguments, impl="cpu")

    def call(**leaves: Tensor) -> Tensor:
        return view(biwkv(**{name: view(x) for name, x in leaves.items()}, impl="cpu"))

    actual = run(call, arguments)
    assert torch.equal(actual["y"], expected["y"])
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("impl", ["cpu", "auto"])
def test_compiles_with_torch(impl: str):
    torch._dynamo.reset()
    arguments = draw(1, 40, 8)
    call = torch.compile(biwkv, backend="aot_eager", fullgraph=True)
    expected = run(biwkv, arguments, impl="cpu")
    actual = run(call, arguments, impl=impl)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("impl", ["chunked", "cpu"])
def test_exports_for_any_number_of_tokens(impl: str):
    class Attention(torch.nn.Module):
        def forward(self, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
            return biwkv(log_w, k, v, u, impl=impl)

    tokens = {1: torch.export.Dim("tokens", min=3, max=4096)}
    shapes = (None, tokens, tokens, None)
    program = torch.export.export(Attention(), tuple(draw(2, 40, 8).values()), dynamic_shapes=shapes)
    arguments = draw(2, 70, 8)
    assert torch.equal(program.module()(*arguments.values()), biwkv(**arguments, impl=impl))


def test_is_a_well_formed_operator():
    with Recorder() as recorder:
        run(biwkv, to(draw(2, 40, 4), torch.float32), impl="cpu")
    (forward, inputs), (backward, others) = recorder.calls
    torch.library.opcheck(forward, tuple(x.clone().requires_grad_() for x in inputs))
    torch.library.opcheck(backward, others)
    assert (forward._opname, backward._opname) == ("biwkv", "biwkv_backward")


# ---- the kernel of the released weights --------------------------------------------------------------------------


def as_released(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, segments: int) -> Tensor:
    """The table of the released kernel's weights, line by line as Vision-RWKV's specification has it."""
    w, tokens = -log_w, k.shape[1]
    length = -(-tokens // segments)
    t, i = torch.arange(tokens)[:, None, None], torch.arange(tokens)[:, None]  # [T, 1, 1] and [T, 1]
    t0 = length * (t // length)
    weight = (-w * (i - t)).exp()  # i > t
    weight = torch.where(i == t, u.exp(), weight)
    weight = torch.where((t0 <= i) & (i < t), (-w * (t - 1 - i)).exp(), weight)
    weight = torch.where(i < t0, (-w * (t - i)).exp(), weight)
    weight = weight + torch.where((t0 < i) & (i <= t), (1 - w.exp()) * (w * (t - i)).exp(), 0)
    weight = weight * k.exp()[:, None]  # [B, T, T, A]
    return (weight * v[:, None]).sum(2) / weight.sum(2)


@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 32, 33, 49, 64, 100, 196])
@pytest.mark.parametrize("segments", [1, 7, 32])
def test_segments_give_the_released_kernel(tokens: int, segments: int):
    arguments = to(to(draw(2, tokens, 3), torch.float32), torch.float64)
    expected = run(as_released, arguments, segments=segments)
    assert_close(run(biwkv, arguments, segments=segments), expected, 1e-10)
    rounded = to(arguments, torch.float32)
    assert_close(run(biwkv, rounded, segments=segments, impl="chunked"), expected, 2e-5)


def test_segments_take_huge_keys_and_half_precision():
    arguments = draw(1, 50, 4)
    arguments["k"] = 60 * arguments["k"].sign()
    arguments = to(to(arguments, torch.bfloat16), torch.float64)
    expected = run(as_released, arguments, segments=32)
    assert_close(run(biwkv, arguments, segments=32), expected, 1e-10)
    half = run(biwkv, to(arguments, torch.bfloat16), segments=32)
    assert all(x.dtype == torch.bfloat16 for x in half.values())
    assert_close(half, expected, 2**-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(biwkv(**arguments, segments=32), biwkv(**arguments, segments=32, impl="chunked"))


def test_segments_differ_from_the_formula_the_less_the_more_tokens():
    differences = []
    for tokens in (16, 49, 196):
        arguments = draw(2, tokens, 64)
        formula = biwkv(**arguments)
        differences.append(((biwkv(**arguments, segments=32) - formula).norm() / formula.norm()).item())
    assert differences[0] > 3 * differences[1] > 9 * differences[2] > 1e-4


# ---- token by token ----------------------------------------------------------------------------------------------


def read(arguments: Arguments, strip: int) -> tuple[Tensor, int]:
    """The output of a reader who sees the picture in strips; how often the future was gathered again."""
    log_w, k, v, u = arguments.values()
    tokens, future, again = k.shape[1], None, 0
    for start in reversed(range(0, tokens, strip)):
        future = streaming.gather(log_w, k[:, start : start + strip], v[:, start : start + strip], future)
    past = streaming.begin(len(k), k.shape[2])
    ys = []

    def gather_again() -> streaming.Future:
        nonlocal again
        again += 1
        return streaming.gather(log_w, k[:, len(ys) + 1 :], v[:, len(ys) + 1 :])

    for t in range(tokens):
        y, past, future = streaming.step(log_w, u, k[:, t], v[:, t], past, future, gather_again)
        ys.append(y)
    return torch.stack(ys, 1), again


@pytest.mark.parametrize("strip", [1, 7, 40, 1000])
@pytest.mark.parametrize("log_w", [None, -0.02, 0.02])
def test_a_picture_gathered_in_strips_is_read_token_by_token(strip: int, log_w: float | None):
    arguments = draw(2, 40, 5, log_w, keys=3)
    y, again = read(arguments, strip)
    assert_close({"y": y}, {"y": softmax(**arguments)}, 1e-12)
    assert again == 0


@pytest.mark.parametrize("keys", [1, 3, 10])
def test_as_vision_rwkv_begins_the_future_is_gathered_once(keys: float):
    arguments = draw(1, 1000, 8, keys=keys)
    y, again = read(arguments, 100)
    assert_close({"y": y}, {"y": softmax(**arguments)}, 1e-10)
    assert again == 0


@pytest.mark.parametrize("position", [100, 150])
def test_a_heavy_token_that_leaves_takes_no_digits_along(position: int):
    """After a weight of e^40 is gone and forgotten, 17 digits of its sum know nothing of what is left."""
    arguments = draw(1, 300, 4, -0.06)
    assert read(arguments, 300)[1] == 0
    arguments["k"][:, position] = 40
    y, again = read(arguments, 300)
    assert again > 0
    assert_close({"y": y}, {"y": softmax(**arguments)}, 1e-5)
    assert_close({"y": biwkv(**arguments, impl="recurrent")}, {"y": softmax(**arguments)}, 1e-5)


def test_the_recurrent_body_gathers_no_more_than_a_block(monkeypatch):
    """With decays that make it gather all the time: never the rest of the picture."""
    lengths = []

    def gather(log_w: Tensor, k: Tensor, *rest) -> streaming.Future:
        lengths.append(k.shape[1])
        return whole(log_w, k, *rest)

    whole = streaming.gather
    monkeypatch.setattr(streaming, "gather", gather)
    arguments = draw(1, 300, 4, -3.0)
    y = biwkv(**arguments, impl="recurrent")
    assert len(lengths) > 40
    assert max(lengths) <= streaming.BLOCK
    assert_close({"y": y}, {"y": softmax(**arguments)}, 2e-6)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log_w", "k", "v", "u"])
def test_wrong_shapes_and_integers_are_named(name: str):
    arguments = draw(2, 6, 5)
    for wrong in (arguments[name][..., :-1], arguments[name][None]):
        with pytest.raises(ValueError, match=r"^biwkv: .*must have shape"):
            biwkv(**arguments | {name: wrong})
    with pytest.raises(ValueError, match=rf"^biwkv: {name} must be floating point, got torch.int64"):
        biwkv(**arguments | {name: arguments[name].long()})


def test_no_tokens_are_refused():
    arguments = draw(2, 6, 5)
    with pytest.raises(ValueError, match=r"^biwkv: k must have shape \[B, T, A\], got \[2, 0, 5\]"):
        biwkv(**arguments | {name: arguments[name][:, :0] for name in ("k", "v")})


def test_unknown_bodies_and_segments_are_refused():
    arguments = draw(1, 6, 5)
    with pytest.raises(ValueError, match="biwkv has no body 'fast'; choose one of auto, reference, chunked"):
        biwkv(**arguments, impl="fast")
    for impl in ("cpu", "recurrent", "reference", "fast"):
        with pytest.raises(ValueError, match=f"biwkv has no body '{impl}' with segments; choose one of auto, chunked"):
            biwkv(**arguments, impl=impl, segments=32)
    for segments in (0, -1):
        with pytest.raises(ValueError, match=f"biwkv: segments must be at least 1, got {segments}"):
            biwkv(**arguments, segments=segments)


def test_without_a_compiler_the_plain_loop_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr("heronry.ops.dispatch.has_native_body", lambda operator: False)
    arguments = draw(2, 40, 8)
    assert torch.equal(biwkv(**arguments), biwkv(**arguments, impl="reference"))


@pytest.mark.parametrize("impl", ["auto", *BODIES])
def test_tensors_on_several_devices_are_refused(impl: str):
    arguments = draw(2, 6, 5)
    for name, x in arguments.items():
        with pytest.raises(ValueError, match=r"^biwkv: (all tensors must be on one device|the body 'cpu' cannot run)"):
            biwkv(**arguments | {name: x.to("meta")}, impl=impl)
