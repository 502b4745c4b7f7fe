"""Packed matrices against what they stand for, in every body and at every size that has a remainder."""

from __future__ import annotations

import pytest
import torch
from levels import LEVELS as TESTED_LEVELS
from torch import Tensor

from heronry import build
from heronry.ops.packed import GROUP, LEVELS, dequantize, packed_matmul, reference, tile, untile
from heronry.quantization import FORMATS

from .cases import assert_same_for_any_threads


@pytest.fixture(params=TESTED_LEVELS)
def level(request, monkeypatch):
    monkeypatch.setattr(build, "level", request.param)
    return request.param


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    """Activations as the product sees them, in float64."""
    groups = x.double().unflatten(-1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    return (torch.where(top > 0, groups * 127 / top, 0).round() * top / 127).flatten(-2)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (33, 96), (100, 320)])
def test_tiles_hold_what_they_were_given(format, rows, columns):
    q, scales = FORMATS[format](matrix(rows, columns))
    back, scales_back = untile(*tile(q, scales), rows)
    assert torch.equal(back, q)
    assert torch.equal(scales_back, scales)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (33, 96), (100, 320)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 12, 13, 29, 200])
def test_product_is_that_of_the_weights(level, format, rows, columns, tokens):
    q, scales = FORMATS[format](matrix(rows, columns))
    x = 3 * matrix(tokens, columns, seed=1)
    x[:, :GROUP] *= 100  # a group with activations out of the ordinary
    y = packed_matmul(x, *tile(q, scales), rows)
    expected = rounded(x) @ dequantize(q, scales).double().T
    assert y.shape == (tokens, rows)
    # a product that lies half way between two integers may be rounded either way
    assert relative(y, expected) < 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_reference_is_the_same_product(format):
    q, scales = FORMATS[format](matrix(50, 96))
    x = matrix(9, 96, seed=1)
    packed = tile(q, scales)
    assert relative(packed_matmul(x, *packed, 50), reference(x, *packed, 50)) < 1e-4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_leading_dimensions(format, dtype):
    packed = tile(*FORMATS[format](matrix(40, 64)))
    x = matrix(12, 64, seed=1).to(dtype).view(2, 2, 3, 64)
    y = packed_matmul(x, *packed, 40)
    assert (y.shape, y.dtype) == ((2, 2, 3, 40), dtype)
    precise = packed_matmul(x.float(), *packed, 40)
    assert relative(y, precise) < 2 * torch.finfo(torch.promote_types(dtype, dtype)).eps + 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_does_not_depend_on_the_others(level, format):
    packed = tile(*FORMATS[format](matrix(70, 96)))
    x = matrix(41, 96, seed=1)
    together = packed_matmul(x, *packed, 70)
    assert all(torch.equal(packed_matmul(row[None], *packed, 70)[0], y) for row, y in zip(x, together, strict=True))


def test_threads_do_not_change_numbers():
    packed = tile(*FORMATS["int8"](matrix(100, 96)))
    x = matrix(20, 96, seed=1)
    assert_same_for_any_threads(lambda: {"y": packed_matmul(x, *packed, 100)})


@pytest.mark.parametrize("format", FORMATS)
def test_gradient_of_the_activations(format):
    q, scales = FORMATS[format](matrix(30, 64))
    x = matrix(5, 64, seed=1).requires_grad_()
    weights = matrix(5, 30, seed=2)
    (packed_matmul(x, *tile(q, scales), 30) * weights).sum().backward()
    assert relative(x.grad, weights @ dequantize(q, scales)) < 1e-6


def test_torch_operator_is_well_formed():
    packed = tile(*FORMATS["int8"](matrix(30, 64)))
    torch.library.opcheck(torch.ops.heronry.packed_matmul, (matrix(5, 64).requires_grad_(), *packed, 30))


def test_zeros_and_largest_numbers(level):
    """The sums of integers at their largest, where 16 bits would overflow, and groups without anything."""
    for format in FORMATS:
        w = torch.full((17, 64), -2.0)
        w[:, 1::2] = 2.0
        w[3] = 0
        q, scales = FORMATS[format](w)
        x = torch.full((3, 64), -5.0)
        x[:, 1::2] = 5.0
        x[1] = 0
        y = packed_matmul(x, *tile(q, scales), 17)
        expected = rounded(x) @ dequantize(q, scales).double().T
        assert torch.allclose(y.double(), expected, rtol=1e-5)
        assert not y[1].any()
        assert not y[:, 3].any()


def test_wrong_width_is_named():
    packed = tile(*FORMATS["int8"](matrix(30, 64)))
    with pytest.raises(ValueError, match=r"packed_matmul: x must have 64 numbers in its last dimension, got \[5, 32\]"):
        packed_matmul(matrix(5, 32), *packed, 30)


def test_levels_rise_through_zero_and_fit_a_byte():
    assert list(LEVELS) == sorted(set(LEVELS))
    assert 0 in LEVELS
    assert all(-64 <= level < 64 for level in LEVELS)


def test_a_matrix_that_is_none_is_refused():
    """C++ would read beyond its end."""
    data, scales = tile(*FORMATS["int8"](matrix(30, 64)))
    x = matrix(5, 64)
    assert packed_matmul(x, data, scales, 30).shape == (5, 30)
    wrong = [
        (data, scales, 33),
        (data, scales, 16),
        (data, scales, 0),
        (data[:1], scales, 30),
        (data, scales[:, :1], 30),
        (data.float(), scales, 30),
        (data, scales.float(), 30),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"^packed_matmul: .* are not a tiled matrix of \d+ rows$"):
            packed_matmul(x, *arguments)
    rows, columns = (
        data.transpose(1, 2).contiguous().transpose(1, 2),
        scales.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(packed_matmul(x, rows, columns, 30), packed_matmul(x, data, scales, 30))


@pytest.mark.parametrize("place", range(3))
def test_tensors_on_several_devices_are_refused(place: int):
    tensors = [matrix(5, 64), *tile(*FORMATS["int8"](matrix(30, 64)))]
    tensors[place] = tensors[place].to("meta")
    with pytest.raises(
        ValueError, match=r"^packed_matmul: all tensors must be on one device, got (cpu and meta|meta and cpu)$"
    ):
        packed_matmul(*tensors, 30)
