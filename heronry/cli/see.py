"""`heronry see`: the classes or features of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options
from .output import print_result

BATCH_SIZE = 16  # pictures
MAX_SIZE = 16384  # pixels: more than any memory holds


def see(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures of any kind that Pillow opens, or folders of them.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A Vision-RWKV: a .pth, a .safetensors or a folder.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="How many classes to print, the most likely first.")] = 5,
    labels: Annotated[
        Path | None,
        typer.Option(help="A text file with the names of the classes, one a line.", show_default="the model's own"),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the pooled features of all pictures to this .safetensors instead."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels of the square cut from the middle.", show_default="the size that the model was trained with"
        ),
    ] = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    quantize: options.Quantize = None,
    force: options.Force = False,
) -> None:
    """Classify pictures, or write their features. See docs/vision.md."""
    import json

    import torch
    from safetensors.torch import save_file

    from ..checkpoint import load_checkpoint
    from ..data.images import open_image, preprocess
    from ..files import atomic_write
    from ..models import VisionModel
    from .progress import note, progress_bar

    if model is None:  # what comes along reads text
        raise InputError("name a model of pictures with --model; docs/vision.md says which there are")
    pictures = [picture for path in pictures for picture in _expand(path)]
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    if features is not None:
        features = options.check_target(features, force)
    options.use_threads(threads)
    with progress_bar("loading") as progress:
        network, checkpoint = load_checkpoint(
            model, dtype, device, quantize=quantize, kind=VisionModel, progress=progress
        )
    side = network.config.image_size if size is None else size
    if not 1 <= side <= MAX_SIZE:
        raise InputError(f"size must be from 1 to {MAX_SIZE}, got {side}")
    n_classes = network.config.num_classes
    names = _class_names(labels, checkpoint.config.get("labels"), n_classes)
    if not features and not n_classes:
        raise InputError(f"{model}: has no classification head; write its features with --features")
    all_features = []
    batches = [pictures[i : i + BATCH_SIZE] for i in range(0, len(pictures), BATCH_SIZE)]
    with progress_bar("reading pictures") as progress:
        for done, batch in enumerate(batches):
            progress(done, len(batches))
            images = torch.stack([preprocess(open_image(path), side) for path in batch])
            with torch.inference_mode():
                tokens = network.forward_features(images.to(device, network.pos_embed.dtype))
                if features:
                    all_features.append(network.forward_head(tokens, pre_logits=True).float().cpu())
                    continue
                probabilities = network.forward_head(tokens).float().softmax(1).cpu()
            for path, row in zip(batch, probabilities, strict=True):
                best = row.topk(min(top, n_classes))
                classes = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                print_result(f"{path}: {', '.join(f'{names[i]} {probability:.1%}' for i, probability in classes)}")
    if features:
        metadata = {"pictures": json.dumps([str(path) for path in pictures]), "model": network.fingerprint}
        with atomic_write(features) as part:
            save_file({"features": torch.cat(all_features)}, part, metadata=metadata)
        note(f"{features}: features, {len(pictures)} x {network.num_features}")


def _expand(path: Path) -> list[Path]:
    """The pictures in a folder, by name; any other path is a picture."""
    if not path.is_dir():
        return [path]
    from PIL import Image

    Image.init()
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in Image.EXTENSION)
    if not pictures:
        raise InputError(f"{path}: holds no picture")
    return pictures


def _class_names(file: Path | None, own: list[str] | None, n_classes: int) -> list[str]:
    """The names of the classes: from a file with one a line, else the model's own, else "class 0", "class 1", ..."""
    if file is None:
        return own if own and len(own) == n_classes else [f"class {i}" for i in range(n_classes)]
    from ..data.text_files import read_text

    names = [line.rstrip("\r") for line in read_text(file).rstrip("\n").split("\n")]
    if len(names) != n_classes:
        raise InputError(f"{file}: has {len(names)} names, but the model has {n_classes} classes")
    return names
