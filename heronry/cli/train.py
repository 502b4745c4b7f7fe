"""`heronry train`: a configuration in, a model folder out."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, count
from ..train.config import Config, describe_settings, parse_arguments
from . import complete
from .output import print_result
from .signals import Terminated

if TYPE_CHECKING:
    from ..models import Network

SAMPLE_TOKENS = 200
WIDTH = shutil.get_terminal_size().columns


def train(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONFIG.toml] [SECTION.KEY=VALUE]...",
            help="A file, settings that override it, or settings alone, like data.train=texts optim.lr=1e-3.",
            autocompletion=complete.setting,
        ),
    ],
) -> None:
    from ..engine.llm import LLM
    from ..models import Model
    from ..text.tokenizers import load_tokenizer
    from .progress import note

    config = parse_arguments(settings)
    try:
        from ..train.language_modeling import LanguageModeling
        from ..train.trainer import Interrupted, Trainer
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise InputError(f"training needs {package}: pip install 'heronry[train]'") from error
    trainer = Trainer(config)
    task = trainer.task
    if isinstance(task, LanguageModeling) and task.data.tokenizer is not None:  # without one, ids have no text
        tokenizer = load_tokenizer(task.data.tokenizer, trainer.model.config.vocab_size)

        def sample(model: Network, prompt: str) -> str:
            assert isinstance(model, Model)
            llm = LLM(model, tokenizer=tokenizer)
            llm.opening = task.notes.get("opening_tokens", [])
            return prompt + llm.generate(prompt, SAMPLE_TOKENS, seed=0).text

        trainer.generate_sample = sample
    is_main, out = trainer.accelerator.is_main_process, trainer.out
    if trainer.is_finished:
        if is_main:
            note(
                f"{out}: already finished, after {count(trainer.steps, 'step')}; raise run.steps to go on, or choose "
                "another run.out"
            )
        return
    try:
        trainer.train()
    except Interrupted as stopped:
        raise Terminated(stopped.signal, str(stopped) if is_main else "") from None
    if is_main:
        print_result(str(out))
        note(f"try it: {_next_command(config, shlex.quote(str(out)))}")


def _next_command(config: Config, out: str) -> str:
    """What to do with a trained model."""
    base = shlex.quote(config.model.path)
    if config.model.is_vision:
        return f"heronry see -m {out} PICTURES"
    if config.model.tune == "state":
        return f"heronry generate -m {base} --state {out} PROMPT"
    if config.model.tune == "all":
        return f"heronry generate -m {out} PROMPT"
    return f"heronry generate -m {base} --adapter {out} PROMPT"


# each paragraph that begins with \b keeps its lines
train.__doc__ = "\n\n".join(
    [
        "Train a model. If interrupted, the same command continues from the last checkpoint. See docs/training.md.",
        "The settings, with their defaults:",
        *("\b\n" + paragraph for paragraph in describe_settings(max(50, min(100, WIDTH - 4))).split("\n\n")),
    ]
)
