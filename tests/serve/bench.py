"""`make bench-serve`: what a server gives to one client and to many, beside what its model gives alone.

python tests/serve/bench.py [--model FILE] [--threads N] [--tokens N] [--long N] [--beside URL]
--long: tokens of a conversation that is continued. --beside: another server of OpenAI's API, as llama.cpp's, asked in
turns with this one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import httpx
import torch
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from load_clients import describe, load, prompt
from server_process import Process

from heronry import LLM, Sampling
from heronry.engine.batch import Row
from heronry.engine.call_sizes import choose_call_sizes
from heronry.engine.decode_batch import DecodeBatch, SequenceDecoder
from heronry.models import Model

MANY = 64


class TimedModel:
    """Adds up the seconds of its calls."""

    def __init__(self, model: Model):
        self.model, self.device, self.seconds = model, model.device, 0.0

    def __call__(self, *args, **options):
        begin = time.perf_counter()
        result = self.model(*args, **options)
        self.seconds += time.perf_counter() - begin
        return result


@torch.inference_mode()
def step_alone(llm: LLM, rows: int, steps: int) -> tuple[float, float]:
    """Seconds of a step of so many rows without a server, and those of them that are the model's."""
    model, ids = TimedModel(llm.model), llm.tokenizer.encode(prompt(0))
    batch = DecodeBatch(model, choose_call_sizes(llm.model))
    logits, state = llm.model(torch.tensor([ids]), last_only=True)
    batch.add(
        {i: SequenceDecoder(Sampling(seed=i), 10**6) for i in range(rows)},
        logits[0, -1:].expand(rows, -1),
        state[[0] * rows],
    )
    texts = [Row(llm.tokenizer, ids, "", (), False, 0, i, with_state=False) for i in range(rows)]

    def step() -> None:
        for event in batch.step():
            texts[event.index].push(event, 0)

    for _ in range(3):
        step()
    model.seconds, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps, model.seconds / steps


async def serve_many(urls: list[str], tokens: int, times: int = 3) -> None:
    places = [(url, *url.removeprefix("http://").split(":")) for url in urls]
    rates: dict[tuple[str, int], list[float]] = {}
    for turn in range(times + 1):  # the first warms up
        for url, host, port in places:
            for clients in (1, MANY):
                rate, heard = await load(host, int(port), clients, tokens, cache_prompt=False)
                if turn:
                    rates.setdefault((url, clients), []).append(rate)
                    print(f"{url}: {describe(rate, heard)}")
    for url, *_ in places:
        one, many = (statistics.median(rates[url, clients]) for clients in (1, MANY))
        print(f"{url}: median {one:.0f} and {many:.0f} tokens/s, {many / one:.1f} times as much")
    host, port = places[0][1:]
    print(describe(*await load(host, int(port), 200, 16)))


def continue_conversation(url: str, tokens: int) -> None:
    """Seconds to the first token of a conversation that goes on, and of one that begins, in turns."""
    seconds: dict[str, list[float]] = {"continued": [], "new": []}
    with httpx.Client(base_url=url, timeout=600) as client:
        text = prompt(1, tokens * 5 // 7)
        body = {"input": text, "max_output_tokens": 4}
        last = client.post("/v1/responses", json=body).raise_for_status().json()
        for i in range(7):
            for kind, before in (("continued", last["id"]), ("new", None)):
                body = {"input": f"And then {i}?", "max_output_tokens": 1, "previous_response_id": before}
                begin = time.perf_counter()
                client.post("/v1/responses", json=body).raise_for_status()
                seconds[kind].append(time.perf_counter() - begin)
        read = last["usage"]["input_tokens"]
    continued, new = (1000 * statistics.median(seconds[kind]) for kind in ("continued", "new"))
    print(f"after {read:,} tokens: an answer of one token {continued:.0f} ms; in a new conversation {new:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=20_000)
    parser.add_argument("--beside", action="append", default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llm = LLM(None if options.model == "bundled" else options.model)
    steps = {rows: step_alone(llm, rows, 30 if rows == 1 else 10) for rows in (1, MANY)}
    (one, _), (many, of_model) = steps.values()
    print(
        f"the engine alone: {1 / one:.0f} tokens/s in 1 row, {MANY / many:.0f} in {MANY}, {MANY * one / many:.1f} "
        f"times as much; of a step of {1000 * many:.1f} ms {100 * (1 - of_model / many):.1f}% are not the model's"
    )
    del llm
    server = Process("-m", options.model, "--threads", str(options.threads), "--log-level", "warning")
    try:
        uvloop.run(serve_many([server.url, *options.beside], options.tokens))
        continue_conversation(server.url, options.long)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
