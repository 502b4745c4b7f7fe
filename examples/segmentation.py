"""Semantic segmentation: a Vision-RWKV Segmenter tells coloured shapes from noise, trained from scratch.

    python examples/segmentation.py --out segmentation

Squares, discs and triangles, each kind in shades of its own colour, overlap on grey noise. The pictures are drawn
here, new ones at every step; takes a minute or two on one core. The measure is mean intersection over union of the
four classes (noise is one) on new pictures, of the trained size and of another. --out gets the weights and shapes.png,
with pictures, labels and predictions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from heronry.data.images import normalize
from heronry.models.vision import VRWKV, VRWKVConfig
from heronry.models.vision.dense import Segmenter

NAMES = ("noise", "square", "disc", "triangle")
COLOURS = np.array([[0.5, 0.5, 0.5], [0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.3, 0.4, 0.95]])


def draw(random: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture [height, width, 3] in 0..1, and the class of every pixel [height, width]."""
    picture, classes = random.normal(0.5, 0.2, (height, width, 3)), np.zeros((height, width), np.int64)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(random.integers(1, 4)):
        kind, r = random.integers(1, 4), random.integers(5, 12)
        y, x = rows - random.integers(r, height - r), columns - random.integers(r, width - r)
        square, disc = np.maximum(abs(y), abs(x)) <= r, y**2 + x**2 <= r**2
        inside = (square, disc, square & (2 * abs(x) <= y + r))[kind - 1]
        shade = COLOURS[kind] * random.uniform(0.6, 1.0)
        picture[inside], classes[inside] = shade + random.normal(0, 0.1, (inside.sum(), 3)), kind
    return picture.clip(0, 1), classes


def batch(random: np.random.Generator, number: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images [B, 3, height, width] in 0..1 and classes [B, height, width]."""
    pictures, classes = zip(*(draw(random, height, width) for _ in range(number)), strict=True)
    return torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2), torch.from_numpy(np.stack(classes))


@torch.inference_mode()
def predict(model: Segmenter, images: Tensor) -> Tensor:
    model.eval()
    classes = torch.cat([model(normalize(part)).argmax(1) for part in images.split(16)])
    model.train()
    return classes


def overlaps(guess: Tensor, truth: Tensor) -> list[float]:
    """Of every class: the pixels that both give it, as a share of those that either does."""
    pairs = [(guess == i, truth == i) for i in range(len(NAMES))]
    return [float((a & b).sum() / (a | b).sum()) for a, b in pairs]


def train(args: argparse.Namespace) -> Segmenter:
    backbone = VRWKV(VRWKVConfig.sized(args.width, args.layers, num_classes=0, image_size=args.size, patch_size=4))
    backbone.init_weights()
    model = Segmenter(backbone, len(NAMES), args.channels)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    rise = min(max(0.1, 1.5 / args.steps), 0.9)  # a rise of exactly one step would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=rise, cycle_momentum=False)
    random, began = np.random.default_rng(args.seed), time.perf_counter()
    for step in range(1, args.steps + 1):
        images, classes = batch(random, args.batch, args.size, args.size)
        loss = F.cross_entropy(model(normalize(images)), classes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps:
            print(f"step {step} of {args.steps}: loss {loss:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="segmentation")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--width", type=int, default=64, help="channels of the backbone")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=24, help="of the pyramid and the head")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = train(args)
    held_out = np.random.default_rng(args.seed + 1)
    for height, width in ((args.size, args.size), (args.size + 13, args.size + 30)):
        images, truth = batch(held_out, 64, height, width)
        guess = predict(model, images)
        each = overlaps(guess, truth)
        per_class = ", ".join(f"{name} {x:.3f}" for name, x in zip(NAMES, each, strict=True))
        print(f"64 pictures of {height} x {width}, held out: mean IoU {np.mean(each):.3f} ({per_class})")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    columns = zip(images.permute(0, 2, 3, 1).numpy()[:6], COLOURS[truth[:6]], COLOURS[guess[:6]], strict=True)
    sheet = np.concatenate([np.concatenate(column) for column in columns], 1)
    Image.fromarray((sheet * 255).astype(np.uint8)).save(out / "shapes.png")
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, out / "segmenter.safetensors")


if __name__ == "__main__":
    main()
