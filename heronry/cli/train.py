"""`heronry train`: a configuration in, a model folder out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..train.config import describe_settings, parse_arguments
from .output import print_result
from .signals import Terminated

if TYPE_CHECKING:
    from ..models import Network

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
    from ..engine.llm import LLM
    from ..models import Model
    from ..text.tokenizers import load_tokenizer

    config = parse_arguments(settings)
    try:
        from ..train.language_modeling import LanguageModeling
        from ..train.trainer import Interrupted, Trainer
    except ModuleNotFoundError as error:
        raise InputError(f"training needs {error.name}: pip install 'heronry[train]'") from error
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
    try:
        trainer.train()
    except Interrupted as stopped:
        raise Terminated(stopped.signal, str(stopped) if trainer.accelerator.is_main_process else "") from None
    if trainer.accelerator.is_main_process:
        print_result(str(trainer.out))


# each paragraph that begins with \b keeps its lines
train.__doc__ = "\n\n".join(
    [
        "Train a model. If interrupted, the same command continues from the last checkpoint. See docs/training.md.",
        "The settings, with their defaults:",
        *("\b\n" + paragraph for paragraph in describe_settings().split("\n\n")),
    ]
)
