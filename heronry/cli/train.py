"""`heronry train`: a configuration on one side, a model folder on the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..engine.llm import LLM
from ..errors import InputError
from ..models import Model
from ..text.tokenizers import load_tokenizer
from ..train.config import read_config

SAMPLE = 200  # tokens


def train(settings: Sequence[str]) -> None:
    """Trains as a file, if the first of them names one, and the settings say, or goes on where the run was stopped."""
    file = Path(settings[0]) if settings and "=" not in settings[0] else None
    told = read_config(file, settings if file is None else settings[1:])
    try:
        from ..train.trainer import Run, Stopped
    except ModuleNotFoundError as error:
        raise InputError(f"training needs {error.name}: pip install 'heronry[train]'") from error
    run = Run(told)
    if not told.model.is_vision and run.data.tokenizer is not None:  # else nobody can tell what text its ids are
        tokenizer = load_tokenizer(run.data.tokenizer, run.plain.config.vocab_size)

        def sample(model: Model, prompt: str) -> str:
            llm = LLM(model, tokenizer=tokenizer)
            llm.opening = run.passes.notes.get("opening_tokens", [])
            return prompt + llm.generate(prompt, SAMPLE, seed=0)

        run.sample = sample
    try:
        run()
    except Stopped as stopped:
        if run.accelerator.is_main_process:
            print(f"heronry: {stopped}", file=sys.stderr)
        sys.exit(130)
    if run.accelerator.is_main_process:
        print(run.out)
