"""Four drawings of what a Vision-RWKV does with pictures: how far it sees, how fast it forgets, what the Q-shift
moves, and which patches a class looks at.

    python examples/vision_pictures.py MODEL PICTURE... --out FOLDER

MODEL is anything that `heronry.load` reads, the name of a variant like vrwkv_tiny (with new weights), or the folder of
a ViT trained by examples/cifar10.py. What a model does not have (decays, a Q-shift, classes) is not drawn. Its
receptive field is drawn beside that of --beside, of the same model with new weights and of a new ViT. Needs `pip
install 'heronry[vision,plots]'`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from heronry import InputError
from heronry.checkpoint import load_checkpoint
from heronry.data.images import open_image, preprocess
from heronry.models import VisionModel
from heronry.models.baselines import ViT, ViTConfig
from heronry.models.vision import VARIANTS, create
from heronry.view import draw_class_maps, draw_decays, draw_q_shift, draw_receptive_fields
from heronry.view.vision import class_maps, decay_weights, pixels, q_shift_maps, receptive_field


def opened(name: str) -> tuple[VisionModel | ViT, list[str] | None]:
    """A model, and what its classes are called."""
    if name in VARIANTS:
        return create(name).eval(), None
    about = Path(name).expanduser() / "config.json"
    described = json.loads(about.read_text()) if about.is_file() else {}
    if described.get("model") == "vit":
        model = ViT(ViTConfig(**{key: x for key, x in described.items() if key not in ("model", "labels")}))
        model.load_state_dict(load_file(about.with_name("model.safetensors")))
        return model.eval(), described.get("labels")
    model, checkpoint = load_checkpoint(name, "float32", kind=VisionModel)
    return model, checkpoint.config.get("labels")


def draw(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model, labels = opened(args.model)
    config = model.config
    pictures = [open_image(path) for path in args.pictures]

    def images(size: int) -> torch.Tensor:
        return torch.stack([preprocess(picture, size) for picture in pictures])

    def write(name: str, figure) -> None:
        figure.savefig(args.out / f"vision-{name}.png", dpi=args.dpi)
        print(args.out / f"vision-{name}.png", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    seen = images(config.image_size)
    compared = {args.model: model} | {name: opened(name)[0] for name in args.beside}
    new = {"its like with new weights": type(model)(config)} if args.model not in VARIANTS else {}
    width, side = config.n_embd, (config.image_size, config.patch_size, math.gcd(64, config.n_embd))
    new["ViT with new weights"] = ViT(ViTConfig(width, config.n_layer, 4 * width, max(1, config.num_classes), *side))
    for other in new.values():
        other.init_weights()
    seeing = {}
    for name, other in (compared | new).items():
        print(f"how far {name} sees ...", flush=True)
        seeing[name] = receptive_field(other, images(other.config.image_size))
    write("receptive-field", draw_receptive_fields(seeing))
    if isinstance(model, VisionModel):
        write("decay", draw_decays(decay_weights(model, seen)))
        if config.shift == "q":
            write("q-shift", draw_q_shift(pixels(seen)[0], *q_shift_maps(model, seen)))
    if config.num_classes:
        scores, classes, logits = class_maps(model, seen[:8])  # more do not fit beside each other
        names = labels or [f"class {i}" for i in range(config.num_classes)]
        titles = [f"{names[i]}: {logit:.2f}" for i, logit in zip(classes, logits, strict=True)]
        write("classes", draw_class_maps(pixels(seen[:8]), scores, titles, config.patch_size))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("pictures", nargs="+", metavar="PICTURE")
    options.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    options.add_argument("--beside", nargs="+", default=[], metavar="MODEL", help="whose sight is drawn too")
    options.add_argument("--dpi", type=int, default=100)
    args = options.parse_args()
    try:
        draw(args)
    except (InputError, OSError, json.JSONDecodeError) as error:
        print(f"vision_pictures: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
