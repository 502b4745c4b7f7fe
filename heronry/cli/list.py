"""`heronry list`: the models that have short names."""

from __future__ import annotations

from typing import Annotated

import typer


def list(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the models that are here, and published ones to pull.

    Sizes are those of the file; memory is what a process takes with the model in the file's dtype. The context is the
    length of the texts in training, which is no limit. Nothing is asked of the network.
    """
    import json
    from dataclasses import asdict

    from .. import catalog
    from .table import print_columns

    here = catalog.downloaded()
    models = [
        asdict(model)
        | {"size": model.size, "memory": model.memory, "path": str(here.pop(name)) if name in here else None}
        for name, model in catalog.published().items()
    ]
    own = {"bundled": catalog.BUNDLED} | here
    if as_json:
        print(json.dumps([*({"name": name, "path": str(path)} for name, path in own.items()), *models], indent=2))
        return
    rows = [("name", "generation", "parameters", "size", "memory", "context", "licence", "here")]
    rows += [(name, "", "", "", "", "", "", str(path)) for name, path in own.items()]
    for model in models:
        parameters, size, memory = (f"{model[key] / 1e9:.1f}" for key in ("parameters", "size", "memory"))
        cells = (f"{parameters} B", f"{size} GB", f"{memory} GB", f"{model['context']:,}", model["licence"])
        rows.append((model["name"], model["generation"], *cells, model["path"] or ""))
    print_columns(rows)
