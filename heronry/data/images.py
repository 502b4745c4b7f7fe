"""Pictures from files, as Vision-RWKV reads them: any mode, upright, resized, normalised.

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

SHARE = 0.875  # of the shorter side that the crop in the middle keeps: 224 of 256


def open_picture(source: str | Path | bytes) -> Image:
    """The picture in a file, or in the bytes of one, in RGB, turned as its camera says. What is transparent becomes
    white; grey, CMYK, palettes and 16 bits are converted.

    Raises:
        InputError: no such file, no picture, a damaged one.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise InputError("pictures need Pillow: pip install 'heronry[vision]'") from error
    name = "a picture" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()) as file:
            picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of damaged files
        raise InputError(f"{name}: cannot be read ({error})") from error
    if picture.mode.startswith(("I", "F")):  # 16 bits or more of grey
        numbers = np.asarray(picture, np.float32)
        top = 65535 if picture.mode.startswith("I") else max(float(numbers.max()), 1e-6)
        picture = Image.fromarray((numbers.clip(0, top) * (255 / top)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def prepare(picture: Image, size: int | None = 224) -> Tensor:
    """The picture as a model wants it, float32 [3, size, size], normalised: its shorter side resized (bicubic) to
    size / 0.875, and of that the middle; one of that very size as it is. size = None: all of it, [3, height, width]."""
    if size is not None and picture.size != (size, size):
        side = round(size / SHARE)
        width, height = picture.size
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        picture = resized(picture, (width, height))
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return normalise(tensor(picture).float() / 255)


def cut(picture: Image, size: int, shares: tuple[float, float], random: np.random.Generator) -> Image:
    """A part of the picture, of a random share of its area within `shares` and of a shape between 3:4 and 4:3, resized
    to [size, size]: the crop that ImageNet is trained with."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * random.uniform(*shares)
        shape = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return resized(picture, (size, size), (left, top, left + w, top + h))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return resized(picture, (size, size), (left, top, left + side, top + side))


def resized(picture: Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Image:
    """(width, height), bicubic; of the part inside the box."""
    from PIL.Image import Resampling

    return picture.resize(size, Resampling.BICUBIC, box=box)


def tensor(picture: Image) -> Tensor:
    """uint8 [3, height, width]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """[..., 3, height, width] from shares of 255."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (MEAN, STD))
    return (pixels - mean) / std
