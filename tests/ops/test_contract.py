"""What every operator promises, for every body: the same numbers, the same gradients, honest states."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from . import cases
from .cases import OPERATORS, Operator, assert_close, cut, draw, run, to

BODIES = [pytest.param(o, impl, id=f"{o.name}-{impl}") for o in OPERATORS for impl in o.bodies]
OTHERS = [pytest.param(o, impl, id=f"{o.name}-{impl}") for o in OPERATORS for impl in o.bodies if impl != "reference"]
EACH = [pytest.param(o, id=o.name) for o in OPERATORS]


@pytest.mark.parametrize(("operator", "impl"), OTHERS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size"), [(2, 1, 3, 5), (2, 63, 3, 5), (1, 1000, 1, 4), (3, 32, 1, 1), (1, 65, 2, 16)]
)
def test_body_equals_reference(operator: Operator, impl: str, batch: int, tokens: int, heads: int, size: int):
    arguments = draw(operator, batch, tokens, heads, size)
    assert_close(run(operator, arguments, impl), run(operator, arguments, "reference"), 1e-10)


@pytest.mark.parametrize(("operator", "impl"), OTHERS)
@given(st.integers(1, 3), st.integers(1, 100), st.integers(1, 3), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=12)
def test_body_equals_reference_at_any_size(operator, impl, batch, tokens, heads, size, seed):
    arguments = draw(operator, batch, tokens, heads, size, seed=seed)
    assert_close(run(operator, arguments, impl), run(operator, arguments, "reference"), 1e-10)


@pytest.mark.parametrize(("operator", "impl"), OTHERS)
def test_long_sequence(operator: Operator, impl: str):
    arguments = draw(operator, 1, 4097, 1, 4)
    y, state = operator.call(**arguments, impl="reference")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        actual = operator.call(**to(arguments, dtype), impl=impl)
        assert_close({"y": actual[0], "state": actual[1]}, {"y": y, "state": state}, tolerance)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_float32_is_near_float64(operator: Operator, impl: str, tokens: int):
    arguments = to(draw(operator, 2, tokens, 2, 8), torch.float32)
    actual = run(operator, arguments, impl)
    assert all(x.dtype == torch.float32 for x in actual.values())
    assert_close(actual, run(operator, to(arguments, torch.float64), "reference"), 2e-5)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_bfloat16_activations_keep_a_float32_state(operator: Operator, impl: str):
    arguments = to(draw(operator, 2, 70, 2, 8), torch.bfloat16)
    y, state = operator.call(**arguments, impl=impl)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact_y, exact_state = operator.call(**to(arguments, torch.float64), impl="reference")
    assert_close({"y": y}, {"y": exact_y}, 2**-8)  # one rounding of the output
    assert_close({"state": state}, {"state": exact_state}, 1e-5)  # none of the state


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_gradients_by_finite_differences(operator: Operator, impl: str):
    arguments = draw(operator, 2, 5, 1, 2)

    def outputs(*tensors):
        y, state = operator.call(**dict(zip(arguments, tensors, strict=True)), impl=impl)
        if operator.name == "wkv4":  # only the sums are numbers, their unit is a choice
            state = state[:, :2] * state[:, 2:].exp()
        return y, state

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in arguments.values()])


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "cpu"])
@pytest.mark.parametrize("operator", EACH)
def test_forward_mode_differentiation(operator: Operator, impl: str):
    """C++ knows nothing of it: "auto" then takes another body, "cpu" refuses."""
    arguments = draw(operator, 1, 5, 2, 4)
    along = torch.randn(arguments["v"].shape, dtype=torch.float64)
    step = 1e-6
    y = [operator.call(**arguments | {"v": arguments["v"] + s * along}, impl="reference")[0] for s in (step, -step)]
    with forward_ad.dual_level():
        arguments["v"] = forward_ad.make_dual(arguments["v"], along)
        if impl == "cpu":
            with pytest.raises(ValueError, match="the body 'cpu' has no forward-mode derivative; choose chunked"):
                operator.call(**arguments, impl=impl)
        else:
            actual = forward_ad.unpack_dual(operator.call(**arguments, impl=impl)[0]).tangent
            assert_close({"y": actual}, {"y": (y[0] - y[1]) / (2 * step)}, 1e-8)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
@pytest.mark.parametrize("middle", [1, 31, 64])
def test_one_pass_equals_two_halves(operator: Operator, impl: str, middle: int):
    arguments = draw(operator, 2, 75, 2, 5)
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    first, state = operator.call(**cut(operator, leaves, 0, middle, leaves["state"]), impl=impl)
    second, state = operator.call(**cut(operator, leaves, middle, 75, state), impl=impl)
    y = torch.cat([first, second], dim=1)
    gradients = torch.autograd.grad(cases.loss(y, state), list(leaves.values()))
    halves = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    assert_close({"y": y, "final state": state} | halves, run(operator, arguments, "reference"), 1e-10)


def packed_equals_separate(operator: Operator, impl: str, lengths: list[int], seed: int = 0):
    cu = [0, *accumulate(lengths)]
    arguments = draw(operator, 1, cu[-1], 2, 3, states=len(lengths), seed=seed)
    packed = run(operator, arguments, impl, cu)

    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    parts = [
        operator.call(**cut(operator, leaves, start, end, leaves["state"][s : s + 1]), impl="reference")
        for s, (start, end) in enumerate(pairwise(cu))
    ]
    y, state = torch.cat([y for y, _ in parts], dim=1), torch.cat([state for _, state in parts])
    gradients = torch.autograd.grad(cases.loss(y, state), list(leaves.values()))
    separate = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    assert_close(packed, {"y": y, "final state": state} | separate, 1e-10)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
@pytest.mark.parametrize("lengths", [[7, 1, 90, 33, 1, 32], [5], [1, 1, 1], [64, 65, 63]], ids=str)
def test_packed_equals_separate(operator: Operator, impl: str, lengths: list[int]):
    packed_equals_separate(operator, impl, lengths)


@pytest.mark.parametrize(("operator", "impl"), OTHERS)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=8)
def test_packed_equals_separate_for_any_lengths(operator, impl, lengths, seed):
    packed_equals_separate(operator, impl, lengths, seed)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_packed_without_states_begins_each_sequence_empty(operator: Operator, impl: str):
    cu = [0, 40, 41, 75]
    arguments = draw(operator, 1, 75, 2, 3)
    y, state = operator.call(**cut(operator, arguments, 0, 75, None), cu_seqlens=torch.tensor(cu), impl=impl)
    for s, (start, end) in enumerate(pairwise(cu)):
        y_alone, state_alone = operator.call(**cut(operator, arguments, start, end, None), impl="reference")
        actual = {"y": y[:, start:end], "state": state[s : s + 1]}
        assert_close(actual, {"y": y_alone, "state": state_alone}, 1e-10)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_inputs_stay_as_they_are(operator: Operator, impl: str):
    arguments = draw(operator, 2, 40, 2, 3)
    before = {name: x.clone() for name, x in arguments.items()}
    operator.call(**arguments, impl=impl)
    assert all(torch.equal(x, before[name]) for name, x in arguments.items())


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_future_does_not_reach_the_past(operator: Operator, impl: str):
    arguments = draw(operator, 1, 70, 2, 3)
    y, _ = operator.call(**arguments, impl=impl)
    for name in operator.over_time:
        arguments[name][:, 45:] -= 0.3
    changed, _ = operator.call(**arguments, impl=impl)
    assert torch.equal(changed[:, :45], y[:, :45])
    assert not torch.equal(changed[:, 45], y[:, 45])


@pytest.mark.parametrize("operator", EACH)
@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_auto_gives_the_same_numbers(operator: Operator, tokens: int):
    arguments = draw(operator, 2, tokens, 2, 3)
    assert_close(run(operator, arguments, "auto"), run(operator, arguments, "reference"), 1e-10)


@pytest.mark.parametrize("operator", EACH)
def test_wrong_shapes_are_named(operator: Operator):
    arguments = draw(operator, 2, 6, 3, 5)
    for name, x in arguments.items():
        with pytest.raises(ValueError, match=rf"^{operator.name}: .*must have shape"):
            operator.call(**arguments | {name: x[..., :-1]})
        with pytest.raises(ValueError, match=rf"^{operator.name}: .*must have shape"):
            operator.call(**arguments | {name: x[None]})
    state = arguments["state"]
    with pytest.raises(ValueError, match="state must have shape"):
        operator.call(**arguments | {"state": state[:1]})


@pytest.mark.parametrize("operator", EACH)
def test_integers_are_refused(operator: Operator):
    arguments = draw(operator, 2, 6, 3, 5)
    for name, x in arguments.items():
        with pytest.raises(ValueError, match=rf"^{operator.name}: {name} must be floating point, got torch.int64"):
            operator.call(**arguments | {name: x.long()})


@pytest.mark.parametrize("operator", EACH)
def test_no_tokens_are_refused(operator: Operator):
    arguments = draw(operator, 2, 6, 3, 5)
    with pytest.raises(ValueError, match=rf"^{operator.name}: "):
        operator.call(**cut(operator, arguments, 0, 0, None))


@pytest.mark.parametrize("operator", EACH)
def test_unknown_impl_is_refused(operator: Operator):
    with pytest.raises(
        ValueError, match=rf"{operator.name} has no body 'fast'; choose one of auto, reference, chunked"
    ):
        operator.call(**draw(operator, 1, 6, 3, 5), impl="fast")


@pytest.mark.parametrize("operator", EACH)
@pytest.mark.parametrize("cu", [[0, 5], [0, 7], [1, 6], [0, 3, 3, 6], [0, 4, 2, 6], [0], [], [0, 2.5, 6], [[0, 6]], 6])
def test_bad_cu_seqlens_are_refused(operator: Operator, cu):
    arguments = cut(operator, draw(operator, 1, 6, 3, 5), 0, 6, None)
    with pytest.raises(ValueError, match="cu_seqlens"):
        operator.call(**arguments, cu_seqlens=cu)
    with pytest.raises(ValueError, match="cu_seqlens"):
        operator.call(**arguments, cu_seqlens=torch.tensor(cu))


@pytest.mark.parametrize("operator", EACH)
def test_cu_seqlens_refuses_a_batch(operator: Operator):
    arguments = cut(operator, draw(operator, 2, 6, 3, 5), 0, 6, None)
    with pytest.raises(ValueError, match="cu_seqlens packs sequences into one row, but the batch has 2"):
        operator.call(**arguments, cu_seqlens=[0, 6])


@pytest.mark.parametrize(("operator", "impl"), BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_inside(operator: Operator, impl: str, dtype: torch.dtype):
    arguments = to(draw(operator, 2, 40, 2, 8), torch.float32)
    y, state = operator.call(**arguments, impl=impl)
    with torch.autocast("cpu", dtype):
        autocast_y, autocast_state = operator.call(**arguments, impl=impl)
    assert torch.equal(autocast_y, y)
    assert torch.equal(autocast_state, state)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_tensors_on_several_devices_are_refused(operator: Operator, impl: str):
    """In C++ the address of a tensor without memory ends the process."""
    arguments = to(draw(operator, 1, 5, 1, 4), torch.float32)
    for name, x in arguments.items():
        mixed = arguments | {name: x.to("meta")}
        with pytest.raises(ValueError, match=rf"^{operator.name}: (all tensors must be on one device|the body 'cpu')"):
            operator.call(**mixed, impl=impl)
    with pytest.raises(ValueError, match=rf"^{operator.name}: all tensors must be on one device, got cpu and meta$"):
        operator.call(**arguments | {"v": arguments["v"].to("meta")}, impl=impl)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_a_view_that_negates_is_read_as_what_it_is(operator: Operator, impl: str):
    arguments = to(draw(operator, 1, 5, 1, 4), torch.float32)
    expected, _ = operator.call(**arguments, impl=impl)
    v = torch.complex(torch.zeros_like(arguments["v"]), -arguments["v"]).conj().imag
    assert v.is_neg()
    assert torch.equal(operator.call(**arguments | {"v": v}, impl=impl)[0], expected)
