"""`heronry generate`: text after a prompt."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options
from .output import print_result


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to continue; - or a pipe: standard input, to its last line break.", show_default=False
        ),
    ] = None,
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    ln_x_eps: options.LnXEps = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file, to its last line break.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    preset: options.Preset = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens only; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens that together reach this.")] = 0.85,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the best one's probability.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of tokens already used.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, times how often the token was used.")] = 0.0,
    penalty_decay: Annotated[float, typer.Option(help="The counts are multiplied by this at each token.")] = 0.996,
    penalize_digits: Annotated[
        bool,
        typer.Option(
            "--penalize-digits/--no-penalize-digits",
            help="Without, digits may come again at no cost, as in PyPI's rwkv.",
            show_default="on",
        ),
    ] = True,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides the logits of tokens already seen, the prompt's too; 1 = off.")
    ] = 1.0,
    order: Annotated[
        str, typer.Option(help="temperature-first, or top-p-first as in PyPI's rwkv.")
    ] = "temperature-first",
    stop: Annotated[
        list[str] | None,
        typer.Option(help=r"Text that ends the output; repeatable. \n is a line break, \t a tab, \\ a backslash."),
    ] = None,
    seed: options.Seed = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Continue from a saved state, or start from a tuned one (time_state.safetensors, a .pth)."),
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Save the state after the text here, to continue from with --state.")
    ] = None,
    force: options.Force = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt in front of the text.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token ids, why it ended, counts.")
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Report tokens/s on standard error.")] = False,
) -> None:
    """Continue a prompt. Only the text goes to standard output."""
    start = time.perf_counter()
    text = _read_prompt(prompt, prompt_file)
    if save_state is not None:
        save_state = options.check_target(save_state, force)
    from ..engine.completion import Pieces
    from ..models import State
    from .progress import progress_bar

    llm = options.load_llm(model, tokenizer, dtype, device, threads, quantize, adapter, ln_x_eps)
    saved_state = None
    if state is not None and State.is_saved_state(state):
        saved_state = State.load(state, device)
    elif state is not None:
        llm.begin_from(state)
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "penalty_decay": penalty_decay,
        "penalize_digits": penalize_digits,
        "repetition_penalty": repetition_penalty,
        "order": order,
    }
    sampling = options.apply_preset(context, preset, given)
    with progress_bar("reading the prompt") as progress:
        stream = llm.generate(
            text,
            max_tokens,
            stream=True,
            state=saved_state,
            stop=None if stop is None else [options.unescape(x) for x in stop],
            **sampling,
            seed=seed,
            progress=progress,
        )
    pieces, first_piece = Pieces(), None  # the time when the first piece came
    for piece in stream:
        if first_piece is None:
            first_piece = time.perf_counter()
            if echo and not as_json:  # now, so that no message about the first step comes between
                print_result(text, end="")
        pieces.add(piece)
        if not as_json:
            print_result(piece.text, end="", flush=True)
    end = time.perf_counter()
    if pieces.last is None:
        return
    completion = pieces.joined()
    if as_json:
        usage = completion.usage
        counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        about: dict[str, object] = {"prompt": text, "text": completion.text, "token_ids": completion.token_ids}
        about |= {"finish_reason": completion.finish_reason, "usage": counts | {"total_tokens": usage.total_tokens}}
        print_result(json.dumps(about, ensure_ascii=False), end="")
    print(flush=True)
    if save_state is not None:
        completion.state.save(save_state)
    if speed and first_piece is not None:
        n_tokens = completion.usage.completion_tokens
        rate = (n_tokens - 1) / (end - first_piece) if n_tokens > 1 else 0.0
        print(f"[first word after {first_piece - start:.1f} s with loading, then {rate:.0f} tokens/s]", file=sys.stderr)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text to continue: as given, from standard input or from a file."""
    if prompt is not None and file is not None:
        raise InputError("give a PROMPT or --prompt-file, not both")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: byte {error.start} is not UTF-8") from error
    if prompt is not None and prompt != "-":
        return prompt
    text = sys.stdin.read() if prompt == "-" or not sys.stdin.isatty() else ""
    if prompt is None and not text:
        raise InputError("give a PROMPT, - to read it from standard input, or --prompt-file")
    return text.removesuffix("\n")
