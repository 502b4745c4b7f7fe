"""`heronry info`: what a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .output import print_result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models import State

SHOWN = 60  # characters of a text


def info(
    file: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint of any format; or a state, a conversation, an adapter or a token file.",
            show_default="bundled",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The same as FILE.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a file holds.

    Of a checkpoint: its generation, sizes, memory, dtype and tokenizer. No weights are read.
    """
    from .table import print_columns

    if file is not None and model is not None:
        raise InputError("give FILE or --model, not both")
    name = file if file is not None else model
    fields = describe("bundled" if name is None else name)
    if as_json:
        print_result(json.dumps(fields, indent=2, ensure_ascii=False))
    else:
        if "state per token" in fields:  # one row for both
            fields["state"] = f"{_size(fields['state'])} a sequence and {fields.pop('state per token'):,} bytes a token"
        print_columns([(name, _text(name, value)) for name, value in fields.items()])


def describe(name: str) -> dict[str, Any]:
    """What the file or folder holds, by name; bytes as numbers."""
    from ..adapters import describe_adapter
    from ..checkpoint import locate
    from ..data.token_file import prefix_file, strip_suffix
    from ..engine.conversation import is_conversation
    from ..models import State

    path = locate(name)
    try:
        adapter = describe_adapter(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if adapter is not None:
        return adapter
    if all(prefix_file(strip_suffix(path), suffix).is_file() for suffix in (".bin", ".idx")):
        return _describe_token_file(path)
    if path.is_file() and is_conversation(path):
        return _describe_conversation(path)
    if path.is_file() and State.is_saved_state(path):
        return _describe_state(State.load(path))
    return _describe_tuned_state(path) or _describe_checkpoint(path)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from ..checkpoint import load_checkpoint, select_notes
    from ..models import Model, Network
    from ..text.chat_templates import usual_template
    from ..text.template_choice import describe_template, model_template
    from ..text.tokenizers import guess_tokenizer

    network, checkpoint = load_checkpoint(path, device="meta", kind=Network)
    config = asdict(network.config)
    n_parameters = network.num_parameters()
    config.pop("version", None)  # part of the generation
    fields: dict[str, Any] = {"generation": network.generation}
    fields["dtype"] = str(network.dtype).removeprefix("torch.")
    if network.quantization:
        fields["quantization"] = network.quantization
    fields |= config | {"parameters": n_parameters}
    if isinstance(network, Model):
        state = network.initial_state()
        fields["state"] = state.nbytes
        if state.bytes_per_token:
            fields["state per token"] = state.bytes_per_token
    if network.quantization:
        fields["weights"] = sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
    else:
        fields["weights"] = {"float32": 4 * n_parameters, "bfloat16 or float16": 2 * n_parameters}
    if isinstance(network, Model):
        try:
            fields["tokenizer"] = str(
                guess_tokenizer(network.config.vocab_size, path if path.is_dir() else path.parent)
            )
        except InputError as error:
            fields["tokenizer"] = str(error)
        usual = usual_template(network.name, fields["tokenizer"] == "world")
        try:
            template = model_template(path, select_notes(checkpoint.config), checkpoint.template)
            fields["template"] = describe_template(template or usual)
        except InputError as error:
            fields["template"] = str(error)
    return fields


def _describe_state(state: State) -> dict[str, Any]:
    fields = {"kind": "state", "rows": len(state), "n_layer": len(state.layers), "size": state.nbytes}
    if state.contexts:
        fields |= {
            "tokens": [len(context.tokens) for context in state.contexts],
            "bytes per token": state.bytes_per_token,
        }
    return fields | {"fingerprint": state.fingerprint, "texts": list(state.texts)}


def _describe_conversation(path: Path) -> dict[str, Any]:
    from ..engine.conversation import read_records

    records = [record for record, _, _ in read_records(path)]
    begin, *rest = records
    turns = [record["turn"] for record in rest if "turn" in record]
    branches: Mapping[str, Any] = next((x for x in reversed(records) if "heads" in x), {"heads": {"main": None}})
    lengths = {}
    for branch, number in branches["heads"].items():
        lengths[branch] = 0
        while number is not None:
            lengths[branch], number = lengths[branch] + 1, turns[number]["before"]
    return {
        "kind": "conversation",
        "branches": lengths,
        "branch": branches.get("branch", "main"),
        "history": len(begin["history"]),
        "size": path.stat().st_size,
        "fingerprint": begin["fingerprint"],
    }


def _describe_token_file(path: Path) -> dict[str, Any]:
    from ..data.token_file import TokenFile

    tokens = TokenFile(path)
    return {
        "kind": "token file",
        "documents": len(tokens),
        "tokens": len(tokens.tokens),
        "counted in the loss": len(tokens.tokens) if tokens.mask is None else int(tokens.mask.sum()),
        "dtype": str(tokens.tokens.dtype),
        "vocab_size": tokens.vocab_size,
        "end_of_text": tokens.end_of_text,
        "tokenizer": None if tokens.tokenizer is None else str(tokens.tokenizer),
        "template": tokens.metadata.get("template"),
    }


def _describe_tuned_state(path: Path) -> dict[str, Any] | None:
    """None if it is none: a checkpoint, or nothing that can be read, which is said later."""
    from .. import formats
    from ..formats import safetensors_file

    if not path.is_file():
        return None
    try:
        tensors = formats.read(path).tensors
    except InputError:
        return None
    if not tensors or not all(name.endswith("att.time_state") for name in tensors):
        return None
    metadata = safetensors_file.read_metadata(path)
    first = next(iter(tensors.values()))
    return {
        "kind": "tuned state",
        "n_layer": len(tensors),
        "shape": list(first.shape),
        "dtype": str(first.dtype).removeprefix("torch."),
        "size": sum(x.nbytes for x in tensors.values()),
        "fingerprint": metadata.get("fingerprint"),
        "notes": json.loads(metadata.get("notes", "{}")),
    }


def _text(name: str, value: Any) -> str:
    """A value as it is shown."""
    if name == "state" and isinstance(value, int):
        return f"{_size(value)} a sequence of any length, in float32"
    if name == "weights" and isinstance(value, dict):
        return ", ".join(f"{_size(n_bytes)} in {dtype}" for dtype, n_bytes in value.items())
    if name in ("weights", "size"):
        return _size(value)
    if name == "branches":
        return ", ".join(f"{branch} ({turns} turns)" for branch, turns in value.items())
    if name == "texts":
        return ", ".join(_shorten(text) for text in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items()) or "none"
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _shorten(text: str) -> str:
    """The end of a text in one line, which is where a state stands."""
    return json.dumps(text if len(text) <= SHOWN else "…" + text[-SHOWN:], ensure_ascii=False)


def _size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} GiB"
