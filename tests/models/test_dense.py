"""The pyramid and the segmenter over Vision-RWKV."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from heronry import InputError
from heronry.models import VRWKV, VRWKV6
from heronry.models.vision import VRWKV6Config, VRWKVConfig
from heronry.models.vision.dense import Pyramid, Segmenter

SIZES = {"num_classes": 0, "image_size": 64}
CONFIGS = {"vrwkv": VRWKVConfig.sized(32, 2, **SIZES), "vrwkv6": VRWKV6Config.sized(32, 2, head_size=16, **SIZES)}


@pytest.fixture(params=CONFIGS)
def backbone(request):
    torch.manual_seed(0)
    model = {"vrwkv": VRWKV, "vrwkv6": VRWKV6}[request.param](CONFIGS[request.param])
    model.init_weights()
    return model.double()


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# rows and columns of patches of 16, one pixel less and more among them
@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (4, 4)), ((63, 97), (4, 7)), ((33, 48), (3, 3)), ((5, 3), (1, 1))]
)
def test_shapes(backbone, size, grid):
    segmenter = Segmenter(backbone, 5, 24)
    images = pictures(2, 3, *size)
    maps = segmenter.pyramid(images)
    rows, columns = grid
    assert list(maps) == ["0", "1", "2", "3"]
    assert [x.shape for x in maps.values()] == [
        (2, 24, 4 * rows, 4 * columns),
        (2, 24, 2 * rows, 2 * columns),
        (2, 24, rows, columns),
        (2, 24, (rows + 1) // 2, (columns + 1) // 2),
    ]
    assert segmenter.pyramid.out_channels == 24
    logits = segmenter(images)
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == torch.float64


def test_the_maps_are_what_vitdet_says(backbone):
    """Of stride 4 and of stride 32, of an odd number of rows, written out again."""
    pyramid = Pyramid(backbone, 24)
    with torch.no_grad():
        for p in pyramid.scales.parameters():  # norms and biases that do something
            p.add_(0.3 * torch.randn_like(p))
    images = pictures(2, 3, 48, 80)
    w = {name: p.detach() for name, p in pyramid.scales.named_parameters()}

    def norm(x, name):
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def doubled(x, name):  # every pixel becomes 2 x 2
        y = torch.einsum("bchw,cdij->bdhiwj", x, w[f"{name}.weight"])
        return y.flatten(2, 3).flatten(3, 4) + w[f"{name}.bias"][:, None, None]

    last = backbone.forward_intermediates(images, [1])[0].detach()
    fine = doubled(F.gelu(norm(doubled(last, "0.0"), "0.1")), "0.3")
    coarse = F.pad(last, (0, 1, 0, 1), value=-torch.inf).unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    for x, scale, first in ((fine, "0", 4), (coarse, "3", 1)):
        x = norm(torch.einsum("bchw,dc->bdhw", x, w[f"{scale}.{first}.weight"][:, :, 0, 0]), f"{scale}.{first + 1}")
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        x = torch.einsum("bchwij,dcij->bdhw", patches, w[f"{scale}.{first + 2}.weight"])
        torch.testing.assert_close(pyramid(images)[scale], norm(x, f"{scale}.{first + 3}"), rtol=0, atol=1e-10)


def test_a_batch_is_its_pictures(backbone):
    segmenter = Segmenter(backbone, 5, 24)
    images = pictures(3, 3, 70, 45)
    together, alone = segmenter(images), torch.cat([segmenter(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    maps = segmenter.pyramid(images)
    for i, image in enumerate(images):
        for name, x in segmenter.pyramid(image[None]).items():
            torch.testing.assert_close(maps[name][i], x[0], rtol=0, atol=1e-12)


def test_what_is_no_whole_patch_moves_nothing(backbone):
    """The same pixels inside a larger frame of zeros get the same logits."""
    segmenter = Segmenter(backbone, 5, 24)
    images = pictures(2, 3, 65, 100)
    framed = segmenter(F.pad(images, (0, 12, 0, 15)))
    torch.testing.assert_close(segmenter(images), framed[..., :65, :100], rtol=0, atol=0)


def test_gradients_reach_everything(backbone):
    segmenter = Segmenter(backbone, 5, 24)
    loss = F.cross_entropy(segmenter(pictures(1, 3, 48, 80)), torch.arange(5).repeat(1, 48, 16))
    loss.backward()
    assert abs(loss.item() - np.log(5)) < 0.05  # all classes are as likely in the beginning
    without = [name for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_other_dtypes(backbone):
    segmenter = Segmenter(backbone.bfloat16(), 5, 24)
    assert {p.dtype for p in segmenter.parameters()} == {torch.bfloat16}
    assert segmenter(pictures(1, 3, 64, 64).bfloat16()).dtype == torch.bfloat16


def test_what_cannot_be(backbone):
    with pytest.raises(InputError, match="classes must be at least 1, got 0"):
        Segmenter(backbone, 0)
    with pytest.raises(InputError, match="got 0 of 32"):
        Pyramid(backbone, 0)
    with pytest.raises(InputError, match="must be floating point"):
        Segmenter(backbone, 2, 8)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def shapes(random: np.random.Generator, number: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Red squares (1) and green discs (2) on noise."""
    images, classes = random.normal(0, 1, (number, 3, size, size)), np.zeros((number, size, size), np.int64)
    rows, columns = np.mgrid[:size, :size]
    for image, mask in zip(images, classes, strict=True):
        for kind in (1, 2):
            y, x = rows - random.integers(8, size - 8), columns - random.integers(8, size - 8)
            inside = (np.maximum(abs(y), abs(x)) <= 7) if kind == 1 else (y**2 + x**2 <= 64)
            mask[inside] = kind
            image[:, inside] = np.eye(3)[kind - 1][:, None] * 2 + 0.5 * random.normal(0, 1, (3, inside.sum()))
    return torch.from_numpy(images).float(), torch.from_numpy(classes)


@pytest.mark.parametrize("kind", ["vrwkv", "vrwkv6"])
@pytest.mark.quick_for("vrwkv")
def test_a_segmenter_learns(kind):
    """Judged by pictures of another size than it has learned from."""
    torch.manual_seed(0)
    sizes = {"num_classes": 0, "image_size": 32, "patch_size": 4}
    if kind == "vrwkv":
        model = VRWKV(VRWKVConfig.sized(32, 2, **sizes))
    else:
        model = VRWKV6(VRWKV6Config.sized(32, 2, head_size=16, **sizes))
    model.init_weights()
    segmenter = Segmenter(model, 3, 16)
    optimizer = torch.optim.AdamW(segmenter.parameters(), 3e-3)
    random, losses = np.random.default_rng(0), []
    for _ in range(40):
        images, classes = shapes(random, 8, 32)
        loss = F.cross_entropy(segmenter(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    images, classes = shapes(np.random.default_rng(1), 16, 45)
    with torch.inference_mode():
        guess = segmenter.eval()(images).argmax(1)
    assert (guess == classes).float().mean() > 0.9
    shares = [float(((guess == i) & (classes == i)).sum() / ((guess == i) | (classes == i)).sum()) for i in range(3)]
    assert min(shares) > 0.6
