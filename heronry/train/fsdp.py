"""A model in pieces: each of N processes holds an Nth of every parameter, of its gradient and of the optimiser's state.

torch's FSDP2 puts the parameters of a group together while it computes. What is special here:

- a group is a block; the embedding with the norm behind it, which the model calls and not its block; or the rest
- tuned initial states stay whole, for they are small and used where no module computes; their gradients are averaged
- checkpoints are those of torch.distributed.checkpoint, in safetensors with the place of every piece in the metadata:
  its own format has a pickle for a table of contents. Any number of processes reads them, and what one process alone
  has written as well
- accelerate's own way to FSDP2 is not taken, for it leaves processes on CPUs as they are without a word
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..models import Model

FILES = "shard-*-model-*.safetensors"  # by process and number
SIZE = 1 << 30  # bytes of one of them; writing takes as much memory again

T = TypeVar("T")


def rank() -> int:
    """The number of this process. The main one is 0."""
    return dist.get_rank() if _several() else 0


def share(things: Sequence[T]) -> Sequence[T]:
    """Those that fall to this process."""
    return things[rank() :: dist.get_world_size()] if _several() else things


def together(act: Callable[[], T]) -> list[T]:
    """What every process makes of it, in their order. Where one of them fails with an OSError, all do."""
    if not _several():
        return [act()]
    mine: T | OSError
    try:
        mine = act()
    except OSError as error:
        mine = error
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for x in found:
        if isinstance(x, OSError):
            raise x
    return found


def shard(model: Model, kind: str, device: torch.device) -> Model:
    """The same model, its pieces on the devices of all processes.

    model: on the CPU of the main process; on the meta device of the others, who get their pieces from there.
    kind: "full" puts a group's parameters together for its forward pass and once more for its backward pass,
        "gradients" keeps them in between.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # a state's shift is a view; nobody writes into what a block returns
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    values = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = set(_whole(model))
    for group in ([model.emb, model.blocks[0].ln0], *model.blocks):
        fully_shard(group, mesh=mesh, reshard_after_forward=kind == "full", ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    model.to_empty(device=device)
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    model.sharded = True
    return model


def gathered(model: Model) -> dict[str, Any]:
    """All parameters of a model in pieces, on the CPU of the main process; nothing on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def average(model: Model) -> None:
    """Averages the gradients of what stays whole."""
    for p in _whole(model):
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def write(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> list[Path]:
    """Writes the pieces of this process, of what is trained and of the optimiser's state, and its random state; the
    files. An OSError of one process is one of all."""
    import torch.distributed.checkpoint as dcp

    tensors: dict[str, Tensor] = {}
    for name, p in _trained(model).items():
        tensors |= {name: p.detach(), **{f"{name}|{what}": x for what, x in optimizer.state[p].items()}}
    randoms = [f"random.{i}" for i in range(dist.get_world_size())]
    places, size = dict.fromkeys(randoms, 1), 0
    for key, x in tensors.items():
        places[key] = 1 + size // (SIZE * dist.get_world_size())
        size += x.nbytes
    tensors[randoms[rank()]] = torch.get_rng_state()
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), places, save_distributed=True))
    except dcp.CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error
    return sorted(folder.glob(FILES.replace("*", f"{rank() + 1:05}", 1)))


def read(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Puts the numbers of a checkpoint where they were, each process its own; both may be in pieces or not."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    there: dict[str, Any] = reader.read_metadata().state_dict_metadata
    trained = _trained(model)
    for name, p in trained.items():
        if name not in there or there[name].size != p.shape:
            raise InputError(f"{folder}: is a checkpoint of another model ({name} is missing or of another shape)")
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in trained.items()}
    number = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, found in there.items():
        name, bar, what = key.rpartition("|")
        if not bar:
            continue
        if name not in trained:
            raise InputError(f"{folder}: its optimiser knows {name}, which is not trained here")
        p = trained[name]
        like = torch.zeros_like(p) if found.size == p.shape else torch.zeros(found.size, dtype=found.properties.dtype)
        tensors[key] = state.setdefault(number[p], {})[what] = like
    random = next(key for key in (f"random.{rank()}", "random.0", "random") if key in there)
    tensors[random] = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process alone need not be told that it is
        dcp.load(tensors, storage_reader=reader)
    torch.set_rng_state(tensors[random])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _whole(model: Model) -> list[torch.nn.Parameter]:
    """What every process holds all of."""
    return [p for name, p in model.named_parameters() if name.endswith("att.time_state")]


def _trained(model: Model) -> dict[str, torch.nn.Parameter]:
    """Parameters by name; their pieces, where a pass has put them together."""
    if model.sharded:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
