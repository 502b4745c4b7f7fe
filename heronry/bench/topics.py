"""The topics of `heronry bench`: for each a function that lists its contests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from ..models.native_step import has_fast_matmul
from .contest import Contest, Row
from .contestants import Heronry, Operator, Training
from .machine import Machine
from .peers import LlamaCpp, PypiRwkv, Transformers, TransformersTraining
from .shapes import BITS, Shape
from .vision import vision
from .worker import Contestant

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
# the format of llama.cpp with as many bits
GGUF_FORMATS = {"bfloat16": "F16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}

RWKV7_SMALL = Shape("rwkv7", 12, 768, 65536)
RWKV7_MEDIUM = Shape("rwkv7", 24, 1024, 65536)
RWKV7_LARGE = Shape("rwkv7", 24, 2048, 65536)  # 1.5B
RWKV4_SMALL = Shape("rwkv4", 12, 768, 50277)
GPT2_SMALL = Shape("gpt2", 12, 768, 50277)


def machine(quick: bool, large: bool) -> list[Contest]:
    """The limits of the machine by themselves."""
    mebibytes = (32, 512) if quick else (8, 32, 64, 128, 256, 512, 2048)
    reads = _read_limits(size << 20 for size in mebibytes)
    products = [_product_limit(dtype) for dtype in _fast_dtypes()]
    return [
        Contest("machine", "reading, over and over", "read", reads),
        Contest("machine", "products of two matrices of 2048 x 2048", "product", products, blocks=8),
    ]


def decode(quick: bool, large: bool) -> list[Contest]:
    """Decoding one sequence, token by token."""
    contests = [_decode_contest(RWKV7_SMALL, 16, FORMATS), _decode_contest(RWKV4_SMALL, 16, FORMATS, gpt2=True)]
    if not quick:
        contests.append(_decode_contest(RWKV7_MEDIUM, 8, FORMATS))
    if large:
        contests.append(_decode_contest(RWKV7_LARGE, 4, ("bfloat16", "int8", "int4")))
    return contests


def fixed(quick: bool, large: bool) -> list[Contest]:
    """The fixed cost of a decode step: models with almost nothing to read."""
    shapes = (Shape("rwkv7", 12, 64, 1024), Shape("rwkv4", 12, 64, 1024))
    return [replace(_decode_contest(shape, 64, ("float32", "bfloat16", "int8")), topic="fixed") for shape in shapes]


def prefill(quick: bool, large: bool) -> list[Contest]:
    """Reading a prompt up to its last logits."""
    tokens = 512
    contests = []
    for shape in (RWKV7_SMALL, RWKV4_SMALL):
        rows = [_product_limit(dtype) for dtype in _fast_dtypes()]
        # without float16: on a processor that has no unit for it, PyTorch takes minutes for such a product
        formats = [format for format in FORMATS if format != "float16"]
        for row, row_shape, format in _decode_rows(shape, formats, gpt2=shape is RWKV4_SMALL):
            dtype = {32: "float32", 16: "bfloat16"}.get(BITS[format], "int8")
            limit = f"product of {dtype if dtype in _fast_dtypes() else 'float32'}"
            flops = row_shape.flops(tokens, 1)
            rows.append(replace(row, job="prefill", options=(tokens,), units=tokens, cost=flops, limit=limit))
        contests.append(Contest("prefill", f"{shape}: {tokens} tokens, the last logits", "token", rows, blocks=5))
    return contests


def batch(quick: bool, large: bool) -> list[Contest]:
    """Decoding many sequences at once."""
    rows = []
    for sequences, tokens in ((1, 16), (4, 8), (16, 4), (64, 4)):
        for row, _, _ in _decode_rows(RWKV7_SMALL, FORMATS, pypi=False):
            name, against = (f"{sequences} x {row.name}", tuple(f"{sequences} x {other}" for other in row.against))
            options, units = (tokens, sequences), tokens * sequences
            rows.append(replace(row, name=name, options=options, units=units, against=against))
    return [Contest("batch", f"{RWKV7_SMALL}: decoding many sequences at once", "token", rows, blocks=7)]


def load(quick: bool, large: bool) -> list[Contest]:
    """Loading a model."""
    formats = ("bfloat16", "int8", "int4")
    rows = [replace(row, job="load", against=()) for row, _, _ in _decode_rows(RWKV7_SMALL, formats)]
    return [Contest("load", f"{RWKV7_SMALL}: loading, without libraries", "load", rows, blocks=3, memory=True)]


def train(quick: bool, large: bool) -> list[Contest]:
    """Forward and backward of a training step."""
    dtypes = [dtype for dtype in ("bfloat16", "float32") if dtype in _fast_dtypes()][: 1 if quick else 2]
    return [_train_contest(12, 768, 50277, 4, 256, dtypes), _train_contest(6, 512, 256, 8, 512, dtypes)]


def operators(quick: bool, large: bool) -> list[Contest]:
    """Every implementation of every operator."""
    sequences = [_operator_contest(name, 8, 512, 768) for name in ("wkv4", "wkv5", "wkv6", "wkv7")]
    pictures = [_operator_contest(name, 8, 196, 192, times=10) for name in ("biwkv", "biwkv6")]
    rows: list[Row] = []
    for pixels, tokens, times in ((224, 196, 84), (2048, 16384, 1)):
        contestant = Contestant(Operator, ("biwkv", 1, tokens, 192, "float32"))
        against = tuple(row.name for row in rows)
        name = f"cpu, {pixels} x {pixels} pixels, {tokens} tokens"
        rows.append(Row(name, contestant, "forward", ("cpu", times), units=times * tokens, against=against))
    title = "biwkv: 1 picture in patches of 16 x 16, 192 channels, forward"
    return [*sequences, *pictures, Contest("operators", title, "token", rows)]


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


def _decode_contest(shape: Shape, tokens: int, formats: Iterable[str], gpt2: bool = False) -> Contest:
    """Decoding `tokens` of one sequence per block, with the limits of reading as many bytes."""
    rows = []
    for row, row_shape, format in _decode_rows(shape, formats, gpt2=gpt2):
        for position in (64, 1000) if row_shape is GPT2_SMALL else (0,):
            size = row_shape.bytes_per_token(format, position)
            rows.append(
                replace(
                    row,
                    name=f"{row.name}, position {position}" if position else row.name,
                    options=(tokens, position) if position else (tokens,),
                    units=tokens,
                    cost=size * tokens,
                    limit=_read_limit_name(size),
                )
            )
    limits = _read_limits({row.cost // tokens for row in rows})
    return Contest("decode", f"{shape}: decoding", "token", [*limits, *rows], memory=True)


def _decode_rows(
    shape: Shape, formats: Iterable[str], pypi: bool = True, gpt2: bool = False
) -> list[tuple[Row, Shape, str]]:
    """A decoding row for each package and format that can run a model of this shape, with the shape and format of the
    row. pypi: with PyPI's rwkv. gpt2: with a GPT-2 of the same size."""
    is_rwkv7 = shape.family == "rwkv7"
    rows = []

    def add(name: str, kind: type, row_shape: Shape, format: str, file: str, against: tuple[str, ...] = ()) -> None:
        options = (format,) if kind is Heronry else (format, row_shape)
        row = Row(
            f"{name} {format}",
            Contestant(kind, options),
            "decode",
            file=(row_shape, file),
            against=against,
            weights=row_shape.weight_bytes(format),
        )
        rows.append((row, row_shape, format))

    for format in formats:
        against = []
        if pypi and format in ("float32", "bfloat16"):
            against.append(f"PyPI rwkv {format}")
        if is_rwkv7 and format in GGUF_FORMATS:
            against.append(f"llama.cpp {GGUF_FORMATS[format]}")
        add("heronry", Heronry, shape, format, format if format in ("int8", "int4") else "pth", tuple(against))
    for format in ("float32", "bfloat16"):
        if pypi and format in formats:
            add("PyPI rwkv", PypiRwkv, shape, format, "pth")
        if not is_rwkv7 and format in formats:
            add("transformers RWKV-4", Transformers, shape, format, "transformers")
        if gpt2:
            add("transformers GPT-2", Transformers, GPT2_SMALL, format, "transformers")
    if is_rwkv7:
        for format in ("F16", "Q8_0", "Q4_0"):
            add("llama.cpp", LlamaCpp, shape, format, format)
    return rows


def _train_contest(
    n_layer: int, n_embd: int, vocab_size: int, sequences: int, length: int, dtypes: Sequence[str]
) -> Contest:
    """A step of RWKV-7, RWKV-4 and GPT-2 of one size; with one vocabulary, so that their heads cost the same."""
    tokens = sequences * length
    rwkv7, rwkv4, gpt2 = (Shape(family, n_layer, n_embd, vocab_size) for family in ("rwkv7", "rwkv4", "gpt2"))
    rows = [_product_limit(dtype) for dtype in dtypes]
    for dtype in dtypes:
        for kind, shape, peers in (
            (Training, rwkv7, ("GPT-2",)),
            (Training, rwkv4, ("RWKV-4", "GPT-2")),
            (TransformersTraining, rwkv4, ()),
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
                against=tuple(f"transformers {name} {dtype}" for name in peers),
            )
            rows.append(row)
        for name, shape in (("wkv7", rwkv7), ("wkv4", rwkv4)):
            row = Row(
                f"{name} {dtype}, {shape.n_layer} times",
                Contestant(Operator, (name, sequences, length, shape.n_embd, dtype)),
                "backward",
                ("auto", shape.n_layer),
                units=tokens,
                part_of=f"heronry {shape.name} {dtype}",
            )
            rows.append(row)
    title = f"L{n_layer} D{n_embd} V{vocab_size}: forward and backward of {sequences} x {length} tokens"
    return Contest("train", title, "token", rows, blocks=3)


def _operator_contest(name: str, sequences: int, length: int, width: int, times: int = 1) -> Contest:
    """All implementations of an operator, each run `times` per block."""
    contestant = Contestant(Operator, (name, sequences, length, width, "float32"))
    rows = []
    for job, job_name in (("forward", "forward"), ("backward", "forward and backward")):
        for impl in ("reference", "chunked", "cpu"):
            against = () if impl == "reference" else (f"reference, {job_name}",)
            units = times * sequences * length
            rows.append(Row(f"{impl}, {job_name}", contestant, job, (impl, times), units=units, against=against))
    title = f"{name}: {sequences} x {length} tokens, {width} channels"
    return Contest("operators", title, "token", rows, blocks=3)


def _read_limit_name(size: int) -> str:
    return f"reading {size / 1e6:.1f} MB"


def _read_limits(sizes: Iterable[int]) -> list[Row]:
    """Rows that read each number of bytes: the limits of memory-bound work."""
    passes = 4
    return [
        Row(_read_limit_name(size), Contestant(Machine), "read", (size, passes), units=passes, cost=passes * size)
        for size in sorted(sizes)
    ]


def _product_limit(dtype: str) -> Row:
    """A row that multiplies matrices: the limit of compute-bound work."""
    return Row(f"product of {dtype}", Contestant(Machine), "multiply", (dtype, 2048), cost=2 * 2048**3)


def _fast_dtypes() -> tuple[str, ...]:
    """The dtypes in which PyTorch multiplies as fast as this processor can; in others one product takes a minute."""
    return ("float32", "bfloat16", "int8") if has_fast_matmul(torch.bfloat16) else ("float32",)
