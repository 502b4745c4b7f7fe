"""The C++ on an emulated ARM processor gives the numbers of the PyTorch bodies.

`make test-arm` runs it; `make test` does not, as it compiles for minutes.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulator import PROCESSORS, Emulator, missing, span

from heronry.checkpoint import assemble
from heronry.models import native_step
from heronry.ops import arguments, dispatch, packed
from heronry.quantization import FORMATS

sys.path += [str(Path(__file__).parents[1] / name) for name in (".", "models")]
from ops.cases import OPERATORS, Operator, assert_close, draw, run, to
from steps import farthest, plain, tokens

if missing():
    pytest.skip(f"not installed: {missing()} (Debian: qemu-user g++-aarch64-linux-gnu)", allow_module_level=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("arm")


@pytest.fixture(params=PROCESSORS)
def emulator(request, folder: Path) -> Emulator:
    return Emulator(folder, request.param)


@pytest.mark.parametrize("operator", [pytest.param(o, id=o.name) for o in OPERATORS])
@pytest.mark.parametrize("cu", [None, [0, 7, 40]])
def test_operators(operator: Operator, cu: list[int] | None, emulator: Emulator, monkeypatch):
    def call(function, tensors, cu, *numbers: int) -> None:
        dense = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
        fields = [number for x in dense for number in arguments.array(x)]
        arrays = (ctypes.c_int64 * len(fields))(*fields)
        starts = (ctypes.c_int64 * len(cu or [0]))(*cu or [0])
        memory = [(ctypes.addressof(x), ctypes.sizeof(x)) for x in (arrays, starts)]
        memory += [span(x) for x in dense if x.numel()]
        values = [ctypes.addressof(arrays), ctypes.addressof(starts) if cu else 0, *numbers, 1]
        emulator.call(dispatch.source(operator.name), function.__name__, values, memory)

    name = "wkv6" if operator.name == "wkv5" else operator.name
    monkeypatch.setattr(sys.modules[f"heronry.ops.{name}.cpu"], "call", call)
    inputs = draw(operator, 2 if cu is None else 1, 40, 2, 24, states=2)
    exact = run(operator, inputs, "reference", cu)
    assert_close(run(operator, to(inputs, torch.float32), "cpu", cu), exact, 2e-5)
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        half = to(inputs, dtype)
        assert_close(run(operator, half, "cpu", cu), run(operator, to(half, torch.float64), "reference", cu), tolerance)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_packed_matrices(format: str, rows: int, emulator: Emulator, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data, scales = packed.tile(*FORMATS[format](torch.randn(33, 96, generator=generator)))
    x = torch.randn(rows, 96, generator=generator)

    def product(matrix, x_at, dtype, y_at, count, threads, block, size) -> None:
        address, size_at = ctypes.addressof(matrix), ctypes.addressof(size._obj)
        memory = [span(data), span(scales), (ctypes.addressof(packed.TABLE), 16)]
        memory += [(x_at.value, rows * 96 * 4), (y_at.value, rows * 33 * 4), (size_at, 8)]
        memory += [(block.value, size._obj.value)] if block else []
        values = [address, x_at.value, dtype.value, y_at.value, count.value, 1, block.value if block else 0, size_at]
        emulator.call(dispatch.source("packed"), "packed_matmul", values, memory, [(address, ctypes.sizeof(matrix))])

    monkeypatch.setattr(packed, "native_library", lambda operator: SimpleNamespace(packed_matmul=product))
    actual = packed.packed_matmul(x, data, scales, 33)
    assert (actual - packed.reference(x, data, scales, 33)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_steps_of_models(version: str, weights: str, emulator: Emulator, random_checkpoint):
    format = weights if weights in FORMATS else None
    dtype = torch.float32 if format else getattr(torch, weights)
    model = assemble(random_checkpoint(version, width=128, heads=2, ffn=192), dtype=dtype, quantize=format)
    step = native_step.NativeStep(model)
    text = tokens(2, 3)
    state, cu = model.validate_inputs(text, None, None)
    entering = [x.float().contiguous() for layer in state.layers for x in layer]

    def call(reference) -> None:
        call = reference._obj
        constant = [(ctypes.addressof(x), ctypes.sizeof(x)) for x in (call, step.model, step.layers, packed.TABLE)]
        memory = [span(x) for x in (*step.tensors, *entering) if x.numel()]
        constant += [
            (call.tokens, call.rows * 8),
            (call.starts, (call.sequences + 1) * 8),
            (call.entering, len(entering) * 8),
        ]
        sizes = [step.layer_count * math.prod(shape) * 4 for shape in step.shapes(call.sequences)]
        memory += zip((call.att_shift, call.wkv, call.ffn_shift), sizes, strict=True)
        memory += [(call.logits, call.rows * call.vocabulary * 4), (call.memory_size, 8)]
        if call.memory:
            memory += [(call.memory, ctypes.c_int64.from_address(call.memory_size).value)]
        emulator.call(native_step.source_path(model.name), "step", [ctypes.addressof(call)], memory, constant)

    expected = plain(model, text)
    native = step(text, state, cu, False)
    pointers = [x.data_ptr() for x in entering]
    step.last_state = (lambda: state), pointers
    step.library = SimpleNamespace(step=call)
    step.scratch_sizes.clear()  # the emulated processor says how much memory it needs
    actual = step(text, state, cu, False)
    # sums in another order may round an activation to the next bfloat16 or the next of 255 integers
    assert farthest(actual, native) < (1e-5 if weights in ("float32", "float16") else 1e-3)
    assert farthest(actual, expected) < (1e-5 if weights == "float32" else 0.05)
