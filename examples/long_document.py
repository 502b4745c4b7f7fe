"""One document of a million tokens: what training on it costs, in rows of 1024 and of 8192.

    python examples/long_document.py enwik8 --out long-document

The state is carried from row to row, and gradients flow through `--tbptt-chunks` rows of each step. Each length of
document and row is trained in a separate process, which reports its peak memory. For the speed, runs with different
row lengths alternate in one process, with equally many tokens in each turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.progress import track

from heronry.data.token_file import TokenWriter
from heronry.train.config import from_dict
from heronry.train.trainer import Trainer


def document(file: Path, tokens: int, folder: Path) -> Path:
    """A token file of one document: the first bytes of a text."""
    out = folder / f"document-{tokens}"
    if not out.with_suffix(".idx").exists():
        text = np.fromfile(file, np.uint8, count=tokens)
        if len(text) < tokens:
            sys.exit(f"{file} has {len(text):,} bytes, and {tokens:,} are asked for")
        writer = TokenWriter(out, "uint8")
        writer.write(text)
        writer.finish({"vocab_size": 256})
    return out


def make(args: argparse.Namespace, data: Path, context: int, name: str) -> Trainer:
    settings = {
        "model": {"generation": args.generation, "n_layer": args.layers, "n_embd": args.width},
        "data": {"train": str(data), "order": "carried", "ctx_len": context, "tbptt_chunks": args.tbptt_chunks},
        "optim": {"lr": 1e-3},
        "run": {"out": str(args.out / name), "batch": 1, "precision": "float32", "sample_every": 0, "log_every": 1},
    }
    return Trainer(from_dict(settings).check(), quiet=True)


def speeds(args: argparse.Namespace, data: Path) -> dict[int, float]:
    """Tokens a second, each the median of its turns."""
    runs = {context: make(args, data, context, f"speed-{context}") for context in args.contexts}
    turn = max(args.contexts) * args.tbptt_chunks
    seconds: dict[int, list[float]] = {context: [] for context in runs}
    for i in track(range(args.turns + 1), "taking turns"):
        for context, run in runs.items():
            began = time.perf_counter()
            for _ in range(turn // (context * args.tbptt_chunks)):
                run.train_step()
            if i:  # the first ones compile
                seconds[context].append(time.perf_counter() - began)
    return {context: turn / median(times) for context, times in seconds.items()}


def whole(args: argparse.Namespace, data: Path, context: int) -> None:
    """Trains through all of a document and tells what it took."""
    run = make(args, data, context, f"{data.name}-{context}")
    steps = range(run.steps)
    losses = [run.train_step().loss for _ in track(steps, f"{data.name}, rows of {context}")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    last = losses[-max(1, len(losses) // 10) :]
    print(json.dumps({"tokens": run.units, "MiB": peak, "loss": sum(last) / len(last)}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("file", type=Path, help="a text of at least as many bytes")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--tokens", type=int, nargs="+", default=[100_000, 1_000_000], help="lengths of documents")
    options.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192], help="lengths of rows")
    options.add_argument("--generation", default="rwkv7")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--tbptt-chunks", type=int, default=1, help="rows of a step")
    options.add_argument("--turns", type=int, default=9)
    options.add_argument("--only", help=argparse.SUPPRESS)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        data, context = args.only.rsplit(",", 1)
        whole(args, Path(data), int(context))
        return
    print(
        "| document, tokens | rows of | memory at most, MiB | loss of the last tenth |\n|---|---|---|---|", flush=True
    )
    for context in args.contexts:
        for tokens in args.tokens:
            only = ["--only", f"{document(args.file, tokens, args.out)},{context}"]
            process = subprocess.run([sys.executable, *sys.argv, *only], check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(process.stdout.splitlines()[-1])
            print(f"| {result['tokens']:,} | {context} | {result['MiB']:,.0f} | {result['loss']:.3f} |", flush=True)
    for context, speed in speeds(args, document(args.file, max(args.tokens), args.out)).items():
        print(f"rows of {context}: {speed:,.0f} tokens/s")


if __name__ == "__main__":
    main()
