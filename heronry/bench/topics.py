"""What is measured beside what: one function a topic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from ..models.native_step import has_fast_matmul
from .contest import Contest, Row
from .machine import Machine
from .ours import Heronry, Operator, Training
from .peers import LlamaCpp, PyPI, Transformers, TransformersTraining
from .shapes import BITS, Shape
from .vision import vision
from .worker import Contestant

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
# the peer whose file has as many bits
LLAMA = {"bfloat16": "F16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}

GOOSE = Shape("rwkv7", 12, 768, 65536)
GOOSE_24 = Shape("rwkv7", 24, 1024, 65536)
GOOSE_LARGE = Shape("rwkv7", 24, 2048, 65536)  # 1.5B
DOVE = Shape("rwkv4", 12, 768, 50277)
GPT2 = Shape("gpt2", 12, 768, 50277)


def machine(quick: bool, large: bool) -> list[Contest]:
    mebibytes = (32, 512) if quick else (8, 32, 64, 128, 256, 512, 2048)
    reads = _reads(size << 20 for size in mebibytes)
    products = [_product(dtype) for dtype in _fast()]
    return [
        Contest("machine", "reading, over and over", "read", reads),
        Contest("machine", "products of two matrices of 2048 x 2048", "product", products, blocks=8),
    ]


def decode(quick: bool, large: bool) -> list[Contest]:
    contests = [_decode(GOOSE, 16, FORMATS), _decode(DOVE, 16, FORMATS, gpt2=True)]
    if not quick:
        contests.append(_decode(GOOSE_24, 8, FORMATS))
    if large:
        contests.append(_decode(GOOSE_LARGE, 4, ("bfloat16", "int8", "int4")))
    return contests


def fixed(quick: bool, large: bool) -> list[Contest]:
    """Decoding where there is almost nothing to read."""
    shapes = (Shape("rwkv7", 12, 64, 1024), Shape("rwkv4", 12, 64, 1024))
    return [replace(_decode(shape, 64, ("float32", "bfloat16", "int8")), topic="fixed") for shape in shapes]


def prefill(quick: bool, large: bool) -> list[Contest]:
    tokens = 512
    contests = []
    for shape in (GOOSE, DOVE):
        rows = [_product(dtype) for dtype in _fast()]
        # float16 is left out: where the processor has no unit for it, torch takes minutes for such a product
        for row, its_shape, format in _contestants(shape, [f for f in FORMATS if f != "float16"], gpt2=shape is DOVE):
            dtype = {32: "float32", 16: "bfloat16"}.get(BITS[format], "int8")
            limit = f"product of {dtype if dtype in _fast() else 'float32'}"
            flops = its_shape.flops(tokens, 1)
            rows.append(replace(row, job="prefill", options=(tokens,), units=tokens, cost=flops, limit=limit))
        contests.append(Contest("prefill", f"{shape}: {tokens} tokens, the last logits", "token", rows, blocks=5))
    return contests


def batch(quick: bool, large: bool) -> list[Contest]:
    rows = []
    for sequences, tokens in ((1, 16), (4, 8), (16, 4), (64, 4)):
        for row, _, _ in _contestants(GOOSE, FORMATS, pypi=False):
            name, against = (f"{sequences} x {row.name}", tuple(f"{sequences} x {other}" for other in row.against))
            options, units = (tokens, sequences), tokens * sequences
            rows.append(replace(row, name=name, options=options, units=units, against=against))
    return [Contest("batch", f"{GOOSE}: decoding many sequences at once", "token", rows, blocks=7)]


def load(quick: bool, large: bool) -> list[Contest]:
    formats = ("bfloat16", "int8", "int4")
    rows = [replace(row, job="load", against=()) for row, _, _ in _contestants(GOOSE, formats)]
    return [Contest("load", f"{GOOSE}: loading, libraries apart", "load", rows, blocks=3, memory=True)]


def train(quick: bool, large: bool) -> list[Contest]:
    dtypes = [dtype for dtype in ("bfloat16", "float32") if dtype in _fast()][: 1 if quick else 2]
    return [_training(12, 768, 50277, 4, 256, dtypes), _training(6, 512, 256, 8, 512, dtypes)]


def _training(layers: int, width: int, vocabulary: int, sequences: int, length: int, dtypes: Sequence[str]) -> Contest:
    """All with one vocabulary, so that their heads cost the same."""
    tokens = sequences * length
    goose, dove, gpt2 = (Shape(family, layers, width, vocabulary) for family in ("rwkv7", "rwkv4", "gpt2"))
    rows = [_product(dtype) for dtype in dtypes]
    for dtype in dtypes:
        for kind, shape, beside in (
            (Training, goose, ("GPT-2",)),
            (Training, dove, ("RWKV-4", "GPT-2")),
            (TransformersTraining, dove, ()),
            (TransformersTraining, gpt2, ()),
        ):
            row = Row(
                f"{'heronry' if kind is Training else 'transformers'} {shape.name} {dtype}",
                Contestant(kind, (shape,)),
                "step",
                (sequences, length, dtype),
                units=tokens,
                cost=3 * shape.flops(tokens, tokens),
                limit=f"product of {dtype}",
                against=tuple(f"transformers {name} {dtype}" for name in beside),
            )
            rows.append(row)
        for name, shape in (("wkv7", goose), ("wkv4", dove)):
            row = Row(
                f"{name} {dtype}, {shape.layers} times",
                Contestant(Operator, (name, sequences, length, shape.width, dtype)),
                "backward",
                ("auto", shape.layers),
                units=tokens,
                part_of=f"heronry {shape.name} {dtype}",
            )
            rows.append(row)
    title = f"L{layers} D{width} V{vocabulary}: forward and backward of {sequences} x {length} tokens"
    return Contest("train", title, "token", rows, blocks=3)


def operators(quick: bool, large: bool) -> list[Contest]:
    sequences = [_bodies(name, 8, 512, 768) for name in ("wkv4", "wkv5", "wkv6", "wkv7")]
    pictures = [_bodies(name, 8, 196, 192, times=10) for name in ("biwkv", "biwkv6")]
    rows: list[Row] = []
    for pixels, tokens, times in ((224, 196, 84), (2048, 16384, 1)):
        contestant = Contestant(Operator, ("biwkv", 1, tokens, 192, "float32"))
        against = tuple(row.name for row in rows)
        name = f"cpu, {pixels} x {pixels} pixels, {tokens} tokens"
        rows.append(Row(name, contestant, "forward", ("cpu", times), units=times * tokens, against=against))
    title = "biwkv: 1 picture in patches of 16 x 16, 192 channels, forward"
    return [*sequences, *pictures, Contest("operators", title, "token", rows)]


def _bodies(name: str, sequences: int, length: int, width: int, times: int = 1) -> Contest:
    """All bodies of an operator, each so many times a block."""
    contestant = Contestant(Operator, (name, sequences, length, width, "float32"))
    rows = []
    for job, told in (("forward", "forward"), ("backward", "forward and backward")):
        for body in ("reference", "chunked", "cpu"):
            against = () if body == "reference" else (f"reference, {told}",)
            units = times * sequences * length
            rows.append(Row(f"{body}, {told}", contestant, job, (body, times), units=units, against=against))
    title = f"{name}: {sequences} x {length} tokens, {width} channels"
    return Contest("operators", title, "token", rows, blocks=3)


TOPICS: dict[str, Callable[[bool, bool], list[Contest]]] = {
    "machine": machine,
    "decode": decode,
    "fixed": fixed,
    "prefill": prefill,
    "batch": batch,
    "load": load,
    "train": train,
    "operators": operators,
    "vision": vision,
}


def _decode(shape: Shape, tokens: int, formats: Iterable[str], gpt2: bool = False) -> Contest:
    rows = []
    for row, its_shape, format in _contestants(shape, formats, gpt2=gpt2):
        for position in (64, 1000) if its_shape is GPT2 else (0,):
            size = its_shape.bytes_a_token(format, position)
            rows.append(
                replace(
                    row,
                    name=f"{row.name}, position {position}" if position else row.name,
                    options=(tokens, position) if position else (tokens,),
                    units=tokens,
                    cost=size * tokens,
                    limit=_reading(size),
                )
            )
    limits = _reads({row.cost // tokens for row in rows})
    return Contest("decode", f"{shape}: decoding", "token", [*limits, *rows], memory=True)


def _contestants(
    shape: Shape, formats: Iterable[str], pypi: bool = True, gpt2: bool = False
) -> list[tuple[Row, Shape, str]]:
    """Everybody who can run such a model, as rows that decode, with what each runs and its format."""
    goose = shape.family == "rwkv7"
    found = []

    def add(name: str, kind: type, its_shape: Shape, format: str, file: str, against: tuple[str, ...] = ()) -> None:
        options = (format,) if kind is Heronry else (format, its_shape)
        weights = its_shape.weights(format)
        contestant = Contestant(kind, options)
        row = Row(f"{name} {format}", contestant, "decode", file=(its_shape, file), against=against, weights=weights)
        found.append((row, its_shape, format))

    for format in formats:
        beside = []
        if pypi and format in ("float32", "bfloat16"):
            beside.append(f"PyPI rwkv {format}")
        if goose and format in LLAMA:
            beside.append(f"llama.cpp {LLAMA[format]}")
        add("heronry", Heronry, shape, format, format if format in ("int8", "int4") else "pth", tuple(beside))
    for format in ("float32", "bfloat16"):
        if pypi and format in formats:
            add("PyPI rwkv", PyPI, shape, format, "pth")
        if not goose and format in formats:
            add("transformers RWKV-4", Transformers, shape, format, "transformers")
        if gpt2:
            add("transformers GPT-2", Transformers, GPT2, format, "transformers")
    if goose:
        for format in ("F16", "Q8_0", "Q4_0"):
            add("llama.cpp", LlamaCpp, shape, format, format)
    return found


def _reading(size: int) -> str:
    return f"reading {size / 1e6:.1f} MB"


def _reads(sizes: Iterable[int]) -> list[Row]:
    """The limits of what reads so many bytes."""
    passes = 4
    return [
        Row(_reading(size), Contestant(Machine), "read", (size, passes), units=passes, cost=passes * size)
        for size in sorted(sizes)
    ]


def _fast() -> tuple[str, ...]:
    """The dtypes in which PyTorch multiplies as fast as this processor can: elsewhere one product takes a minute."""
    return ("float32", "bfloat16", "int8") if has_fast_matmul(torch.bfloat16) else ("float32",)


def _product(dtype: str) -> Row:
    """The limit of what multiplies matrices."""
    return Row(f"product of {dtype}", Contestant(Machine), "multiply", (dtype, 2048), cost=2 * 2048**3)
