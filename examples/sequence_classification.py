"""Many to one: a text goes in, the name of its author comes out of the last state.

    python examples/sequence_classification.py novels.jsonl.gz --out author

An RWKV-7 reads texts of different lengths, packed into one row without padding; a linear layer tells from the state
that each leaves who has written it. The authors are those with the most text; one novel of each is held out, so that
the names of its persons are no help. Beside it stands what the counts of bytes tell to a logistic regression. The file
has one JSON object a line: {"title": "Author_Novel_Year", "text"}. A few minutes on one core; Ctrl-C ends the learning
and keeps what was reached, the model and head.safetensors.
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

from rookery import LLM
from rookery.checkpoint import save
from rookery.files import replacing

LENGTHS = (100, 300, 1000)  # characters of the texts that are measured


def read(file: Path, number: int) -> tuple[dict[str, str], dict[str, str]]:
    """For each author what is learned from and what is held out."""
    novels = defaultdict(list)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            novels[row["title"].split("_")[0]].append(row["text"])
    able = sorted((name for name in novels if len(novels[name]) > 2), key=lambda name: -sum(map(len, novels[name])))
    told = sorted(able[:number])
    return {name: "\n".join(novels[name][:-1]) for name in told}, {name: novels[name][-1] for name in told}


def cut(texts: dict[str, str], number: int, lengths: tuple[int, int], dice: random.Random) -> tuple[list[str], Tensor]:
    """Pieces from anywhere, short ones as often as long ones, and the numbers of their authors."""
    all_of, pieces = list(texts.values()), []
    for i in range(number):
        text, length = all_of[i % len(texts)], round(lengths[0] * (lengths[1] / lengths[0]) ** dice.random())
        begin = dice.randrange(len(text) - length)
        pieces.append(text[begin : begin + length])
    return pieces, torch.arange(number) % len(texts)


def classify(llm: LLM, head: nn.Module, texts: list[str]) -> Tensor:
    """[texts, authors]: many tokens to one vector, what the last layer's channel mix read last."""
    ids = [llm.encode(text, begins=True) for text in texts]
    ends = [0, *accumulate(map(len, ids))]
    _, state = llm.model(torch.tensor([[*chain.from_iterable(ids)]]), cu_seqlens=ends, last_only=True)
    return head(state.layers[-1].ffn_shift)


def train(llm: LLM, head: nn.Module, texts: dict[str, str], args: argparse.Namespace) -> None:
    groups = [*llm.model.param_groups(args.lr, 0.01), {"params": head.parameters(), "lr": args.lr}]
    optimizer, dice = torch.optim.AdamW(groups), random.Random(1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, args.steps)
    try:
        for _ in track(range(args.steps), "learning"):
            pieces, authors = cut(texts, 16, (LENGTHS[0], LENGTHS[-1]), dice)
            optimizer.zero_grad()
            F.cross_entropy(classify(llm, head, pieces), authors).backward()
            optimizer.step()
            schedule.step()
    except KeyboardInterrupt:
        print("stopped; with what was learned so far:")


def counts(texts: list[str]) -> Tensor:
    """[texts, 256]: the root of each byte's share."""
    found = torch.stack([torch.bincount(torch.tensor([*text.encode()]), minlength=256) for text in texts])
    return (found / found.sum(1, keepdim=True)).sqrt()


def logistic(pieces: list[str], authors: Tensor) -> nn.Linear:
    head, x = nn.Linear(256, int(authors.max()) + 1), counts(pieces)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(head(x), authors).backward()
        optimizer.step()
    return head


@torch.no_grad()
def right(told: Callable[[list[str]], Tensor], pieces: list[str], authors: Tensor) -> float:
    """The share of texts whose author is told."""
    found = [told(pieces[first : first + 50]).argmax(1) for first in range(0, len(pieces), 50)]
    return (torch.cat(found) == authors).float().mean().item()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", type=Path, help="novels.jsonl.gz")
    options.add_argument("--out", type=Path, required=True, help="folder for the model and its head")
    options.add_argument("--model", type=Path, help="an RWKV of any generation, in place of the bundled one")
    options.add_argument("--authors", type=int, default=8)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--steps", type=int, default=200)
    args = options.parse_args()
    torch.manual_seed(0)
    texts, held_out = read(args.file, args.authors)
    llm = LLM(args.model, dtype="float32")
    head = nn.Linear(llm.model.config.n_embd, len(texts))
    train(llm, head, texts, args)
    save(llm.model, args.out)
    with replacing(args.out / "head.safetensors") as part:
        save_file(head.state_dict(), part)
    by_bytes = logistic(*cut(texts, 8000, (LENGTHS[0], LENGTHS[-1]), random.Random(2)))
    print(f"Who of {', '.join(texts)}? Of 400 texts of the novels that were held out, right are\n")
    print("| characters | RWKV | counts of bytes |\n|---|---|---|")
    for length in LENGTHS:
        held = cut(held_out, 400, (length, length), random.Random(3))
        ours, theirs = right(lambda x: classify(llm, head, x), *held), right(lambda x: by_bytes(counts(x)), *held)
        print(f"| {length} | {ours:.1%} | {theirs:.1%} |")


if __name__ == "__main__":
    main()
