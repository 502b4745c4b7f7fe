"""World's tokenizer beside pyrwkv-tokenizer, in turns: python examples/tokenizer_speed.py enwik8.txt stories.jsonl.gz

Each text is encoded by both, one after the other, nine times; the medians of CPU time are printed. One text of Chinese
characters and one short prompt are always among them. Files are read as text, 4 MB of each.
"""

from __future__ import annotations

import gzip
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pyrwkv_tokenizer import RWKVTokenizer

from heronry.text.world import WorldTokenizer, read_vocabulary

LENGTH = 4 << 20  # bytes
ROUNDS = 9


def read_text(path: str) -> str:
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        return file.read(LENGTH).decode(errors="ignore")


def draw_chinese(count: int) -> str:
    """Tokens of one to three Chinese characters, drawn from the vocabulary."""
    words = [word.decode(errors="ignore") for word in read_vocabulary() if len(word) in (3, 6, 9)]
    words = [word for word in words if word and all("\u4e00" <= character <= "\u9fff" for character in word)]
    return "".join(random.Random(0).choices(words, k=count))


def seconds(encode: Callable[[str], list[int]], text: str, repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        encode(text)
    return (time.process_time() - begin) / repeats


def main() -> None:
    ours, theirs = WorldTokenizer().encode, RWKVTokenizer().encode
    texts = {path: read_text(path) for path in sys.argv[1:]}
    texts |= {"Chinese": draw_chinese(300_000), "a prompt": "Once upon a time there was a little frog."}
    for name, text in texts.items():
        size = len(text.encode())
        assert ours(text) == theirs(text)
        repeats = 1 + 200_000 // size
        pairs = [(seconds(ours, text, repeats), seconds(theirs, text, repeats)) for _ in range(ROUNDS)]
        mine, other = (size / median(times) / 1e6 for times in zip(*pairs, strict=True))
        ratio = median(theirs / ours for ours, theirs in pairs)
        print(f"{Path(name).name}: {mine:.1f} MB/s, pyrwkv-tokenizer {other:.1f}, {ratio:.2f} times its speed")


if __name__ == "__main__":
    main()
