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
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from rookery import LLM, load
from rookery.checkpoint import save
from rookery.engine.llm import BUNDLED
from rookery.models import VRWKV
from rookery.models.captioner import Captioner
from rookery.models.vision import VRWKVConfig
from rookery.pictures import prepare
from rookery.train.pictures import Pictures

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TEMPLATES = ["a {light} picture of {thing}.", "{thing} in a {light} picture.", "this is {thing} in a {light} picture."]
PROMPT = "\n"  # what asks for a caption


def light(image: Tensor) -> str:
    mean = image.mean().item()
    return "dark" if mean < -0.4 else "bright" if mean > 0.4 else "soft"


def caption(image: Tensor, name: str) -> str:
    thing = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return random.choice(TEMPLATES).format(light=light(image), thing=thing)


def pick(data: Pictures, numbers: Iterable[int], size: int, names: list[str]) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, size, size] and the names of their classes."""
    pictures, labels = zip(*map(data.get, numbers), strict=True)
    return torch.stack([prepare(picture, size) for picture in pictures]), [names[label] for label in labels]


def train(captioner: Captioner, llm: LLM, data: Pictures, names: list[str], args: argparse.Namespace) -> None:
    captioner.language.requires_grad_(args.language_lr > 0)
    groups = [*captioner.vision.param_groups(args.lr, 0.05), {"params": captioner.projection.parameters()}]
    if args.language_lr:
        groups += captioner.language.param_groups(args.language_lr, 0.0)
    optimizer = torch.optim.AdamW(groups, args.lr)
    most = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, args.steps, pct_start=0.1, cycle_momentum=False)
    asks = llm.encode(PROMPT, begins=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    captioner.train()
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("learning", total=args.steps)
        try:
            for _ in range(args.steps):
                numbers = torch.randint(len(data), (args.batch,)).tolist()
                images, things = pick(data, numbers, captioner.vision.config.image_size, names)
                said = [caption(image, thing) for image, thing in zip(images, things, strict=True)]
                mirrored = torch.rand(len(images)) < 0.5
                images[mirrored] = images[mirrored].flip(3)
                optimizer.zero_grad()
                loss = captioner.loss(images, [asks + llm.encode(text, begins=False) for text in said], len(asks))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update(task, advance=1, description=f"loss {loss.item():.3f}")
        except KeyboardInterrupt:
            bar.console.print("stopped; with what was learned so far:")
    captioner.eval()


def measure(captioner: Captioner, llm: LLM, data: Pictures, names: list[str], number: int) -> None:
    """Captions the first pictures, and tells how many captions are right."""
    right = lit = 0
    for first in range(0, number, 100):
        numbers = range(first, min(number, first + 100))
        images, things = pick(data, numbers, captioner.vision.config.image_size, names)
        with torch.no_grad():
            state = captioner.look(images)
        said = llm.generate([PROMPT] * len(images), 20, state=state, temperature=0, stop=".")
        for i, image, thing, text in zip(numbers, images, things, said, strict=True):
            right += [word for word in text.split() if word in names] == [thing]
            lit += light(image) in text.split()
            if i < 12:
                print(f"{thing:>10}: {text}")
    print(f"of {number} held-out captions {right} name the right class, {lit} tell how bright the picture is")
    again = (llm.generate(PROMPT, 20, state=state[0], seed=seed, stop=".") for seed in (1, 2, 3))  # it is seen once
    print(f"three captions of one {things[0]}:", *again, sep="\n  ")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train", help="pictures with classes: a .parquet file, a folder of folders or hf://NAME")
    options.add_argument("test", help="the same, held out")
    options.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    options.add_argument("--vision", type=Path, help="the folder of a VRWKV to begin with, in place of a new one")
    options.add_argument("--language", type=Path, help="an RWKV of any generation, in place of the bundled one")
    options.add_argument("--language-lr", type=float, default=0.0, help="0 leaves the language model as it is")
    options.add_argument("--names", nargs="+", default=CIFAR10, help="of the classes, where the data numbers them only")
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--captions", type=int, default=1000, help="so many held-out pictures are captioned")
    args = options.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    llm, data, test = LLM(args.language, dtype="float32"), Pictures(args.train), Pictures(args.test)
    if args.vision:
        vision = load(args.vision, dtype="float32")
    else:
        vision = VRWKV(VRWKVConfig.sized(128, 4, image_size=32, patch_size=8, num_classes=0))
        vision.init_weights()
    names = args.names if data.labels[0].isdigit() else data.labels
    captioner = Captioner(vision, llm.model)
    train(captioner, llm, data, names, args)
    save(captioner.vision, args.out / "vision")
    words = (args.language or BUNDLED) / "tokenizer.json"
    save(captioner.language, args.out / "language", words if words.is_file() else None)
    captioner.save(args.out / "projection.safetensors")
    measure(captioner, llm, test, names, min(args.captions, len(test)))


if __name__ == "__main__":
    main()
