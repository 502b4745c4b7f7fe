"""What all generations share: matrices, plain and packed, the token shift, the group norm, checks of configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..ops.dispatch import has_tangents
from ..ops.packed import GROUP, packed_matmul
from .sequence_parallel import Boundaries, SequenceShard

# oneDNN's product, which has no public name: None in a PyTorch without it
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def widen(x: Tensor) -> Tensor:
    """x in float32, float64 unchanged: for values that need more than 16 bits."""
    return x if x.dtype == torch.float64 else x.float()


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in].

    Without gradients, float32 on a CPU is multiplied by oneDNN instead of MKL, which torch would take and which is
    slow on processors that are not Intel's: on an AMD EPYC, 1 row takes 0.4 and 512 rows 0.8 of the time.
    """
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    plain = plain or x.dtype != torch.float32 or x.device.type != "cpu"
    if plain or ONEDNN is None or has_tangents((x, weight)):  # oneDNN's product would lose them
        return F.linear(x, weight)
    y: Tensor = ONEDNN(x, weight, None, "none", [], "")
    return y


class Linear(nn.Linear):
    """y = W x with W [out, in] and no bias."""

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, size_in: int, size_out: int):
        super().__init__(size_in, size_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)


class PackedLinear(nn.Module):
    """y = W x with the weights of a `Linear` in 8 or 4 bits; see ops/packed."""

    def __init__(self, weight: Tensor, scales: Tensor, out_features: int):
        super().__init__()
        self.in_features, self.out_features = scales.shape[1] * GROUP, out_features
        self.weight: Tensor
        self.scales: Tensor
        self.register_buffer("weight", weight)  # bytes, in the order of the kernel
        self.register_buffer("scales", scales)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """As in any module, but .to(dtype) keeps the scales in float16, which the kernel reads."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, self.weight, self.scales, self.out_features)


def embedding(config: Any) -> nn.Embedding:
    """[V, C], zeros. torch's random initialisation would cost a second, even on the meta device."""
    weights = torch.zeros(config.vocab_size, config.n_embd)
    emb: nn.Embedding = nn.Embedding.from_pretrained(weights, freeze=False)
    return emb


@torch.no_grad()
def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """nn.init.orthogonal_ for any dtype, in float32 at least: 16 bits have no QR decomposition on a CPU."""
    wide = widen(weight)
    nn.init.orthogonal_(wide, gain)
    weight.copy_(wide)


def token_shift(x: Tensor, shift: Tensor, cu: Boundaries | None) -> Tensor:
    """The previous token of each token: x [B, T, C] shifted by one, with the carried `shift` [S, C] before each
    sequence."""
    shift = shift.to(x.dtype)
    if isinstance(cu, SequenceShard):
        x, shift = cu.shift(x, shift)
    elif x.shape[1] == 1:  # a decode step, B sequences or a packed one
        return shift[:, None]
    if cu is None:
        return torch.cat([shift[:, None], x[:, :-1]], dim=1)
    moved = torch.cat([x[:, :1], x[:, :-1]], dim=1)
    return moved.index_copy(1, torch.tensor(cu[:-1], device=x.device), shift[None])


def last_tokens(x: Tensor, cu: Boundaries | None) -> Tensor:
    """The last token of each sequence: [B, 1, C], packed [1, S, C]."""
    return x[:, -1:] if cu is None else x[:, [end - 1 for end in cu[1:]]]


def last_shift(x: Tensor, cu: Boundaries | None) -> Tensor:
    """What the token shift keeps of x [B, T, C]: the last vector of each sequence, [S, C] float32.

    Exact for 16-bit activations, so a carried state continues as if it had not been cut.
    """
    last = last_tokens(x, cu).reshape(-1, x.shape[-1])
    wide = widen(last)
    return wide.clone() if wide is last and cu is None and x.shape[1] > 1 else wide  # a view would keep all of x


def group_norm(y: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Norm over each head, in y's dtype: [B, T, H, N] -> [B, T, H*N]."""
    batch, tokens, heads, size = y.shape
    weight, bias = norm.weight.to(y.dtype), norm.bias.to(y.dtype)
    flat = F.group_norm(y.reshape(batch * tokens, heads * size), heads, weight, bias, norm.eps)
    return flat.reshape(batch, tokens, heads * size)


def count_layers(shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of blocks in a checkpoint; InputError if one in between is missing."""
    layers = {int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")}
    missing = sorted(set(range(len(layers))) - layers)
    if missing:
        raise InputError(f"blocks.{missing[0]} is missing")
    return len(layers)


def check_heads(config: Any) -> None:
    """InputError unless the attention's channels divide into heads."""
    if config.head_size < 1 or config.dim_att % config.head_size:
        raise InputError(f"{config.dim_att} attention channels do not divide into heads of {config.head_size}")
