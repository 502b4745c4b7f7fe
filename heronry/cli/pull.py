"""`heronry pull`: a model from the hub into the default folder."""

from __future__ import annotations

from typing import Annotated

import typer

from . import complete
from .output import print_result


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="A name in `heronry list`, or hf://OWNER/REPOSITORY with or without /FILE.",
            autocompletion=complete.published,
        ),
    ],
) -> None:
    """Download a model.

    It goes into the default folder, where its short name finds it.
    """
    import sys

    from .. import catalog, hub
    from ..errors import unknown_name
    from ..files import check_free_space
    from .progress import note, stderr

    if (known := catalog.downloaded().get(name)) is not None:
        note(f"{name}: is there already, {known}")
        return
    folder, model = catalog.models_folder(), catalog.published().get(name)
    if model is None and not hub.is_name(name):
        raise unknown_name("model", name, catalog.published())
    if not sys.stderr.isatty() or stderr().quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    if model is not None:
        check_free_space(model.size, folder / model.file)
        path = hub.fetch(f"hf://{model.repository}/{model.file}", local_dir=folder)
    else:
        repository, _, file = name.removeprefix("hf://").partition("/")[2].partition("/")
        path = hub.fetch(name, local_dir=folder if file else folder / repository.partition("@")[0])
    print_result(str(path))
