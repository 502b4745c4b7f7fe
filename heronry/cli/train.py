"""`heronry train`: a configuration in, a model folder out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from ..models import Model

SAMPLE_TOKENS = 200


def train(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONFIG.toml] [SECTION.KEY=VALUE]...",
            help="A file, settings that override it, or settings alone, like data.train=texts optim.lr=1e-3.",
        ),
    ],
) -> None:
    """Train a model. If interrupted, the same command continues from the last checkpoint. See docs/training.md."""
    from ..engine.llm import LLM
    from ..text.tokenizers import load_tokenizer
    from ..train.config import read_config

    file = Path(settings[0]) if settings and "=" not in settings[0] else None
    config = read_config(file, settings if file is None else settings[1:])
    try:
        from ..train.trainer import Run, Stopped
    except ModuleNotFoundError as error:
        raise InputError(f"training needs {error.name}: pip install 'heronry[train]'") from error
    run = Run(config)
    if not config.model.is_vision and run.data.tokenizer is not None:  # without one, ids have no text
        tokenizer = load_tokenizer(run.data.tokenizer, run.plain.config.vocab_size)

        def sample(model: Model, prompt: str) -> str:
            llm = LLM(model, tokenizer=tokenizer)
            llm.opening = run.passes.notes.get("opening_tokens", [])
            return prompt + llm.generate(prompt, SAMPLE_TOKENS, seed=0).text

        run.sample = sample
    try:
        run()
    except Stopped as stopped:
        if run.accelerator.is_main_process:
            print(f"heronry: {stopped}", file=sys.stderr)
        sys.exit(130)
    if run.accelerator.is_main_process:
        print(run.out)
