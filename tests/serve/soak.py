"""`make soak`: clients connect, stream, cancel and die for a long time; nothing may leak.

python tests/serve/soak.py --minutes 20 [options of heronry serve]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from load_clients import prompt, stream
from server_process import Process

WARM_UP = 0.25  # of the time, before memory is compared


async def soak(server: Process, seconds: float, clients: int = 24) -> tuple[dict[str, int], list[float]]:
    """What became of the requests, and the server's resident memory in MB, sampled while it goes on."""
    host, port = server.url.removeprefix("http://").split(":")
    counts = dict.fromkeys(("complete", "left", "refused", "cut"), 0)
    memory: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            leaves = dice.random() < 0.4
            body = {
                "prompt": prompt(dice.randrange(50), dice.choice([1, 20, 200, 800])),
                "max_tokens": dice.choice([1, 10, 60, 200]),
                "n": dice.choice([1, 1, 1, 3]),
                "ignore_eos": True,
            }
            heard = await stream(host, int(port), body, dice.random() * 2 if leaves else None)
            if heard.complete:
                counts["complete"] += 1
            elif heard.status == 429:
                counts["refused"] += 1
                await asyncio.sleep(0.5)
            else:
                counts["left" if leaves else "cut"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.resident())
            await asyncio.sleep(min(5.0, seconds / 20))

    await asyncio.gather(watch(), *(client(i) for i in range(clients)))
    return counts, memory


def rows(server: Process) -> int:
    """Sequences that are written and requests that wait or are read."""
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        health = json.load(reply)
    return sum(health[name] for name in ("waiting", "reading", "decoding"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    options, rest = parser.parse_known_args()
    server = Process("--log-level", "warning", *rest)
    counts, memory = asyncio.run(soak(server, 60 * options.minutes))
    time.sleep(2)
    left = rows(server)
    warm = memory[round(WARM_UP * len(memory)) :]
    early, late = (sorted(part)[len(part) // 2] for part in (warm[: len(warm) // 3], warm[-len(warm) // 3 :]))
    code = server.stop()
    print(f"requests: {counts}; rows left: {left}; exit code {code}")
    print(f"resident: {early:.0f} MB after warm-up, {late:.0f} MB at the end: {100 * (late / early - 1):+.1f}%")
    if counts["cut"] or left or late > 1.05 * early:
        sys.exit("failed")


if __name__ == "__main__":
    main()
