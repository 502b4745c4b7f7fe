"""`heronry list`: the models that have short names."""

from __future__ import annotations

from typing import Annotated

import typer


def list(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List downloaded models, and published ones to pull.

    Sizes are those of the file; memory is what a process takes with the model in the file's dtype. The context is the
    length of the texts in training, which is no limit. Nothing is asked of the network. --json has the paths too.
    """
    import json
    from dataclasses import asdict

    from .. import catalog
    from .table import print_columns

    here = {"bundled": catalog.BUNDLED} | catalog.downloaded()
    models = [catalog.BUNDLED_MODEL, *catalog.published().values()]
    own = {name: path for name, path in here.items() if name not in {model.name for model in models}}
    if as_json:
        described = [
            asdict(model)
            | {
                "size": model.size,
                "memory": model.memory,
                "path": str(here[model.name]) if model.name in here else None,
            }
            for model in models
        ]
        described += [{"name": name, "path": str(path)} for name, path in own.items()]
        print(json.dumps(described, indent=2))
        return
    rows = [("name", "generation", "parameters", "size", "memory", "context", "license", "here")]
    for model in models:
        sizes = (_amount(model.parameters, "B"), _amount(model.size, "GB"), _amount(model.memory, "GB"))
        is_here = "yes" if model.name in here else ""
        rows.append((model.name, model.generation, *sizes, f"{model.context:,}", model.license, is_here))
    for name, path in own.items():
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files if file.is_file())
        rows.append((name, "", "", _amount(size, "GB"), _amount(size + catalog.RUNTIME, "GB"), "", "", "yes"))
    print_columns(rows)


def _amount(number: int, unit: str) -> str:
    """3_100_000_000 -> "3.1 GB", and in millions what is less than a tenth of that."""
    if number < 100_000_000:
        number, unit = number * 1000, unit.replace("G", "").replace("B", "M", 1) + ("B" if "G" in unit else "")
    return f"{number / 1e9:.1f} {unit}"
