"""Weight-only quantization: the large matrices in 8 or 4 bits, everything else as it was.

int8 takes 8.5 bits a weight, int4 4.5, the scales of the groups of 32 included (ops/packed says what they mean). A
group has its own scale, so a weight out of the ordinary coarsens only the 31 beside it. Embeddings, norms, mixes,
decays, low-rank matrices and states stay as they are.
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

MOST = -LEVELS[0]
# Where the search for a scale begins: the largest weight of the group at this multiple of MOST, either way up, for the
# levels are not symmetric.
STARTS = [sign * start for sign in (1, -1) for start in (0.84, 0.91, 0.98, 1.05)]
BLOCK = 1 << 18  # weights at a time: fits the cache
TINY, HUGE = 2.0**-24, 65504  # the ends of float16


def quantize(model: M, format: str, progress: Progress | None = None) -> M:
    """Replaces the matrices of `model` by packed ones, "int8" or "int4", and returns it.

    The model is changed in place, runs on as before and cannot be trained; `heronry.save` writes it and
    `heronry.load` reads it back without the original.

    progress: called with (bytes done, bytes in all) after each matrix; the bytes are those of the original weights.

    Raises:
        InputError: another format, a model that is quantized already, or a matrix whose rows do not divide into
            groups of 32 weights.
    """
    check(model, format)
    model.fingerprint  # noqa: B018  taken before the weights go: the states stay those of the original
    arena = Arena(model.device)
    linears = matrices(model)
    counter = ByteCounter(sum(linear.weight.nbytes for _, linear in linears), progress)
    for name, linear in linears:
        if not linear.weight.isfinite().all():
            raise InputError(f"{name}.weight holds numbers that are infinite or none")
        with torch.no_grad():
            replace_matrix(model, name, *FORMATS[format](linear.weight), arena)
        counter.add(linear.weight.nbytes)
    model.quantization = format
    return model


def check(model: Network, format: str) -> None:
    """InputError if `model` cannot be quantized so; its weights are not looked at."""
    if format not in FORMATS:
        raise InputError(f"there is no quantization {format!r}; choose one of {', '.join(FORMATS)}")
    if model.quantization is not None:
        raise InputError(f"the model is quantized already ({model.quantization}); begin with the original")
    if model.adapted_from is not None:
        raise InputError("the model has adapters beside its matrices; pack first, or merge them")
    for name, linear in matrices(model):
        if linear.in_features % GROUP:
            raise InputError(f"{name}.weight has rows of {linear.in_features} weights, not whole groups of {GROUP}")


def matrices(model: Network) -> list[tuple[str, Linear]]:
    """The matrices that are quantized, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


def replace_matrix(model: Network, name: str, q: Tensor, scales: Tensor, arena: Arena) -> None:
    """Puts a packed matrix in the place of a `Linear`; q and scales as `quantize_int8` or `quantize_int4` give them."""
    parent, _, child = name.rpartition(".")
    data, scales = map(arena.copy, tile(q, scales))
    packed = PackedLinear(data, scales, len(q))
    setattr(model.get_submodule(parent), child, packed.eval())


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [out, in] -> q int8 [out, in] in -127 .. 127 and scales float16 [out, in / 32]; w is about q * scale."""
    groups = w.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 127).clamp(TINY, HUGE).half()
    q = (groups / scales.float()[..., None]).round_().clamp_(-127, 127)
    return q.to(torch.int8).flatten(1), scales


def quantize_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [out, in] -> packed codes uint8 [out, in / 2], scales float16 [out, in / 32]; w is about LEVELS[code] * scale.

    Scales may be negative. Each is searched for the least squared error.
    """
    parts = [_int4(block.float()) for block in w.split(max(1, BLOCK // w.shape[1]))]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _int4(w: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=w.device)
    # the code nearest to (i - 128) / 2 + 1/4; between two integers the midpoint is a multiple of 1/2, so this is exact
    nearest = torch.bucketize((torch.arange(256, device=w.device) - 127.5) / 2, (levels[1:] + levels[:-1]) / 2)
    rounded = levels[nearest]

    def bins(x: Tensor) -> Tensor:
        return x.mul_(2).add_(128).clamp_(0, 255).int().flatten()

    groups = w.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(MOST * TINY)
    # with the best scale for given values v, sum(wv) / sum(vv), the squared error is sum(ww) - sum(wv)^2 / sum(vv)
    best = gain = torch.zeros_like(largest)
    for start in STARTS:
        v = rounded.index_select(0, bins(groups * (MOST * start / largest))).view_as(groups)
        wv, vv = (groups * v).sum(-1, keepdim=True), v.square().sum(-1, keepdim=True)
        better = wv.square() / vv > gain
        best = torch.where(better, wv / vv, best)
        gain = torch.where(better, wv.square() / vv, gain)
    scales = best.clamp(-HUGE, HUGE).half()
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    codes = nearest.to(torch.uint8).index_select(0, bins(groups * inverse)).view_as(groups)
    return pack(codes.flatten(1)), scales.squeeze(-1)


FORMATS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": quantize_int8, "int4": quantize_int4}
