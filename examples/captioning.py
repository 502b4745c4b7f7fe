"""One to many: a picture goes in, words come out. Vision-RWKV's patches are read by an RWKV that tells stories.

    python examples/captioning.py cifar10-train.parquet cifar10-test.parquet --out captioner

The language model is the bundled storyteller (or --language), frozen unless --language-lr is given. The eyes are a new
small VRWKV (or --vision, the folder of a trained one). Between the two stands a projection, and between the picture and
its caption nothing but a state. The captions are made of the name of the class and of how bright the picture is.

A few minutes on one core; Ctrl-C ends the learning and keeps what was reached. In the folder --out are then the two
models and projection.safetensors (`pip install 'rookery[train,vision]'`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from rookery import LLM, load
from rookery.checkpoint import save
from rookery.engine.llm import BUNDLED
from rookery.models import VRWKV, VisionModel
from rookery.models.captioner import Captioner
from rookery.models.vision import VRWKVConfig
from rookery.pictures import prepare
from rookery.train.pictures import Pictures

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TEMPLATES = ["a {light} picture of {thing}.", "{thing} in a {light} picture.", "this is {thing} in a {light} picture."]
PROMPT = "\n"  # what asks for a caption


def names(data: Pictures) -> list[str]:
    """Of the classes; a parquet file may hold their numbers only, and those of CIFAR-10 are known."""
    numbered = data.labels == [str(i) for i in range(len(CIFAR10))]
    return CIFAR10 if numbered else data.labels


def light(image: Tensor) -> str:
    mean = image.mean().item()
    return "dark" if mean < -0.4 else "bright" if mean > 0.4 else "soft"


def caption(image: Tensor, name: str, template: str) -> str:
    return template.format(light=light(image), thing=f"{'an' if name[0] in 'aeiou' else 'a'} {name}")


def batches(data: Pictures, size: int, batch: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Pictures [B, 3, size, size] and their classes in a random order, for ever; half of them mirrored."""
    while True:
        order = torch.randperm(len(data)).tolist()
        for first in range(0, len(order) - batch + 1, batch):
            found = [data.get(i) for i in order[first : first + batch]]
            images = torch.stack([prepare(picture, size) for picture, _ in found])
            mirrored = torch.rand(batch) < 0.5
            images[mirrored] = images[mirrored].flip(3)
            yield images, [label for _, label in found]


def train(captioner: Captioner, llm: LLM, data: Pictures, args: argparse.Namespace) -> None:
    told, given = names(data), len(llm.encode(PROMPT, begins=False))
    groups = [*captioner.vision.param_groups(args.lr, 0.05), {"params": captioner.projection.parameters()}]
    captioner.language.requires_grad_(args.language_lr > 0)
    if args.language_lr:
        groups += captioner.language.param_groups(args.language_lr, 0.0)
    optimizer = torch.optim.AdamW(groups, args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], args.steps, pct_start=0.1, cycle_momentum=False
    )
    pictures = batches(data, captioner.vision.config.image_size, args.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    captioner.train()
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("learning", total=args.steps)
        try:
            for _ in range(args.steps):
                images, labels = next(pictures)
                texts = [caption(x, told[i], random.choice(TEMPLATES)) for x, i in zip(images, labels, strict=True)]
                ids = [llm.encode(PROMPT, begins=False) + llm.encode(text, begins=False) for text in texts]
                optimizer.zero_grad()
                loss = captioner.loss(images, ids, given)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update(task, advance=1, description=f"loss {loss.item():.3f}")
        except KeyboardInterrupt:
            bar.console.print("stopped; with what was learned so far:")
    captioner.eval()


def measure(captioner: Captioner, llm: LLM, data: Pictures, number: int) -> None:
    """Captions the first pictures, and tells how many captions are right."""
    told, size = names(data), captioner.vision.config.image_size
    right = bright = 0
    for first in range(0, number, 100):
        found = [data.get(i) for i in range(first, min(number, first + 100))]
        images = torch.stack([prepare(picture, size) for picture, _ in found])
        with torch.no_grad():
            state = captioner.look(images)
        said = llm.generate([PROMPT] * len(found), 20, state=state, temperature=0, stop=".")
        for i, (text, (_, label)) in enumerate(zip(said, found, strict=True)):
            words = text.split()
            right += [word for word in words if word in told] == [told[label]]
            bright += light(images[i]) in words
            if first + i < 12:
                print(f"{told[label]:>10}: {text}")
    print(f"of {number} held-out captions {right} name the right class, {bright} tell how bright the picture is")
    again = (llm.generate(PROMPT, 20, state=state[0], seed=seed, stop=".") for seed in (1, 2, 3))  # seen once
    print(f"three captions of one {told[found[0][1]]}:", *again, sep="\n  ")


def eyes(folder: Path | None) -> VisionModel:
    if folder is not None:
        return load(folder, dtype="float32")
    model = VRWKV(VRWKVConfig.sized(96, 4, image_size=32, patch_size=4, num_classes=0))
    model.init_weights()
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train", help="pictures with classes: a .parquet file, a folder of folders or hf://NAME")
    options.add_argument("test", help="the same, held out")
    options.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    options.add_argument("--vision", type=Path, help="the folder of a VRWKV to begin with, in place of a new one")
    options.add_argument("--language", type=Path, help="an RWKV of any generation, in place of the bundled one")
    options.add_argument("--language-lr", type=float, default=0.0, help="0 leaves the language model as it is")
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--captions", type=int, default=1000, help="so many held-out pictures are captioned")
    args = options.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    llm = LLM(args.language, dtype="float32")
    captioner = Captioner(eyes(args.vision), llm.model)
    train(captioner, llm, Pictures(args.train), args)
    save(captioner.vision, args.out / "vision")
    words = (args.language or BUNDLED) / "tokenizer.json"
    save(captioner.language, args.out / "language", words if words.is_file() else None)
    captioner.save(args.out / "projection.safetensors")
    test = Pictures(args.test)
    measure(captioner, llm, test, min(args.captions, len(test)))


if __name__ == "__main__":
    main()
