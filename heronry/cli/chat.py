"""`heronry chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..engine.options import DecodeOptions


def chat(
    context: typer.Context,
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    ln_x_eps: options.LnXEps = None,
    template: options.Template = None,
    system: Annotated[str | None, typer.Option(help="A system text at the start of the conversation.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Start from a tuned state (time_state.safetensors, a .pth).")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(help="Continue from this file if it exists, and save the conversation there after every answer."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    preset: options.Preset = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the most likely token.", show_default="by the template")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most likely tokens that together reach this.", show_default="by the template"
        ),
    ] = None,
    seed: options.Seed = None,
) -> None:
    """Chat with a model. /help lists what can be undone, forked and saved.

    Without a terminal every line of standard input is a message; the exit code is 2 if one of them failed.
    """
    from ..files import check_writable
    from .chat_loop import run_chat_loop

    if session is not None and not session.is_dir():  # which is no conversation
        check_writable(session)
    llm = options.load_llm(model, tokenizer, dtype, device, threads, quantize, adapter, ln_x_eps)
    if state is not None:
        llm.begin_from(state)
    given = {name: x for name, x in (("temperature", temperature), ("top_p", top_p)) if x is not None}
    sampling: DecodeOptions = {**options.apply_preset(context, preset, given)}  # type: ignore[typeddict-item]
    conversation = llm.chat(template=template, system=system)
    first: DecodeOptions = {**sampling, "seed": seed}
    conversation.check_options(max_tokens, **first)  # fails before the first message
    if code := run_chat_loop(conversation, session, max_tokens, seed, sampling):
        sys.exit(code)
