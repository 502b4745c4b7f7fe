"""Options that several commands share, and what is done with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..catalog import BUNDLED
from ..errors import InputError
from . import complete

if TYPE_CHECKING:
    from ..engine.llm import LLM


TYPED = ("COMMANDLINE", "ENVIRONMENT")


def _tokenizer(name: str | None) -> str | None:
    return str(BUNDLED / "tokenizer.json") if name == "bundled" else name


ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescape(text: str) -> str:
    r"""With a line break for \n, as shells pass it on."""
    return re.sub(r"\\([nrt\\])", lambda found: ESCAPES[found[1]], text)


def _template(text: str | None) -> str | None:
    """A turn is written with \\n for line breaks; names stay as they are."""
    return unescape(text) if text is not None and "{user}" in text else text


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="HERONRY_MODEL",
        autocompletion=complete.model,
        help="A file or folder of any format, hf://OWNER/REPOSITORY/FILE, a name in `heronry list`, or bundled.",
        show_default="bundled",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        callback=_tokenizer,
        help="bytes, world, bundled or a tokenizer.json.",
        show_default="the one beside the model, else by vocabulary size",
    ),
]
DTYPES = "float32, bfloat16, float16 (or fp32, bf16, fp16), float64"
Precision = Annotated[
    str | None,
    typer.Option("--dtype", envvar="HERONRY_DTYPE", help=DTYPES + ".", show_default="as in the file; bundled: float32"),
]
WrittenPrecision = Annotated[
    str | None,
    typer.Option("--dtype", help=DTYPES + ".", show_default="as in the file"),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="int8 or int4: quantize the large matrices while loading."),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", help="A LoRA, DoRA or MiSS adapter, a folder or a file, to merge into the weights."),
]
Device = Annotated[str, typer.Option("--device", envvar="HERONRY_DEVICE", help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, envvar="HERONRY_THREADS", help="Threads of the CPU.", show_default="one a core"
    ),
]
LnXEps = Annotated[
    float | None,
    typer.Option("--ln-x-eps", help="Epsilon of the norm after the recurrence.", show_default="64e-5, or the file's"),
]
TEMPLATE = (
    "How conversations are shown: raven, world, g1, g1-think, g1-fast-think, story, alpaca, raven-alpaca, instruction, "
    r"qa, bot; a file FILE.jinja; or a turn of your own, such as 'Bob: {user}\n\nAlice:'."
)
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        callback=_template,
        help=TEMPLATE,
        show_default="that of the model, see heronry info",
        autocompletion=complete.template,
    ),
]
DataTemplate = Annotated[
    str | None,
    typer.Option(
        "--template",
        callback=_template,
        help=TEMPLATE,
        show_default="the Jinja template beside the tokenizer",
        autocompletion=complete.template,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Sampling by name: chat, gradio, open-think, fake-think, lightning, tools, tools-stable, function-call, "
        "maths, creative, conservative, fixed. Other options replace its values.",
        show_default="none",
        autocompletion=complete.preset,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists under that name.")]


def load_llm(
    model: str | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str,
    threads: int | None,
    quantize: str | None,
    adapter: Path | None,
    ln_x_eps: float | None,
) -> LLM:
    """The model that these options name; a bar shows how far it is loaded."""
    from ..engine.llm import LLM
    from .progress import progress_bar

    use_threads(threads)
    with progress_bar("loading") as progress:
        return LLM(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            quantize=quantize,
            adapter=adapter,
            ln_x_eps=ln_x_eps,
            progress=progress,
        )


def apply_preset(context: typer.Context, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Options of sampling: those of the preset where the command line does not say otherwise; without a preset all that
    are given."""
    from ..engine.presets import preset_by_name
    from ..engine.sampling import UnseededOptions

    if preset is None:
        return given
    chosen = preset_by_name(preset)
    sources = {name: context.get_parameter_source(name) for name in given}  # not config.toml, which is for all calls
    explicit = {name: given[name] for name, source in sources.items() if source is not None and source.name in TYPED}
    return {name: getattr(chosen, name) for name in UnseededOptions.__annotations__} | explicit


def use_threads(threads: int | None) -> None:
    """Computes with so many threads from now on; None = one a core."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def check_target(target: Path, force: bool) -> Path:
    """The path to write to, with ~ expanded: the one rule of all commands for what exists.

    Raises:
        InputError: something is there already, and `force` was not given; or it is a folder without a config.json, and
            so not a model that could be replaced.
    """
    target = target.expanduser()
    if target.is_dir():
        if not any(target.iterdir()):
            return target
        if not (target / "config.json").exists():
            raise InputError(f"{target}: is a folder with other files; choose another name")
    elif not target.exists():
        return target
    if not force:
        raise InputError(f"{target}: already exists; replace it with --force")
    return target
