"""The command line. Thin: each command brings in what it needs when it is called."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import InputError

app = typer.Typer(
    help="RWKV, every generation: trained like a Transformer, run like an RNN.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# typer reads these at run time, where Python 3.10 needs Optional spelled out
Model = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--model", "-m", help="A .pth, a .safetensors or a folder; the bundled model without it."),
]
Vocabulary = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--tokenizer", help="bytes, world or a tokenizer.json; found beside the model or guessed without it."),
]
Precision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--dtype", help="float32, bfloat16 or float16; as in the file without it."),
]
Quantize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--quantize", help="int8 or int4: pack the large matrices while loading."),
]
Adapter = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="The folder of a LoRA or DoRA adapter, which is merged into the weights."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Seed = Annotated[Optional[int], typer.Option(help="The same seed gives the same text.")]  # noqa: UP045


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from standard input.")],
    model: Model = None,
    tokenizer: Vocabulary = None,
    dtype: Precision = None,
    device: Device = "cpu",
    quantize: Quantize = None,
    adapter: Adapter = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens that together reach this.")] = 0.85,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this share as likely as the best.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logit of what was said before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, times how often.")] = 0.0,
    penalty_decay: Annotated[float, typer.Option(help="How the counts fade with each token.")] = 0.996,
    order: Annotated[str, typer.Option(help="temperature-first, or top-p-first as PyPI's rwkv.")] = "temperature-first",
    stop: Annotated[Optional[list[str]], typer.Option(help="Text that ends the output; repeatable.")] = None,  # noqa: UP045
    seed: Seed = None,
    state: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Go on from a saved state, or begin from a tuned one (time_state.safetensors, a .pth)."),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt in front of the text.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Tell tokens/s on standard error.")] = False,
) -> None:
    """Write text after a prompt. Only the text goes to standard output."""
    began = time.perf_counter()
    from ..engine.llm import LLM
    from ..models import State

    if prompt == "-":
        prompt = sys.stdin.read()
    llm = LLM(model, tokenizer=tokenizer, dtype=dtype, device=device, quantize=quantize, adapter=adapter)
    before = None
    if state is not None and State.wrote(state):
        before = State.load(state, device)
    elif state is not None:
        llm.begin_from(state)
    pieces = llm.generate(
        prompt,
        max_tokens,
        stream=True,
        state=before,
        stop=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_decay=penalty_decay,
        order=order,
        seed=seed,
    )
    if echo:
        print(prompt, end="", flush=True)
    first, text = None, ""
    for piece in pieces:
        first = first or time.perf_counter()
        text += piece
        print(piece, end="", flush=True)
    ended = time.perf_counter()
    print(flush=True)
    if speed and first is not None:
        tokens = len(llm.tokenizer.encode(text))
        rate = (tokens - 1) / (ended - first) if tokens > 1 else 0.0
        print(f"[first word {first - began:.1f} s after loading began, then {rate:.0f} tokens/s]", file=sys.stderr)


@app.command()
def chat(
    model: Model = None,
    tokenizer: Vocabulary = None,
    dtype: Precision = None,
    device: Device = "cpu",
    quantize: Quantize = None,
    adapter: Adapter = None,
    template: Annotated[Optional[str], typer.Option(help="raven, world, g1, g1-think, story; guessed.")] = None,  # noqa: UP045
    system: Annotated[Optional[str], typer.Option(help="A text that the conversation begins with.")] = None,  # noqa: UP045
    state: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Begin from a tuned state (time_state.safetensors, a .pth)."),
    ] = None,
    session: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Go on from this file if it exists, and keep the conversation there after every answer."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[Optional[float], typer.Option(help="As the template says without it.")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(help="As the template says without it.")] = None,  # noqa: UP045
    seed: Seed = None,
) -> None:
    """Talk with a model. /help tells what can be undone, forked, saved: nothing is ever read twice."""
    from ..engine.llm import LLM
    from ..engine.sampling import Sampling
    from .chat import talk

    llm = LLM(model, tokenizer=tokenizer, dtype=dtype, device=device, quantize=quantize, adapter=adapter)
    if state is not None:
        llm.begin_from(state)
    given = {"temperature": temperature, "top_p": top_p}
    sampling = {name: value for name, value in given.items() if value is not None}
    if max_tokens < 0:
        raise InputError(f"max_tokens must be at least 0, got {max_tokens}")
    conversation = llm.chat(template, system)
    Sampling(**conversation.template.sampling).changed(seed=seed, **sampling)  # complains before the first message
    talk(conversation, session, max_tokens, seed, sampling)


@app.command("info")
def describe(
    file: Annotated[Optional[Path], typer.Argument(help="A .pth, a .safetensors or a folder.")] = None,  # noqa: UP045
    model: Model = None,
) -> None:
    """Tell what a checkpoint holds, without loading it."""
    from ..engine.llm import BUNDLED
    from .info import info

    info(file or model or BUNDLED)


@app.command("quantize")
def pack(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .pth, a .safetensors or a folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option("--format", "-f", help="int8 or int4.")] = "int8",
    dtype: Precision = None,
) -> None:
    """Pack the large matrices of a model in 8 or 4 bits a weight; every command takes the result as it does others."""
    from .quantize import pack

    pack(source, target, format, dtype)


@app.command("merge")
def fold(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="What the adapter was trained on.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The folder of a LoRA or DoRA adapter, or a file of RWKV-PEFT's.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    dtype: Precision = None,
    alpha: Annotated[Optional[float], typer.Option(help="Of RWKV-PEFT's LoRA: its --lora_alpha.")] = None,  # noqa: UP045
    beginning: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Of RWKV-PEFT's PiSSA: the file with its initial matrices."),
    ] = None,
) -> None:
    """Merge an adapter into the weights of its model (docs/adapters.md); every command takes the result."""
    from .merge import merge

    merge(source, adapter, target, dtype, alpha, beginning)


@app.command("convert")
def change(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file or folder of any format.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="NAME.pth, .safetensors, .st, .gguf, .bin, .onnx, or a new folder."),
    ],
    to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="blinkdl, safetensors, webrwkv, gguf, ggml, heronry, huggingface, vision_rwkv, onnx, onnx-step."
        ),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32, bfloat16, float16, for GGUF also q8_0. Without it, what IN has."),
    ] = None,
    tokenizer: Vocabulary = None,
    shard: Annotated[float, typer.Option(help="The largest file of a folder, in GB.")] = 2.0,
) -> None:
    """Write a model in another format (docs/conversion.md), and compare the logits of both."""
    from .convert import run

    run(source, target, to, dtype, tokenizer, shard)


@app.command("eval")
def weigh(
    files: Annotated[list[Path], typer.Argument(help="Texts, or .jsonl with one text a line.")],
    model: Model = None,
    tokenizer: Vocabulary = None,
    dtype: Precision = None,
    device: Device = "cpu",
    quantize: Quantize = None,
    adapter: Adapter = None,
    lambada: Annotated[bool, typer.Option("--lambada", help="Measure the last word of each line, not all.")] = False,
    key: Annotated[str, typer.Option(help="The field of a line that holds its text.")] = "text",
) -> None:
    """How well a model knows texts: bits a byte and perplexity, or LAMBADA (docs/evaluation.md)."""
    from .eval import run

    run(files, model, tokenizer, dtype, device, quantize, adapter, lambada, key)


@app.command("see")
def look(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures of any kind that Pillow opens.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="A Vision-RWKV: a .pth, a .safetensors or a folder.")],
    top: Annotated[int, typer.Option(help="So many classes, the likeliest first.")] = 5,
    labels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A text with the names of the classes, one a line; the model's own without it."),
    ] = None,
    features: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="OUT", help="Write the pooled features of all pictures to this .safetensors instead."),
    ] = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Pixels of the square that is cut from the middle; what the model was trained with."),
    ] = None,
    dtype: Precision = None,
    device: Device = "cpu",
    quantize: Quantize = None,
) -> None:
    """Tell what is in pictures, or write their features (docs/vision.md)."""
    from .see import see

    see(pictures, model, top, labels, features, size, dtype, device, quantize)


@app.command("data")
def encode(
    sources: Annotated[
        list[str],
        typer.Argument(help=".txt, .jsonl, .jsonl.gz, .parquet, folders, globs, or hf://NAME[:SPLIT]."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PREFIX", help="What the token file is called.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="bytes, world, a tokenizer.json, or a model's folder.")
    ] = "world",
    template: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How conversations are shown: raven, world, g1, g1-think, story."),
    ] = None,
    workers: Annotated[Optional[int], typer.Option(help="Processes; up to 8 without it.")] = None,  # noqa: UP045
    key: Annotated[str, typer.Option(help="The field of a row that holds its text.")] = "text",
    holdout: Annotated[float, typer.Option(help="This part of the documents goes to PREFIX-eval.")] = 0.0,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever is there.")] = False,
) -> None:
    """Turn texts into a token file to train on (docs/data.md). Stopped in whatever way, the same command goes on."""
    from .data import data

    data(sources, out, tokenizer, template, workers, key, holdout, restart)


@app.command("train")
def learn(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONFIG.toml] [SECTION.KEY=VALUE]...",
            help="A file, settings on top of it, or settings alone, like data.train=texts optim.lr=1e-3.",
        ),
    ],
) -> None:
    """Train a model (docs/training.md). Stopped in whatever way, the same command goes on from the last checkpoint."""
    from .train import train

    train(settings)


@app.command("bench")
def measure(
    topics: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="machine, decode, fixed, prefill, batch, load, train, operators, vision; all without it."),
    ] = None,
    blocks: Annotated[Optional[int], typer.Option(help="Of each contestant; each topic knows its own number.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="Three blocks, smaller models only.")] = False,
    large: Annotated[bool, typer.Option("--large", help="A model of 1.5B parameters too.")] = False,
    out: Annotated[Optional[Path], typer.Option("--json", help="Write the figures there too.")] = None,  # noqa: UP045
) -> None:
    """Time this package beside its peers on this machine; the extra `bench` brings them."""
    from ..bench.run import bench

    bench(topics or (), blocks, quick, large, out)


def main() -> None:
    """Runs a command; what the user can mend is told in one line, with exit code 2."""
    # input that is not UTF-8 reaches the tokenizer, which names it; what the terminal cannot show becomes "?"
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        app()
    except InputError as error:
        print(f"heronry: {error}", file=sys.stderr)
        sys.exit(2)
