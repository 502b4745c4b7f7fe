"""MiSS: the formula as loops, peft's numbers, training, what stays beside packed weights, and bad input."""

from __future__ import annotations

import json

import pytest
import torch
from peft import MissConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

import heronry
from heronry import InputError
from heronry.adapters import attach_adapter, merge_adapter, read_adapter, save_adapter
from heronry.adapters.inject import inject_miss
from heronry.adapters.miss import MiSS
from heronry.checkpoint import assemble, load, save
from heronry.models.layers import Linear
from heronry.ops.packed import dequantize, untile
from heronry.quantization import quantize

FILES = ["adapter_config.json", "adapter_model.safetensors"]
SIZES = {"vocab": 101, "width": 64, "heads": 2, "ffn": 96}
SHAPES = [(96, 64), (64, 64), (60, 64), (64, 60), (96, 60)]  # out, in

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_loops(w: torch.Tensor, change: MiSS) -> torch.Tensor:
    """The merged matrix, number by number."""
    merged = w.clone()
    rows, columns = w.shape
    d, r = change.block, change.rank
    for o in range(rows):
        for i in range(columns):
            if change.is_bat:
                a, b = o // r, i // r
                block = d[a if change.axis == "out" else b]
                merged[o, i] += sum(w[o, b * r + j] * block[j, i % r] for j in range(r)) + block[o % r, i % r]
            else:
                merged[o, i] += change.scale * d[i % r, o % d.shape[1]]
    return merged


def changes(rows: int, columns: int) -> list[MiSS]:
    found = [MiSS(normal(8, rows, seed=1)), MiSS(normal(8, rows, seed=1), 0.5), MiSS(normal(8, 4, seed=2))]
    if rows % 8 == columns % 8 == 0:
        found += [
            MiSS(0.1 * normal(rows // 8, 8, 8, seed=3), axis="out"),
            MiSS(0.1 * normal(columns // 8, 8, 8, seed=4), axis="in"),
        ]
    return found


def test_worked_example():
    change = MiSS(torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T)
    assert change.merge(torch.zeros(2, 3)).tolist() == [[1, 3, 1], [2, 4, 2]]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_formula_as_loops(rows, columns):
    w, x = normal(rows, columns), normal(5, columns, seed=7)
    matrix = Linear(columns, rows).double()
    matrix.weight.data = w
    for change in changes(rows, columns):
        assert change.misfit(rows, columns) is None
        expected = by_loops(w, change)
        torch.testing.assert_close(change.merge(w), expected, rtol=0, atol=5e-15)
        torch.testing.assert_close(change.beside(matrix)(x), x @ expected.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("rows", "columns", "variant"),
    [
        *((rows, columns, variant) for rows, columns in SHAPES for variant in (True, "mini")),
        (96, 64, "bat"),
        (64, 64, "bat"),
    ],
)
def test_numbers_of_peft(rows, columns, variant):
    """Forward and merged, in float64."""
    theirs = nn.Sequential(nn.Linear(columns, rows, bias=False)).double()
    w = theirs[0].weight.detach().clone()
    config = MissConfig(r=8, mini_r=4, init_weights=variant, target_modules=["0"])
    theirs = inject_adapter_in_model(config, theirs)
    block = theirs[0].miss_block["default"]
    block.data = 0.1 * normal(*block.shape, seed=1)
    ours = Linear(columns, rows).double()
    ours.weight.data = w
    change, x = MiSS(block.detach().clone()), normal(5, columns, seed=2)
    torch.testing.assert_close(change.beside(ours)(x), theirs(x), rtol=0, atol=5e-15)
    theirs[0].merge()
    torch.testing.assert_close(change.merge(w), theirs[0].base_layer.weight, rtol=0, atol=5e-15)


@pytest.fixture(scope="module")
def base(random_checkpoint, tmp_path_factory):
    """The folder of an RWKV-7."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save(assemble(random_checkpoint("7", **SIZES)), folder)
    return folder


def logits(model) -> torch.Tensor:
    tokens = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens)[0]


def trained(model, variant: str = "default", **options):
    """A model whose MiSS changes something."""
    inject_miss(model, 8, variant, 4 if variant == "mini" else 1, **options)
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data = 0.05 * normal(*p.shape, seed=i, dtype=p.dtype)
    return model.eval()


@pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("variant", ["default", "mini", "bat"])
def test_folders_of_peft(generation, variant, random_checkpoint, tmp_path):
    """peft reads ours, we read peft's, and merged they are the same model."""

    def model():
        return assemble(random_checkpoint(generation, **SIZES)).eval()

    ours = trained(model(), variant)
    save_adapter(ours, tmp_path / "ours", {"opening_tokens": [3]})
    theirs = get_peft_model(
        model(),
        MissConfig(
            r=8,
            mini_r=4 if variant == "mini" else 1,
            init_weights=True if variant == "default" else variant,
            target_modules=["key", "value", "receptance", "output", "gate"],
        ),
    ).eval()
    adapter = read_adapter(tmp_path / "ours", model())
    assert adapter.notes == {"opening_tokens": [3]}
    state = load_file(tmp_path / "ours" / FILES[1])
    for name, p in theirs.named_parameters():
        if "miss_block" in name:
            p.data = state[name.removesuffix(".default")].clone()
    torch.testing.assert_close(logits(theirs), logits(ours), atol=2e-5, rtol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    again = read_adapter(tmp_path / "theirs", model())
    assert {name: change.block.tolist() for name, change in again.changes.items()} == {
        name: change.block.tolist() for name, change in adapter.changes.items()
    }
    merged = model()
    merge_adapter(merged, again)
    assert merged.is_unmodified()
    torch.testing.assert_close(logits(merged), logits(ours), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model()), logits(ours), atol=0.01)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("axis", ["default", "mini", "out", "in"])
def test_beside_packed_weights(format, axis, base):
    """What the packed weights stand for, changed by the formula; the weights stay packed."""
    packed = quantize(load(base), format)
    matrix = packed.blocks[1].ffn.value  # [64, 96]
    w = dequantize(*untile(matrix.weight, matrix.scales, 64)).double()
    shape = {"default": (8, 64), "mini": (8, 4), "out": (8, 8, 8), "in": (12, 8, 8)}[axis]
    change = MiSS(0.1 * normal(*shape), axis="in" if axis == "in" else "out")
    x = normal(5, 96, seed=1)
    found = change.beside(matrix)(x.float()).double()
    assert (found - x @ by_loops(w, change).T).norm() < 0.02 * found.norm()
    before = matrix.weight.clone()
    inject_miss(packed, 8)
    assert packed.blocks[1].ffn.value.base_layer is matrix
    assert torch.equal(matrix.weight, before)


@pytest.mark.parametrize("variant", ["default", "mini", pytest.param("bat", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", [None, "int8"])
def test_gradients(variant, format, base):
    """Those of autograd through the merged matrix."""
    model = load(base)
    if format:
        quantize(model, format)
    layer = trained(model, variant).blocks[0].ffn.value
    weight = layer.base_layer
    w = weight.weight if format is None else dequantize(*untile(weight.weight, weight.scales, 64))
    x = normal(5, 96, dtype=torch.float32).requires_grad_()
    dy = normal(5, 64, seed=1, dtype=torch.float32)
    layer(x).backward(dy)
    block, x64 = layer.miss_block.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    (x64 @ by_loops(w.detach().double(), MiSS(block)).T).backward(dy.double())
    torch.testing.assert_close(layer.miss_block.grad.double(), block.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-4, rtol=1e-4)


def test_bat_in_bfloat16_autocast(base):
    """The matrix is changed in float32 and rounded once."""
    layer = trained(load(base), "bat").blocks[0].ffn.key
    x = normal(5, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    merged = MiSS(layer.miss_block.detach()).merge(layer.base_layer.weight)
    assert torch.equal(y, nn.functional.linear(x.bfloat16(), merged.bfloat16()))


def test_older_bone_and_other_prefixes(base, tmp_path):
    """The type of peft before MiSS, and the names that transformers' class gives."""
    save_adapter(trained(load(base)), tmp_path)
    expected = read_adapter(tmp_path, load(base)).changes
    tensors = load_file(tmp_path / FILES[1])
    renamed = {
        "base_model.model.rwkv7." + name.removeprefix("base_model.model.").replace("miss_block", "bone_block"): x
        for name, x in tensors.items()
    }
    save_file(renamed, tmp_path / FILES[1])
    settings = json.loads((tmp_path / FILES[0]).read_text())
    old = {"peft_type": "BONE", "r": 8, "init_weights": True, "bone_dropout": 0.1}
    (tmp_path / FILES[0]).write_text(json.dumps(old))
    found = read_adapter(tmp_path, load(base)).changes
    assert found.keys() == expected.keys()
    assert all(torch.equal(change.block, expected[name].block) for name, change in found.items())
    assert settings["peft_type"] == "MISS"
    assert settings["init_weights"] is True


def test_what_does_not_fit_is_refused(base, tmp_path):
    save_adapter(trained(load(base), targets=["att.key", "ffn.key"]), tmp_path)
    tensors, settings = load_file(tmp_path / FILES[1]), json.loads((tmp_path / FILES[0]).read_text())
    key = "base_model.model.blocks.0.att.key.miss_block"

    def told(change=None, **more) -> str:
        (tmp_path / FILES[0]).write_text(json.dumps(settings | more))
        save_file({**tensors, **(change or {})}, tmp_path / FILES[1])
        with pytest.raises(InputError) as error:
            read_adapter(tmp_path, load(base))
        line = str(error.value)
        assert "\n" not in line
        return line.removeprefix(f"{tmp_path}: ")

    shape = "blocks.0.att.key.miss_block has shape [8, 64], expected "
    assert told(init_weights="bat") == shape + '[8, 8, 8] with r = 8 and init_weights = "bat", for 64 outputs'
    assert told(init_weights="mini", mini_r=4).startswith(shape + "[8, 4]")
    assert told(r=4).startswith(shape + "[4, 64]")
    assert told({key: tensors[key].T.contiguous()}).startswith(
        "blocks.0.att.key.miss_block has shape [64, 8], expected [8, 64]"
    )
    wide = {name: torch.zeros(65, x.shape[1]) for name, x in tensors.items()}
    assert told(wide, r=65) == (
        "an adapter of another model: blocks.0.att.key has a MiSS block of rank 65 for a matrix [64, 64]; "
        "the rank is at most 64"
    )
    assert told({key: tensors[key] * torch.nan}) == "the adapter of blocks.0.att.key contains NaN or infinity"
    assert told({key.replace("miss_block", "miss_more"): tensors[key].clone()}) == (
        "adapter_model.safetensors: unexpected tensor blocks.0.att.key.miss_more, which is not part of such an adapter"
    )
    assert told({key.replace("blocks.0", "blocks.7"): tensors[key].clone()}) == (
        "an adapter of another model: it changes blocks.7.att.key, which this rwkv7 does not have"
    )
    assert told(init_weights="mosaic").endswith("init_weights must be true, false, mini or bat, got 'mosaic'")
    assert told(init_weights=1).endswith("init_weights must be true, false, mini or bat, got 1")
    assert told(mini_r=0).endswith("mini_r must be a positive whole number, got 0")
    assert told(bias="all").endswith("bias = 'all' is not supported")

    def refused(*args, **options) -> str:
        model = load(base)
        with pytest.raises(InputError) as error:
            inject_miss(model, *args, **options)
        assert model.is_unmodified()
        return str(error.value)

    assert refused(65) == "blocks.0.att.receptance has 64 inputs: the rank of MiSS is at most that, not 65"
    assert refused(12, "bat").endswith("[64, 64] does not divide into blocks of rank 12, as bat needs")
    assert refused(8, "mini", 5).endswith("has 64 outputs, not a multiple of mini_r = 5")
    assert "is called 'q_proj'" in refused(8, targets=["q_proj"])


def test_overflow_changes_nothing(base):
    model = load(base, dtype="float16")
    before, fingerprint = {name: p.clone() for name, p in model.named_parameters()}, model.fingerprint
    adapter = heronry.adapters.Adapter({"blocks.1.att.key": MiSS(torch.full((8, 64), 1e6))})
    with pytest.raises(InputError, match=r"^blocks\.1\.att\.key\.weight contains NaN or infinity after merging$"):
        merge_adapter(model, adapter)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.fingerprint == fingerprint
    attach_adapter(model, adapter)
    with pytest.raises(InputError, match="already has adapters"):
        attach_adapter(model, adapter)
