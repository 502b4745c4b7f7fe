"""Images from files to the input of Vision-RWKV: any mode to RGB, upright, resized, normalized.

Pillow opens the files (`pip install 'heronry[vision]'`).
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..models.vision import MEAN, STD

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_FRACTION = 0.875  # of the shorter side that the center crop keeps: 224 of 256


def open_image(source: str | Path | bytes) -> Image:
    """Opens an image in RGB, rotated as its EXIF data say.

    Transparent parts become white; grey, CMYK, palette and 16-bit images are converted.

    Args:
        source: the path of a file, or its content.

    Raises:
        InputError: the file is missing, not an image, damaged, or contains NaN or infinity.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise InputError("images need Pillow: pip install 'heronry[vision]'") from error
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()) as file:
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image that can be read") from None
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's formats raises other kinds for damaged files
        raise InputError(f"{name}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from error
    if image.mode.startswith(("I", "F")):  # 16 bits or more of grey
        numbers = np.asarray(image, np.float32)
        if not np.isfinite(numbers).all():
            raise InputError(f"{name}: contains NaN or infinity")
        top = 65535 if image.mode.startswith("I") else max(float(numbers.max()), 1e-6)
        image = Image.fromarray((numbers.clip(0, top) * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def preprocess(image: Image, size: int | None = 224) -> Tensor:
    """The input of a model, float32 [3, size, size], normalized.

    The shorter side is resized (bicubic) to size / 0.875, and the center is cropped. An image of exactly this size is
    not resized. With size=None the whole image is returned, [3, height, width].
    """
    if size is not None and image.size != (size, size):
        image = resize(image, (size, size), _center(image.size, size))
    return normalize(to_tensor(image).float() / 255)


def _center(image_size: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """The part of an image that becomes the center crop, in its own pixels: left, top, right, bottom.

    Only this part is resized: a long and narrow image would grow to many times its memory.
    """
    side = round(size / CROP_FRACTION)
    scale = side / min(image_size)
    spans = []
    for length in image_size:
        resized = max(side, round(length * scale))
        begin = (resized - size) // 2
        spans.append((begin * length / resized, (begin + size) * length / resized))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def random_resized_crop(image: Image, size: int, scale: tuple[float, float], random: np.random.Generator) -> Image:
    """A random part of the image, resized to [size, size]: the usual augmentation for ImageNet.

    scale: the smallest and largest fraction of the area to keep. The aspect ratio is between 3:4 and 4:3.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return resize(image, (size, size), (left, top, left + w, top + h))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return resize(image, (size, size), (left, top, left + side, top + side))


def resize(image: Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Image:
    """Resizes the image, or its part inside `box`, to (width, height), bicubic."""
    from PIL.Image import Resampling

    return image.resize(size, Resampling.BICUBIC, box=box)


def to_tensor(image: Image) -> Tensor:
    """The pixels, uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(pixels: Tensor) -> Tensor:
    """Pixels [..., 3, height, width] between 0 and 1, with the mean and the standard deviation of ImageNet."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (MEAN, STD))
    return (pixels - mean) / std
