"""Many to one: what the state of a text holds at its end is enough to tell of which kind the text is.

There is no class for it: the last layer's `ffn_shift`, [S, C], is the vector that a linear layer reads.
"""

from __future__ import annotations

import random
from itertools import accumulate, chain

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heronry.models import RWKV7, Model, RWKV7Config

A, B = 65, 66


def last_vectors(model: Model, texts: list[list[int]]) -> Tensor:
    """[texts, C], of texts of any lengths in one row."""
    ends = [0, *accumulate(map(len, texts))]
    _, state = model(torch.tensor([[*chain.from_iterable(texts)]]), cu_seqlens=ends, last_only=True)
    return state.layers[-1].ffn_shift


def marked(lengths: list[int], dice: random.Random) -> tuple[list[list[int]], Tensor]:
    """Noise in which an A and a B stand somewhere, and which of them comes first."""
    texts, labels = [], []
    for length in lengths:
        text = [dice.randrange(97, 123) for _ in range(length)]
        first, second = sorted(dice.sample(range(length), 2))
        label = dice.randrange(2)
        text[first], text[second] = (B, A) if label else (A, B)
        texts.append(text)
        labels.append(label)
    return texts, torch.tensor(labels)


@torch.no_grad()
def test_packed_is_separate(model, version):
    """And is what enters the last channel mix: that of the last token, normalised."""
    model.double()
    texts = [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 14]]
    seen = []
    last = model.blocks[-1]
    last.ffn.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1]))
    alone = torch.cat([last_vectors(model, [text]) for text in texts])
    torch.testing.assert_close(alone, torch.stack(seen), rtol=0, atol=0)
    torch.testing.assert_close(last_vectors(model, texts), alone, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def judge() -> tuple[RWKV7, nn.Linear]:
    """Has learned from texts of up to 256 bytes which of two marks comes first."""
    torch.manual_seed(0)
    model, head = RWKV7(RWKV7Config.sized(256, 2, 64, 32)), nn.Linear(64, 2)
    model.init_weights()
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    dice = random.Random(0)
    for _ in range(200):
        texts, labels = marked([round(4 * 64 ** dice.random()) for _ in range(16)], dice)
        optimizer.zero_grad()
        F.cross_entropy(head(last_vectors(model, texts)), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), head


@pytest.mark.slow
@pytest.mark.parametrize("length", [10, 60, 200, 500])
@torch.no_grad()
def test_it_tells_which_came_first(judge, length):
    """In longer texts than it has learned from too."""
    model, head = judge
    texts, labels = marked([length] * 200, random.Random(length))
    right = (head(last_vectors(model, texts)).argmax(1) == labels).float().mean()
    assert right > 0.95
