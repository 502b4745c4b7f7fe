"""A forward pass on a batch in the form of transformers: with padding, embeddings instead of ids, and hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from ...errors import InputError
from ...models import Model, State
from ...models.base import replace_embeddings


def masked_forward(
    model: Model,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    state: State | None,
    *,
    last_only: bool,
    output_hidden_states: bool,
) -> tuple[Tensor, State, tuple[Tensor, ...] | None]:
    """Runs the model on a batch [B, T] without its padding, so that each row gives what it would give alone.

    Args:
        model: with or without a head.
        input_ids: [B, T], or None.
        inputs_embeds: [B, T, C], used instead of the embeddings of input_ids.
        attention_mask: [B, T] or longer, of which the last T columns count; 0 = padding, at any position.
        state: of B rows, or None.
        last_only: only the output for the last token of each row, [B, 1].
        output_hidden_states: also the input of the first block and the output of each block.

    Returns:
        the model's output [B, T, V] (without a head [B, T, C]), where a padded position has the output of the last
        token before it; the state after each row; the hidden states [B, T, C], zero at padded positions, or None.

    Raises:
        InputError: a row of nothing but padding, or both or none of input_ids and inputs_embeds.
    """
    tokens = _tokens(model, input_ids, inputs_embeds)
    n_rows, length = tokens.shape
    mask = None if attention_mask is None else attention_mask[:, -length:].bool()
    if mask is None or bool(mask.all()):
        with _hooks(model, tokens, inputs_embeds, output_hidden_states) as hidden_states:
            output, new_state = model(tokens, state, last_only=last_only)
        return output, new_state, tuple(hidden_states) if output_hidden_states else None
    # rows of different lengths: one packed sequence without the padding
    counts = mask.sum(1).tolist()
    if 0 in counts:
        raise InputError(f"row {counts.index(0)} of the batch is nothing but padding")
    cu_seqlens = [0, *accumulate(counts)]
    packed = tokens[mask][None]
    embeds = None if inputs_embeds is None else inputs_embeds[mask][None]
    with _hooks(model, packed, embeds, output_hidden_states) as hidden_states:
        output, new_state = model(packed, state, cu_seqlens=cu_seqlens, last_only=last_only)
    hidden = tuple(_unpack(x, mask) for x in hidden_states) if output_hidden_states else None
    if last_only:
        return output.transpose(0, 1), new_state, hidden
    unpacked = _unpack(output, mask)
    if not bool(mask[:, -1].all()):
        positions = torch.arange(length, device=mask.device).expand(n_rows, length)
        last_token = torch.where(mask, positions, 0).cummax(1).values
        unpacked = unpacked.gather(1, last_token[..., None].expand_as(unpacked))
    return unpacked, new_state, hidden


def _tokens(model: Model, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The ids [B, T], or zeros in their place for embeddings."""
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is None or input_ids is not None:
        raise InputError("give either input_ids or inputs_embeds")
    channels = model.config.n_embd
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != channels or not inputs_embeds.is_floating_point():
        got = f"{str(inputs_embeds.dtype).removeprefix('torch.')} {list(inputs_embeds.shape)}"
        raise InputError(f"inputs_embeds must be floating point numbers [B, T, {channels}], got {got}")
    if variant := getattr(model.config, "variant", ""):
        raise InputError(f"{variant} has a matrix for each token id: give input_ids, not inputs_embeds")
    return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)


@contextmanager
def _hooks(model: Model, tokens: Tensor, embeds: Tensor | None, collect: bool) -> Iterator[list[Tensor]]:
    """Within the block, `embeds` replace the embeddings of `tokens`; with `collect`, the input of the first block and
    the output of each block are appended to the list. The C++ step does not run for a model that has hooks."""
    hidden_states: list[Tensor] = []
    with ExitStack() as hooks:
        if embeds is not None:
            hooks.enter_context(replace_embeddings(model, tokens, embeds))
        if collect:
            first = model.blocks[0]
            hooks.enter_context(first.register_forward_pre_hook(lambda _, inputs: hidden_states.append(inputs[0])))
            for block in model.blocks:
                hooks.enter_context(
                    block.register_forward_hook(lambda _, inputs, outputs: hidden_states.append(outputs[0]))
                )
        yield hidden_states


def _unpack(x: Tensor, mask: Tensor) -> Tensor:
    """A packed [1, sum, C] at the positions of `mask` [B, T]: [B, T, C], zero at padded positions."""
    return x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x)
