"""Decoding, one token at a time, beside PyPI's rwkv: the same random RWKV-4 of the 169M shape in both, float32.

    python bench/decode.py [--blocks 15] [--json FILE]

Blocks of tokens of the two alternate, so that whatever else the machine does meets both; medians are compared.
The share of the read limit sets the bytes of the weights that a token needs against what this machine reads
from memory in one pass, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from rookery import RWKV4, load
from rookery.models import RWKV4Config

TOKENS = 16  # in a block


def read_limit(gigabytes: float = 1.0) -> float:
    """Bytes a second that a sum over a large tensor reads; the best of five."""
    x = torch.ones(int(gigabytes * 2**28))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--blocks", type=int, default=15)
    options.add_argument("--json", type=Path, help="write the figures there too")
    args = options.parse_args()
    os.environ["RWKV_JIT_ON"] = "1"  # its faster setting
    from rwkv.model import RWKV

    torch.manual_seed(0)
    model = RWKV4(RWKV4Config.sized(50277, 12, 768))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "emb.weight")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rwkv4-169m.pth"
        torch.save(model.state_dict(), path)
        model = load(path)
        peer = RWKV(model=str(path), strategy="cpu fp32", verbose=False)

    peer_state = None
    state = None

    def peer_block() -> None:
        nonlocal peer_state
        for token in range(TOKENS):
            _, peer_state = peer.forward([token], peer_state)

    def our_block() -> None:
        nonlocal state
        with torch.inference_mode():
            for token in range(TOKENS):
                _, state = model(torch.tensor([[token]]), state)

    times: dict[str, list[float]] = {"rookery": [], "PyPI rwkv": []}
    for block in range(args.blocks + 2):
        for name, run in (("rookery", our_block), ("PyPI rwkv", peer_block)):
            start = time.perf_counter()
            run()
            if block >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start) / TOKENS)

    limit = read_limit()
    rows = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows[name] = {
            "ms_per_token": round(1000 * median, 2),
            "tokens_per_second": round(1 / median, 1),
            "share_of_read_limit": round(weights / limit / median, 2),
        }
    ratio = statistics.median(b / a for a, b in zip(times["rookery"], times["PyPI rwkv"], strict=True))
    print(f"RWKV-4, 12 layers of 768, vocabulary 50277, float32, {torch.get_num_threads()} threads")
    print(f"read limit {limit / 1e9:.1f} GB/s, {weights / 1e9:.3f} GB of weights a token")
    for name, row in rows.items():
        share = row["share_of_read_limit"]
        print(f"{name:10} {row['ms_per_token']:7.2f} ms/token {row['tokens_per_second']:7.1f} tokens/s  {share:.0%}")
    print(f"rookery is {ratio:.2f} times as fast (median of {args.blocks} pairs of blocks of {TOKENS} tokens)")
    if args.json:
        args.json.write_text(json.dumps({"read_limit": limit, "rows": rows, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
