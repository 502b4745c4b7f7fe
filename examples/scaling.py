"""What training on many GPUs takes: memory, tokens/s, and when processes wait for each other. Computed, not measured.

    python examples/scaling.py

Prints the tables of docs/scaling.md, from the parameters of the models as they are built here. Every assumption is a
name at the top of the file; measured ones say where.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from heronry.models import RWKV7, RWKV7Config

SIZES = {
    "0.1B": (12, 768),
    "0.4B": (24, 1024),
    "1.5B": (24, 2048),
    "2.9B": (32, 2560),
    "7.2B": (32, 4096),
    "13.3B": (61, 4096),
}
VOCABULARY = 65536
PEAK = 989e12  # operations a second of an H100's bfloat16 products, as its maker tells
UTILISATION = 0.37  # of them, published for RWKV-7 7.2B on 32 H100s at 10,240 tokens a row (270,000 tokens/s)
LINKS = {"NVLink, 8 GPUs of a machine": 450e9, "InfiniBand, 400 Gbit/s a GPU": 50e9}  # bytes a second, each way
MEMORY = 80e9
ACTIVATIONS = (
    132  # bytes a token, layer and channel that wait for the backward pass in bfloat16 (measured, see --saved)
)
CHECKPOINTED = 4  # the same with run.checkpointing, besides one block's whole
LOGITS = 10  # bytes a token and entry of the vocabulary: 16 bits, float32, and its gradient
STATE = 16  # bytes a parameter: weight, gradient and Adam's two means in float32
GPUS = (1, 8, 64, 1024)
COLUMNS = [("none", 1), *((kind, gpus) for kind in ("gradients", "full") for gpus in GPUS[1:])]


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    parameters: int
    block: int  # parameters of one
    matrices: int  # parameters that are multiplied, the embedding apart

    @property
    def flops(self) -> int:
        """A token in training, matrices only."""
        return 6 * self.matrices


def size(layers: int, width: int) -> Size:
    with torch.device("meta"):
        model = RWKV7(RWKV7Config.sized(VOCABULARY, layers, width))
    named = dict(model.named_parameters())
    matrices = sum(p.numel() for name, p in named.items() if p.ndim == 2 and name != "emb.weight")
    block = sum(p.numel() for p in model.blocks[1].parameters())
    return Size(layers, width, model.num_parameters(), block, matrices)


def held(of: Size, kind: str, gpus: int) -> float:
    """Bytes of weights, gradients and optimiser on each of so many GPUs at most, with run.checkpointing."""
    head = VOCABULARY * of.width
    if kind == "none":  # and 16-bit copies of the weights
        return (STATE + 2) * of.parameters
    if kind == "gradients":  # the weights whole in a pass, and the gradients of what is going back
        return STATE * of.parameters / gpus + 4 * of.parameters + 4 * max(of.block, head)
    # whole: two blocks, the head from its forward to its backward pass, and the gradients of what is going back
    return STATE * of.parameters / gpus + 4 * (2 * of.block + head) + 4 * max(of.block, head)


def activations(of: Size, tokens: int) -> float:
    """Bytes for rows of so many tokens in one pass, with run.checkpointing."""
    blocks = CHECKPOINTED * of.layers + ACTIVATIONS
    return tokens * (blocks * of.width + LOGITS * VOCABULARY)


def memory(tokens: int) -> list[str]:
    names = [kind if gpus == 1 else f"{kind}, {gpus}" for kind, gpus in COLUMNS]
    lines = [f"| | parameters | activations | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for name, shape in SIZES.items():
        of = size(*shape)
        work = activations(of, tokens)
        totals = [held(of, kind, gpus) + work for kind, gpus in COLUMNS]
        cells = [f"{x / 1e9:.0f}" if x < MEMORY else f"({x / 1e9:.0f})" for x in totals]
        lines.append(f"| {name} | {of.parameters:,} | {work / 1e9:.1f} | {' | '.join(cells)} |")
    return lines


def speed() -> list[str]:
    lines = [
        "| | GFLOP a token | "
        + " | ".join(f"{n} GPUs" if n > 1 else "1 GPU" for n in GPUS)
        + " | 100 billion tokens on 8 |"
    ]
    lines.append("|---" * (3 + len(GPUS)) + "|")
    for name, shape in SIZES.items():
        of = size(*shape)
        one = PEAK * UTILISATION / of.flops
        days = 1e11 / (8 * one) / 86400
        cells = " | ".join(f"{one * n:,.0f}" for n in GPUS)
        lines.append(f"| {name} | {of.flops / 1e9:.1f} | {cells} | {days:,.1f} days |")
    return lines


def waiting() -> list[str]:
    """The tokens of a GPU in a step below which it waits for the others. Parameters cancel, up to the embedding, which
    is sent and not multiplied."""
    # bytes a parameter that each GPU sends and receives in a step: an average of the gradients is sent twice, weights
    # are put together once or twice and gradients taken apart once, all in float32
    sent = {"none": 8, "gradients": 8, "full": 12}
    lines = ["| | " + " | ".join(sent) + " |", "|---" * (1 + len(sent)) + "|"]
    for link, rate in LINKS.items():
        tokens = [bytes_ / rate * PEAK * UTILISATION / 6 for bytes_ in sent.values()]
        lines.append(f"| {link} | " + " | ".join(f"{n:,.0f}" for n in tokens) + " |")
    return lines


def saved(generation: str, layers: int, width: int, tokens: int) -> float:
    """Bytes a token that the backward pass of a model waits for, as torch tells of each tensor, its weights apart."""
    from heronry.models import MODELS

    cls = MODELS[generation]
    model = cls(cls.Config.sized(256, layers, width)).train()
    model.init_weights()
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {p.numel() for p in model.parameters() if p.ndim == 2}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and not (x.dtype == torch.bfloat16 and x.numel() in sizes):
            storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(256, (1, tokens)))
    return sum(storage.nbytes() for storage in storages.values()) / tokens


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=8192, help="in one pass of a GPU")
    options.add_argument("--saved", action="store_true", help="measure what the backward pass waits for, here")
    args = options.parse_args()
    if args.saved:
        for generation in ("rwkv4", "rwkv5", "rwkv6", "rwkv7"):
            more = saved(generation, 4, 256, 515) - saved(generation, 2, 256, 515)
            print(f"{generation}: {more / 2 / 256:.0f} bytes a token, layer and channel")
        return
    for title, lines in (
        (f"GB on each GPU, {args.tokens:,} tokens in a pass, run.checkpointing", memory(args.tokens)),
        ("tokens/s", speed()),
        ("tokens of a GPU in a step, below which it waits", waiting()),
    ):
        print(f"{title}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
