"""VRWKV6's operator against what it adds up, written out: every body, every gradient, decays up to forgetting all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heronry.ops import dispatch
from heronry.ops.biwkv6 import BODIES, biwkv6
from heronry.ops.biwkv6 import recurrent as body

from .cases import Arguments, assert_close, assert_same_for_any_threads, to
from .cases import run_without_state as run

pytestmark = pytest.mark.skipif(not dispatch.has_native_body("wkv6"), reason="there is no C++ compiler")

# of float64; the recurrent body lets a rounding grow by e^20 before it gathers anew
EXACT = {"reference": 1e-11, "chunked": 1e-11, "recurrent": 1e-6, "cpu": 1e-11}


def draw(batch: int, tokens: int, heads: int, size: int, decay: float = 1.0, seed: int = 0) -> Arguments:
    """Arguments in float64; log_w from -decay / 20 to -20 decay or so."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    r, log_w, k, v = (noise(batch, tokens, heads, size) for _ in range(4))
    return {"r": r, "log_w": -decay * log_w.exp(), "k": k, "v": v, "u": noise(heads, size)}


def written_out(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """Every pair of tokens: what is strictly between them decays, on either side, and the token itself counts once."""
    tokens = r.shape[1]
    sums = torch.cat([torch.zeros_like(log_w[:, :1]), log_w.cumsum(1)], 1)  # [B, T + 1, H, N]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    between = sums[:, torch.maximum(i, j)] - sums[:, torch.minimum(i, j) + 1]  # [B, T, T, H, N]
    weight = torch.where((i == j)[..., None, None], u, between.clamp(max=0).exp())
    scores = torch.einsum("bihn,bijhn,bjhn->bijh", r, weight, k)
    return torch.einsum("bijh,bjhn->bihn", scores, v)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("decay", [0.02, 1.0, 8.0])
def test_equals_what_it_adds_up(impl: str, tokens: int, decay: float):
    arguments = draw(2, tokens, 2, 5, decay)
    assert_close(run(biwkv6, arguments, impl=impl), run(written_out, arguments), EXACT[impl])
    rounded = to(arguments, torch.float32)
    assert_close(run(biwkv6, rounded, impl=impl), run(written_out, to(rounded, torch.float64)), 2e-5)


@pytest.mark.parametrize("impl", BODIES)
def test_many_tokens(impl: str):
    arguments = to(to(draw(1, 500, 1, 4, 0.05), torch.float32), torch.float64)
    y = written_out(**arguments)
    assert_close({"y": biwkv6(**arguments, impl=impl)}, {"y": y}, EXACT[impl])
    assert_close({"y": biwkv6(**to(arguments, torch.float32), impl=impl)}, {"y": y}, 2e-5)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("log_w", [-60.0, -torch.inf])
def test_some_tokens_forget_all(impl: str, log_w: float):
    """Either side sees nothing through them, but for the last that are before and after."""
    arguments = draw(1, 70, 2, 4, 0.1)
    ends = {name: x[:, :31] if x.ndim == 4 else x for name, x in arguments.items()}
    begins = {name: x[:, 30:] if x.ndim == 4 else x for name, x in arguments.items()}
    left, right = written_out(**ends), written_out(**begins)  # where the token lies between no two
    arguments["log_w"] = arguments["log_w"].index_fill(1, torch.tensor(30), log_w)
    y = biwkv6(**arguments, impl=impl)
    assert_close({"y": y[:, :30]}, {"y": left[:, :30]}, EXACT[impl])
    assert_close({"y": y[:, 31:]}, {"y": right[:, 1:]}, EXACT[impl])
    gradients = run(biwkv6, arguments, impl=impl)
    assert_close(gradients, run(biwkv6, arguments, impl="reference"), 2 * EXACT[impl])


@pytest.mark.parametrize("impl", BODIES)
def test_gradients_by_finite_differences(impl: str):
    names, tensors = zip(*draw(1, 5, 1, 2).items(), strict=True)
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: biwkv6(**dict(zip(names, x, strict=True)), impl=impl), inputs)


@pytest.mark.parametrize("impl", BODIES)
def test_half_precision_is_computed_in_full(impl: str):
    arguments = to(draw(2, 50, 2, 8), torch.bfloat16)
    actual = run(biwkv6, arguments, impl=impl)
    assert all(x.dtype == torch.bfloat16 for x in actual.values())
    assert torch.equal(actual["y"], biwkv6(**to(arguments, torch.float32), impl=impl).bfloat16())
    assert_close(actual, run(written_out, to(arguments, torch.float64)), 2**-7)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_inside(impl: str, dtype: torch.dtype):
    arguments = to(draw(2, 40, 2, 8), torch.float32)
    y = biwkv6(**arguments, impl=impl)
    with torch.autocast("cpu", dtype):
        assert torch.equal(biwkv6(**arguments, impl=impl), y)


@pytest.mark.parametrize("impl", BODIES)
def test_a_flipped_picture_gives_a_flipped_output(impl: str):
    arguments = draw(2, 50, 2, 4, 0.3)
    flipped = {name: x.flip(1) if x.ndim == 4 else x for name, x in arguments.items()}
    actual, expected = biwkv6(**flipped, impl=impl), biwkv6(**arguments, impl=impl).flip(1)
    assert_close({"y": actual}, {"y": expected}, EXACT[impl])


@pytest.mark.parametrize("impl", BODIES)
def test_pictures_do_not_meet(impl: str):
    arguments = draw(3, 40, 2, 4)
    together = biwkv6(**arguments, impl=impl)
    for row in range(3):
        alone = {name: x[row : row + 1] if x.ndim == 4 else x for name, x in arguments.items()}
        assert_close({"y": biwkv6(**alone, impl=impl)}, {"y": together[row : row + 1]}, EXACT[impl])


def test_threads_do_not_change_a_bit():
    arguments = to(draw(3, 60, 3, 16), torch.float32)
    assert_same_for_any_threads(lambda: run(biwkv6, arguments, impl="cpu"))


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_auto_gives_the_same_numbers(tokens: int):
    arguments = draw(2, tokens, 2, 3)
    assert_close(run(biwkv6, arguments), run(biwkv6, arguments, impl="reference"), 1e-11)


def test_compiles_with_torch():
    torch._dynamo.reset()
    arguments = draw(1, 40, 2, 8)
    call = torch.compile(biwkv6, backend="aot_eager", fullgraph=True)
    expected, actual = run(biwkv6, arguments, impl="cpu"), run(call, arguments, impl="cpu")
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


# ---- token by token ----------------------------------------------------------------------------------------------


def test_as_vrwkv6_begins_a_block_gathers_at_most_once_more(monkeypatch):
    """Its decays are exp(-exp(w)), w from -6 to -1 over the channels, whatever the number of tokens."""
    lengths = []

    def gather(log_w: Tensor, *rest: Tensor) -> Tensor:
        lengths.append(log_w.shape[1])
        return whole(log_w, *rest)

    whole = body.gather
    monkeypatch.setattr(body, "gather", gather)
    arguments = draw(1, 196, 1, 8)
    h = torch.linspace(0, 1, 8, dtype=torch.float64)
    arguments["log_w"] = -(-6 + 5 * h**0.7).exp().expand_as(arguments["log_w"])
    y = biwkv6(**arguments, impl="recurrent")
    assert_close({"y": y}, {"y": written_out(**arguments)}, 1e-6)
    blocks = -(-196 // body.BLOCK)
    assert blocks < len(lengths) <= 2 * blocks
    assert max(lengths) <= body.BLOCK


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r", "log_w", "k", "v", "u"])
def test_wrong_shapes_and_integers_are_named(name: str):
    arguments = draw(2, 6, 3, 5)
    for wrong in (arguments[name][..., :-1], arguments[name][None]):
        with pytest.raises(ValueError, match=r"^biwkv6: .*must have shape"):
            biwkv6(**arguments | {name: wrong})
    with pytest.raises(ValueError, match=rf"^biwkv6: {name} must be floating point, got torch.int64"):
        biwkv6(**arguments | {name: arguments[name].long()})


def test_no_tokens_and_unknown_bodies_are_refused():
    arguments = draw(2, 6, 3, 5)
    with pytest.raises(ValueError, match=r"^biwkv6: r must have shape \[B, T, H, N\], got \[2, 0, 3, 5\]"):
        biwkv6(**{name: x[:, :0] if x.ndim == 4 else x for name, x in arguments.items()})
    with pytest.raises(
        ValueError, match="biwkv6 has no body 'fast'; choose one of auto, reference, chunked, cpu, recurrent"
    ):
        biwkv6(**arguments, impl="fast")


@pytest.mark.parametrize("impl", ["auto", *BODIES])
def test_tensors_on_several_devices_are_refused(impl: str):
    arguments = draw(2, 6, 3, 5)
    for name, x in arguments.items():
        with pytest.raises(ValueError, match=r"^biwkv6: all tensors must be on one device"):
            biwkv6(**arguments | {name: x.to("meta")}, impl=impl)
