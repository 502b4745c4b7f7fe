"""`heronry see`: what a model sees in pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from ..checkpoint import load_found
from ..data.images import open_picture, prepare
from ..errors import InputError
from ..files import replacing
from ..models import VisionModel

AT_ONCE = 16  # pictures


def see(
    pictures: list[Path],
    model: Path,
    top: int,
    labels: Path | None,
    features: Path | None,
    size: int | None,
    dtype: str | None,
    device: str,
    quantize: str | None,
) -> None:
    """Prints the likeliest classes of each picture, or writes the pooled features of all."""
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    seeing, found = load_found(model, dtype, device, quantize=quantize, kind=VisionModel)
    side = seeing.config.image_size if size is None else size
    if side < 1:
        raise InputError(f"size must be at least 1, got {side}")
    names = _names(labels, found.described.get("labels"), seeing.config.num_classes)
    if not features and not seeing.config.num_classes:
        raise InputError(f"{model}: has no head that knows classes; write its features with --features")
    progress, out = Console(stderr=True), Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    kept = []
    batches = [pictures[i : i + AT_ONCE] for i in range(0, len(pictures), AT_ONCE)]
    for batch in track(batches, "seeing", console=progress, transient=True):
        images = torch.stack([prepare(open_picture(path), side) for path in batch])
        with torch.inference_mode():
            seen = seeing.forward_features(images.to(device, seeing.pos_embed.dtype))
            pooled = seeing.forward_head(seen, pre_logits=True)
            kept.append(pooled.float().cpu())
            if features:
                continue
            likely = seeing.forward_head(seen).float().softmax(1).cpu()
        for path, chances in zip(batch, likely, strict=True):
            best = chances.topk(min(top, len(chances)))
            told = ", ".join(f"{names[i]} {p:.1%}" for p, i in zip(*(x.tolist() for x in best), strict=True))
            out.print(f"{path}: {told}")
    if features:
        target = features.expanduser()
        with replacing(target) as part:
            about = {"pictures": json.dumps([str(path) for path in pictures]), "model": seeing.fingerprint}
            save_file({"features": torch.cat(kept)}, part, metadata=about)
        progress.print(f"{target}: features, {len(pictures)} x {seeing.num_features}", highlight=False)


def _names(file: Path | None, own: list[str] | None, classes: int) -> list[str]:
    """What the classes are called: by a file of one name a line, by the model, or by their numbers."""
    if file is None:
        return own if own and len(own) == classes else [f"class {i}" for i in range(classes)]
    try:
        names = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    if len(names) != classes:
        raise InputError(f"{file}: has {len(names)} names, the model {classes} classes")
    return names
