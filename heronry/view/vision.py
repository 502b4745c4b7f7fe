"""What models of pictures do, as arrays: how far they see, how fast they forget, what the Q-shift moves, and which
patches a class looks at. figures.py draws them.

Images are what the models read, float [B, 3, height, width]; what comes back is float32 of numpy. A model is looked at
in eval mode and left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..models.baselines import ViT
from ..models.layers import widen
from ..models.vision import MEAN, STD, Block, Grid, SpatialMix, SpatialMix6, VisionModel, shift_patches


def feature_map(model: VisionModel | ViT, images: Tensor) -> Tensor:
    """[B, C, H, W]: of every patch, after the last norm, as a tensor with its gradients."""
    if isinstance(model, VisionModel):
        return model.forward_features(images)
    seen: list[Tensor] = []
    with model.ln_out.register_forward_hook(lambda _module, _inputs, output: seen.append(output)):
        model(images)
    size = model.config.patch_size
    return seen[0].transpose(1, 2).unflatten(2, (images.shape[2] // size, images.shape[3] // size))


def receptive_field(model: VisionModel | ViT, images: Tensor, draws: int = 8) -> np.ndarray:
    """How far the patch in the middle (H // 2, W // 2) sees, [height, width]: the absolute gradient of the sum over its
    features with respect to the pixels, the mean over colours, pictures and draws.

    Each draw sums the features with other random signs: of what comes out of a LayerNorm the plain sum, which is usual
    for networks with batch norms, does not depend on the picture unless the norm's weights differ.
    Source: "Understanding the Effective Receptive Field" (arXiv 1701.04128).
    """
    random = torch.Generator().manual_seed(0)
    total = images.new_zeros(images.shape[2:], dtype=torch.float32, device="cpu")
    with _looking(model), torch.enable_grad():
        for image in _as_weights(model, images).split(1):
            image = image.detach().requires_grad_()
            features = feature_map(model, image)
            middle = features[0, :, features.shape[2] // 2, features.shape[3] // 2]  # [C]
            for _ in range(draws):
                signs = torch.randint(2, middle.shape, generator=random) * 2 - 1
                (slope,) = torch.autograd.grad(middle @ signs.to(middle), image, retain_graph=True)
                total += slope[0].abs().mean(0).float().cpu()
    return (total / (draws * len(images))).numpy()


@torch.no_grad()
def decay_weights(model: VisionModel, images: Tensor) -> np.ndarray:
    """What another patch weighs by its distance, of every layer and channel: [layers, C, 2 T - 1] for the T patches,
    row by row, of a picture, from T - 1 before the one that reads to T - 1 after it, which has weight 0 where attention
    looks back only. In the middle stands the weight of the patch itself, the bonus.

    VRWKV: e^(log_w (|d| - 1)) and e^u, as in ops/biwkv without `segments`; of the images only the size counts.
    VRWKV6: the product of the decays of all patches in between, the mean over all pairs of patches at that distance
    and over all images, and u, which may lie below 0, as in ops/biwkv6.
    """
    layers = []
    with _looking(model):
        x, grid = model.embed(_as_weights(model, images))
        for block in model.layers:
            if isinstance(block.att, SpatialMix6):
                own, away = _product_weights(block.att, _read_by_attention(block, x), grid)
            else:
                own, away = _power_weights(block.att, x.shape[1])
            after = torch.zeros_like(away) if model.config.causal else away
            layers.append(torch.cat([away.flip(1), own[:, None], after], 1))
            x = block(x, grid)
    return torch.stack(layers).float().cpu().numpy()


def _power_weights(att: SpatialMix, tokens: int) -> tuple[Tensor, Tensor]:
    """Of the patch itself [C] and of those 1 .. T - 1 away [C, T - 1]."""
    log_w, u = -widen(att.spatial_decay) / tokens, widen(att.spatial_first) / tokens
    between = torch.arange(tokens - 1, device=log_w.device)
    return u.exp(), (log_w[:, None] * between).exp()


def _product_weights(att: SpatialMix6, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The same of a decay that depends on the data; x [B, T, C] is what the attention reads."""
    w = torch.exp(_log_w(att, x, grid))  # [B, T, C]
    tokens = w.shape[1]
    away = w.new_empty(w.shape[2], tokens - 1)
    product = torch.ones_like(w[:, 1:])  # of what lies between i and i + distance, for all i
    for distance in range(1, tokens):
        away[:, distance - 1] = product.mean((0, 1))
        product = product[:, :-1] * w[:, distance:-1]
    return widen(att.time_faaaa).flatten(), away


def _log_w(att: SpatialMix6, x: Tensor, grid: Grid) -> Tensor:
    """What SpatialMix6 makes of x on its way to biwkv6, [B, T, C]."""
    d = shift_patches(x, grid, att.config, att.heads) - x
    low = torch.tanh(torch.addcmul(x, d, att.time_maa_x) @ att.time_maa_w1).unflatten(-1, (5, -1))
    xw = torch.addcmul(x, d, att.time_maa_w + low[..., 0, :] @ att.time_maa_w2[0])  # the first of the five mixes is w's
    return -torch.exp(widen(att.time_decay) + widen(torch.tanh(xw @ att.time_decay_w1) @ att.time_decay_w2))


@torch.no_grad()
def q_shift_maps(model: VisionModel, images: Tensor) -> tuple[list[int], np.ndarray, np.ndarray]:
    """What the first layer's attention reads of the first image: of each quarter (left, right, above, below) the
    channel that differs most from patch to patch, and its values [4, H, W] before and after the shift.

    Raises:
        InputError: a model with another shift, or with too few channels for one.
    """
    heads = model.layers[0].ffn.heads
    size = model.config.n_embd // heads
    if model.config.shift != "q" or size < 4:
        raise InputError("this model has no Q-shift")
    with _looking(model):
        x, grid = model.embed(_as_weights(model, images[:1]))
        x = _read_by_attention(model.layers[0], x)
        moved = shift_patches(x, grid, model.config, heads)
    spread = x[0].float().std(0, correction=0).view(heads, size)
    channels = []
    for quarter in range(4):
        begin = quarter * (size // 4)
        head, place = divmod(int(spread[:, begin : begin + size // 4].argmax()), size // 4)
        channels.append(head * size + begin + place)
    before, after = (y[0, :, channels].T.unflatten(1, grid).float().cpu().numpy() for y in (x, moved))
    return channels, before, after


def class_maps(
    model: VisionModel | ViT, images: Tensor, labels: Sequence[int] | None = None
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """What each patch says for a class: scores [B, H, W], the classes (the likeliest where none are given) and their
    logits [B].

    The score of a patch is its features times the gradient of the logit with respect to their mean over all patches,
    which is what the head reads. A head of one Linear has its weights for a gradient, so that the mean of the scores
    plus the bias of the class is the logit; with a hidden layer that holds to first order (Grad-CAM, arXiv 1610.02391,
    without its ReLU).

    Raises:
        InputError: a model without a head, a class that there is not, another number of classes than images.
    """
    classes = model.config.num_classes
    if not classes:
        raise InputError("this model has no head that knows classes")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"{len(labels)} classes were given for {len(images)} images")
    for label in labels or ():
        if not 0 <= label < classes:
            raise InputError(f"there is no class {label}: this model has {classes}")
    with _looking(model):
        with torch.no_grad():
            features = feature_map(model, _as_weights(model, images))  # [B, C, H, W]
        with torch.enable_grad():
            pooled = features.mean((2, 3)).requires_grad_()
            logits = model.head(pooled)
            chosen = logits.argmax(1) if labels is None else torch.tensor(labels, device=logits.device)
            wanted = logits.gather(1, chosen[:, None])[:, 0]
            (slope,) = torch.autograd.grad(wanted.sum(), pooled)  # no picture's logit depends on another's features
    scores = torch.einsum("bc,bchw->bhw", slope, features)
    return scores.float().cpu().numpy(), chosen.tolist(), wanted.detach().float().cpu().numpy()


def pixels(images: Tensor) -> np.ndarray:
    """Normalised images as they are drawn, [B, height, width, 3] from 0 to 1."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _read_by_attention(block: Block, x: Tensor) -> Tensor:
    return x if block.post_norm else block.ln1(x)


def _as_weights(model: VisionModel | ViT, images: Tensor) -> Tensor:
    return images.to(model.device, model.dtype)


@contextmanager
def _looking(model: VisionModel | ViT) -> Iterator[None]:
    """Eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
