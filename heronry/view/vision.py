"""What picture models compute, as arrays for figures.py: receptive fields, decays, Q-shifts and class maps.

Images are the input of the models, float [B, 3, height, width]; results are float32 NumPy arrays. Models are run in
eval mode and the mode of every part is restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models.baselines import ViT
from ..models.layers import widen
from ..models.vision import MEAN, STD, Block, Grid, SpatialMix, SpatialMix6, VisionModel, shift_patches
from .inside import in_eval_mode


def feature_map(model: VisionModel | ViT, images: Tensor) -> Tensor:
    """The features of every patch after the last norm, [B, C, H, W], with gradients."""
    if isinstance(model, VisionModel):
        features: Tensor = model.forward_features(images)
        return features  # [B, C, H, W]
    outputs: list[Tensor] = []
    with model.ln_out.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)):
        model(images)
    size = model.config.patch_size
    features = outputs[0].transpose(1, 2).unflatten(2, (images.shape[2] // size, images.shape[3] // size))
    return features


@in_eval_mode
def receptive_field(model: VisionModel | ViT, images: Tensor, draws: int = 8) -> NDArray[Any]:
    """The effective receptive field of the middle patch (H // 2, W // 2), [height, width]: the absolute gradient of the
    sum of its features with respect to the pixels, averaged over colours, pictures and draws.

    Each draw sums the features with different random signs. The plain sum, usual for networks with batch norms, is
    constant after a LayerNorm with equal weights.
    Source: "Understanding the Effective Receptive Field" (arXiv 1701.04128).
    """
    random = torch.Generator().manual_seed(0)
    total = images.new_zeros(images.shape[2:], dtype=torch.float32, device="cpu")
    with torch.enable_grad():
        for image in _like_weights(model, images).split(1):
            image = image.detach().requires_grad_()
            features = feature_map(model, image)
            middle = features[0, :, features.shape[2] // 2, features.shape[3] // 2]  # [C]
            for _ in range(draws):
                signs = torch.randint(2, middle.shape, generator=random) * 2 - 1
                (gradient,) = torch.autograd.grad(middle @ signs.to(middle), image, retain_graph=True)
                total += gradient[0].abs().mean(0).float().cpu()
    return (total / (draws * len(images))).numpy()


@torch.no_grad()
@in_eval_mode
def decay_weights(model: VisionModel, images: Tensor) -> NDArray[Any]:
    """The weight of another patch by its offset, for every layer and channel: [layers, C, 2 T - 1] for T patches in row
    order, from T - 1 before the reading patch to T - 1 after it (0 if attention is causal). In the middle is the weight
    of the patch itself, the bonus.

    VRWKV: e^(log_w (|d| - 1)) and e^u, as in ops/biwkv without `segments`; only the size of the images matters.
    VRWKV6: the product of the decays of all patches in between, averaged over all pairs of patches at that offset and
    over all images, and u, which may be negative, as in ops/biwkv6.
    """
    layers = []
    x, grid = model.embed(_like_weights(model, images))
    for block in model.layers:
        if isinstance(block.att, SpatialMix6):
            own, away = _product_weights(block.att, _attention_input(block, x), grid)
        else:
            own, away = _power_weights(block.att, x.shape[1])
        after = torch.zeros_like(away) if model.config.causal else away
        layers.append(torch.cat([away.flip(1), own[:, None], after], 1))
        x = block(x, grid)
    return torch.stack(layers).float().cpu().numpy()


def _power_weights(att: SpatialMix, tokens: int) -> tuple[Tensor, Tensor]:
    """The weights of the patch itself [C] and of those 1 .. T - 1 away [C, T - 1], for T = `tokens`."""
    log_w, u = -widen(att.spatial_decay) / tokens, widen(att.spatial_first) / tokens
    between = torch.arange(tokens - 1, device=log_w.device)
    return u.exp(), (log_w[:, None] * between).exp()


def _product_weights(att: SpatialMix6, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """As `_power_weights`, for data-dependent decays; x [B, T, C] is the input of the attention."""
    w = torch.exp(_log_w(att, x, grid))  # [B, T, C]
    tokens = w.shape[1]
    away = w.new_empty(w.shape[2], tokens - 1)
    product = torch.ones_like(w[:, 1:])  # of the decays between i and i + distance, for all i
    for distance in range(1, tokens):
        away[:, distance - 1] = product.mean((0, 1))
        product = product[:, :-1] * w[:, distance:-1]
    return widen(att.time_faaaa).flatten(), away


def _log_w(att: SpatialMix6, x: Tensor, grid: Grid) -> Tensor:
    """The log decays that SpatialMix6 computes from x and passes to biwkv6, [B, T, C]."""
    d = shift_patches(x, grid, att.config, att.heads) - x
    low = torch.tanh(torch.addcmul(x, d, att.time_maa_x) @ att.time_maa_w1).unflatten(-1, (5, -1))
    xw = torch.addcmul(x, d, att.time_maa_w + low[..., 0, :] @ att.time_maa_w2[0])  # the first of the five mixes is w's
    return -torch.exp(widen(att.time_decay) + widen(torch.tanh(xw @ att.time_decay_w1) @ att.time_decay_w2))


@torch.no_grad()
@in_eval_mode
def q_shift_maps(model: VisionModel, images: Tensor) -> tuple[list[int], NDArray[Any], NDArray[Any]]:
    """The input of the first layer's attention for the first image: of each quarter (left, right, above, below) the
    channel that varies most between patches, and its values [4, H, W] before and after the shift.

    Raises:
        InputError: a model with another shift, or with too few channels for one.
    """
    heads = model.layers[0].ffn.heads
    size = model.config.n_embd // heads
    if model.config.shift != "q" or size < 4:
        raise InputError("this model has no Q-shift")
    x, grid = model.embed(_like_weights(model, images[:1]))
    x = _attention_input(model.layers[0], x)
    shifted = shift_patches(x, grid, model.config, heads)
    deviation = x[0].float().std(0, correction=0).view(heads, size)
    channels = []
    for quarter in range(4):
        begin = quarter * (size // 4)
        head, place = divmod(int(deviation[:, begin : begin + size // 4].argmax()), size // 4)
        channels.append(head * size + begin + place)
    before, after = (y[0, :, channels].T.unflatten(1, grid).float().cpu().numpy() for y in (x, shifted))
    return channels, before, after


@in_eval_mode
def class_maps(
    model: VisionModel | ViT, images: Tensor, labels: Sequence[int] | None = None
) -> tuple[NDArray[Any], list[int], NDArray[Any]]:
    """The contribution of each patch to the logit of a class: scores [B, H, W], the classes (by default the most likely
    ones) and their logits [B].

    The score of a patch is the product of its features and the gradient of the logit with respect to the mean of all
    patches, the input of the head. For a head of one Linear the gradient is its weights, so that the mean score plus
    the bias is the logit; with a hidden layer this holds to first order (Grad-CAM, arXiv 1610.02391, without its ReLU).

    Raises:
        InputError: a model without a classification head, an unknown class, or not one class per image.
    """
    classes = model.config.num_classes
    if not classes:
        raise InputError("this model has no classification head")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"{len(labels)} classes were given for {len(images)} images")
    for label in labels or ():
        if not 0 <= label < classes:
            raise InputError(f"class {label} does not exist: this model has {classes} classes")
    with torch.no_grad():
        features = feature_map(model, _like_weights(model, images))  # [B, C, H, W]
    with torch.enable_grad():
        pooled = features.mean((2, 3)).requires_grad_()
        logits = model.head(pooled)
        chosen = logits.argmax(1) if labels is None else torch.tensor(labels, device=logits.device)
        class_logits = logits.gather(1, chosen[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(class_logits.sum(), pooled)  # logits of pictures are independent
    scores = torch.einsum("bc,bchw->bhw", gradient, features)
    return scores.float().cpu().numpy(), chosen.tolist(), class_logits.detach().float().cpu().numpy()


def pixels(images: Tensor) -> NDArray[Any]:
    """Normalised images [B, 3, height, width] -> pixels for drawing, [B, height, width, 3] from 0 to 1."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _attention_input(block: Block, x: Tensor) -> Tensor:
    """The input of a block's attention [B, T, C], for its own input x."""
    return x if block.post_norm else block.ln1(x)


def _like_weights(model: VisionModel | ViT, images: Tensor) -> Tensor:
    """The images on the device and in the dtype of the model."""
    return images.to(model.device, model.dtype)
