"""Object detection: D-FINE of transformers over a VRWKV backbone finds coloured shapes, trained from scratch.

    python examples/detection.py --out detection

Squares, discs and triangles, each kind in shades of its own colour, lie on grey noise. The pictures are drawn here,
new ones at every step; takes two minutes on one core. The measure is average precision at IoU 0.5 on new pictures.
--out gets the detector for DFineForObjectDetection.from_pretrained. Needs `pip install transformers scipy`.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor
from transformers import DFineConfig, DFineForObjectDetection

from heronry.data.images import normalize
from heronry.integrations.vision import VisionRwkvConfig, register

KINDS = ("square", "disc", "triangle")
COLOURS = np.array([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.3, 0.4, 0.95]])
SIZE, PATCH, HELD_OUT = 64, 8, 128


def draw(random: np.random.Generator) -> tuple[np.ndarray, dict[str, Tensor]]:
    """A picture [SIZE, SIZE, 3] in 0..1 and its labels as DETR wants them: boxes x, y, width, height in shares."""
    picture, shapes = random.normal(0.5, 0.2, (SIZE, SIZE, 3)), []
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for _ in range(random.integers(1, 4)):
        kind, r = random.integers(3), random.integers(6, 14)
        row, column = random.integers(r, SIZE - r, 2)
        if any(max(abs(row - y), abs(column - x)) <= r + other for _, x, y, other in shapes):
            continue  # one shape never hides another
        y, x = rows - row, columns - column
        square, disc = np.maximum(abs(y), abs(x)) <= r, y**2 + x**2 <= r**2
        inside = (square, disc, square & (2 * abs(x) <= y + r))[kind]
        shade = COLOURS[kind] * random.uniform(0.6, 1.0)
        picture[inside] = shade + random.normal(0, 0.1, (inside.sum(), 3))
        shapes.append((kind, column, row, r))
    boxes = torch.tensor([[x + 0.5, y + 0.5, 2 * r + 1, 2 * r + 1] for _, x, y, r in shapes]).float() / SIZE
    return picture.clip(0, 1), {"class_labels": torch.tensor([shape[0] for shape in shapes]), "boxes": boxes}


def batch(random: np.random.Generator, number: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    pictures, labels = zip(*(draw(random) for _ in range(number)), strict=True)
    return normalize(torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2)), list(labels)


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes."""
    low, high = (torch.stack([box[:2] + sign * box[2:] / 2 for box in (a, b)]) for sign in (-1, 1))
    common = (high.amin(0) - low.amax(0)).clamp(min=0).prod()
    return float(common / (a[2:].prod() + b[2:].prod() - common))


def average_precision(scores: Tensor, boxes: Tensor, truths: list[Tensor]) -> float:
    """Of one kind: scores [B, queries], boxes [B, queries, 4], of each picture the true boxes [n, 4]."""
    missing = [list(truth) for truth in truths]
    total, hits = sum(map(len, missing)), []
    for place in scores.flatten().argsort(descending=True).tolist():
        i, query = divmod(place, scores.shape[1])
        fits = [overlap(boxes[i, query], box) for box in missing[i]]
        hits.append(max(fits, default=0) >= 0.5)
        if hits[-1]:
            missing[i].pop(fits.index(max(fits)))
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    return float(best[hits].sum() / total)


def build(c: int = 48) -> DFineForObjectDetection:
    """A small D-FINE that reads three maps of the pyramid, of strides 4, 8 and 16 here."""
    register()
    pyramid = {"patch_size": PATCH, "pyramid_channels": c, "out_indices": [1, 2, 3]}
    backbone = VisionRwkvConfig(hidden_size=64, num_hidden_layers=3, image_size=SIZE, **pyramid)
    each = {"in_channels": [c] * 3, "attention_heads": c // 16, "ffn_dim": 2 * c}
    settings = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in each.items()}
    settings |= {"d_model": c, "encoder_hidden_dim": c, "decoder_layers": 2, "num_queries": 20, "num_denoising": 40}
    settings |= {"feat_strides": [PATCH // 2, PATCH, 2 * PATCH], "id2label": dict(enumerate(KINDS))}
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, **settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="detection")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, random, began = build(), np.random.default_rng(0), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=1e-4)
    rise = min(max(0.1, 1.5 / args.steps), 0.9)  # a rise of exactly one step would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=rise, cycle_momentum=False)
    for step in range(1, args.steps + 1):
        images, labels = batch(random, args.batch)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps:
            print(f"step {step} of {args.steps}: loss {loss:.2f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval().save_pretrained(args.out)
    images, labels = batch(np.random.default_rng(1), HELD_OUT)
    with torch.inference_mode():
        outputs = [model(pixel_values=part) for part in images.split(16)]
    scores, boxes = torch.cat([o.logits.sigmoid() for o in outputs]), torch.cat([o.pred_boxes for o in outputs])
    truths = ([x["boxes"][x["class_labels"] == kind] for x in labels] for kind in range(len(KINDS)))
    each = [average_precision(scores[..., kind], boxes, truth) for kind, truth in enumerate(truths)]
    per_class = ", ".join(f"{kind} {x:.3f}" for kind, x in zip(KINDS, each, strict=True))
    print(f"{HELD_OUT} pictures held out: average precision at IoU 0.5 {np.mean(each):.3f} ({per_class})")


if __name__ == "__main__":
    main()
