"""Text classification: the author of a text from the last state of an RWKV-7.

    python examples/sequence_classification.py novels.jsonl.gz --out author

The model reads texts of different lengths, packed into one row without padding; a linear layer predicts the author
from the state after each. The test sets are the unread ends of the novels, and another novel of each author, where
names of characters do not help; the baseline is a linear layer over byte counts. The file has one JSON object a line:
{"title": "Author_Novel_Year", "text"}. Takes a few minutes on one core; Ctrl-C stops the training and keeps what was
reached: the model and head.safetensors.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from heronry import LLM
from heronry.checkpoint import save

LENGTHS = (100, 300, 1000)  # characters of the texts that are measured; learned from are all lengths in between


def read(file: Path, number: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """The authors with the most text, and of each: what is learned from, the ends of the same novels, another novel."""
    novels = defaultdict(list)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            novels[row["title"].split("_")[0]].append(row["text"])
    able = sorted((name for name in novels if len(novels[name]) > 1), key=lambda name: -sum(map(len, novels[name])))
    names = sorted(able[:number])
    begins = ["".join(text[: -len(text) // 10] for text in novels[name][:-1]) for name in names]
    ends = ["".join(text[-len(text) // 10 :] for text in novels[name][:-1]) for name in names]
    return names, begins, ends, [novels[name][-1] for name in names]


def cut(texts: list[str], number: int, shortest: int, longest: int, dice: random.Random) -> tuple[list[str], Tensor]:
    """Pieces from anywhere, short ones as often as long ones, and the numbers of their authors."""
    pieces = []
    for i in range(number):
        text, length = texts[i % len(texts)], round(shortest * (longest / shortest) ** dice.random())
        begin = dice.randrange(len(text) - length)
        pieces.append(text[begin : begin + length])
    return pieces, torch.arange(number) % len(texts)


def last_vectors(llm: LLM, texts: list[str]) -> Tensor:
    """Many tokens to one vector: what the last layer's channel mix has read last, [texts, C]."""
    ids = [llm.encode(text, begins=True) for text in texts]
    ends = [0, *accumulate(map(len, ids))]
    _, state = llm.model(torch.tensor([[*chain.from_iterable(ids)]]), cu_seqlens=ends, last_only=True)
    return state.layers[-1].ffn_shift


def counts(texts: list[str]) -> Tensor:
    """The root of each byte's share, [texts, 256]."""
    frequencies = torch.stack([torch.bincount(torch.tensor([*text.encode()]), minlength=256) for text in texts])
    return (frequencies / frequencies.sum(1, keepdim=True)).sqrt()


def train(llm: LLM, head: nn.Module, texts: list[str], lr: float, steps: int) -> None:
    optimizer = torch.optim.AdamW([*llm.model.param_groups(lr, 0.01), {"params": head.parameters(), "lr": lr}])
    schedule, dice = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps), random.Random(1)
    try:
        for _ in track(range(steps), "learning"):
            pieces, authors = cut(texts, 16, LENGTHS[0], LENGTHS[-1], dice)
            optimizer.zero_grad()
            F.cross_entropy(head(last_vectors(llm, pieces)), authors).backward()
            optimizer.step()
            schedule.step()
    except KeyboardInterrupt:
        print("stopped; with what was learned so far:")


def train_on_counts(pieces: list[str], authors: Tensor) -> nn.Linear:
    head, x = nn.Linear(256, int(authors.max()) + 1), counts(pieces)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(head(x), authors).backward()
        optimizer.step()
    return head


@torch.no_grad()
def right(vectors: Callable[[list[str]], Tensor], head: nn.Module, pieces: list[str], authors: Tensor) -> str:
    """The share of texts with the right author."""
    predictions = [head(vectors(pieces[first : first + 50])).argmax(1) for first in range(0, len(pieces), 50)]
    return f"{(torch.cat(predictions) == authors).float().mean():.1%} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", type=Path, help="novels.jsonl.gz")
    options.add_argument("--out", type=Path, required=True, help="folder for the model and its head")
    options.add_argument("--model", type=Path, help="an RWKV of any generation, in place of the bundled one")
    options.add_argument("--authors", type=int, default=8)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--texts", type=int, default=320, help="so many of each length are measured")
    args = options.parse_args()
    torch.manual_seed(0)
    names, texts, *held_out = read(args.file, args.authors)
    llm = LLM(args.model, dtype="float32")
    head = nn.Linear(llm.model.config.n_embd, len(names))
    train(llm, head, texts, args.lr, args.steps)
    save(llm.model, args.out)
    save_file(head.state_dict(), args.out / "head.safetensors")
    by_counts = train_on_counts(*cut(texts, 25 * args.texts, LENGTHS[0], LENGTHS[-1], random.Random(2)))
    print(f"Who of {', '.join(names)}? Of {args.texts} texts are right\n")
    print("| characters | same novels: RWKV | counts | other novels: RWKV | counts |\n|---|---|---|---|---|")
    ways = ((lambda texts: last_vectors(llm, texts), head), (counts, by_counts))
    for length in LENGTHS:
        held = [cut(split, args.texts, length, length, random.Random(3)) for split in held_out]
        print(f"| {length} |", *(right(*way, *pieces) for pieces in held for way in ways))


if __name__ == "__main__":
    main()
