"""Trains the storyteller: the small RWKV-7 that is bundled with heronry.

    python examples/storyteller.py --stories stories.jsonl.gz --out storyteller

The file has one JSON object a line: {"source", "text"}. For the bundled model: 22,167 TinyStories (Eldan & Li, arXiv
2305.07759, CDLA-Sharing-1.0) followed by 278 classic fairy tales (the public-domain texts of FairytaleQA). Every tenth
TinyStories text (index % 10 == 9) is held out.

Each pass has every story once, half of them as the answer to a request for their subject, so that the model learns to
answer "User: Tell me a story about a frog". The loss does not count the request. The tales, which differ in language,
are in the first pass only. If interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from heronry import LLM
from heronry.checkpoint import load, save
from heronry.data.tokenize_corpus import tokenize_corpus
from heronry.models import Model
from heronry.train.config import from_dict
from heronry.train.trainer import Interrupted, Trainer

VOCABULARY = 2048
LAYERS, WIDTH = 6, 192  # 3.8 million parameters: 7.6 MB in bfloat16
ASKS = [
    "Tell me a story about {}",
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "Write a story about {}.",
    "I want to hear a story about {}.",
]
ASKS_ANY = ["Tell me a story", "Tell me a story.", "Tell me another story.", "Can you tell me a story?"]


def read_texts(path: Path) -> tuple[list[str], list[str], list[str]]:
    """(training stories, held-out stories, fairy tales)"""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    stories = [row["text"] for row in rows if row["source"] == "TinyStories"]
    tales = [row["text"] for row in rows if row["source"] != "TinyStories"]
    train = [text for i, text in enumerate(stories) if i % 10 != 9]
    return train, stories[9::10], tales


def subjects(stories: list[str]) -> list[list[str]]:
    """For each story the things it is about, with their article: ["a frog", "a pond"].

    A thing is a word that often follows an article and ends its phrase; a story is about the ones that
    it repeats more than other stories do.
    """
    phrase = re.compile(
        r"\b(?:a|an|the|his|her|their)\s+(?:\w+\s+)?([a-z]{3,})"
        r"(?=[.,!?]|\s+(?:was|is|and|had|that|who|named|to|in|on|with|said|saw|went|could|ran|looked)\b)"
    )
    nouns = [Counter(phrase.findall(story)) for story in stories]
    stories_with = Counter(word for words in nouns for word in words)
    as_thing = Counter(word for words in nouns for word in words.elements())
    anyhow = Counter(word for story in stories for word in re.findall(r"[a-z]+", story))
    things = {word for word, n in stories_with.items() if n >= 8 and as_thing[word] > 0.25 * anyhow[word]}
    about = []
    for story, words in zip(stories, nouns, strict=True):
        said = Counter(re.findall(r"[a-z]+", story.lower()))
        weight = {w: said[w] * math.log(len(stories) / stories_with[w]) for w in words if w in things}
        best = sorted(weight, key=lambda w: -weight[w])[:2]
        about.append([_with_article(word) for word in best])
    return about


def _with_article(noun: str) -> str:
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_rows(stories: list[str], tales: list[str], passes: int, seed: int) -> list[dict[str, Any]]:
    """The rows of the texts to tokenize: all passes, one after the other."""
    random_ = random.Random(seed)
    about = subjects(stories)

    def asked(i: int) -> list[dict[str, str]]:
        ask = random_.choice(ASKS).format(random_.choice(about[i])) if about[i] else random_.choice(ASKS_ANY)
        return [{"role": "user", "content": ask}, {"role": "assistant", "content": stories[i]}]

    rows: list[dict[str, Any]] = [{"text": tale} for tale in tales]
    for _ in range(passes):
        for i, story in enumerate(stories):
            if random_.random() < 0.5:
                rows.append({"text": story})
            else:  # one in five conversations goes on with another story
                others = [random_.randrange(len(stories))] if random_.random() < 0.2 else []
                rows.append({"messages": [message for j in [i, *others] for message in asked(j)]})
    return rows


def encode(rows: list[dict[str, Any]], out: Path, tokenizer: Path) -> None:
    """The token file `out` of these rows."""
    if out.with_suffix(".idx").exists():
        return
    texts = out.with_suffix(".jsonl")
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenize_corpus([str(texts)], out, tokenizer, template="story", workers=os.cpu_count() or 1)


@torch.inference_mode()
def bits_per_byte(model: Model, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Each text from its first byte to its end mark, from an empty state."""
    bits, end = 0.0, tokenizer.token_to_id("<|endoftext|>")
    sequences = [[end, *tokenizer.encode(text).ids, end] for text in texts]
    for start in range(0, len(sequences), 32):
        some = sequences[start : start + 32]
        cu = [0]
        for ids in some:
            cu.append(cu[-1] + len(ids) - 1)
        inputs = torch.tensor([[token for ids in some for token in ids[:-1]]])
        targets = torch.tensor([token for ids in some for token in ids[1:]])
        logits, _ = model(inputs, cu_seqlens=cu)
        bits += F.cross_entropy(logits[0].float(), targets, reduction="sum").item() / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


def draw(log: Path, picture: Path, bits_a_nat: float) -> None:
    """The curves of the run: the training loss in nats a token, the held-out texts in bits a byte."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    learned = [row for row in rows if row.get("loss") is not None]
    left.plot([row["tokens"] / 1e6 for row in learned], [row["loss"] for row in learned], color="0.6", linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(1, 4))
    measured = [row for row in rows if "eval_loss" in row]
    tokens = {row["step"]: row["tokens"] / 1e6 for row in learned}
    x, y = ([tokens[row["step"]] for row in measured], [row["eval_loss"] * bits_a_nat for row in measured])
    right.plot(x, y, color="tab:green", marker=".")
    right.set(ylabel="200 held-out texts, bits a byte", ylim=(0.5, 1.25))
    figure.savefig(picture, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--stories", type=Path, required=True, help="stories.jsonl.gz")
    options.add_argument("--out", type=Path, required=True, help="folder for the texts, the run and the model")
    options.add_argument("--model", type=Path, help="a storyteller to go on from, in place of a new one")
    options.add_argument("--passes", type=int, default=7, help="how often every story is read")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--seed", type=int, default=1)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out, tales = read_texts(args.stories)
    file = args.out / "tokenizer.json"
    if not file.exists() and args.model:
        shutil.copy(args.model / "tokenizer.json", file)
    elif not file.exists():
        train_tokenizer(train + [f"User: {ask}\n\nAssistant:" for ask in ASKS for _ in range(200)]).save(str(file))
    encode(training_rows(train, tales, args.passes, args.seed), args.out / "texts", file)
    encode([{"text": text} for text in held_out[:200]], args.out / "held-out", file)
    config = from_dict(
        {
            "model": {"path": str(args.model)} if args.model else {"n_layer": LAYERS, "n_embd": WIDTH},
            "data": {"train": str(args.out / "texts"), "eval": str(args.out / "held-out"), "ctx_len": 1024},
            "optim": {"lr": args.lr, "lr_final": args.lr / 50, "warmup": 50, "muon": True},
            "run": {"out": str(args.out / "run"), "batch": 4, "seed": args.seed, "log_every": 40, "eval_every": 400}
            | {"eval_rows": 1000, "sample_every": 0},
        }
    ).check()
    if not (args.out / "run" / "model.safetensors").exists():
        try:
            Trainer(config).train()
        except Interrupted as stopped:
            sys.exit(str(stopped))

    model = load(args.out / "run", "bfloat16")
    save(model, args.out / "model", file, {"chat_template": "story", "opening_tokens": [0]})
    tokenizer = Tokenizer.from_file(str(file))
    print(f"held out, all {len(held_out)}: {bits_per_byte(model.float(), tokenizer, held_out):.4f} bits per byte")
    some = held_out[:200]
    ids = sum(len(tokenizer.encode(text).ids) + 1 for text in some)
    draw(args.out / "run" / "log.jsonl", args.out / "curve.png", ids / math.log(2) / sum(len(t.encode()) for t in some))
    print(LLM(args.out / "model").chat().say("Tell me a story about a boat", seed=1))


if __name__ == "__main__":
    main()
