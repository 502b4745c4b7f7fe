"""Vision-RWKV beside a ViT of equal size on CIFAR-10, and what the Q-shift and the second direction contribute.

    python examples/cifar10.py cifar10-train.parquet cifar10-test.parquet --out cifar10

Five models learn from the same pictures in the same order, in 64 patches of 4 x 4 pixels: a ViT, VRWKV, and VRWKV
without a shift, with the shift of text (the previous patch), and with the Q-shift but attention in one direction only,
as in the paper's ablation. An interrupted run continues. The result is a table and a figure of the curves. Needs `pip
install 'heronry[train,vision,plots]'`.

A GPU can run several at once: --jobs 5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from heronry.models.baselines import ViT, ViTConfig
from heronry.train.config import Config, read_config
from heronry.train.trainer import Trainer

MODELS = {
    "ViT": [],
    "VRWKV": [],
    "VRWKV, causal": ["vision.causal=true"],
    "VRWKV, shift of text": ["vision.shift=previous"],
    "VRWKV, no shift": ["vision.shift=none"],
}
SETTINGS = [
    *("vision.size=32", "vision.patch_size=4", "vision.rand_augment=0", "vision.erasing=0.0", "vision.crop=[0.5, 1.0]"),
    # decays are divided by the number of patches and move far in the authors' 375,000 steps, but not in a few thousand
    "vision.decay_lr=30.0",
    *("optim.lr_final=1e-5", "optim.weight_decay=0.05", "optim.betas=[0.9, 0.999]", "optim.eps=1e-8", "optim.clip=5.0"),
    *("model.generation=vrwkv", "run.eval_every=200", "run.log_every=50", "run.save_minutes=10.0", "run.keep=1"),
]


def settings(args: argparse.Namespace, name: str, seed: int) -> Config:
    overrides = [
        *(f"data.train={args.train}", f"data.eval={args.test}", f"model.n_embd={args.width}"),
        *(f"model.n_layer={args.layers}", f"run.batch={args.batch}", f"run.epochs={float(args.epochs)}"),
        *(f"optim.lr={args.lr}", f"run.seed={seed}", f"run.out={folder(args, name, seed)}"),
        *(f"optim.warmup={args.warmup}", f"vision.workers={args.workers}"),
    ]
    return read_config(None, [*SETTINGS, *overrides, *MODELS[name], *args.set])


def folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(args.out) / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"


def train(args: argparse.Namespace, name: str, seed: int) -> None:
    """One run, unless it is done."""
    config = settings(args, name, seed)
    if (Path(config.run.out) / "config.json").exists():
        return
    if name == "ViT":
        # a layer of VRWKV has 13 matrices of C x C, one of a ViT of this width 12: its hidden layer makes up for it
        c = args.width
        model = ViT(ViTConfig(c, args.layers, 4 * c + c // 2, 10, 32, 4, 32 if c % 64 else 64))
        model.init_weights()
        Trainer(config, model=model).train()
    else:
        Trainer(config).train()


def read(args: argparse.Namespace, name: str, seed: int) -> tuple[list[dict], list[dict]]:
    """The lines of a log that tell of the losses, and those that tell of the measured pictures."""
    lines = [json.loads(line) for line in (folder(args, name, seed) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def table(args: argparse.Namespace) -> None:
    title = f"{args.epochs:g} epochs, {args.layers} layers of {args.width}"
    print(f"| {title} | right on the test pictures | nats | pictures/s |")
    print("|---|---|---|---|")
    for name in args.models:
        logs = [read(args, name, seed) for seed in args.seeds]
        right = [seen[-1]["eval_accuracy"] for _, seen in logs]
        nats = mean(seen[-1]["eval_loss"] for _, seen in logs)
        speed = mean(losses[-1]["images_per_second"] for losses, _ in logs)
        each = f" ({', '.join(f'{x:.2%}' for x in right)})" if len(right) > 1 else ""
        print(f"| {name} | {mean(right):.2%}{each} | {nats:.4f} | {speed:,.0f} |")


def plot(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name in args.models:
        logs = [read(args, name, seed)[1] for seed in args.seeds]
        steps = [line["step"] for line in logs[0]]
        right = [100 * mean(seen[i]["eval_accuracy"] for seen in logs) for i in range(len(steps))]
        axes.plot([step * args.batch / 50_000 for step in steps], right, label=name)
    axes.set(xlabel="epochs", ylabel="test pictures right, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(args.out) / "cifar10.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", default="cifar10")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at once")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of heronry train")
    args = parser.parse_args()
    runs = [(name, seed) for seed in args.seeds for name in args.models]
    if args.jobs == 1:
        for name, seed in runs:
            train(args, name, seed)
    if args.jobs == 1 and len(runs) == 1:
        return
    if args.jobs > 1:
        at = sys.argv[1:3]
        options = [f"--{key}={getattr(args, key)}" for key in OPTIONS]

        def job(run: tuple[str, int]) -> None:
            name, seed = run
            more = ["--models", name, "--seeds", str(seed), "--set", *args.set]
            subprocess.run([sys.executable, __file__, *at, *options, *more], check=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(job, runs))
    table(args)
    plot(args)


OPTIONS = ("out", "width", "layers", "epochs", "batch", "lr", "warmup", "workers")

if __name__ == "__main__":
    main()
