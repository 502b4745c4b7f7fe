"""Weight-only quantization: the large matrices in 8 or 4 bits, everything else unchanged.

int8 takes 8.5 bits per weight and int4 4.5, including the scales of groups of 32 weights (ops/packed defines both).
Each group has its own scale, so an outlier costs precision only in the 31 weights beside it. Embeddings, norms, mixes,
decays, low-rank matrices and states are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .errors import InputError
from .memory import Arena
from .models import Network
from .models.layers import Linear, PackedLinear
from .ops.packed import GROUP, LEVELS, pack, tile
from .progress import ByteCounter, Progress

M = TypeVar("M", bound=Network)

MAX_LEVEL = -LEVELS[0]
# The search for an int4 scale starts with the largest weight of a group at these multiples of MAX_LEVEL; with both
# signs, because the levels are not symmetric.
STARTS = [sign * start for sign in (1, -1) for start in (0.84, 0.91, 0.98, 1.05)]
BLOCK = 1 << 18  # weights quantized at a time: fits the cache
TINY, HUGE = 2.0**-24, 65504  # the smallest and largest float16
LARGEST = max(LEVELS) * HUGE  # the largest weight of both formats, whatever the sign


def quantize(model: M, format: str, progress: Progress | None = None) -> M:
    """Quantizes the large matrices of a model in place, and returns the model.

    A quantized model runs like the original and accepts its states, but cannot be trained. `heronry.save` writes it and
    `heronry.load` reads it without the original. If anything goes wrong the model stays as it was; so both exist in
    memory for a moment, which `heronry.load(..., quantize=...)` avoids.

    Args:
        model: in float32, bfloat16, float16 or float64.
        format: "int8" or "int4".
        progress: called with (bytes done, bytes in all) after each matrix; bytes of the original weights.

    Raises:
        InputError: an unknown format, a model that is already quantized or has adapters, weights that contain NaN,
            infinity or numbers too large for a scale, or a matrix whose rows are not whole groups of 32 weights.
    """
    check_quantizable(model, format)
    model.check_has_weights()
    model.fingerprint  # noqa: B018  computed before the weights change: states of the original still fit
    arena = Arena(model.device)
    linears = quantizable_matrices(model)
    counter = ByteCounter(sum(linear.weight.nbytes for _, linear in linears), progress)
    packed = {}
    for name, linear in linears:
        packed[name] = pack_matrix(f"{name}.weight", linear.weight, format, arena)
        counter.add(linear.weight.nbytes)
    for name, matrix in packed.items():  # now that nothing can be refused any more
        replace_matrix(model, name, matrix)
    model.quantization = format
    return model


def check_quantizable(model: Network, format: str) -> None:
    """InputError if `model` cannot be quantized to `format`. Its weights are not read."""
    if format not in FORMATS:
        raise InputError(f"unknown quantization {format!r}; choose one of {', '.join(FORMATS)}")
    if model.quantization is not None:
        raise InputError(f"the model is already quantized ({model.quantization}); quantize the original")
    if model.adapted_from is not None:
        raise InputError("the model has adapters beside its matrices; quantize first, or merge them")
    for name, linear in quantizable_matrices(model):
        if linear.in_features % GROUP:
            raise InputError(f"{name}.weight has rows of {linear.in_features} weights, not a multiple of {GROUP}")


def quantizable_matrices(model: Network) -> list[tuple[str, Linear]]:
    """The names and modules of the large matrices that are not quantized yet."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


@torch.no_grad()
def pack_matrix(name: str, w: Tensor, format: str, arena: Arena) -> PackedLinear:
    """The matrix w [out, in] in 8 or 4 bits, with its memory in `arena`; InputError, with this name, if its weights are
    not finite or too large."""
    if not w.abs().max() <= LARGEST:  # NaN included
        what = "numbers that are too large to quantize" if w.isfinite().all() else "NaN or infinity"
        raise InputError(f"{name} contains {what}")
    return pack_quantized(name, *FORMATS[format](w), arena)


def pack_quantized(name: str, q: Tensor, scales: Tensor, arena: Arena) -> PackedLinear:
    """A packed matrix from q and scales as `quantize_int8` or `quantize_int4` return them; InputError, with this name,
    if the scales are not finite."""
    if not scales.is_meta and not scales.isfinite().all():
        raise InputError(f"the scales of {name} contain NaN or infinity")
    data, tiled_scales = tile(q.to(arena.device), scales.to(arena.device))
    return PackedLinear(arena.copy(data), arena.copy(tiled_scales), len(q)).eval()


def replace_matrix(model: Network, name: str, packed: PackedLinear) -> None:
    """Replaces a `Linear` by a packed matrix."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, packed)


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [out, in] -> q int8 [out, in] in -127 .. 127 and scales float16 [out, in / 32]; w ≈ q * scale."""
    groups = w.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 127).clamp(TINY, HUGE).half()
    q = (groups / scales.float()[..., None]).round_().clamp_(-127, 127)
    return q.to(torch.int8).flatten(1), scales


def quantize_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [out, in] -> packed codes uint8 [out, in / 2] and scales float16 [out, in / 32]; w ≈ LEVELS[code] *
    scale.

    Scales may be negative. Each is chosen by a search for the least squared error.
    """
    parts = [_quantize_int4_block(block.float()) for block in w.split(max(1, BLOCK // w.shape[1]))]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _quantize_int4_block(w: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_int4`, for float32 [rows, in] that fit the cache."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=w.device)
    # the code nearest to (i - 128) / 2 + 1/4; between two integers the midpoint is a multiple of 1/2, so this is exact
    middles = (torch.arange(256, dtype=torch.float32, device=w.device) - 127.5) / 2
    nearest = torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2)
    rounded = levels[nearest]

    def bins(x: Tensor) -> Tensor:
        return x.mul_(2).add_(128).clamp_(0, 255).int().flatten()

    groups = w.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(MAX_LEVEL * TINY)
    # with the best scale for given values v, sum(wv) / sum(vv), the squared error is sum(ww) - sum(wv)^2 / sum(vv)
    best = gain = torch.zeros_like(largest)
    for start in STARTS:
        v = rounded.index_select(0, bins(groups * (MAX_LEVEL * start / largest))).view_as(groups)
        wv, vv = (groups * v).sum(-1, keepdim=True), v.square().sum(-1, keepdim=True)
        better = wv.square() / vv > gain
        best = torch.where(better, wv / vv, best)
        gain = torch.where(better, wv.square() / vv, gain)
    scales = best.clamp(-HUGE, HUGE).half()
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    codes = nearest.to(torch.uint8).index_select(0, bins(groups * inverse)).view_as(groups)
    return pack(codes.flatten(1)), scales.squeeze(-1)


FORMATS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": quantize_int8, "int4": quantize_int4}
