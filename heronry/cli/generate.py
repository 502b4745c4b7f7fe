"""`heronry generate`: text after a prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from . import options


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    ln_x_eps: options.LnXEps = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens only; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens that together reach this.")] = 0.85,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the best one's probability.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of tokens already used.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, times how often the token was used.")] = 0.0,
    penalty_decay: Annotated[float, typer.Option(help="The counts are multiplied by this at each token.")] = 0.996,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides the logits of tokens already seen, the prompt's too; 1 = off.")
    ] = 1.0,
    order: Annotated[
        str, typer.Option(help="temperature-first, or top-p-first as in PyPI's rwkv.")
    ] = "temperature-first",
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; repeatable.")] = None,
    seed: options.Seed = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Continue from a saved state, or start from a tuned one (time_state.safetensors, a .pth)."),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt in front of the text.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Report tokens/s on standard error.")] = False,
) -> None:
    """Continue a prompt. Only the text goes to standard output."""
    start = time.perf_counter()
    from ..engine.llm import LLM
    from ..models import State
    from .progress import progress_bar

    if prompt == "-":
        prompt = sys.stdin.read()
    with progress_bar("loading") as progress:
        llm = LLM(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            quantize=quantize,
            adapter=adapter,
            ln_x_eps=ln_x_eps,
            progress=progress,
        )
    saved_state = None
    if state is not None and State.is_saved_state(state):
        saved_state = State.load(state, device)
    elif state is not None:
        llm.begin_from(state)
    with progress_bar("reading the prompt") as progress:
        pieces = llm.generate(
            prompt,
            max_tokens,
            stream=True,
            state=saved_state,
            stop=stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            penalty_decay=penalty_decay,
            repetition_penalty=repetition_penalty,
            order=order,
            seed=seed,
            progress=progress,
        )
    if echo:
        print(prompt, end="", flush=True)
    first_piece, n_tokens = None, 0  # the time when the first piece came
    for piece in pieces:
        first_piece = first_piece or time.perf_counter()
        n_tokens = piece.usage.completion_tokens
        print(piece.text, end="", flush=True)
    end = time.perf_counter()
    print(flush=True)
    if speed and first_piece is not None:
        rate = (n_tokens - 1) / (end - first_piece) if n_tokens > 1 else 0.0
        print(f"[first word after {first_piece - start:.1f} s with loading, then {rate:.0f} tokens/s]", file=sys.stderr)
