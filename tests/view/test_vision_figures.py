"""What models of pictures do, as numbers: beside definitions written out, the operators, and the logits."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heronry import InputError, save, view
from heronry.models import VRWKV, VRWKV6, VisionModel
from heronry.models.baselines import ViT, ViTConfig
from heronry.models.vision import VRWKV6Config, VRWKVConfig
from heronry.ops.biwkv import biwkv
from heronry.ops.biwkv6 import biwkv6
from heronry.view.vision import class_maps, decay_weights, feature_map, pixels, q_shift_maps, receptive_field

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision_pictures.py"
SIZES = {"num_classes": 5, "image_size": 20, "patch_size": 4}  # 5 x 5 patches
SIZE6 = {"head_size": 8, "mix_rank": 3, "decay_rank": 4}
WRITES = {f"vision-{name}.png" for name in ("receptive-field", "decay", "q-shift", "classes")}


def make(kind: str, width: int = 16, layers: int = 2, **changes):
    """A small model in which every parameter counts."""
    torch.manual_seed(0)
    if kind == "vit":
        model = ViT(ViTConfig(width, layers, 2 * width, head_size=8, **SIZES))
    elif kind == "vrwkv6":
        model = VRWKV6(VRWKV6Config.sized(width, layers, **SIZES, **SIZE6, **changes))
    else:
        model = VRWKV(VRWKVConfig.sized(width, layers, **(SIZES | changes)))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def images(count: int = 2, height: int = 20, width: int = 20) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def patches(field: np.ndarray) -> list[list[int]]:
    """Which patches of 4 x 4 pixels have a gradient; one that has must have it in every pixel."""
    seen = (field > 0).reshape(5, 4, 5, 4).sum((1, 3))
    assert set(np.unique(seen)) <= {0, 16}
    return (seen > 0).astype(int).tolist()


def without_attention(model: VisionModel) -> VisionModel:
    with torch.no_grad():
        for block in model.layers:
            block.att.output.weight.zero_()
    return model


def test_without_mixing_a_patch_sees_itself():
    field = receptive_field(without_attention(make("vrwkv", shift="none")), images())
    assert field.shape == (20, 20)
    assert field.dtype == np.float32
    assert patches(field) == [[0] * 5, [0] * 5, [0, 0, 1, 0, 0], [0] * 5, [0] * 5]


@pytest.mark.parametrize("kind", ["vrwkv", "vrwkv6"])
def test_the_q_shift_alone_sees_one_patch_farther_with_every_layer(kind):
    for layers in (1, 2):
        field = receptive_field(without_attention(make(kind, layers=layers)), images())
        near = [[int(abs(x - 2) + abs(y - 2) <= layers) for x in range(5)] for y in range(5)]
        assert patches(field) == near


def test_attention_that_looks_back_sees_what_is_before():
    field = receptive_field(make("vrwkv", shift="none", causal=True), images())
    assert patches(field) == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0], [0] * 5, [0] * 5]


@pytest.mark.parametrize("kind", ["vrwkv", "vrwkv6", "vit"])
def test_attention_sees_everything(kind):
    assert patches(receptive_field(make(kind), images())) == [[1] * 5] * 5


@pytest.mark.parametrize("kind", ["vrwkv6", "vit"])
def test_the_field_is_the_mean_over_all_signs(kind):
    """All 2^8 sums of the rows of the Jacobian, of two pictures."""
    model, seen = make(kind, width=8, layers=1), images(2)
    rows = [torch.autograd.functional.jacobian(lambda x: feature_map(model, x)[0, :, 2, 2], x) for x in seen.split(1)]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    wanted = torch.einsum("sc,cbpyx->sbpyx", signs, torch.cat(rows, 1)).abs().mean((0, 1, 2)).numpy()
    field = receptive_field(model, seen, draws=400)
    assert np.abs(field - wanted).max() < 0.1 * wanted.max()
    assert abs(field.sum() / wanted.sum() - 1) < 0.03


def test_new_models_whose_norms_hide_the_plain_sum():
    """S and B begin so: each thing that is added to the features has a LayerNorm of equal weights behind it."""
    model = make("vrwkv", post_norm=True, init_values=1.0)
    model.init_weights()
    image = images(1).requires_grad_()
    (slope,) = torch.autograd.grad(model.forward_features(image)[0, :, 2, 2].sum(), image)
    field = receptive_field(model, images(1))
    assert slope.abs().max() < 1e-3 * field.max()
    assert patches(field) == [[1] * 5] * 5


def test_fields_are_the_mean_over_pictures_and_leave_the_model_as_it_was():
    model = make("vrwkv6", drop_path=0.5).train()
    model.layers[0].eval()  # frozen
    with torch.no_grad():
        once = receptive_field(model, images(1))
    assert not model.layers[0].training
    assert np.array_equal(once, receptive_field(model, images(1)))
    assert model.training
    assert np.array_equal(once, receptive_field(model.eval(), images(1)))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert receptive_field(model, images(3, 24, 14)).shape == (24, 14)


def respond(log_w: Tensor, u: Tensor, tokens: int) -> Tensor:
    """biwkv's answer to a value of 1 at one token, keys all equal: [from, to, C]."""
    k = torch.zeros(tokens, tokens, len(u), dtype=torch.float64)
    v = torch.eye(tokens, dtype=torch.float64)[:, :, None].expand_as(k)
    return biwkv(log_w.double(), k, v, u.double(), impl="reference")


def test_decays_are_the_response_of_biwkv():
    model = make("vrwkv")
    weights = decay_weights(model, images(1, 16, 12))
    tokens = 12
    assert weights.shape == (2, 16, 2 * tokens - 1)
    for block, curves in zip(model.layers, weights, strict=True):
        response = respond(-block.att.spatial_decay / tokens, block.att.spatial_first / tokens, tokens)
        for to in range(tokens):
            seen = curves[:, tokens - 1 - to : 2 * tokens - 1 - to]  # of the tokens 0 .. T - 1, as `to` reads them
            wanted = response[:, to].T.detach().numpy()
            np.testing.assert_allclose(seen / seen.sum(1, keepdims=True), wanted, rtol=1e-5)


def test_decays_of_attention_that_looks_back():
    both, back = (decay_weights(make("vrwkv", causal=causal), images(1)) for causal in (False, True))
    assert np.array_equal(both[:, :, :25], back[:, :, :25])
    assert not back[:, :, 25:].any()


@pytest.mark.parametrize("changes", [{}, {"post_norm": True, "init_values": 0.5}, {"shift": "previous"}])
def test_decays_of_vrwkv6_are_the_mean_response_of_biwkv6(changes, monkeypatch):
    """With the decays that the forward pass hands to the operator."""
    model, seen = make("vrwkv6", **changes), []

    def record(r: Tensor, log_w: Tensor, *others: Tensor) -> Tensor:
        seen.append((log_w, others[-1]))
        return biwkv6(r, log_w, *others)

    monkeypatch.setattr("heronry.models.vision.vrwkv6.biwkv6", record)
    with torch.no_grad():
        model(images(2, 12, 8))
    monkeypatch.undo()
    weights = decay_weights(model, images(2, 12, 8))
    assert weights.shape == (2, 16, 11)
    tokens = 6
    for (log_w, u), curves in zip(seen, weights, strict=True):
        found = torch.zeros(2 * tokens - 1, 2, 8, dtype=torch.float64)  # the sum over pairs and pictures, of H and N
        for i in range(tokens):
            for channel in range(8):  # a key and receptance of this channel alone, a value at one token
                one = torch.zeros(2, tokens, 2, 8, dtype=torch.float64)
                one[..., channel] = 1
                v = torch.zeros_like(one)
                v[:, i] = 1
                y = biwkv6(one, log_w.double(), one, v, u.detach().double(), impl="reference")
                for to in range(tokens):
                    found[i - to + tokens - 1, :, channel] += y[:, to, :, 0].sum(0)
        pairs = 2 * (tokens - torch.arange(1 - tokens, tokens).abs())
        wanted = (found / pairs[:, None, None]).flatten(1).T
        np.testing.assert_allclose(curves, wanted.numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["vrwkv", "vrwkv6"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_q_shift_maps_move_by_one_patch(kind, post_norm):
    channels, before, after = q_shift_maps(make(kind, post_norm=post_norm), images(2, 20, 12))
    size = 8 if kind == "vrwkv6" else 16  # of what a shift divides into quarters
    assert [channel % size // (size // 4) for channel in channels] == [0, 1, 2, 3]
    assert before.shape == after.shape == (4, 5, 3)
    wanted = np.zeros_like(before)
    wanted[0, :, 1:], wanted[1, :, :-1] = before[0, :, :-1], before[1, :, 1:]
    wanted[2, 1:], wanted[3, :-1] = before[2, :-1], before[3, 1:]
    assert np.array_equal(after, wanted)


def test_what_has_no_q_shift_says_so():
    for model in (make("vrwkv", shift="previous"), make("vrwkv", width=2)):
        with pytest.raises(InputError, match="no Q-shift"):
            q_shift_maps(model, images(1))


@pytest.mark.parametrize("kind", ["vrwkv", "vrwkv6", "vit"])
def test_class_scores_add_up_to_the_logit(kind):
    model, batch = make(kind), images(3)
    with torch.no_grad():
        logits = model(batch)
    linear = next(m for m in model.head.modules() if isinstance(m, nn.Linear))
    for labels in (None, [4, 0, 4]):
        scores, classes, class_logits = class_maps(model, batch, labels)
        assert classes == (labels or logits.argmax(1).tolist())
        assert scores.shape == (3, 5, 5)
        wanted = logits[range(3), classes].numpy()
        np.testing.assert_allclose(class_logits, wanted, rtol=1e-5)
        bias = linear.bias[classes].detach().numpy()
        np.testing.assert_allclose(scores.mean((1, 2), dtype=np.float64) + bias, wanted, rtol=1e-5, atol=1e-5)
        features = feature_map(model, batch).detach()
        by_hand = torch.einsum("bc,bchw->bhw", linear.weight[classes].detach(), features)
        np.testing.assert_allclose(scores, by_hand.numpy(), rtol=1e-5, atol=1e-5)


def test_class_scores_of_a_head_with_a_hidden_layer():
    """How the logit grows when a patch's features do, as a difference."""
    model = make("vrwkv", head_hidden=7).double()
    scores, classes, _ = class_maps(model, images(1), [3])
    assert classes == [3]
    with torch.no_grad():
        features = model.forward_features(images(1).double())
        for y, x in ((0, 0), (2, 3)):
            more, less = features.clone(), features.clone()
            more[:, :, y, x] *= 1 + 1e-4
            less[:, :, y, x] *= 1 - 1e-4
            slope = (model.forward_head(more) - model.forward_head(less))[0, 3] / 2e-4
            assert scores[0, y, x] == pytest.approx(25 * slope.item(), rel=1e-5)


def test_classes_that_there_are_not():
    headless = make("vrwkv")
    headless.reset_classifier(0)
    with pytest.raises(InputError, match="no classification head"):
        class_maps(headless, images(1))
    with pytest.raises(InputError, match="class 5 does not exist: this model has 5"):
        class_maps(make("vrwkv"), images(1), [5])
    with pytest.raises(InputError, match="2 classes were given for 1 images"):
        class_maps(make("vrwkv"), images(1), [1, 2])


@pytest.mark.parametrize("kind", ["vrwkv", "vrwkv6"])
def test_drawings_are_written(kind, tmp_path):
    model, seen = make(kind), images(2)
    weights = decay_weights(model, seen)
    scores, classes, _ = class_maps(model, seen)
    field = receptive_field(model, seen, draws=1)
    for name, figure in {
        "one field": view.draw_receptive_fields({"a": field}),
        "fields, one of nothing": view.draw_receptive_fields({"a": field, "b": np.zeros_like(field)}),
        "decays": view.draw_decays(weights),
        "decays of more layers than a row holds": view.draw_decays(np.tile(weights, (3, 1, 1))[:5]),
        "shift": view.draw_q_shift(pixels(seen)[0], *q_shift_maps(model, seen)),
        "classes": view.draw_class_maps(pixels(seen), scores, [str(i) for i in classes], 4),
    }.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pixels_are_those_of_the_picture():
    from PIL import Image

    from heronry.data.images import preprocess

    numbers = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(pixels(preprocess(Image.fromarray(numbers), 20)[None])[0], numbers / 255, atol=1e-6)


def test_matplotlib_comes_when_something_is_drawn(monkeypatch):
    code = "import sys, heronry.view.vision; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"^drawings need matplotlib: pip install 'heronry\[plots\]'$"):
        view.draw_decays(np.ones((1, 4, 5)))


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def picture(tmp_path) -> Path:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (300, 260), "skyblue")
    ImageDraw.Draw(image).ellipse((80, 60, 200, 200), fill="orange")
    image.save(tmp_path / "sun.png")
    return tmp_path / "sun.png"


@pytest.mark.slow
def test_the_example_draws_an_untrained_model(run, picture, tmp_path):
    output = run("vrwkv_tiny", picture, "--out", tmp_path / "drawn")
    assert "how far vrwkv_tiny sees" in output
    assert "how far ViT with new weights sees" in output
    assert {file.name for file in (tmp_path / "drawn").iterdir()} == WRITES
    assert all((tmp_path / "drawn" / name).stat().st_size > 5000 for name in WRITES)


@pytest.mark.slow
def test_the_example_draws_models_in_folders_beside_each_other(run, picture, tmp_path):
    ours, theirs, out = tmp_path / "ours", tmp_path / "theirs", tmp_path / "drawn"
    save(make("vrwkv6"), ours, notes={"labels": ["a", "b", "c", "d", "e"]})
    save(make("vit"), theirs)
    output = run(ours, picture, picture, "--out", out, "--beside", theirs)
    assert re.findall(r"how far (.*) sees", output) == [
        str(ours),
        str(theirs),
        "its like with new weights",
        "ViT with new weights",
    ]
    assert {file.name for file in out.iterdir()} == WRITES
    save(make("vrwkv", num_classes=0, shift="none"), ours)
    run(ours, picture, "--out", tmp_path / "of features")
    assert {file.name for file in (tmp_path / "of features").iterdir()} == {
        "vision-receptive-field.png",
        "vision-decay.png",
    }
    run(theirs, picture, "--out", tmp_path / "of ViT")
    assert {file.name for file in (tmp_path / "of ViT").iterdir()} == {
        "vision-receptive-field.png",
        "vision-classes.png",
    }


def test_the_example_tells_errors_in_one_line(run, picture, tmp_path, capsys):
    picture.with_name("text.png").write_text("no picture")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for model, file, what in (
        ("vrwkv_tiny", tmp_path / "none.png", "no such file"),
        ("vrwkv_tiny", picture.with_name("text.png"), "not an image"),
        (tmp_path / "nothing", picture, "nothing"),
        (tmp_path / "damaged", picture, "line 1"),
    ):
        with pytest.raises(SystemExit) as left:
            run(model, file, "--out", tmp_path / "drawn")
        assert left.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("vision_pictures: ")
        assert what in message
        assert message.count("\n") == 1
