"""Which of 500 texts belongs to which beginning? Embeddings of a language model against counting words.

    python examples/retrieval.py [--model MODEL] [--stories stories.jsonl.gz] [--count 500]

Pairs are made of the docstrings in Python's standard library, the first line and what follows it, and with --stories of
stories, the first half and the second. For each beginning the other parts are put in order; shown is how often the
right one comes first, how often it is among the first ten, and the mean of 1 / its place.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np

import heronry

MODULES = """argparse asyncio base64 bisect calendar collections configparser contextlib copy csv datetime decimal
difflib email enum fractions functools glob gzip heapq html http.client imaplib inspect io itertools json
logging mailbox math multiprocessing os pathlib pickle random re sched shutil smtplib socket sqlite3
statistics string subprocess tarfile tempfile textwrap threading time timeit tokenize traceback typing
unittest urllib.parse urllib.request uuid weakref zipfile"""


def docstrings() -> Iterator[tuple[str, str]]:
    seen = set()
    for name in MODULES.split():
        for thing in vars(importlib.import_module(name)).values():
            methods = [x for key, x in vars(thing).items() if key[0] != "_"] if inspect.isclass(thing) else []
            for each in (thing, *methods):
                text = getattr(each, "__doc__", None)
                head, _, rest = inspect.cleandoc(text if isinstance(text, str) else "").partition("\n\n")
                if 20 < len(head) < 150 and 100 < len(rest) < 800 and not set("\n(>") & set(head) and head not in seen:
                    seen.add(head)
                    yield head, rest


def halves(path: str) -> Iterator[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for text in (json.loads(line)["text"] for line in file):
            if 300 < len(text) < 1200:
                sentences = re.split(r"(?<=[.!?])\s+", text)
                yield " ".join(sentences[: len(sentences) // 2]), " ".join(sentences[len(sentences) // 2 :])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def bag_of_words(heads: list[str], rests: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, words] of unit length."""
    places = {word: i for i, word in enumerate(sorted({word for text in heads + rests for word in words(text)}))}
    both = np.zeros((2, len(heads), len(places)))
    for side, texts in enumerate((heads, rests)):
        for row, text in enumerate(texts):
            for word in words(text):
                both[side, row, places[word]] += 1
    both /= np.linalg.norm(both, axis=2, keepdims=True).clip(1e-9)
    return both[0], both[1]


def bm25(heads: list[str], rests: list[str], k: float = 1.5, b: float = 0.75) -> np.ndarray:
    """How well each text fits each beginning [N, N]."""
    counts = [Counter(words(text)) for text in rests]
    lengths = np.array([sum(count.values()) for count in counts])
    holders = Counter(word for count in counts for word in count)
    scores = np.zeros((len(heads), len(rests)))
    for row, head in enumerate(heads):
        for word in set(words(head)) & holders.keys():
            times = np.array([count[word] for count in counts])
            rarity = np.log(1 + (len(rests) - holders[word] + 0.5) / (holders[word] + 0.5))
            scores[row] += rarity * times * (k + 1) / (times + k * (1 - b + b * lengths / lengths.mean()))
    return scores


def centered(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def show(what: str, scores: np.ndarray) -> None:
    places = 1 + (scores > scores.diagonal()[:, None]).sum(1)
    first, ten = 100 * (places == 1).mean(), 100 * (places <= 10).mean()
    print(f"| {what} | {first:.1f}% | {ten:.1f}% | {(1 / places).mean():.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--stories")
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    llm = heronry.LLM(options.model)
    for name, source in {"docstrings": docstrings(), "stories": options.stories and halves(options.stories)}.items():
        pairs = [pair for pair, _ in zip(source or [], range(options.count), strict=False)]
        if not pairs:
            continue
        heads, rests = ([*side] for side in zip(*pairs, strict=True))
        version = f" of Python {sys.version_info.major}.{sys.version_info.minor}" if name == "docstrings" else ""
        print(f"\n| {len(pairs)} {name}{version} | first | among ten | mean of 1 / place |\n|---|---|---|---|")
        show("BM25", bm25(heads, rests))
        x, y = bag_of_words(heads, rests)
        show("words counted", x @ y.T)
        for pooling in ("mean", "state"):
            x, y = llm.embed(heads, pooling=pooling), llm.embed(rests, pooling=pooling)
            show(pooling, x @ y.T)
            show(f"{pooling}, centered", centered(x) @ centered(y).T)
