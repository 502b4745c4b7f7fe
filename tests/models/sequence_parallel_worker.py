"""Rows in one process against the same rows over several. Prints JSON: {case: {what: error}}, and what RWKV-4 says.

An error is the largest difference over the largest number. Every process computes the whole for itself.
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate, pairwise, product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from heronry.checkpoint import assemble
from heronry.errors import InputError
from heronry.models import LayerState, State
from heronry.models.sequence_parallel import SequenceShard

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import random_checkpoint
from processes import together

# of every row: where the pieces of three processes begin and the row ends; where its documents do
LAYOUTS = {
    "one document": [([0, 37, 60, 101], [0, 101])],
    "two documents": [([0, 37, 60, 101], [0, 50, 101])],
    "many rows, carried": [
        ([0, 33, 66, 80], [0, 80]),
        ([0, 1, 2, 3], [0, 3]),
        ([0, 40, 75, 99], [0, 11, 50, 52, 80, 99]),  # cuts inside documents,
        ([0, 40, 75, 99], [0, 40, 75, 99]),  # between,
        ([0, 40, 75, 99], [0, 39, 41, 74, 76, 99]),  # and beside
        ([0, 8, 16, 50], [0, 16, 50]),
        ([0, 9, 30, 31], [0, 31]),
    ],
}


def compare(
    version: str, dtype: torch.dtype, layout: str, group: dist.ProcessGroup, checkpointing: bool
) -> dict[str, float]:
    ranks, rank = group.size(), group.rank()
    rows = [([*cuts[:ranks], cuts[-1]], borders) for cuts, borders in LAYOUTS[layout]]
    weights = random_checkpoint(version, width=32, heads=2, layers=2, ffn=40, rank=3, vocab=23, tuned=True)
    model = assemble({name: x.to(dtype) for name, x in weights.items()}).train()
    random = torch.Generator().manual_seed(1)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=dtype)

    cu = [0, *accumulate(end - begin for _, borders in rows for begin, end in pairwise(borders))]
    tokens = torch.randint(23, (1, cu[-1]), generator=random)
    empty = model.initial_state(len(cu) - 1)
    entering = None
    if layout.endswith("carried"):
        entering = State(
            [LayerState(*(normal(x).requires_grad_() for x in y)) for y in empty.layers], empty.fingerprint
        )
    pull = normal(tokens[..., None].expand(-1, -1, 23))
    pulls = [LayerState(*map(normal, layer)) for layer in empty.layers]
    trained = dict(model.named_parameters())
    if entering is not None:
        trained |= {f"{i}.{name}": x for i, y in enumerate(entering.layers) for name, x in y._asdict().items()}

    def pulled(state: State, rows: list[int]) -> Tensor:
        """Of a state whose rows are these documents."""
        parts = zip(state.layers, pulls, strict=True)
        return sum((x * by[rows]).sum() for layer, p in parts for x, by in zip(layer, p, strict=True))

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(trained, found, strict=True))

    logits, leaving = model(tokens, entering, cu_seqlens=cu)
    wanted = gradients((logits * pull).sum() + pulled(leaving, list(range(len(cu) - 1))))

    # what this process has: tokens and documents by their number in all
    mine, here, firsts, goes_on, lengths, done, ended = [], [], [], [], [], 0, 0
    through, lasts = [], []  # those that end here, but for the last of each row; these, by their number in all
    for cuts, borders in rows:
        first, end = cuts[rank : rank + 2]
        inside = [i for i, (b, e) in enumerate(pairwise(borders)) if b < end and e > first]
        firsts.append(len(here))
        goes_on.append(borders[inside[0]] < first)
        lengths += [min(end, borders[i + 1]) - max(first, borders[i]) for i in inside]
        through += [
            len(here) + j for j, i in enumerate(inside) if borders[i + 1] <= end and borders[i + 1] < borders[-1]
        ]
        mine += range(done + first, done + end)
        here += [ended + i for i in inside]
        done, ended = done + borders[-1], ended + len(borders) - 1
        lasts.append(ended - 1)
    bounds = [0, *accumulate(lengths)]
    spread = SequenceShard(bounds, firsts, goes_on, group)
    given = None if entering is None else entering[here]
    with torch.no_grad():  # few tokens, which the native step must leave to the plain model
        unlearned, _ = model(tokens[:, mine], given, cu_seqlens=spread)
    model.gradient_checkpointing = checkpointing
    found, states = model(tokens[:, mine], given, cu_seqlens=spread)
    ends = [end - 1 for end in [*firsts[1:], len(here)]]
    found, carried = spread.broadcast_final_state(found, states[ends])
    loss = (found * pull[:, mine]).sum()
    if through:
        loss = loss + pulled(states[through], [here[i] for i in through])
    if rank == 0:  # only one goes on with what all were given
        loss = loss + pulled(carried, lasts)
    summed = gradients(loss)
    for x in summed.values():
        dist.all_reduce(x, group=group)

    def error(x: Tensor, wanted: Tensor) -> float:
        x, wanted = x.detach(), wanted.detach()
        return float((x - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))

    pairs = [
        (x, y)
        for ours, numbers in ((carried, lasts), (states[through], [here[i] for i in through]))
        for a, b in zip(ours.layers, leaving[numbers].layers, strict=True)
        for x, y in zip(a, b, strict=True)
        if len(numbers)
    ]
    return {
        "logits": error(found, logits[:, mine]),
        "logits without gradients": error(unlearned, logits[:, mine]),
        "states": max(error(x, y) for x, y in pairs),
        **{name: error(summed[name], x) for name, x in wanted.items()},
    }


def check() -> None:
    groups = {3: dist.group.WORLD, 2: dist.new_group([0, 1])}
    found: dict[str, dict[str, float]] = {}
    cases = [
        *product(("5.1", "5.2", "6", "7"), (torch.float64,), LAYOUTS, (3,), (False,)),
        *product(("6", "7"), (torch.float32,), ("many rows, carried",), (3, 2), (True,)),
    ]
    for version, dtype, layout, processes, checkpointing in cases:
        if dist.get_rank() < processes:
            name = f"{version}, {str(dtype).removeprefix('torch.')}, {layout}, {processes} processes"
            found[name] = compare(version, dtype, layout, groups[processes], checkpointing)
    worst: list = [None] * dist.get_world_size()
    dist.all_gather_object(worst, found)
    if dist.get_rank() == 0:
        errors = {case: {k: max(w[case][k] for w in worst if case in w) for k in found[case]} for case in found}
        print(json.dumps([errors, refusal()]))


def refusal() -> str:
    model, spread = assemble(random_checkpoint("4")), SequenceShard([0, 3], [0], [False], dist.group.WORLD)
    try:
        model(torch.tensor([[1, 2, 3]]), cu_seqlens=spread)
    except InputError as error:
        return str(error)
    return "nothing"


together(3, check)
