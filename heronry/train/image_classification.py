"""Image classification: batches of images, cropped, flipped, augmented and mixed.

Images are found by number, like rows of tokens: which image it is and how it is cropped depend only on the seed and
that number. The trainer seeds the augmentation of every pass. So a run that is resumed sees the same images as one that
was never stopped. Threads read ahead while the model computes.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batching import generator_for
from ..data.image_dataset import ImageDataset
from ..data.images import normalize, preprocess, random_resized_crop, resize, to_tensor
from ..errors import InputError
from ..models import Network
from .config import Config, VisionSection
from .tasks import Autocast, Reduce

LoadImage = Callable[[int], tuple[Tensor, int]]  # the pixels [3, S, S] of the image of this number, and its class


class ImageBatch(NamedTuple):
    """Images side by side: for training uint8, before augmentation; for evaluation normalized float32."""

    pixels: Tensor  # [B, 3, S, S]
    classes: Tensor  # int64 [B]


class _TrainingImages:
    """Image i, counted through all epochs: cropped and flipped uint8 [3, S, S], and its class."""

    def __init__(self, data: ImageDataset, config: VisionSection, seed: int):
        self.data, self.config, self.seed = data, config, seed
        self._last_order: tuple[int, NDArray[Any]] | None = None

    def __call__(self, i: int) -> tuple[Tensor, int]:
        epoch, position = divmod(i, len(self.data))
        image, label = self.data[int(self._order(epoch)[position])]
        random, size = generator_for(self.seed, i), self.config.size
        if self.config.crop != (1.0, 1.0):
            image = random_resized_crop(image, size, self.config.crop, random)
        elif image.size != (size, size):
            image = resize(image, (size, size))
        pixels = to_tensor(image)
        if self.config.flip and random.random() < 0.5:  # by NumPy, as PyTorch would start threads in each thread here
            pixels = torch.from_numpy(pixels.numpy()[:, :, ::-1].copy())
        return pixels, label

    def _order(self, epoch: int) -> NDArray[Any]:
        """The order of the images in an epoch, int64 [images]."""
        last = self._last_order  # read once: another thread may store the next epoch meanwhile
        if last is None or last[0] != epoch:
            last = self._last_order = epoch, generator_for(self.seed, epoch).permutation(len(self.data))
        return last[1]


class ImageClassification:
    """Predicts the class of an image. See `tasks.Task`; a row is an image.

    Attributes:
        data: the training images.
        eval_data: the evaluation images, or None.
    """

    unit = "image"
    tokenizer_file = None

    def __init__(self, config: Config, data: ImageDataset, accelerator: Accelerator):
        """
        Raises:
            InputError: the evaluation images cannot be read or have more classes than the training images.
        """
        self.config, self.data, self.accelerator = config, data, accelerator
        self.eval_data = ImageDataset(config.data.eval) if config.data.eval else None
        n_classes = len(data.class_names)
        if self.eval_data is not None and len(self.eval_data.class_names) > n_classes:
            raise InputError(
                f"{config.data.eval}: has {len(self.eval_data.class_names)} classes, {config.data.name} {n_classes}"
            )
        self.rows_per_epoch = len(data)
        self.rows_per_step = config.run.batch * config.run.accumulate * accelerator.num_processes
        self._augment = _build_augmentation(config.vision)
        self._load = _TrainingImages(data, config.vision, config.run.seed)
        self._reader: tuple[int, Iterator[ImageBatch]] | None = None  # the step it is at, and its batches from there on

    @property
    def notes(self) -> dict[str, Any]:
        return {"labels": self.data.class_names}

    @property
    def can_evaluate(self) -> bool:
        return self.eval_data is not None

    def describe(self) -> str:
        size = self.config.vision.size
        return f"{len(self.data):,} images of {size} x {size} in {len(self.data.class_names)} classes"

    def source_metrics(self, step: int) -> dict[str, float]:
        return {}

    def flops_per_unit(self, model: Network) -> int:
        """Those of the matrices."""
        n_patches = int(self.config.vision.size // model.config.patch_size) ** 2
        return 6 * n_patches * sum(p.numel() for p in model.parameters() if p.ndim in (2, 4))

    def batches(self, step: int) -> Iterator[list[ImageBatch]]:
        if self._reader is None or self._reader[0] != step:
            self._reader = step, read_batches(self._load, self._image_numbers(step), self.config.vision.workers)
        reader = self._reader[1]
        yield from ([batch] for batch in islice(reader, self.config.run.accumulate))
        self._reader = step + 1, reader

    def _image_numbers(self, step: int) -> Iterator[range]:
        """The numbers of the images in this process's batches, from a step on, without end."""
        size, processes = self.config.run.batch, self.accelerator.num_processes
        batch = step * self.config.run.accumulate * processes + self.accelerator.process_index
        while True:
            yield range(batch * size, (batch + 1) * size)
            batch += processes

    def count_targets(self, batch: ImageBatch) -> tuple[int, int]:
        return len(batch.classes), len(batch.classes)

    def compute_loss(self, model: nn.Module, batch: ImageBatch, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """The cross entropy with label smoothing; L2Wrap is not used."""
        vision, device = self.config.vision, self.accelerator.device
        images = batch.pixels.to(device).float() / 255
        targets = F.one_hot(batch.classes.to(device), len(self.data.class_names)).float()
        if self._augment is not None:
            images = self._augment(images)
        images, targets = mix_images(normalize(images), targets, vision.mixup, vision.cutmix)
        with autocast:
            logits = model(images)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        nats = F.cross_entropy(wide, targets, reduction="sum", label_smoothing=vision.label_smoothing)
        return nats, nats.new_zeros(())

    def finish_step(self, applied: bool) -> None:
        """Nothing is carried from step to step."""

    def evaluate(self, model: Network, autocast: Autocast, reduce: Reduce) -> dict[str, float]:
        """The mean cross entropy of the evaluation images in nats, and the accuracy."""
        assert self.eval_data is not None
        run, device = self.config.run, self.accelerator.device
        n_images = min(run.eval_rows or len(self.eval_data), len(self.eval_data))
        own_images = range(self.accelerator.process_index, n_images, self.accelerator.num_processes)
        numbers = (own_images[start : start + run.batch] for start in range(0, len(own_images), run.batch))
        sums = torch.zeros(3, dtype=torch.float64)
        with autocast:
            for pixels, classes in read_batches(self._load_for_evaluation, numbers, self.config.vision.workers):
                logits = model(pixels.to(device)).float().cpu()
                nats = F.cross_entropy(logits, classes, reduction="sum")
                correct = (logits.argmax(1) == classes).sum()
                sums += torch.tensor([nats.item(), correct.item(), len(classes)], dtype=torch.float64)
        total_nats, total_correct, count = reduce(sums).tolist()
        return {"eval_loss": total_nats / count, "eval_accuracy": total_correct / count}

    def _load_for_evaluation(self, i: int) -> tuple[Tensor, int]:
        """The center of evaluation image i, normalized float32 [3, size, size], and its class."""
        assert self.eval_data is not None
        image, label = self.eval_data[i]
        return preprocess(image, self.config.vision.size), label

    def carried_states(self) -> None:
        return None

    def load_carried_states(self, file: Path) -> None:
        raise InputError(f"{file}: states of a language model, but images are trained on")


def read_batches(load: LoadImage, numbers: Iterable[Sequence[int]], workers: int) -> Iterator[ImageBatch]:
    """The batches of these numbers, in order.

    Args:
        workers: threads that read ahead (decoding and resizing release the GIL); 0: none; -1: as many as there are
            cores to spare, up to 8. Processes would have to be forked beside PyTorch's threads, or import it anew.
    """
    workers = workers if workers >= 0 else min(8, max(0, (os.cpu_count() or 1) - 2))
    if not workers:
        yield from (_collate(map(load, batch)) for batch in numbers)
        return
    pool = ThreadPoolExecutor(workers)
    pending: deque[list[Future[tuple[Tensor, int]]]] = deque()
    try:
        for batch in numbers:
            pending.append([pool.submit(load, i) for i in batch])
            if len(pending) > 2:  # two batches ahead
                yield _collate(future.result() for future in pending.popleft())
        while pending:
            yield _collate(future.result() for future in pending.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _collate(images: Iterable[tuple[Tensor, int]]) -> ImageBatch:
    pixels, classes = zip(*images, strict=True)
    return ImageBatch(torch.stack(pixels), torch.tensor(classes))


def mix_images(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixes each image with the one at the opposite position of the batch.

    Either as a weighted mean (mixup, arXiv 1710.09412) or by pasting a rectangle (CutMix, arXiv 1905.04899); if both
    are on, one of them is drawn for the batch.

    Args:
        images: [B, 3, S, S].
        targets: probabilities [B, classes].
        mixup, cutmix: alpha of the distribution Beta(alpha, alpha) of the share; 0: off.
    """
    if not mixup and not cutmix:
        return images, targets
    paste = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if paste else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not paste:
        images = images.lerp(images.flip(0), 1 - share)
    else:
        height, width = images.shape[2:]
        h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        images = images.clone()
        images[:, :, top : top + h, left : left + w] = images.flip(0)[:, :, top : top + h, left : left + w]
        share = 1 - h * w / (height * width)
    return images, targets.lerp(targets.flip(0), 1 - share)


def _build_augmentation(config: VisionSection) -> Callable[[Tensor], Tensor] | None:
    """RandAugment and random erasing of images [B, 3, S, S] between 0 and 1; None if both are off."""
    if not config.rand_augment and not config.erasing:
        return None
    try:
        import kornia.augmentation as K  # an optional package that takes seconds to import
        from kornia.augmentation.auto import RandAugment
    except ModuleNotFoundError as error:
        raise InputError(f"augmentations need {error.name}: pip install 'heronry[vision]'") from error
    transforms: list[Callable[[Tensor], Tensor]] = []
    if config.rand_augment:
        transforms.append(RandAugment(n=2, m=config.rand_augment))
    if config.erasing:
        transforms.append(K.RandomErasing(p=config.erasing, scale=(0.02, 1 / 3)))

    def augment(images: Tensor) -> Tensor:
        for transform in transforms:
            images = transform(images)
        return images.clamp(0, 1)

    return augment
