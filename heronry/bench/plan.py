"""How much `heronry compare` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        layers, width: of the RWKV-7 whose number of parameters all have.
        positions: tokens that have been read when decoding is timed.
        decode_blocks: how many blocks of each count.
        contexts: lengths of the texts in a training step that is timed.
        step_tokens: tokens of such a step, whatever the length.
        step_blocks: how many such steps of each count.
        context, batch, steps: of the training on a text.
        lr: its learning rate, of all models.
        eval_rows: texts of `context` tokens that it is judged by.
    """

    layers: int = 3
    width: int = 128
    positions: tuple[int, ...] = (64, 256, 1024, 4096, 16384, 65536)
    decode_blocks: int = 15
    contexts: tuple[int, ...] = (256, 1024, 4096, 8192)
    step_tokens: int = 8192
    step_blocks: int = 3
    context: int = 256
    batch: int = 8
    steps: int = 160
    lr: float = 4e-3
    eval_rows: int = 128


QUICK = Plan(2, 64, (64, 1024, 8192), 5, (256, 1024), 2048, 2, 128, 8, 60, eval_rows=64)
