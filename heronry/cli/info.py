"""`heronry info`: what a file holds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, count
from .output import print_result

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..formats.lazy_tensor import LazyTensor
    from ..models import State

SHOWN = 60  # characters of a text
MANIFEST = "release-manifest.json"  # in official folders
CONTEXT = re.compile(r"ctx-?(\d{1,9})(k?)(?![0-9a-z])", re.IGNORECASE)  # in the name of a checkpoint
WORDS = {  # of settings whose names only the code knows; those without a word are for training alone
    "time_state": "tuned initial state",
    "deep_rank": "DeepEmbed rank",
    "dea_rank": "DeepEmbedAttention rank",
    "dea_dim": "DeepEmbedAttention query size",
    "ln0_folded": "embedding holds ln0",
    "final_norm": "",
    "post_norm": "norms behind the blocks",
    "head_hidden": "hidden layer of the head",
    "segments": "segments of the authors' kernel",
    "shift": "neighbors seen by a patch",
    "causal": "sees earlier patches only",
    "log_bonus": "",
    "init_values": "",
    "drop_path": "",
    "decay_lr": "",
}


def _unless_file(context: typer.Context, model: str | None) -> str | None:
    """A default of the model is none for somebody who names a file."""
    source = context.get_parameter_source("model")
    is_typed = source is not None and source.name == "COMMANDLINE"
    return model if is_typed or context.params.get("file") is None else None


def info(
    file: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint of any format or an ONNX graph; or a state, a conversation, an adapter, a token file, "
            "features of pictures.",
            show_default="the model of generate",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="HERONRY_MODEL",
            callback=_unless_file,
            help="The same as FILE.",
            show_default="bundled",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a file holds.

    Of a checkpoint: what file it is and who writes such files, its generation, sizes, memory, dtype, tokenizer, and the
    length of the texts it was trained on. No weights are read.
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
    from ..checkpoint.time_state import FILE
    from ..data.token_file import prefix_file, strip_suffix
    from ..engine.conversation import is_conversation
    from ..models import State

    path = Path(name).expanduser()
    if path.name not in ("", "..") and all(prefix_file(strip_suffix(path), x).is_file() for x in (".bin", ".idx")):
        return _describe_token_file(path)
    path = locate(name)
    try:
        adapter = describe_adapter(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if adapter is not None:
        return adapter
    if (path / FILE).is_file() and not (path / "config.json").is_file():
        path = path / FILE
    if path.suffix == ".onnx" and path.is_file():
        return _describe_graph(path)
    if path.is_file() and is_conversation(path):
        return _describe_conversation(path)
    if path.is_file() and State.is_saved_state(path):
        return _describe_state(State.load(path))
    return _describe_features(path) or _describe_tuned_state(path) or _describe_checkpoint(path, name)


def _describe_checkpoint(path: Path, name: str) -> dict[str, Any]:
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
    fields: dict[str, Any] = {"file": checkpoint.description, "generation": network.generation}
    fields["dtype"] = str(network.dtype).removeprefix("torch.")
    if packed_as := _packed_as(checkpoint.tensors.values()):
        fields |= {"dtype": packed_as, "loaded as": fields["dtype"]}
    if network.quantization:
        fields["quantization"] = network.quantization
    for key, value in config.items():
        if (word := WORDS.get(key, key)) and value not in (None, False) and (value or word == key):
            fields[word] = value
    fields["parameters"] = n_parameters
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
        if length := trained_context(path, name):
            fields["trained context"] = length
        try:
            fields["tokenizer"] = (
                "in the file"
                if checkpoint.tokenizer is not None
                else str(guess_tokenizer(network.config.vocab_size, path if path.is_dir() else path.parent))
            )
        except InputError:
            fields["tokenizer"] = "none found: name one with --tokenizer to generate"
        usual = usual_template(network.name, fields["tokenizer"] == "world")
        try:
            template = model_template(path, select_notes(checkpoint.config), checkpoint.template)
            fields["template"] = describe_template(template or usual)
        except InputError as error:
            fields["template"] = str(error)
    return fields


def trained_context(path: Path, name: str) -> int | None:
    """The length in tokens of the texts that a checkpoint was trained on, which is no limit; None where neither the
    release-manifest.json of its folder nor its name ("ctx4096") says it.

    name: what `path` was found under.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        length = manifest["identity"]["training_context_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        length = None
    if type(length) is int and length > 0:
        return length
    found = next((found for text in (path.name, name) if (found := CONTEXT.search(text))), None)
    return int(found[1]) * (1024 if found[2] else 1) if found else None


def _packed_as(tensors: Iterable[LazyTensor]) -> str:
    """The type of the quantized numbers in a file, of most of them; "" if there are none."""
    sizes: Counter[str] = Counter()
    for x in tensors:
        sizes[x.packed_as] += x.numel()
    del sizes[""]
    return sizes.most_common(1)[0][0] if sizes else ""


def _describe_graph(path: Path) -> dict[str, Any]:
    try:
        import onnx
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading it needs the package onnx: pip install 'heronry[onnx]'") from None
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # of protobuf, whose classes differ
        raise InputError(f"{path}: damaged, or not an ONNX file") from error
    shapes = {
        x.name: [size.dim_param or size.dim_value for size in x.type.tensor_type.shape.dim]
        for x in (*proto.graph.input, *proto.graph.output)
    }
    names = dict(zip(next(iter(shapes.values()), []), ("batch", "tokens"), strict=False))  # of the first input

    def describe(values: Iterable[Any]) -> str:
        return ", ".join(
            f"{x.name} [{', '.join(str(names.get(size, size)) for size in shapes[x.name])}]" for x in values
        )

    notes = {entry.key: entry.value for entry in proto.metadata_props}
    fields: dict[str, Any] = {"kind": "ONNX graph", "generation": notes.get("model")}
    fields |= {"inputs": describe(proto.graph.input), "outputs": describe(proto.graph.output)}
    fields |= {key: int(notes[key]) for key in ("vocab_size", "image_size") if notes.get(key, "").isdecimal()}
    fields["parameters"] = sum(math.prod(x.dims) for x in proto.graph.initializer)
    data = path.with_name(f"{path.name}.data")
    fields["size"] = path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    return fields


def _describe_features(path: Path) -> dict[str, Any] | None:
    """None if they are none: of pictures, as `heronry see` writes them."""
    from ..formats import safetensors_file

    if not path.is_file() or "pictures" not in (metadata := safetensors_file.read_metadata(path)):
        return None
    tensors = safetensors_file.read(path)
    if tensors.keys() != {"features"}:
        return None
    pictures, channels = tensors["features"].shape
    fields = {"kind": "features of pictures", "pictures": pictures, "channels": channels}
    return fields | {"size": tensors["features"].nbytes, "fingerprint": metadata.get("model")}


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
    nodes = [record.get("turn") for record in rest if "turn" in record or "beginning" in record]
    branches: Mapping[str, Any] = next((x for x in reversed(records) if "heads" in x), {"heads": {"main": None}})
    lengths = {}
    for branch, number in branches["heads"].items():
        lengths[branch] = 0
        while number is not None and (turn := nodes[number]) is not None:
            lengths[branch], number = lengths[branch] + 1, turn["before"]
    return {
        "kind": "conversation",
        "branches": lengths,
        "branch": branches.get("branch", "main"),
        **({"messages before": len(begin["history"])} if begin["history"] else {}),
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
        checkpoint = formats.read(path)
    except InputError:
        return None
    tensors = checkpoint.tensors
    if not tensors or not all(name.endswith("att.time_state") for name in tensors):
        return None
    metadata = safetensors_file.read_metadata(path)
    first = next(iter(tensors.values()))
    if "fingerprint" in metadata:
        file = "a tuned state of heronry's"
    elif checkpoint.format == "webrwkv":
        file = "a tuned state of Ai00's or web-rwkv's: float16 and transposed, which is undone"
    else:
        file = "a tuned state as RWKV-LM, RWKV-PEFT and rwkv_lightning write it"
    return {
        "kind": "tuned state",
        "file": file,
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
        return ", ".join(f"{branch} ({count(turns, 'turn')})" for branch, turns in value.items())
    if name == "texts":
        return ", ".join(_shorten(text) for text in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items()) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


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
