"""A batch as `transformers` has it, read by our model: rows with padding, vectors in place of ids, hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from ..models.base import replace_embeddings


def read(
    model: Model,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    state: State | None,
    *,
    last_only: bool = False,
    collect: bool = False,
) -> tuple[Tensor, State, tuple[Tensor, ...] | None]:
    """What the model makes of a batch [B, T], or with last_only of the last token of each row, [B, 1].

    A place of padding gets what the last token before it has got.

    Args:
        inputs_embeds: [B, T, C], in place of the rows of the embedding that input_ids [B, T] would choose.
        attention_mask: [B, T] or longer, of which the last T columns count; 0 = not there, wherever it stands.
        collect: also what enters the first block and what leaves each, [B, T, C]; zeros in places of padding.
    """
    tokens = _tokens(model, input_ids, inputs_embeds)
    rows, length = tokens.shape
    there = None if attention_mask is None else attention_mask[:, -length:].bool()
    if there is None or bool(there.all()):
        with _hooked(model, tokens, inputs_embeds, collect) as seen:
            out, left = model(tokens, state, last_only=last_only)
        return out, left, tuple(seen) if collect else None
    # rows of different lengths, side by side without their padding
    counts = there.sum(1).tolist()
    if 0 in counts:
        raise InputError(f"row {counts.index(0)} of the batch is nothing but padding")
    ends = [0, *accumulate(counts)]
    packed = tokens[there][None]
    embeds = None if inputs_embeds is None else inputs_embeds[there][None]
    with _hooked(model, packed, embeds, collect) as seen:
        out, left = model(packed, state, cu_seqlens=ends, last_only=last_only)
    hidden = tuple(_spread(x, there) for x in seen) if collect else None
    if last_only:
        return out.transpose(0, 1), left, hidden
    spread = _spread(out, there)
    if not bool(there[:, -1].all()):
        place = torch.arange(length, device=there.device).expand(rows, length)
        before = torch.where(there, place, 0).cummax(1).values
        spread = spread.gather(1, before[..., None].expand_as(spread))
    return spread, left, hidden


def _tokens(model: Model, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The ids, or zeros in their places where there are vectors instead."""
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is None or input_ids is not None:
        raise InputError("give either input_ids or inputs_embeds")
    channels = model.config.n_embd
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != channels or not inputs_embeds.is_floating_point():
        what = f"{str(inputs_embeds.dtype).removeprefix('torch.')} {list(inputs_embeds.shape)}"
        raise InputError(f"inputs_embeds must be floating point numbers [B, T, {channels}], got {what}")
    if getattr(model.config, "deep_rank", 0):
        raise InputError("RWKV-7a (DeepEmbed) has a matrix for each token id: give input_ids, not inputs_embeds")
    return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)


@contextmanager
def _hooked(model: Model, tokens: Tensor, embeds: Tensor | None, collect: bool) -> Iterator[list[Tensor]]:
    """While it is entered, `embeds` are what the embedding makes of `tokens`; with `collect`, what enters the first
    block and what leaves each is put into the list. The C++ step does not run for a model that has hooks."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        if embeds is not None:
            hooks.enter_context(replace_embeddings(model, tokens, embeds))
        if collect:
            hooks.enter_context(model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0])))
            for block in model.blocks:
                hooks.enter_context(block.register_forward_hook(lambda _, given, made: seen.append(made[0])))
        yield seen


def _spread(x: Tensor, there: Tensor) -> Tensor:
    """A packed [1, sum, C] back in its places [B, T, C]; zeros where nothing was."""
    return x.new_zeros(*there.shape, x.shape[-1]).masked_scatter(there[..., None], x)
