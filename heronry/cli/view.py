"""`heronry view`: pictures of what a model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, unknown_name
from ..files import check_writable
from . import options

NAMES = ("decay", "flow", "reads", "cascade", "state", "knockout", "lens", "memory", "report")
STORY = {  # for the model that comes along
    "prompt": "Once upon a time there was a little boy named Tim. He had a red ball. One day,",
    "subject": "Tim",
    "fact": "Tim had a toy frog.",
    "question": " Tim played with his toy",
    "recalled": " frog",
}
PLACE = {
    "prompt": "The Eiffel Tower is located in the city of",
    "subject": "The Eiffel Tower",
    "fact": "The secret word is heron.",
    "question": " The secret word is",
    "recalled": " heron",
}
LONG = ("memory", "cascade")  # views of long texts
USED_BY = {  # options that only some views, and the report, look at
    "subject": ("flow",),
    "answer": ("flow",),
    "against": ("state",),
    "text": LONG,
    "fact": ("memory",),
    "question": ("memory",),
    "recalled": ("memory",),
}
N_TEXTS, LENGTH = 16, 512  # of what the model writes where no text is given
MAX_LENGTH = 4096  # tokens of a given text that are one of N_TEXTS
MAX_BYTES = 16 * N_TEXTS * MAX_LENGTH  # of a given file that are read; tokens have about 4


def view(
    name: Annotated[str, typer.Argument(help=f"What to draw: {', '.join(NAMES)}.")],
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    prompt: Annotated[str | None, typer.Option(help="The text to look at.", show_default="a short one")] = None,
    subject: Annotated[str | None, typer.Option(help="flow: the part of the prompt that gets noise.")] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="flow: what should follow the prompt; its first token counts.", show_default="what the model says"
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="state: a second text; its state is compared with that of the prompt.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="memory, cascade: a file of text to read.", show_default="what the model writes itself"),
    ] = None,
    fact: Annotated[str | None, typer.Option(help="memory: what is to be remembered.")] = None,
    question: Annotated[str | None, typer.Option(help="memory: what is asked later.")] = None,
    recalled: Annotated[str | None, typer.Option(help="memory: what should follow the question.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A .png, .svg, .html or .gif file.", show_default="NAME.png here, of several NAME.html"),
    ] = None,
    force: options.Force = False,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    ln_x_eps: options.LnXEps = None,
) -> None:
    """Draw what a model remembers, reads and forgets. See docs/view.md."""
    if name not in NAMES:
        raise unknown_name("view", name, NAMES)
    given = {"subject": subject, "answer": answer, "against": against, "text": text}
    given |= {"fact": fact, "question": question, "recalled": recalled}
    for option, views in USED_BY.items():
        if given[option] is not None and name not in (*views, "report"):
            raise InputError(f"--{option} is for {' and '.join(views)}; {name} does not look at it")
    out = options.check_target(out or Path(f"{name}.html" if name == "report" else f"{name}.png"), force)
    from ..data.text_files import read_text
    from ..evaluate import opening_tokens
    from ..view.figures import new_figure
    from ..view.page import check_ending, write_pictures
    from ..view.views import VIEWS, Look, view_report
    from .progress import note, progress_bar

    if check_ending(out) != ".html" and name == "report":
        raise InputError(f"{out}: a report is an .html page")
    new_figure(1, 1)  # says at once if matplotlib is missing
    check_writable(out)  # not after minutes
    if prompt is not None and subject is None and name == "flow":
        raise InputError("name the part of the prompt that gets noise with --subject")
    given_text = None if text is None else read_text(text, MAX_BYTES)
    llm = options.load_llm(model, tokenizer, dtype, device, threads, quantize, adapter, ln_x_eps)
    defaults = STORY if model in (None, "bundled") else PLACE
    given["prompt"] = prompt
    chosen: dict[str, Any] = {key: value if given[key] is None else given[key] for key, value in defaults.items()}
    if prompt is not None:
        chosen["subject"] = subject  # that of the other prompt is not in it
    texts: list[list[int]] = []
    if given_text is not None:
        ids = llm.tokenizer.encode(given_text)
        length = min(len(ids) // N_TEXTS, MAX_LENGTH) if len(ids) >= N_TEXTS * LENGTH else len(ids)
        texts = [ids[i : i + length] for i in range(0, length * (len(ids) // max(length, 1)), max(length, 1))][:N_TEXTS]
    elif name in (*LONG, "report"):
        with progress_bar("writing texts") as progress:
            begin = opening_tokens(llm) or chosen["prompt"]  # a model of bytes has nothing that texts start after
            written = llm.generate(begin, LENGTH, n=N_TEXTS, ignore_eos=True, top_p=1.0, seed=0, progress=progress)
        texts = [completion.token_ids for completion in written]
    with progress_bar("looking") as progress:
        look = Look(
            llm.model,
            llm.tokenizer,
            llm.opening,
            answer=answer,
            against=against,
            texts=texts,
            progress=progress,
            **chosen,
        )
        pictures, left_out = view_report(look) if name == "report" else (VIEWS[name](look), {})
    about = f"heronry view {name}\nmodel: {model or 'bundled'} ({llm.model.generation})"
    about += "" if adapter is None else f"\nadapter: {adapter}"
    if name not in LONG:
        about += f"\nprompt: {look.prompt}"
    if name in (*LONG, "report"):
        about += f"\ntext: {text or 'what the model writes itself'}"
    about += "".join(f"\nwithout {view}: {reason}" for view, reason in left_out.items())
    write_pictures(pictures, out, f"{name}: {model or 'bundled'}", about)
    if name == "report":
        note(f"{out}: {len(pictures)} pictures" + "".join(f"; without {view}: {x}" for view, x in left_out.items()))
    else:
        note(f"{out}: {pictures[0].caption}")
