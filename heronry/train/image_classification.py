"""What a process reads in a step of a model of pictures: batches of them, cut, flipped, changed and mixed.

Images are found by their number, as rows of tokens are: which one it is and how it is cut depend on the seed and that
number alone, and how a batch is changed on the seed and its first number. So a run that goes on from a checkpoint sees
what it would have seen. Processes read ahead while the model computes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..data.batching import generator_for
from ..data.image_dataset import ImageDataset
from ..data.images import normalize, preprocess, random_resized_crop, resize, to_tensor
from ..errors import InputError
from ..models import VisionModel
from .config import Config, VisionSection

Chunk = tuple[int, Tensor, Tensor]  # the first picture's number, uint8 [B, 3, S, S], classes int64 [B]


class _Numbered(Dataset):
    """Picture i of all epochs, as it is trained with: (uint8 [3, S, S], class)."""

    def __init__(self, data: ImageDataset, told: VisionSection, seed: int):
        self.data, self.told, self.seed = data, told, seed

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        epoch, place = divmod(i, len(self.data))
        picture, label = self.data[int(_order(self.seed, epoch, len(self.data))[place])]
        dice, size = generator_for(self.seed, i), self.told.size
        if self.told.crop != (1.0, 1.0):
            picture = random_resized_crop(picture, size, self.told.crop, dice)
        elif picture.size != (size, size):
            picture = resize(picture, (size, size))
        pixels = to_tensor(picture)
        return pixels.flip(2) if self.told.flip and dice.random() < 0.5 else pixels, label


_kept: tuple[tuple[int, int, int], np.ndarray] | None = None


def _order(seed: int, epoch: int, number: int) -> np.ndarray:
    """The order of an epoch; that of the last asked for is kept."""
    global _kept
    if _kept is None or _kept[0] != (seed, epoch, number):
        _kept = (seed, epoch, number), generator_for(seed, epoch).permutation(number)
    return _kept[1]


class PicturePasses:
    """As Passes, for pictures.

    Attributes:
        data, measured: where they come from.
        a_step: pictures that all processes together read in a step.
    """

    unit = "picture"
    tokenizer_file = None
    states: dict = {}  # noqa: RUF012  pictures carry none

    def __init__(self, config: Config, data: ImageDataset, accelerator: Accelerator):
        self.config, self.data, self.accelerator = config, data, accelerator
        self.measured = ImageDataset(config.data.eval) if config.data.eval else None
        if self.measured is not None and len(self.measured.class_names) > len(data.class_names):
            raise InputError(
                f"{config.data.eval}: has {len(self.measured.class_names)} classes, "
                f"{config.data.train} {len(data.class_names)}"
            )
        self.rows, self.rows_per_epoch = self, len(data)
        self.a_step = config.run.batch * config.run.accumulate * accelerator.num_processes
        self.change = _changes(config.vision)
        self._ahead: tuple[int, Iterator] | None = None  # the step that is read next, and the batches from there on

    def told(self) -> str:
        told = self.config.vision
        return f"{len(self.data):,} pictures of {told.size} x {told.size} in {len(self.data.class_names)} classes"

    @property
    def notes(self) -> dict[str, Any]:
        return {"labels": self.data.class_names}

    def flops(self, model: VisionModel) -> int:
        """Operations of a picture's way forward and back, those of the matrices."""
        tokens = (self.config.vision.size // model.config.patch_size) ** 2
        return 6 * tokens * sum(p.numel() for p in model.parameters() if p.ndim in (2, 4))

    def of(self, step: int) -> Iterator[list[Chunk]]:
        """The batches of a step, each a backward pass of its own."""
        if self._ahead is None or self._ahead[0] != step:
            numbers = _Numbered(self.data, self.config.vision, self.config.run.seed)
            workers = _workers(self.config.vision.workers)
            loader = DataLoader(
                numbers, batch_sampler=_Batches(self, step), num_workers=workers, persistent_workers=workers > 0
            )
            self._ahead = step, iter(loader)
        batches = self._ahead[1]
        first = step * self.a_step
        for i in range(self.config.run.accumulate):
            pixels, classes = _next(batches)
            yield [(first + i, pixels, classes)]
        self._ahead = step + 1, batches

    def size(self, chunk: Chunk) -> tuple[int, int]:
        return len(chunk[2]), len(chunk[2])

    def losses(self, model: Any, chunk: Chunk, autocast: AbstractContextManager) -> tuple[Tensor, Tensor]:
        """The cross entropy, summed over the batch, and nothing else."""
        (first, pixels, classes), told, device = chunk, self.config.vision, self.accelerator.device
        torch.manual_seed(
            int(generator_for(self.config.run.seed, first).integers(2**62))
        )  # of all that follows, drop path too
        images = pixels.to(device).float() / 255
        targets = F.one_hot(classes.to(device), len(self.data.class_names)).float()
        if self.change is not None:
            images = self.change(images)
        images, targets = mixed(normalize(images), targets, told.mixup, told.cutmix)
        with autocast:
            logits = model(images)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        nats = F.cross_entropy(wide, targets, reduction="sum", label_smoothing=told.label_smoothing)
        return nats, nats.new_zeros(())

    def measure(self, model: VisionModel, autocast: AbstractContextManager, add: Callable[[Tensor], Tensor]) -> dict:
        """The mean cross entropy of the measured pictures, in nats, and how many are right."""
        assert self.measured is not None
        told, device = self.config.run, self.accelerator.device
        number = min(told.eval_rows or len(self.measured), len(self.measured))
        mine = range(self.accelerator.process_index, number, self.accelerator.num_processes)
        found = torch.zeros(3, dtype=torch.float64)
        whole = _Whole(self.measured, self.config.vision.size)
        loader = DataLoader(whole, told.batch, sampler=mine, num_workers=_workers(self.config.vision.workers))
        with autocast:
            batches = iter(loader)
            for _ in range(len(loader)):
                images, classes = _next(batches)
                logits = model(images.to(device)).float().cpu()
                nats = F.cross_entropy(logits, classes, reduction="sum")
                right = (logits.argmax(1) == classes).sum()
                found += torch.tensor([nats.item(), right.item(), len(classes)], dtype=torch.float64)
        nats, right, count = add(found).tolist()
        return {"eval_loss": nats / max(1.0, count), "eval_accuracy": right / max(1.0, count)}

    def carried(self) -> None:
        return None


class _Whole(Dataset):
    """The middle of each picture, normalised."""

    def __init__(self, data: ImageDataset, size: int):
        self.data, self.size = data, size

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, label = self.data[i]
        return preprocess(picture, self.size), label


class _Batches:
    """The numbers of a process's batches from a step on, without an end."""

    def __init__(self, passes: PicturePasses, step: int):
        self.passes, self.step = passes, step

    def __iter__(self) -> Iterator[list[int]]:
        passes, told, step = self.passes, self.passes.config.run, self.step
        while True:
            for i in range(told.accumulate):
                lane = i * passes.accelerator.num_processes + passes.accelerator.process_index
                first = step * passes.a_step + lane * told.batch
                yield list(range(first, first + told.batch))
            step += 1


def mixed(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each picture with its opposite in the batch: as a weighted mean (mixup, arXiv 1710.09412), or with a rectangle of
    it pasted in (CutMix, arXiv 1905.04899), by chance where both are wanted. The shares are of Beta(x, x), 0: never."""
    if not mixup and not cutmix:
        return images, targets
    pastes = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if pastes else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not pastes:
        images = images.lerp(images.flip(0), 1 - share)
    else:
        height, width = images.shape[2:]
        h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        images = images.clone()
        images[:, :, top : top + h, left : left + w] = images.flip(0)[:, :, top : top + h, left : left + w]
        share = 1 - h * w / (height * width)
    return images, targets.lerp(targets.flip(0), 1 - share)


def _changes(told: VisionSection) -> Callable[[Tensor], Tensor] | None:
    """RandAugment and erasing, of pictures [B, 3, S, S] in 0 to 1."""
    if not told.rand_augment and not told.erasing:
        return None
    try:
        import kornia.augmentation as K
        from kornia.augmentation.auto import RandAugment
    except ModuleNotFoundError as error:
        raise InputError(f"augmentations need {error.name}: pip install 'heronry[vision]'") from error
    steps: list[Callable] = []
    if told.rand_augment:
        steps.append(RandAugment(n=2, m=told.rand_augment))
    if told.erasing:
        steps.append(K.RandomErasing(p=told.erasing, scale=(0.02, 1 / 3)))

    def change(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images.clamp(0, 1)

    return change


def _next(batches: Iterator) -> Any:
    """The next batch. What a process that reads complains of arrives with its traceback, whose last line is the
    complaint."""
    try:
        return next(batches)
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].rpartition("InputError: ")[2]) from None


def _workers(wanted: int) -> int:
    return wanted if wanted >= 0 else min(8, max(0, (os.cpu_count() or 1) - 2))
