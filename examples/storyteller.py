"""Trains the storyteller: the small RWKV-7 that rookery carries with it.

    python examples/storyteller.py --stories stories.jsonl.gz --out storyteller --minutes 120

The texts: one JSON object a line, {"source", "text"}. Ours are 22,167 TinyStories (Eldan & Li, arXiv 2305.07759,
CDLA-Sharing-1.0) followed by 278 classic fairy tales (the public-domain texts of FairytaleQA). Every tenth
TinyStories text (index % 10 == 9) is held out and only ever measured.

A third to a half of the time a story is dressed as the answer to a question about its subject, so that the model
learns to answer "User: Tell me a story about a frog". The run lasts as long as it is told to, on any machine; the
learning rate follows the clock. Stopped by Ctrl-C or a crash, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from rookery.checkpoint import save
from rookery.files import replacing
from rookery.models import RWKV7, RWKV7Config

END = 0  # <|endoftext|>, in front of every text and after it
VOCABULARY = 2048
LAYERS, WIDTH = 6, 192  # 3.8 million parameters: 7.6 MB in bfloat16
TOKENS_PER_STEP = 4096
LONGEST = 768  # tokens of a training sequence; fairy tales are cut into pieces
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
    found = [Counter(phrase.findall(story)) for story in stories]
    stories_with = Counter(word for words in found for word in words)
    as_thing = Counter(word for words in found for word in words.elements())
    anyhow = Counter(word for story in stories for word in re.findall(r"[a-z]+", story))
    things = {word for word, n in stories_with.items() if n >= 8 and as_thing[word] > 0.25 * anyhow[word]}
    about = []
    for story, words in zip(stories, found, strict=True):
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


def documents(
    tokenizer: Tokenizer, stories: list[str], about: list[list[str]], tales: list[str], rng: random.Random
) -> Iterator[tuple[int, list[int]]]:
    """Endless (epoch, sequence) in a new order every epoch; a third of the stories, later half of them, as
    conversations. The tales, in a language of their own, are read once for breadth."""
    epoch = 0
    while True:
        order = list(range(len(stories) + (len(tales) if epoch == 0 else 0)))
        rng.shuffle(order)
        for i in order:
            if i >= len(stories):
                text = tales[i - len(stories)]
            elif rng.random() < (1 / 3 if epoch == 0 else 1 / 2):
                turns = [i] if rng.random() < 0.8 else [i, rng.randrange(len(stories))]
                text = "\n\n".join(
                    f"User: {rng.choice(ASKS).format(rng.choice(about[j])) if about[j] else rng.choice(ASKS_ANY)}"
                    f"\n\nAssistant: {stories[j].strip()}"
                    for j in turns
                )
            else:
                text = stories[i]
            ids = [END, *tokenizer.encode(text).ids, END]
            for start in range(0, len(ids) - 1, LONGEST):
                yield epoch, ids[start : start + LONGEST + 1]
        epoch += 1


def pack(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Many sequences in one row: inputs [1, T], targets [T] and the boundaries."""
    inputs = [token for ids in sequences for token in ids[:-1]]
    targets = [token for ids in sequences for token in ids[1:]]
    cu = [0]
    for ids in sequences:
        cu.append(cu[-1] + len(ids) - 1)
    return torch.tensor([inputs]), torch.tensor(targets), cu


@torch.inference_mode()
def bits_per_byte(model: RWKV7, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Each text from its first byte to its end mark, from an empty state."""
    bits = 0.0
    sequences = [[END, *tokenizer.encode(text).ids, END] for text in texts]
    for start in range(0, len(sequences), 32):
        inputs, targets, cu = pack(sequences[start : start + 32])
        logits, _ = model(inputs, cu_seqlens=cu)
        bits += F.cross_entropy(logits[0].float(), targets, reduction="sum").item() / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


def optimizers(model: RWKV7, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the square-ish matrices inside the blocks, AdamW with the recipe's groups for the rest."""
    groups = model.param_groups(lr, weight_decay=0.1)
    inner = [p for name, p in model.blocks.named_parameters() if name.endswith(".weight") and p.ndim == 2]
    elsewhere = set(inner)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in elsewhere]
    return [
        torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-18),
        torch.optim.Muon(inner, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]


def draw(rows: list[dict], picture: Path) -> None:
    """The curves of the run: the training loss in nats a token, the held-out texts in bits a byte."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], color="0.6", linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(1, 4))
    measured = [row for row in rows if "held_out_bits_per_byte" in row]
    x, y = ([row["tokens"] / 1e6 for row in measured], [row["held_out_bits_per_byte"] for row in measured])
    right.plot(x, y, color="tab:green", marker=".")
    right.set(ylabel="200 held-out texts, bits a byte", ylim=(0.5, 1.25))
    figure.savefig(picture, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--stories", type=Path, required=True, help="stories.jsonl.gz")
    options.add_argument("--out", type=Path, required=True, help="folder for the model and its log")
    options.add_argument("--minutes", type=float, default=120, help="how long to train")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--seed", type=int, default=1)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    train, held_out, tales = read_texts(args.stories)
    tokenizer = train_tokenizer(train + [f"User: {ask}\n\nAssistant:" for ask in ASKS for _ in range(200)])
    model = RWKV7(RWKV7Config.sized(tokenizer.get_vocab_size(), LAYERS, WIDTH))
    model.init_weights()
    optims = optimizers(model, args.lr)
    rates = [[group["lr"] for group in optim.param_groups] for optim in optims]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train)} stories, {len(tales)} tales, {len(held_out)} held out", flush=True)

    checkpoint, log = args.out / "training.pt", args.out / "log.jsonl"
    log.touch()
    step = tokens = skip = 0
    seconds = 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optim, state in zip(optims, saved["optims"], strict=True):
            optim.load_state_dict(state)
        step, tokens, skip, seconds = (saved[name] for name in ("step", "tokens", "documents", "seconds"))
        rows = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(row + "\n" for row in rows))
        print(f"going on from step {step}", flush=True)

    stream = documents(tokenizer, train, subjects(train), tales, random.Random(args.seed))
    seen, epoch = 0, 0
    while seen < skip:
        epoch, _ = next(stream)
        seen += 1

    def keep() -> None:
        saved = {"model": model.state_dict(), "optims": [optim.state_dict() for optim in optims]}
        saved |= {"step": step, "tokens": tokens, "documents": seen, "seconds": seconds}
        with replacing(checkpoint) as part:
            torch.save(saved, part)

    budget = 60 * args.minutes
    clock, last_kept, losses = time.perf_counter(), seconds, []
    try:
        while seconds < budget:
            sequences, size = [], 0
            while size < TOKENS_PER_STEP:
                epoch, ids = next(stream)
                sequences.append(ids)
                size += len(ids) - 1
            inputs, targets, cu = pack(sequences)

            rate = min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * seconds / budget)))
            for optim, base in zip(optims, rates, strict=True):
                for group, lr in zip(optim.param_groups, base, strict=True):
                    group["lr"] = lr * rate
            with torch.autocast("cpu", torch.bfloat16):
                logits, _ = model(inputs, cu_seqlens=cu)
            logits = logits[0].float()
            loss = F.cross_entropy(logits, targets)
            # L2Wrap: a faint pull on the largest logit keeps 16-bit heads from drifting
            (loss + 0.5e-4 * logits.amax(-1).square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)

            step, tokens, seen = step + 1, tokens + size, seen + len(sequences)
            losses.append(loss.item())
            now = time.perf_counter()
            seconds, clock = seconds + now - clock, now
            if step % 20 == 0:
                row = {"step": step, "epoch": epoch, "tokens": tokens, "seconds": round(seconds, 1)}
                row["loss"] = round(sum(losses) / len(losses), 4)
                losses = []
                if step % 400 == 0:
                    row["held_out_bits_per_byte"] = round(bits_per_byte(model, tokenizer, held_out[:200]), 4)
                    clock = time.perf_counter()  # measuring is not training
                print(json.dumps(row), flush=True)
                with open(log, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
            if seconds - last_kept > 300:
                keep()
                last_kept = seconds
    except KeyboardInterrupt:
        keep()
        print(f"kept at step {step}; the same command goes on from here")
        return
    keep()

    tokenizer.save(str(args.out / "tokenizer.json"))
    model.bfloat16()
    notes = {"chat_template": "story", "opening_tokens": [END]}
    save(model, args.out, tokenizer_file=args.out / "tokenizer.json", notes=notes)
    print(f"held out, all {len(held_out)} texts: {bits_per_byte(model.float(), tokenizer, held_out):.4f} bits per byte")
    draw([json.loads(line) for line in log.read_text().splitlines()], args.out / "curve.png")


if __name__ == "__main__":
    main()
