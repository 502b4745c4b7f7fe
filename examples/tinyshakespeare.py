"""Shakespeare, byte by byte, in minutes: an RWKV-7 of 0.8 million parameters on two cores.

    python examples/tinyshakespeare.py tinyshakespeare.txt --out shakespeare
    heronry generate "ROMEO:" --model shakespeare/model

Trains on random windows of the first 90% of the file and measures on the last 10%. The loss is in nats per character,
as is usual for this text. If interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from heronry import LLM
from heronry.data.tokenize_corpus import tokenize_corpus
from heronry.train.config import from_dict
from heronry.train.trainer import Trainer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("file", type=Path, help="tinyshakespeare.txt, or any text")
    options.add_argument("--out", type=Path, required=True, help="folder for the model, its log and the picture")
    options.add_argument("--generation", default="rwkv7")
    options.add_argument("--steps", type=int, default=1000)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    text = args.file.read_bytes()
    held_out = text[len(text) * 9 // 10 :]
    for name, part in (("train", text[: -len(held_out)]), ("held-out", held_out)):
        if (args.out / f"{name}.idx").exists():
            continue
        (args.out / f"{name}.txt").write_bytes(part)
        tokenize_corpus([str(args.out / f"{name}.txt")], args.out / name, "bytes")

    settings = {
        "model": {"generation": args.generation, "n_layer": 3, "n_embd": 128},
        "data": {
            "train": str(args.out / "train"),
            "eval": str(args.out / "held-out"),
            "order": "random",
            "ctx_len": 256,
        },
        "optim": {"lr": 4e-3, "lr_final": 2e-4, "warmup": 50},
        "run": {"out": str(args.out / "model"), "batch": 8, "steps": args.steps, "eval_every": 100, "sample_every": 0},
    }
    if not (args.out / "model" / "model.safetensors").exists():
        Trainer(from_dict(settings).check()).train()

    llm = LLM(args.out / "model")
    with torch.inference_mode():
        ids = torch.tensor([llm.encode(held_out.decode(), begins=True)])
        logits, _ = llm.model(ids[:, :-1])
        nats = F.cross_entropy(logits[0].float(), ids[0, 1:]).item()
    print(f"held out: {nats:.4f} nats a character, {nats / math.log(2):.4f} bits, in one pass over all of it")
    print(llm.generate("ROMEO:\n", 400, temperature=0.8, top_p=1.0, seed=1))
    draw(args.out / "model" / "log.jsonl", args.out / "curve.png")


def draw(log: Path, picture: Path) -> None:
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training windows"), ("eval_loss", "held out")):
        points = [row for row in rows if row.get(key) is not None]
        axes.plot([row["step"] for row in points], [row[key] for row in points], label=label)
    axes.set(xlabel="steps of 2048 characters", ylabel="nats a character", ylim=(1.2, 3))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
