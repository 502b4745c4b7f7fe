"""The C++ bodies: the same numbers on any processor, with any threads, for any inputs."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from levels import LEVELS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from heronry import build
from heronry.ops import dispatch

from .cases import OPERATORS, Operator, Recorder, assert_close, assert_same_for_any_threads, draw, run, threads, to

NATIVE = [pytest.param(o, id=o.name) for o in OPERATORS if "cpu" in o.bodies]

pytestmark = pytest.mark.skipif(not dispatch.has_native_body("wkv7"), reason="there is no C++ compiler")


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("cu", [None, [0, 40, 41, 100]])
def test_threads_do_not_change_a_bit(operator: Operator, cu: list[int] | None):
    batch, states = (3, 3) if cu is None else (1, 3)
    arguments = to(draw(operator, batch, 100, 5, 24, states=states), torch.float32)
    assert_same_for_any_threads(lambda: run(operator, arguments, "cpu", cu))


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [5, 64])
def test_every_level_gives_the_same_numbers(operator: Operator, level: str, size: int, monkeypatch):
    monkeypatch.setattr(build, "level", level)
    arguments = draw(operator, 2, 70, 2, size)
    exact = run(operator, arguments, "reference")
    assert_close(run(operator, arguments, "cpu"), exact, 1e-10)
    assert_close(run(operator, to(arguments, torch.float32), "cpu"), exact, 2e-5)
    half = to(arguments, torch.bfloat16)
    assert_close(run(operator, half, "cpu"), run(operator, to(half, torch.float64), "reference"), 2**-7)
    half = to(arguments, torch.float16)
    assert_close(run(operator, half, "cpu"), run(operator, to(half, torch.float64), "reference"), 2**-9)


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("size", [16, 33, 64, 100])
def test_head_sizes(operator: Operator, size: int):
    arguments = draw(operator, 1, 40, 2, size)
    exact = run(operator, arguments, "reference")
    assert_close(run(operator, arguments, "cpu"), exact, 1e-10)
    assert_close(run(operator, to(arguments, torch.float32), "cpu"), exact, 2e-5)


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("shift", range(4))
def test_each_input_may_have_its_own_dtype(operator: Operator, shift: int):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
    exact = draw(operator, 2, 40, 2, 16)
    arguments = {name: x.to(dtypes[(i + shift) % 5]) for i, (name, x) in enumerate(exact.items())}
    actual = run(operator, arguments, "cpu")
    assert actual["y"].dtype == arguments["v"].dtype
    assert actual["final state"].dtype == torch.float32
    for name, x in arguments.items():
        assert actual[f"gradient of {name}"].dtype == x.dtype
    assert_close(actual, run(operator, to(arguments, torch.float64), "reference"), 2**-7)


def scattered(x: Tensor) -> Tensor:
    """The same numbers with room between them along every axis, the last included."""
    room = x.new_full([3 * n for n in x.shape], float("nan"))
    view = room[tuple(slice(1, None, 3) for _ in x.shape)]
    return view.copy_(x)


def last_axis_dense(x: Tensor) -> Tensor:
    """The same numbers in a slice of a wider tensor, the first two axes swapped in memory."""
    if x.ndim == 1:
        return x
    room = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan")).transpose(0, 1).contiguous().transpose(0, 1)
    return room[..., 1:-2].copy_(x)


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("view", [scattered, last_axis_dense])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_where_they_lie(operator: Operator, view, dtype: torch.dtype):
    arguments = to(draw(operator, 2, 40, 3, 8), dtype)
    expected = run(operator, arguments, "cpu")
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    y, state = operator.call(**{name: view(x) for name, x in leaves.items()}, impl="cpu")
    generator = torch.Generator().manual_seed(1)  # the weights of cases.loss, handed in as views too
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in (y, state)]
    gradients = torch.autograd.grad((y, state), list(leaves.values()), [view(w) for w in weights])
    actual = {"y": y, "final state": state} | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    assert torch.equal(y, expected["y"])
    assert torch.equal(state, expected["final state"])
    assert_close(actual, expected, 2**-7 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("operator", NATIVE)
def test_gradient_of_one_output_alone(operator: Operator):
    arguments = draw(operator, 2, 40, 2, 4)
    for output in (0, 1):
        gradients = []
        for impl in ("cpu", "reference"):
            leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
            chosen = operator.call(**leaves, impl=impl)[output]
            grads = torch.autograd.grad(chosen.square().sum(), list(leaves.values()), allow_unused=True)
            zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
            gradients.append(zeros | {name: g for name, g in zip(leaves, grads, strict=True) if g is not None})
        assert_close(*gradients, 1e-10)


@pytest.mark.parametrize("operator", NATIVE)
def test_no_states_are_kept_without_a_gradient(operator: Operator, monkeypatch):
    kept = []
    module = sys.modules[f"heronry.ops.{'wkv6' if operator.name == 'wkv5' else operator.name}.cpu"]
    call = module.call

    def watched(function, tensors, *rest):
        kept.append(tensors[-1].numel())
        call(function, tensors, *rest)

    monkeypatch.setattr(module, "call", watched)
    arguments = draw(operator, 1, 40, 1, 4)
    operator.call(**arguments, impl="cpu")
    with torch.no_grad():
        operator.call(**{name: x.clone().requires_grad_() for name, x in arguments.items()}, impl="cpu")
    operator.call(**{name: x.clone().requires_grad_() for name, x in arguments.items()}, impl="cpu")
    assert kept[:2] == [0, 0]
    assert kept[2] > 0


@pytest.mark.parametrize("operator", NATIVE)
def test_without_numbers_it_is_an_operator_of_torch(operator: Operator):
    arguments = draw(operator, 1, 40, 1, 4)
    with FakeTensorMode() as mode, torch.no_grad():
        y, state = operator.call(**{name: mode.from_tensor(x) for name, x in arguments.items()}, impl="cpu")
    assert type(y) is type(state) is FakeTensor
    assert (y.shape, state.shape) == (arguments["v"].shape, arguments["state"].shape)


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("impl", ["cpu", "auto"])
@pytest.mark.parametrize("cu", [None, [0, 7, 40]])
@pytest.mark.quick_for("wkv7", "wkv4")
def test_compiles_with_torch(operator: Operator, impl: str, cu: list[int] | None):
    torch._dynamo.reset()
    arguments = draw(operator, 1, 40, 2, 8, states=1 if cu is None else 2)
    call = torch.compile(operator.call, backend="aot_eager", fullgraph=True)
    compiled = Operator(operator.name, call, operator.draw, operator.bodies, operator.over_time)
    expected = run(operator, arguments, "cpu", cu)
    for _ in range(2):
        actual = run(compiled, arguments, impl, cu)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
    with torch.no_grad():
        assert torch.equal(call(**arguments, cu_seqlens=cu, impl=impl)[0], expected["y"])


@pytest.mark.parametrize("operator", NATIVE)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.quick_for("wkv7", "biwkv")
def test_is_a_well_formed_operator(operator: Operator, gradient: bool):
    with Recorder() as recorder:
        run(operator, to(draw(operator, 2, 40, 2, 4), torch.float32), "cpu")
    assert len(recorder.calls) == 2
    for function, args in recorder.calls:
        leaf = gradient and function is recorder.calls[0][0]
        args = tuple(x.clone().requires_grad_(leaf) if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(function, args)


# ---- without a compiler -------------------------------------------------------------------------------------------

SAY = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="LOG %(message)s", stream=sys.stdout)
from heronry.ops.wkv7 import wkv7
x = torch.full((1, 40, 1, 4), -0.3)
first, _ = wkv7(x, x, x, x, x, x, impl="reference")
for _ in range(2):
    y, _ = wkv7(x, x, x, x, x, x)
    assert torch.allclose(y, first, atol=1e-5)
"""


def start(script: str, cache: Path, **environment: str) -> subprocess.Popen:
    """A Python of its own whose compiled code is kept in `cache`."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed; its error output where it failed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def test_without_a_compiler_auto_runs_pytorch_and_says_so_once(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    out = finish(start(SAY, tmp_path, PATH=str(tmp_path / "empty")))
    lines = [line for line in out.splitlines() if "no native wkv7" in line]
    assert len(lines) == 1
    assert "no C++ compiler found" in lines[0]
    assert out.count("wkv7: impl=auto runs the chunked body") == 1


@pytest.mark.slow
def test_without_a_compiler_cpu_is_refused(tmp_path: Path):
    refused = """
import torch
from heronry.ops.wkv7 import wkv7
x = torch.zeros(1, 1, 1, 4)
try:
    wkv7(x, x, x, x, x, x, impl="cpu")
except ValueError as error:
    print(error)
"""
    out = finish(start(refused, tmp_path, PATH=str(tmp_path)))
    assert "wkv7: the body 'cpu' needs a C++ compiler (g++ or clang++)" in out


# ---- the threads' runtime ------------------------------------------------------------------------------------------

TEAM = """
import ctypes, sys, torch
from pathlib import Path
from heronry import build
from heronry.ops import dispatch, packed
from heronry.ops.wkv7 import wkv7
torch.set_num_threads(3)
if len(sys.argv) > 1:
    functions = build.openmp_functions(ctypes.CDLL(sys.argv[1]))
    functions[2] = None  # GNU's way to start a team
    for operator in ("wkv7", "packed"):
        dispatch.native_library(operator).use_openmp(functions)
x = torch.randn(6, 1, 40, 4, 8, generator=torch.Generator().manual_seed(1)) / 4
state = torch.zeros(1, 4, 8, 8)
y, _ = wkv7(*x, state, impl="cpu")
assert torch.allclose(y, wkv7(*x, state, impl="reference")[0], atol=1e-5)
q, scales = torch.ones(64, 32, dtype=torch.int8), torch.ones(64, 1, dtype=torch.float16)
assert torch.equal(packed.packed_matmul(torch.ones(5, 32), *packed.tile(q, scales), 64), torch.full((5, 64), 32.0))
if len(sys.argv) == 1:
    torch.mm(torch.ones(400, 400), torch.ones(400, 400))
files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(len(list(Path("/proc/self/task").iterdir())))
print(*(file for file in files if "gomp" in file or "libomp" in file or "iomp" in file))
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
@pytest.mark.slow
def test_there_is_one_openmp_runtime_and_it_is_torchs():
    out = subprocess.run([sys.executable, "-c", TEAM], capture_output=True, text=True, check=True).stdout
    threads, files = out.splitlines()
    assert int(threads) >= 3
    [file] = files.split()
    assert Path(file).is_relative_to(Path(torch.__file__).parents[1])


@on_linux
def test_llvms_openmp_starts_a_team_too():
    """What macOS and Windows have; here it is a second runtime beside torch's."""
    runtime = ctypes.util.find_library("omp")
    if runtime is None:
        pytest.skip("LLVM's OpenMP (libomp) is not installed")
    out = subprocess.run([sys.executable, "-c", TEAM, runtime], capture_output=True, text=True, check=True).stdout
    threads, files = out.splitlines()
    assert int(threads) >= 3
    assert runtime in files


@pytest.mark.parametrize("operator", NATIVE)
def test_without_openmp_one_thread_does_it_all(operator: Operator):
    arguments = to(draw(operator, 2, 40, 3, 8), torch.float32)
    library = dispatch.native_library(operator.name)
    with threads(3):
        expected = run(operator, arguments, "cpu")
        library.use_openmp(build.openmp_functions(None))
        try:
            actual = run(operator, arguments, "cpu")
        finally:
            library.use_openmp(build.torch_openmp())
    assert all(torch.equal(actual[name], x) for name, x in expected.items())
