"""The matrix of docs/conversion.md: every format into every other, and how much the logits change.

    python examples/conversion.py tiny-rwkv-4.pth tiny-rwkv-5.pth tiny-rwkv-7.pth

Each file is first written in every format that can hold it; then each of these is converted to every other. A cell is
the largest difference between logits over 24 tokens, with both files computed in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from heronry import InputError
from heronry.checkpoint import locate
from heronry.convert import FOLDERS, GRAPHS, SUFFIXES, convert
from heronry.formats import read

NAMES = {
    "blinkdl": ".pth",
    "safetensors": ".safetensors",
    "heronry": "ours",
    "huggingface": "Hugging Face",
    "fla": "fla",
    "gguf": "GGUF",
    "ggml": "rwkv.cpp",
    "webrwkv": "web-rwkv",
    "onnx": "ONNX",
}
FORMATS = [name for name in NAMES if name not in GRAPHS]


def place(format: str, folder: Path, stem: str) -> Path:
    suffix = next((suffix for suffix, known in SUFFIXES.items() if known == format), "")
    return folder / f"{stem}-{format}{'.onnx' if format in GRAPHS else suffix}"


def matrix(source: Path, dtype: str | None, folder: Path) -> str:
    """The table of one model."""
    read(locate(source))  # InputError for what is no model; below it means that a format cannot hold it
    held: dict[str, Path] = {}
    for format in FORMATS:
        try:
            convert(source, place(format, folder, "from"), to=format, dtype=None if format == "webrwkv" else dtype)
        except InputError:
            continue  # it has no place for this generation
        held[format] = place(format, folder, "from")
    lines = [f"| from, to | {' | '.join(NAMES.values())} |", f"|---|{'---|' * len(NAMES)}"]
    largest = 0.0
    for format, file in held.items():
        cells = []
        for to in NAMES:
            if to not in held and to not in GRAPHS:
                cells.append("")
                continue
            done = convert(file, place(to, folder, f"{format}-to"), to=to)
            largest = max(largest, done.largest)
            cells.append("0" if done.difference == 0 else f"{done.difference:.1e}")
        lines.append(f"| {NAMES[format]} | {' | '.join(cells)} |")
    return "\n".join([f"{source.stem}, largest logit {largest:.1f}:", "", *lines])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--dtype", help="of the files that are converted; without it, that of the model")
    args = options.parse_args()
    assert set(NAMES) == {*SUFFIXES.values(), *FOLDERS, "onnx"}
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(matrix(model, args.dtype, Path(folder)), end="\n\n", flush=True)
            except InputError as error:
                print(f"{model}: {error}", file=sys.stderr)
                sys.exit(2)


if __name__ == "__main__":
    main()
