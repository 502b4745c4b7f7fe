"""Quantized models: near the original, the same in every path, saved and loaded without it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import heronry
from heronry import InputError
from heronry.checkpoint import assemble
from heronry.cli.app import app
from heronry.models.layers import Linear, PackedLinear
from heronry.ops.packed import dequantize, untile
from heronry.quantization import FORMATS, quantize

BUNDLED = Path(heronry.__file__).parent / "bundled"
ERROR = {"int8": 0.03, "int4": 0.4}  # of random models' logits, in units of their spread


@pytest.fixture(params=list(FORMATS))
def format(request) -> str:
    return request.param


@pytest.fixture
def model(random_checkpoint, version):
    return assemble(random_checkpoint(version, ffn=192))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(1))


def logits_of(model, text=None):
    with torch.no_grad():
        return model(tokens(2, 20) if text is None else text)[0]


def unpacked(model):
    """The model of the same weights in float32."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            plain = Linear(module.in_features, module.out_features)
            weights = dequantize(*untile(module.weight, module.scales, module.out_features))
            plain.weight = torch.nn.Parameter(weights)
            model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = plain
    model.quantization = None
    return model


def test_near_the_original_and_nearer_to_its_own_weights(model, format):
    expected = logits_of(model)
    quantize(model, format)
    spread = expected.std()
    error = (logits_of(model) - expected).square().mean().sqrt() / spread
    own = (logits_of(model) - logits_of(unpacked(model))).square().mean().sqrt() / spread
    print(f"{model.name} {format}: {error:.4f} of the spread, {own:.4f} by the rounding of activations")
    assert 0 < error < ERROR[format]
    assert own < 0.2  # 5.0 without a gate: random weights drive its state far
    assert own < error or format == "int8"


def test_every_matrix_and_nothing_else_is_packed(model, format):
    before = {name: p.clone() for name, p in model.named_parameters()}
    linear = {name for name, m in model.named_modules() if isinstance(m, Linear)}
    quantize(model, format)
    assert {name for name, m in model.named_modules() if isinstance(m, PackedLinear)} == linear
    assert not any(isinstance(m, Linear) for m in model.modules())
    after = dict(model.named_parameters())
    assert before.keys() - after.keys() == {f"{name}.weight" for name in linear}
    assert all(torch.equal(p, before[name]) for name, p in after.items())


def test_step_is_the_plain_model(model, format):
    """But for an activation half way between two integers, which last bits send either way: of one sequence or two."""
    quantize(model, format)
    state = model(tokens(21, 9))[1].detach()
    text = tokens(21, 2)
    expected, end = model(text, state)
    with torch.inference_mode():
        actual, own_end = model(text, state)
    assert model._step is not None

    def errors(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of each sequence."""
        return (x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)

    found = [errors(actual, expected)]
    for a, b in zip(own_end.layers, end.layers, strict=True):
        found += [errors(x, y) for x, y in zip(a, b, strict=True)]
    for error in found:
        assert error.median() < 1e-5
        assert error.max() < 0.05


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_saved_and_loaded_without_the_original(model, format, dtype, tmp_path):
    count = model.num_parameters()
    model = quantize(model if dtype is None else model.to(getattr(torch, dtype)), format)
    heronry.save(model, tmp_path / "packed")
    back = heronry.load(tmp_path / "packed")
    assert back.quantization == format
    assert back.fingerprint == model.fingerprint
    assert back.num_parameters() == model.num_parameters() == count
    assert torch.equal(logits_of(back), logits_of(model))
    heronry.save(back, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    text = heronry.load(tmp_path / "packed" / "model.safetensors")  # the folder by its file
    assert torch.equal(logits_of(text), logits_of(model))


def test_packed_while_loading(random_checkpoint, version, format, tmp_path):
    weights = random_checkpoint(version, ffn=192)
    torch.save(weights, tmp_path / "model.pth")
    loaded = heronry.load(tmp_path / "model.pth", quantize=format)
    assert torch.equal(logits_of(loaded), logits_of(quantize(assemble(weights), format)))
    half = heronry.load(tmp_path / "model.pth", dtype="bfloat16", quantize=format)
    assert half.emb.weight.dtype == torch.bfloat16
    assert torch.equal(half.head.weight, loaded.head.weight)  # packed from the file's numbers, not from rounded ones


def test_states_are_those_of_the_original(random_checkpoint, format, tmp_path):
    model = assemble(random_checkpoint("7", ffn=192))
    with torch.inference_mode():
        _, state = model(tokens(1, 20))
    small = quantize(copy.deepcopy(model), format)
    with torch.inference_mode():
        small(tokens(1, 1), state)
    heronry.save(small, tmp_path)
    with torch.inference_mode():
        heronry.load(tmp_path)(tokens(1, 1), state)


def test_size_on_disk(tmp_path):
    model = assemble(
        {
            name: x.bfloat16()
            for name, x in heronry.load(BUNDLED).state_dict().items()  # 3.8 million weights
        }
    )
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    rest = sum(p.nbytes for p in model.parameters()) - 2 * matrices
    for format, bits in (("int8", 8.5), ("int4", 4.5)):
        heronry.save(quantize(copy.deepcopy(model), format), tmp_path / format)
        size = (tmp_path / format / "model.safetensors").stat().st_size
        assert size == pytest.approx(rest + matrices * bits / 8, rel=0.01)


def test_moving_to_another_dtype_leaves_the_packed_weights(random_checkpoint, format):
    model = quantize(assemble(random_checkpoint("7", ffn=192)), format)
    packed = model.head.weight, model.head.scales.clone()
    model.to(torch.bfloat16)
    assert model.emb.weight.dtype == torch.bfloat16
    assert torch.equal(model.head.weight, packed[0])
    assert model.head.scales.dtype == torch.float16
    assert torch.equal(model.head.scales, packed[1])


def test_progress_is_reported_in_bytes(random_checkpoint, tmp_path):
    model = assemble(random_checkpoint("7", ffn=192))
    expected = sum(m.weight.nbytes for m in model.modules() if isinstance(m, Linear))
    calls: list[tuple[int, int]] = []
    quantize(model, "int8", lambda *counts: calls.append(counts))
    assert calls == sorted(set(calls))
    assert calls[-1] == (expected, expected)
    heronry.save(model, tmp_path)
    calls.clear()
    heronry.load(tmp_path, progress=lambda *counts: calls.append(counts))
    size = sum(x.nbytes for x in load_file(tmp_path / "model.safetensors").values())
    assert calls[-1] == (size, size)


def test_bad_input(random_checkpoint):
    model = assemble(random_checkpoint("7", ffn=192))
    with pytest.raises(InputError, match="unknown quantization 'int3'; choose one of int8, int4"):
        quantize(model, "int3")
    quantize(model, "int8")
    for format in FORMATS:
        with pytest.raises(InputError, match=r"already quantized \(int8\)"):
            quantize(model, format)
    odd = assemble(random_checkpoint("7", ffn=200))
    before = logits_of(odd)
    with pytest.raises(InputError, match=r"blocks.0.ffn.value.weight has rows of 200 weights, not a multiple of 32"):
        quantize(odd, "int8")
    assert torch.equal(logits_of(odd), before)  # untouched


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 4e6])
def test_weights_that_cannot_be_packed_are_refused_and_change_nothing(random_checkpoint, format, value):
    """By every way to a quantized model; the last matrix is the wrong one."""
    broken = random_checkpoint("7", ffn=192)
    broken["head.weight"][3, 4] = value
    what = "numbers that are too large to quantize" if value == 4e6 else "NaN or infinity"
    with pytest.raises(InputError, match=rf"^head.weight contains {what}$"):
        assemble(broken, quantize=format)
    model = assemble(broken)
    fingerprint, modules = model.fingerprint, list(model.modules())
    with pytest.raises(InputError, match=rf"^head.weight contains {what}$"):
        quantize(model, format)
    assert (model.quantization, model.fingerprint, list(model.modules())) == (None, fingerprint, modules)
    with torch.no_grad():
        model.head.weight[3, 4] = 0
    assert quantize(model, format).quantization == format


def test_a_quantization_that_is_interrupted_changes_nothing(model, format):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    modules = list(model.modules())
    with pytest.raises(KeyboardInterrupt):
        quantize(model, format, stop)
    assert list(model.modules()) == modules
    assert model.quantization is None


def test_damaged_files_are_named(random_checkpoint, format, tmp_path):
    heronry.save(quantize(assemble(random_checkpoint("7", ffn=192)), format), tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, about = {key: x.clone() for key, x in load_file(file).items()}, json.loads(config.read_text())

    def complaint(tensors: dict, changes: dict | None = None) -> str:
        save_file(tensors, file)
        config.write_text(json.dumps(about | (changes or {})))
        with pytest.raises(InputError) as error:
            heronry.load(tmp_path)
        return str(error.value)

    name = "blocks.1.ffn.key"
    assert f"{name}.scales has the shape" in complaint(
        whole | {f"{name}.scales": whole[f"{name}.scales"][:, :-1].clone()}
    )
    assert f"{name}.scales and its matrix are not" in complaint(whole | {f"{name}.weight": whole["emb.weight"].clone()})
    without = {key: x for key, x in whole.items() if key != f"{name}.scales"}
    assert f"{name}.weight is" in complaint(without)
    assert "quantization = 'int5'" in complaint(whole, {"quantization": "int5"})
    scales = whole[f"{name}.scales"].clone()
    scales[0, 0] = torch.inf
    assert complaint(whole | {f"{name}.scales": scales}).endswith(
        f"the scales of {name}.weight contain NaN or infinity"
    )
    other = "int4" if format == "int8" else "int8"
    assert f"are not in the layout of {other}" in complaint(whole, {"quantization": other})


def test_already_quantized_files_are_not_quantized_again(random_checkpoint, format, tmp_path):
    heronry.save(quantize(assemble(random_checkpoint("7", ffn=192)), format), tmp_path)
    with pytest.raises(InputError, match="already quantized"):
        heronry.load(tmp_path, quantize="int8")


def test_without_a_compiler(random_checkpoint, format, monkeypatch):
    model = quantize(assemble(random_checkpoint("7", ffn=192)), format)
    expected = logits_of(model)
    monkeypatch.setattr("heronry.build.library", lambda source: None)
    model._step = None
    assert (logits_of(model) - expected).norm() < 5e-3 * expected.norm()  # activations half way between integers


def test_commands(tmp_path):
    run = CliRunner().invoke
    folder = tmp_path / "small"
    done = run(app, ["quantize", str(BUNDLED), str(folder), "--format", "int4"])
    assert done.exit_code == 0
    assert (folder / "tokenizer.json").is_file()
    output = run(app, ["info", str(folder)]).stdout
    assert "int4" in output
    assert "3,819,456" in output
    text = run(
        app, ["generate", "Once upon a time", "-m", str(folder), "--max-tokens", "12", "--temperature", "0"]
    ).stdout
    assert text.strip()
    packed_now = ["generate", "Once upon a time", "--quantize", "int8", "--max-tokens", "12", "--temperature", "0"]
    assert run(app, packed_now).stdout.strip()
    for command, complaint in (
        (["quantize", str(folder), str(tmp_path / "twice")], "already quantized"),
        (["quantize", str(BUNDLED), str(BUNDLED)], "is the original itself"),
        (["quantize", str(tmp_path / "nothing"), str(tmp_path / "x")], "no such file"),
        (["quantize", str(BUNDLED), str(tmp_path / "x"), "-f", "q4"], "unknown quantization 'q4'"),
    ):
        failed = run(app, command)
        assert isinstance(failed.exception, InputError)
        assert complaint in str(failed.exception)
    assert not (tmp_path / "x").exists()


def test_bundled_model_keeps_its_perplexity():
    """On a story the model has not seen; docs/quantization.md has the figures for all of them."""
    llm = heronry.LLM()
    story = (
        "One day, a boy named Tom went to the lake with his mom. He had a small red boat. He put the boat in the water "
        'and the wind took it far away. Tom was sad. "Do not cry," said his mom. "We can ask the man with the big boat '
        'to help us." The man was very kind. He got the little boat and gave it back to Tom. Tom said, "Thank you!" '
        "and he was happy again. They went home and ate soup."
    )
    ids = torch.tensor([[*llm.opening, *llm.tokenizer.encode(story)]])

    def perplexity(model) -> float:
        with torch.inference_mode():
            logits, _ = model(ids[:, :-1])
        return torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:]).exp().item()

    exact = perplexity(llm.model)
    for format, allowed in (("int8", 0.01), ("int4", 0.06)):
        rise = perplexity(quantize(copy.deepcopy(llm.model), format)) / exact - 1
        print(f"{format}: {rise:+.2%}")
        assert abs(rise) < allowed
