"""Pictures of every kind that users have, and `heronry see`."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import heronry
from heronry import InputError
from heronry.cli.app import main
from heronry.data.images import open_image, preprocess, random_resized_crop
from heronry.models.vision import MEAN, STD, create


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.array(picture).astype(int)


def saved(picture: Image.Image, path, **options):
    picture.save(path, **options)
    return path


def test_modes(tmp_path):
    red, grey = (200, 30, 40), (90, 90, 90)
    kinds = {
        "rgb.png": (Image.new("RGB", (3, 2), red), red),
        "grey.png": (Image.new("L", (3, 2), 90), grey),
        "bits.png": (Image.new("1", (3, 2), 1), (255,) * 3),
        "sixteen.png": (Image.fromarray(np.full((2, 3), 90 * 257, np.uint16)), grey),
        "grey_alpha.png": (Image.new("LA", (3, 2), (90, 255)), grey),
        "clear.png": (Image.new("RGBA", (3, 2), (*red, 0)), (255,) * 3),
        "half.png": (Image.new("RGBA", (3, 2), (*red, 51)), tuple(round(0.2 * c + 0.8 * 255) for c in red)),
        "palette.gif": (Image.new("RGB", (3, 2), red).convert("P", palette=Image.Palette.ADAPTIVE), red),
        "inks.tiff": (Image.new("RGB", (3, 2), red).convert("CMYK"), red),
        "floats.tiff": (Image.fromarray(np.linspace(0, 2, 6, dtype=np.float32).reshape(2, 3)), None),
    }
    for name, (picture, expected) in kinds.items():
        found = pixels(open_image(saved(picture, tmp_path / name)))
        assert found.shape == (2, 3, 3), name
        if expected is not None:
            assert np.abs(found - np.array(expected)).max() <= 2, name
    assert found[..., 0].flatten().tolist() == [0, 51, 102, 153, 204, 255]


@pytest.mark.parametrize("shape", [(60, 40), (41, 97), (300, 7), (256, 256)])
def test_only_the_center_is_resized(shape):
    """As if the whole image were resized and then cropped, to within the rounding of a pixel."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [128 + 100 * np.sin(0.11 * i * x + 0.07 * y) for i in (1, 2, 3)]
    image = Image.fromarray(np.stack(waves, 2).astype(np.uint8))
    size, side = 28, 32
    width, height = (max(side, round(length * side / min(image.size))) for length in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
    found = preprocess(image, size) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert (found - expected).abs().max() < 1.5 / 255


def test_a_long_and_narrow_image_takes_no_more_memory(monkeypatch):
    """6000 x 1 pixels, of which a square of 224 is kept, not the 1,536,000 x 256 that they would be resized to."""
    made = []
    resize = Image.Image.resize

    def count(image, size, *arguments, **options):
        made.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", count)
    for size in ((6000, 1), (1, 6000)):
        assert preprocess(Image.new("RGB", size, (255, 0, 0))).shape == (3, 224, 224)
    assert made == [(224, 224), (224, 224)]


def test_cameras_say_how_they_were_held(tmp_path):
    upright = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    turned = Image.fromarray(np.rot90(upright).copy())  # 90 degrees to the left, which 6 says to undo
    exif = Image.Exif()
    exif[0x0112] = 6
    found = pixels(open_image(saved(turned, tmp_path / "a.png", exif=exif)))
    assert found.tolist() == upright.tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 7), (224, 224), (256, 256)])
def test_any_size_becomes_a_square(size):
    x = preprocess(Image.new("RGB", size, (10, 200, 90)), 224)
    assert x.shape == (3, 224, 224)
    expected = (torch.tensor([10, 200, 90]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(x, expected[:, None, None].expand_as(x))
    assert preprocess(Image.new("RGB", size), None).shape == (3, *size[::-1])


def test_the_middle_is_seen():
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 255  # the middle square
    x = preprocess(Image.fromarray(picture), 32)
    assert (x > 1).all()  # seven eighths of it
    with_edges = preprocess(Image.fromarray(picture), None)
    assert with_edges.min() < 0


def test_cuts():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    one, same, other = (random_resized_crop(picture, 16, (0.2, 0.5), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.size == (16, 16)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    narrow = random_resized_crop(Image.new("RGB", (1, 500), "red"), 8, (0.9, 1.0), np.random.default_rng(0))
    assert (pixels(narrow) == (255, 0, 0)).all()  # no shape fits, so the middle is taken


def test_what_cannot_be_read_is_told_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(whole, "png")
    (tmp_path / "short.png").write_bytes(whole.getvalue()[:5000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, message in (
        ("nothing.png", "no such file"),
        ("text.png", "not an image that can be read"),
        ("empty.jpg", "not an image that can be read"),
        ("short.png", r"cannot be read \("),
        (".", r"cannot be read \("),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the image: not an image"):
        open_image(b"nothing")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_an_image_of_numbers_that_are_none(number):
    """It was black."""
    numbers = np.full((4, 4), 200, np.float32)
    numbers[0, 0] = number
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "tiff")
    with pytest.raises(InputError, match="the image: contains NaN or infinity"):
        open_image(file.getvalue())


@pytest.mark.parametrize("error", [RuntimeError("Failed to\ndecode"), NotImplementedError(), KeyError("x")])
def test_every_format_has_errors_of_its_own(monkeypatch, error):
    """RuntimeError of AVIF, NotImplementedError of DDS, AttributeError of SPIDER, ..."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match=r"the image: cannot be read \((Failed to decode|NotImplementedError|'x')\)"):
        open_image(b"x")
    error = MemoryError()
    with pytest.raises(MemoryError):
        open_image(b"x")


# ---- heronry see --------------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str, str]:
    from unittest.mock import patch

    with patch("sys.argv", ["heronry", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    vision = create("vrwkv_tiny", n_layer=1, n_embd=16, dim_ffn=32, image_size=32, num_classes=3).eval()
    with torch.no_grad():
        for p in vision.parameters():
            p += 0.2 * torch.randn_like(p)
    heronry.save(vision, tmp_path / "model", notes={"labels": ["a rook", "a boat", "a pond"]})
    return vision


def test_see(model, tmp_path, capsys):
    paths = []
    for i, size in enumerate([(40, 50), (1, 1), (33, 20)]):
        noise = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        paths.append(saved(Image.fromarray(noise), tmp_path / f"{i}.png"))
    images = torch.stack([preprocess(open_image(path), 32) for path in paths])
    with torch.no_grad():
        chances = model(images).softmax(1)
    code, out, _ = run(capsys, "see", *paths, "--model", tmp_path / "model", "--top", 2)
    assert code == 0
    for line, path, row in zip(out.splitlines(), paths, chances, strict=True):
        best = row.topk(2)
        names = [["a rook", "a boat", "a pond"][i] for i in best.indices]
        assert line == f"{path}: {names[0]} {best.values[0]:.1%}, {names[1]} {best.values[1]:.1%}"

    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    _, out, _ = run(
        capsys, "see", paths[0], "--model", tmp_path / "model", "--labels", tmp_path / "names.txt", "--top", 1
    )
    assert out == f"{paths[0]}: {'xyz'[chances[0].argmax()]} {chances[0].max():.1%}\n"

    code, out, _ = run(capsys, "see", *paths, "--model", tmp_path / "model", "--features", tmp_path / "f.safetensors")
    assert (code, out) == (0, "")
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(load_file(tmp_path / "f.safetensors")["features"], pooled, atol=1e-6)


def test_see_tells_what_is_wrong(model, tmp_path, capsys):
    picture = saved(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("x\n")
    heronry.save(create("vrwkv_tiny", n_layer=1, n_embd=16, dim_ffn=32, num_classes=0), tmp_path / "bare")
    at = ("--model", tmp_path / "model")
    for arguments, message in (
        ((picture, "--model", "heronry/bundled"), "reads text, not pictures"),
        ((tmp_path / "b.png", *at), "b.png: no such file"),
        ((picture, *at, "--labels", tmp_path / "names.txt"), "has 1 names, but the model has 3 classes"),
        ((picture, *at, "--labels", tmp_path / "nowhere"), "cannot be read"),
        ((picture, *at, "--top", 0), "top must be at least 1"),
        ((picture, *at, "--size", 0), "size must be from 1 to 16384, got 0"),
        ((picture, "--model", tmp_path / "bare"), "no classification head"),
    ):
        code, out, err = run(capsys, "see", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.strip().count("\n") == 0


def test_info_and_quantize(model, tmp_path, capsys):
    _, out, _ = run(capsys, "info", tmp_path / "model")
    assert "vrwkv" in out
    assert "state" not in out
    wide = create("vrwkv_tiny", n_layer=1, n_embd=32, dim_ffn=64, image_size=32, num_classes=3)
    heronry.save(wide, tmp_path / "wide", notes={"labels": ["a rook", "a boat", "a pond"]})
    run(capsys, "quantize", tmp_path / "wide", tmp_path / "packed")
    picture = saved(Image.new("RGB", (40, 40), "red"), tmp_path / "a.png")
    _, out, _ = run(capsys, "see", picture, "--model", tmp_path / "packed")
    assert "a rook" in out
