"""ONNX graphs of every generation in onnxruntime: any batch, any length, a step; packed by its own tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

import heronry
from heronry import InputError
from heronry.checkpoint import assemble
from heronry.convert import convert
from heronry.convert.onnx import INPUTS, OUTPUTS, Graph, export, stack_layers

SMALL = {"width": 64, "heads": 2, "ffn": 96, "rank": 8}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def graphs(random_checkpoint, tmp_path_factory):
    """Model and onnxruntime session of a version; exporting takes seconds, so each is made once."""
    folder, cache = tmp_path_factory.mktemp("onnx"), {}

    def graph(version: str, to: str, **options):
        key = f"{version}-{to}-{options}"
        if key not in cache:
            torch.save(random_checkpoint(version, **SMALL, **options), folder / "a.pth")
            path = folder / f"{len(cache)}.onnx"
            convert(folder / "a.pth", path, to=to)
            cache[key] = heronry.load(folder / "a.pth"), path
        return cache[key]

    return graph


def run(path: Path, tokens: torch.Tensor, state) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path))
    assert [x.name for x in session.get_inputs()] == list(INPUTS)
    feeds = dict(zip(INPUTS, [tokens.numpy(), *(x.numpy() for x in stack_layers(state))], strict=True))
    return [torch.from_numpy(x) for x in session.run(list(OUTPUTS), feeds)]


@pytest.mark.slow
def test_the_exporter_is_quiet(random_checkpoint, tmp_path):
    """Neither warnings nor log lines of torch; and no lasting change of what is shown."""
    torch.save(random_checkpoint("7", **SMALL), tmp_path / "a.pth")
    words = [sys.executable, "-m", "heronry", "convert", str(tmp_path / "a.pth"), str(tmp_path / "a.onnx")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1), done.stderr
    assert "a.onnx: onnx, " in done.stderr


BETWEEN = [pytest.param(version, marks=pytest.mark.slow) for version in ("5.0", "5.2", "6")]  # exporting takes seconds


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), *BETWEEN, "7"])
@torch.inference_mode()
def test_sequences_of_any_length_and_number(graphs, version):
    model, path = graphs(version, "onnx")
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 1), (1, 2), (3, 1), (2, 9), (4, 70)):
        tokens = torch.randint(101, (rows, length), generator=generator)
        _, state = model(torch.randint(101, (rows, 5), generator=generator))
        logits, left = model(tokens, state)
        for output, expected in zip(run(path, tokens, state), (logits, *stack_layers(left)), strict=True):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
@torch.inference_mode()
def test_steps(graphs, version):
    model, path = graphs(version, "onnx-step")
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape[1] == 1
    tokens = torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(0))
    state = model.initial_state(3)
    carried = [x.numpy() for x in stack_layers(state)]
    for i in range(20):
        output, *carried = session.run(None, dict(zip(INPUTS, [tokens[:, i : i + 1].numpy(), *carried], strict=True)))
        logits, state = model(tokens[:, i : i + 1], state)
        torch.testing.assert_close(torch.from_numpy(output), logits, rtol=0, atol=1e-4)


def test_what_the_file_says_of_itself(graphs):
    for version, filling in (("4", [0.0, 0.0, -1e38]), ("7", [0.0])):
        model, path = graphs(version, "onnx")
        proto = onnx.load(path)
        about = {entry.key: entry.value for entry in proto.metadata_props}
        assert about["model"] == model.name
        assert json.loads(about["heronry.state"])["wkv"] == pytest.approx(filling)
        onnx.checker.check_model(proto)


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_packed_by_onnxruntime(graphs, tmp_path, bits):
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model, path = graphs("7", "onnx")
    packed = tmp_path / "packed.onnx"
    if bits == 8:
        quantize_dynamic(path, packed, weight_type=QuantType.QInt8)
    else:
        quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(packed), False)
    assert packed.stat().st_size < 0.7 * path.stat().st_size
    tokens = torch.randint(101, (1, 12), generator=torch.Generator().manual_seed(0))
    state = model.initial_state(1)
    exact = model(tokens, state)[0]
    output = run(packed, tokens, state)[0]
    assert 0 < (output - exact).abs().mean() < {8: 0.2, 4: 0.6}[bits] * exact.abs().mean()


@pytest.mark.quick_for("4", "7")
def test_torch_export_of_every_version(version, random_checkpoint):
    """The graph runs for sizes that it was not made with, and carries the state."""
    model = assemble(random_checkpoint(version, **SMALL))
    program = export(model, step=False).module()
    with torch.inference_mode():
        tokens = torch.randint(101, (3, 8), generator=torch.Generator().manual_seed(0))
        expected, left = model(tokens)
        logits, *state = program(tokens, *stack_layers(model.initial_state(3)))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for output, part in zip(state, stack_layers(left), strict=True):
            torch.testing.assert_close(output, part, rtol=1e-5, atol=1e-5)
        again = Graph(model)(tokens, *stack_layers(model.initial_state(3)))[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_example_writes_with_numpy_alone(tmp_path):
    """examples/onnx_numpy.py imports no torch, and says what we say."""
    bundled = Path(heronry.__file__).parent / "bundled"
    convert(bundled, tmp_path / "step.onnx", to="onnx-step")
    script = ROOT / "examples" / "onnx_numpy.py"
    command = [
        sys.executable,
        script,
        tmp_path / "step.onnx",
        bundled / "tokenizer.json",
        "Once upon a time",
        "--tokens",
        "20",
    ]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    expected = heronry.LLM(dtype="float32").generate("Once upon a time", 20, temperature=0)
    assert done.stdout.strip() == f"Once upon a time{expected}".strip()
    assert "torch" not in script.read_text().replace("PyTorch", "")


def test_bad_input(random_checkpoint, tmp_path):
    torch.save(random_checkpoint("4", **SMALL), tmp_path / "a.pth")
    with pytest.raises(InputError, match="ONNX files are float32"):
        convert(tmp_path / "a.pth", tmp_path / "a.onnx", dtype="float16")
    assert not (tmp_path / "a.onnx").exists()


@torch.inference_mode()
@pytest.mark.slow
def test_weights_beside_the_file(random_checkpoint, tmp_path, monkeypatch):
    """As of a model too large for one file."""
    monkeypatch.setattr("heronry.convert.onnx.MAX_INLINE", 1000)
    torch.save(random_checkpoint("4", **SMALL), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.onnx")
    model = heronry.load(tmp_path / "a.pth")
    size = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "a.onnx.data").stat().st_size > 0.8 * size
    tokens, state = torch.tensor([[5, 7, 9]]), model.initial_state(1)
    output = run(tmp_path / "a.onnx", tokens, state)[0]
    torch.testing.assert_close(output, model(tokens, state)[0], rtol=0, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "a.onnx", "a.onnx.data"}
