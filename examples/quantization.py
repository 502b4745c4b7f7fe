"""What int8 and int4 cost: perplexity and greedy texts of trained models in each format (docs/quantization.md).

    python examples/quantization.py --stories stories.jsonl.gz [--texts 200] [--tiny FOLDER --text FILE]

The bundled model reads held-out stories (see storyteller.py). With --tiny, byte-level .pth files are measured too, on
the first 20,000 bytes of --text.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from storyteller import read_texts
from torch.nn import functional as F

from heronry import LLM, load, quantize
from heronry.models import Model

FORMATS: dict[str, Callable[[Model], Model]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "int8": lambda model: quantize(model, "int8"),
    "int4": lambda model: quantize(model, "int4"),
}
PROMPTS = [
    "Once upon a time", "Lily and Ben", "One day, a little dog", "The sun was", "Tom had a big red ball",
    "In the forest there lived", "Mom said", "It was a rainy day", "A small fish", "The old man and his cat",
]  # fmt: skip
CHUNK = 512


@torch.inference_mode()
def read(model: Model, texts: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]:
    """Nats a token, and the most likely token everywhere."""
    nats, best, count = 0.0, [], 0
    for ids in texts:
        tokens, state = torch.tensor([ids]), None
        for start in range(0, len(ids) - 1, CHUNK):
            part = tokens[:, start : min(start + CHUNK, len(ids) - 1)]
            logits, state = model(part, state)
            targets = tokens[0, start + 1 : start + 1 + part.shape[1]]
            nats += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
            best.append(logits[0].argmax(-1))
            count += len(targets)
    return nats / count, torch.cat(best)


def compare(name: str, model: Model, texts: Sequence[Sequence[int]]) -> None:
    expected, best = 0.0, torch.empty(0)
    for format, change in FORMATS.items():
        nats, own_best = read(change(copy.deepcopy(model)), texts)
        if format == "float32":
            expected, best = nats, own_best
        rise = torch.tensor(nats - expected).expm1().item()
        agree = (own_best == best).float().mean().item()
        perplexity = torch.tensor(nats).exp().item()
        print(
            f"{name:24} {format:9} perplexity {perplexity:8.4f} ({rise:+.2%}), same best token {agree:.2%}", flush=True
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--stories", type=Path, required=True)
    options.add_argument("--texts", type=int, default=200)
    options.add_argument("--tiny", type=Path)
    options.add_argument("--text", type=Path)
    args = options.parse_args()

    llm = LLM()
    _, held_out, _ = read_texts(args.stories)
    texts = [[*llm.opening, *llm.tokenizer.encode(text)] for text in held_out[: args.texts]]
    compare("bundled", llm.model, texts)

    greedy = {"max_tokens": 200, "temperature": 0.0}
    expected = [llm.generate(prompt, **greedy).text for prompt in PROMPTS]
    for format, change in FORMATS.items():
        changed = LLM(change(copy.deepcopy(llm.model)), tokenizer=llm.tokenizer)
        changed.opening = llm.opening
        same = sum(
            changed.generate(prompt, **greedy).text == text for prompt, text in zip(PROMPTS, expected, strict=True)
        )
        print(f"bundled, greedy texts of 200 tokens, {format}: {same} of {len(PROMPTS)} as in float32", flush=True)

    if args.tiny is not None:
        ids = list(args.text.read_bytes()[:20_000])
        for file in sorted(args.tiny.glob("*.pth")):
            compare(file.stem, load(file, ln_x_eps=1e-5 if "5v2" in file.stem else None), [ids])


if __name__ == "__main__":
    main()
