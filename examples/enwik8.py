"""The classic byte-level run: RWKV-4 and RWKV-7 beside an LSTM and a GPT with as many parameters.

    python examples/enwik8.py enwik8 --out enwik8-run

All models read the same random windows of the first 90% of the file with the same optimizer, each at its own learning
rate. The next 5% are the validation set, the last 5% the test set: measured from an empty state in windows of the same
length, and for models with a state also in one pass with the state carried through. The width of each model is chosen
so that it has as many parameters as the RWKV-7.

A run that already exists is not repeated; an interrupted one continues. The early demos of RWKV-4 are `--layers 6
--width 512 --context 1024 --batch 12`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from heronry.data.token_file import TokenWriter
from heronry.models import RWKV4, RWKV7, Model, RWKV4Config, RWKV7Config
from heronry.models.baselines import GPT, LSTM, GPTConfig, LSTMConfig
from heronry.train.config import Config, from_dict
from heronry.train.trainer import Trainer

NAMES = {"rwkv7": "RWKV-7", "rwkv4": "RWKV-4", "lstm": "LSTM", "gpt": "GPT"}
RATES = {"rwkv7": 4e-3, "rwkv4": 8e-3, "lstm": 1.6e-2, "gpt": 4e-3}  # each the best of those that were tried
VOCABULARY = 256


def split(file: Path, folder: Path) -> dict[str, Path]:
    """Token files of the first 90% of its bytes, the next 5% and the last 5%."""
    text = np.fromfile(file, np.uint8)
    cuts = {"train": (0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1)}
    parts = {name: folder / name for name in cuts}
    for name, (begin, end) in cuts.items():
        if not parts[name].with_suffix(".idx").exists():
            writer = TokenWriter(parts[name], "uint8")
            writer.write(text[round(begin * len(text)) : round(end * len(text))])
            writer.finish({})
    return parts


def make(name: str, layers: int, width: int) -> Model:
    """A new model of `layers` layers; all are as near as they come to the parameters of the RWKV-7 of this width."""
    if name == "rwkv7":
        return RWKV7(RWKV7Config.sized(VOCABULARY, layers, width))
    n_parameters = count(lambda: make("rwkv7", layers, width))
    constructors: dict[str, Callable[[int], Model]] = {
        "rwkv4": lambda n: RWKV4(RWKV4Config(VOCABULARY, layers, width, width, n)),
        "gpt": lambda n: GPT(GPTConfig(VOCABULARY, layers, width, n)),
        "lstm": lambda n: LSTM(LSTMConfig(VOCABULARY, 2, width, n)),
    }
    widths = range(width // 2, 6 * width, 4)
    return constructors[name](min(widths, key=lambda n: abs(count(lambda: constructors[name](n)) - n_parameters)))


def count(make: Callable[[], Model]) -> int:
    """How many parameters a model has; no memory is allocated for it."""
    with torch.device("meta"):
        return make().num_parameters()


def config(args: argparse.Namespace, name: str, seed: int, parts: dict[str, Path]) -> Config:
    out = args.out / f"{name}-{seed}"
    rate = args.lr or RATES[name]
    every = max(1, args.steps // 16)
    return from_dict(
        {
            "data": {"train": str(parts["train"]), "eval": str(parts["valid"]), "order": "random"}
            | {"ctx_len": args.context},
            "optim": {"lr": rate, "lr_final": rate / 20, "warmup": 20},
            "run": {"out": str(out), "batch": args.batch, "steps": args.steps, "seed": seed, "precision": "float32"}
            | {"log_every": max(1, args.steps // 200), "eval_every": every, "eval_rows": 64, "sample_every": 0},
        }
    ).check()


@torch.inference_mode()
def bits(model: Model, tokens: torch.Tensor, length: int, carried: bool) -> float:
    """A byte, over `tokens` [N] in windows of `length`, each from an empty state or from the one before."""
    nats, state = 0.0, None
    for begin in range(0, len(tokens) - 1, length):
        window = tokens[begin : begin + length + 1]
        logits, left = model(window[None, :-1], state)
        state = left if carried else None
        nats += F.cross_entropy(logits[0].float(), window[1:], reduction="sum").item()
    return nats / math.log(2) / (len(tokens) - 1)


def results(args: argparse.Namespace, parts: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Of every model and seed, one after the other."""
    for seed in range(args.seeds):
        for name in args.models:
            run_config = config(args, name, seed, parts)
            file = Path(run_config.run.out) / "result.json"
            if not file.exists():
                torch.manual_seed(seed)
                model = make(name, args.layers, args.width)
                model.init_weights()
                run = Trainer(run_config, model=model)
                run.train()
                test = torch.from_numpy(np.fromfile(parts["test"].with_suffix(".bin"), np.uint8)).long()
                row = {"model": name, "seed": seed, "parameters": model.num_parameters()}
                row |= {
                    "tokens": run.units,
                    "seconds": round(run.seconds),
                    "test": bits(model, test, args.context, False),
                }
                if name != "gpt":
                    row["carried"] = bits(model, test, args.context, True)
                file.write_text(json.dumps(row) + "\n")
            yield json.loads(file.read_text())


def speeds(args: argparse.Namespace, parts: dict[str, Path], steps: int = 6) -> dict[str, float]:
    """Tokens a second in training, the models step by step in turn so that all have the same machine."""
    tokens = np.fromfile(parts["train"].with_suffix(".bin"), np.uint8)[: args.batch * args.context + 1]
    inputs, targets = (torch.from_numpy(x).long() for x in (tokens[:-1], tokens[1:]))
    models = {name: make(name, args.layers, args.width) for name in args.models}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.init_weights()
    for step in range(steps + 1):
        for name, model in models.items():
            began = time.perf_counter()
            logits, _ = model(inputs.view(args.batch, -1))
            F.cross_entropy(logits.flatten(0, 1), targets).backward()
            if step:  # the first one compiles
                times[name].append(time.perf_counter() - began)
    return {name: len(inputs) / sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}


def table(rows: list[dict[str, Any]], speed: dict[str, float]) -> str:
    lines = ["| | parameters | test, bits a byte | each seed | state carried | training, tokens/s |"]
    lines.append("|---|---|---|---|---|---|")
    for name in speed:
        mine = [row for row in rows if row["model"] == name]
        tests = [row["test"] for row in mine]
        spread = f" ± {stdev(tests):.3f}" if len(tests) > 1 else ""
        carried = f"{mean(row['carried'] for row in mine):.3f}" if "carried" in mine[0] else "has none"
        seeds = ", ".join(f"{x:.3f}" for x in tests)
        lines.append(
            f"| {NAMES[name]} | {mine[0]['parameters']:,} | {mean(tests):.3f}{spread} | {seeds} | {carried} "
            f"| {speed[name]:,.0f} |"
        )
    return "\n".join(lines)


def draw(args: argparse.Namespace, picture: Path) -> None:
    """What the middle 5% cost on the way: the mean of the seeds, and all of them in the shade."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in args.models:
        curves = []
        for seed in range(args.seeds):
            log = (args.out / f"{name}-{seed}" / "log.jsonl").read_text().splitlines()
            curves.append([row for row in map(json.loads, log) if "eval_loss" in row])
        tokens = [row["step"] * args.batch * args.context / 1e6 for row in curves[0]]
        nats = np.array([[row["eval_loss"] for row in curve] for curve in curves]) / math.log(2)
        (line,) = axes.plot(tokens, nats.mean(0), label=NAMES[name])
        axes.fill_between(tokens, nats.min(0), nats.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="million bytes read", ylabel="bits a byte, the part that is measured on the way", ylim=(None, 4))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("file", type=Path, help="enwik8, or a part of it")
    options.add_argument("--out", type=Path, required=True, help="folder for the runs, the table and the picture")
    options.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--context", type=int, default=256)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--lr", type=float, help="in place of each model's own")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = split(args.file, args.out)
    rows = list(results(args, parts))
    markdown = table(rows, speeds(args, parts))
    (args.out / "table.md").write_text(markdown + "\n")
    draw(args, args.out / "curves.png")
    print(markdown)


if __name__ == "__main__":
    main()
