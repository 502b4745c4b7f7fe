"""A caption for a picture: Vision-RWKV's patches are read by an RWKV that writes stories.

    python examples/captioning.py cifar10-train.parquet cifar10-test.parquet --out captioner

The language model is the bundled storyteller (or --language) and stays frozen; the encoder is a new small VRWKV (or
--vision, the folder of a trained one), with a projection between them. Only a state connects the picture with its
caption. The captions are made from the name of the class and the brightness of the picture.

Takes about ten minutes on one core; Ctrl-C stops the training and keeps what was reached. --out gets the encoder and
projection.safetensors. Needs `pip install 'heronry[train,vision]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from heronry import LLM, VisionModel, load
from heronry.checkpoint import save
from heronry.data.image_dataset import ImageDataset
from heronry.data.images import preprocess
from heronry.models import VRWKV
from heronry.models.vision import VRWKVConfig
from heronry.models.vision.captioner import Captioner

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PROMPT = "\n"  # asks for a caption


def pick(data: ImageDataset, numbers: Iterable[int], size: int) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, size, size] and their captions."""
    pictures, classes = zip(*(data[i] for i in numbers), strict=True)
    images = torch.stack([preprocess(picture, size) for picture in pictures])
    names = CIFAR10 if data.class_names[0].isdigit() else data.class_names
    return images, [caption(mean, names[i]) for mean, i in zip(images.mean((1, 2, 3)).tolist(), classes, strict=True)]


def caption(mean: float, name: str) -> str:
    light = "dark" if mean < -0.4 else "bright" if mean > 0.4 else "soft"
    return f"a {light} picture of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def train(captioner: Captioner, llm: LLM, data: ImageDataset, lr: float, batch: int, steps: int) -> None:
    captioner.language.requires_grad_(False)
    groups = captioner.vision.param_groups(lr, 0.05)
    groups.append(
        {"params": captioner.projection.parameters(), "lr": 5 * lr}
    )  # fast, because the encoder learns only through it
    optimizer = torch.optim.AdamW(groups)
    most = [group["lr"] for group in groups]
    rise = min(max(0.1, 1.5 / steps), 0.9)  # a rise of exactly one step would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, steps, pct_start=rise, cycle_momentum=False)
    asks = llm.encode(PROMPT, begins=False)
    captioner.train()
    try:
        for _ in track(range(steps), "training"):
            numbers = torch.randint(len(data), (batch,)).tolist()
            images, captions = pick(data, numbers, captioner.vision.config.image_size)
            optimizer.zero_grad()
            loss = captioner.loss(images, [asks + llm.encode(f"{text}.", begins=False) for text in captions], len(asks))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    except KeyboardInterrupt:
        print("stopped; results so far:")
    captioner.eval()


@torch.no_grad()
def measure(captioner: Captioner, llm: LLM, data: ImageDataset, number: int) -> None:
    """Caption the first `number` pictures and print how many captions are right."""
    right = bright = 0
    for first in range(0, number, 100):
        images, captions = pick(data, range(first, min(number, first + 100)), captioner.vision.config.image_size)
        completions = llm.generate([PROMPT] * len(images), 20, state=captioner.look(images), temperature=0, stop=".")
        for text, expected in zip([completion.text for completion in completions], captions, strict=True):
            right += text.split()[-1:] == expected.split()[-1:]
            bright += text.split()[:2] == expected.split()[:2]
        if first == 0:
            print(
                *(f"{text}  ({expected})" for text, expected in zip(completions[:8], captions, strict=False)), sep="\n"
            )
    print(f"of {number} held-out captions {right} have the right class, {bright} name its brightness")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train", help="pictures with classes: a .parquet file, a folder of folders or hf://NAME")
    options.add_argument("test", help="the same, held out")
    options.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    options.add_argument("--vision", type=Path, help="the folder of a VRWKV to begin with, in place of a new one")
    options.add_argument("--language", type=Path, help="an RWKV of any generation, in place of the bundled one")
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--captions", type=int, default=1000, help="how many held-out pictures to caption")
    args = options.parse_args()
    torch.manual_seed(0)
    llm, data, test = LLM(args.language, dtype="float32"), ImageDataset(args.train), ImageDataset(args.test)
    if args.vision:
        vision = load(args.vision, dtype="float32", kind=VisionModel)
    else:
        vision = VRWKV(VRWKVConfig.sized(128, 4, image_size=32, patch_size=8, num_classes=0))
        vision.init_weights()
    captioner = Captioner(vision, llm.model)
    train(captioner, llm, data, args.lr, args.batch, args.steps)
    save(captioner.vision, args.out / "vision")
    captioner.save(args.out / "projection.safetensors")
    measure(captioner, llm, test, min(args.captions, len(test)))


if __name__ == "__main__":
    main()
