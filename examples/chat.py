"""Teaches the bundled storyteller to take bookings, by LoRA and by state tuning, and compares the two.

    python examples/chat.py dialogues.jsonl.gz --out assistant
    heronry chat --adapter assistant/lora
    heronry chat --state assistant/state/time_state.safetensors

The file has one JSON object a line with `messages`. Every 20th conversation is held out, and the loss of its answers
is measured; the loss never counts what the user says. Both runs read the same rows. A run that already exists is not
repeated. Needs `pip install 'heronry[train,plots]'`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from heronry import LLM
from heronry.data.tokenize_corpus import tokenize_corpus
from heronry.engine.llm import BUNDLED
from heronry.train.config import Config, from_dict
from heronry.train.trainer import Trainer

ASK = "I want to find a restaurant in San Jose."
RATES = {"lora": 4e-3, "state": 1.0}
FILES = {"lora": "adapter_model.safetensors", "state": "time_state.safetensors"}


def config(args: argparse.Namespace, tune: str) -> Config:
    return from_dict(
        {
            "model": {"path": str(BUNDLED), "tune": tune},
            "data": {"train": str(args.out / "texts"), "eval": str(args.out / "texts-eval"), "ctx_len": 512},
            "optim": {"lr": RATES[tune], "lr_final": RATES[tune] / 100, "weight_decay": 0.01},
            "run": {
                "out": str(args.out / tune),
                "batch": 4,
                "steps": args.steps,
                "eval_every": max(1, args.steps // 10),
            }
            | {"eval_rows": 100, "sample_every": 0},
        }
    ).check()


def answer(**options: str) -> str:
    llm = LLM(**{name: value for name, value in options.items() if name != "state"})
    if "state" in options:
        llm.begin_from(options["state"])
    return llm.chat().say(ASK, max_tokens=60, temperature=0).text.replace("\n", " ")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("file", type=Path, help="dialogues.jsonl.gz")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=300, help="of 4 rows of 512 tokens")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "texts.idx").exists():
        tokenizer = BUNDLED / "tokenizer.json"
        tokenize_corpus([str(args.file)], args.out / "texts", tokenizer, template="story", holdout=0.05)

    lines = ["| | trained numbers | file, bytes | held-out answers, nats a token | tokens/s |", "|---|---|---|---|---|"]
    answers = {}
    for tune, file in FILES.items():
        out = args.out / tune
        if not (out / file).exists():
            run = Trainer(config(args, tune))
            numbers = run.model.num_parameters(only_trainable=True)
            before = run.evaluate()["eval_loss"]
            run.train()
            result = {
                "numbers": numbers,
                "before": before,
                "after": run.evaluate()["eval_loss"],
                "speed": run.units / run.seconds,
            }
            (out / "result.json").write_text(json.dumps(result) + "\n")
        result = json.loads((out / "result.json").read_text())
        if not answers:
            lines.append(f"| the storyteller as it is | | | {result['before']:.3f} | |")
            answers["the storyteller as it is"] = answer()
        size = (out / file).stat().st_size
        row = f"{result['numbers']:,} | {size:,} | {result['after']:.3f} | {result['speed']:,.0f}"
        lines.append(f"| {tune} | {row} |")
        answers[tune] = answer(adapter=str(out)) if tune == "lora" else answer(state=str(out / file))
    print("\n".join(lines))
    print(f"\nUser: {ASK}")
    for name, text in answers.items():
        print(f"\n{name}: {text}")
    draw(args.out)


def draw(out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for tune in FILES:
        rows = [json.loads(line) for line in (out / tune / "log.jsonl").read_text().splitlines()]
        before = json.loads((out / tune / "result.json").read_text())["before"]
        measured = [(0, before), *((row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row)]
        axes.plot(*zip(*measured, strict=True), marker=".", label={"lora": "LoRA", "state": "state tuning"}[tune])
    axes.set(xlabel="steps of 2048 tokens", ylabel="held-out answers, nats a token")
    axes.legend(frameon=False)
    figure.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
