"""Fully sharded training: each of N processes holds an Nth of every parameter, its gradient and its optimizer state.

torch's FSDP2 gathers the parameters of a group while it computes. What is special here:

- a group is a block; the embedding with the norm after it, which the model calls and not its block; or the rest
- tuned initial states stay unsharded, as they are small and used outside of any module; their gradients are averaged
- checkpoints are written by torch.distributed.checkpoint as safetensors files whose metadata say where each shard
  belongs; its own format would store its table of contents as a pickle. They can be read by any number of processes, as
  can the checkpoint of a single process
- accelerate's own FSDP2 support is not used, because it silently leaves processes on CPUs unsharded
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from ..models import Model, Network

SHARD_FILES = "shard-*-model-*.safetensors"  # numbers of the process and of the file
SHARD_SIZE = 1 << 30  # bytes per file; writing takes as much memory again

T = TypeVar("T")


def rank() -> int:
    """The number of this process; 0 is the main process."""
    return dist.get_rank() if _is_distributed() else 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The items that this process is responsible for."""
    return items[rank() :: dist.get_world_size()] if _is_distributed() else items


def run_on_all(function: Callable[[], T]) -> list[T]:
    """The results of all processes, in order of their rank. An OSError of one process is raised in all."""
    if not _is_distributed():
        return [function()]
    result: T | OSError
    try:
        result = function()
    except OSError as error:
        result = error
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    for x in results:
        if isinstance(x, OSError):
            raise x
    return results


def shard_model(model: Model, kind: str, device: torch.device) -> Model:
    """Shards a model, in place, over the devices of all processes.

    Args:
        model: on the CPU in the main process; on the meta device in the others, which get their shards from there.
        kind: "full" gathers the parameters of a group for its forward pass and again for its backward pass;
            "gradients" keeps them in between.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # the shift in a state is a view, but nothing writes into the output of a block
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    state_dict = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    unsharded = set(_unsharded_parameters(model))
    for group in ([model.emb, model.blocks[0].ln0], *model.blocks):
        fully_shard(group, mesh=mesh, reshard_after_forward=kind == "full", ignored_params=unsharded)
    fully_shard(model, mesh=mesh, ignored_params=unsharded)
    model.to_empty(device=device)
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    model.sharded = True
    return model


def gather_state_dict(model: Network) -> dict[str, Any]:
    """All parameters of a sharded model, on the CPU of the main process; {} in the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def average_unsharded_gradients(model: Network) -> None:
    """Averages, over all processes, the gradients of the parameters that are not sharded."""
    for p in _unsharded_parameters(model):
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def save_shards(folder: Path, model: Network, optimizer: torch.optim.Optimizer) -> list[Path]:
    """Writes what this process holds of the trained parameters and the optimizer state, and its random state.

    Returns:
        The files of this process.

    Raises:
        OSError: a file of any process could not be written.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    tensors: dict[str, Tensor] = {}
    for name, p in _trained_parameters(model).items():
        tensors |= {name: p.detach(), **{f"{name}|{key}": x for key, x in optimizer.state[p].items()}}
    random_keys = [f"random.{i}" for i in range(dist.get_world_size())]
    file_numbers, size = dict.fromkeys(random_keys, 1), 0
    for key, x in tensors.items():
        file_numbers[key] = 1 + size // (SHARD_SIZE * dist.get_world_size())
        size += x.nbytes
    tensors[random_keys[rank()]] = torch.get_rng_state()
    writer = HuggingFaceStorageWriter(str(folder), file_numbers, save_distributed=True)
    try:
        state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error
    return sorted(folder.glob(SHARD_FILES.replace("*", f"{rank() + 1:05}", 1)))


def load_shards(folder: Path, model: Network, optimizer: torch.optim.Optimizer) -> None:
    """Restores a checkpoint into a model and its optimizer, each process its own part; both may be sharded or not.

    Raises:
        InputError: it is a checkpoint of another model.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    trained = _trained_parameters(model)
    for name, p in trained.items():
        if name not in stored or stored[name].size != p.shape:
            raise InputError(f"{folder}: a checkpoint of another model ({name} is missing or has another shape)")
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in trained.items()}
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, info in stored.items():
        name, bar, what = key.rpartition("|")
        if not bar:
            continue
        if name not in trained:
            raise InputError(f"{folder}: has optimizer state for {name}, which is not trained here")
        p = trained[name]
        empty = torch.zeros_like(p) if info.size == p.shape else torch.zeros(info.size, dtype=info.properties.dtype)
        tensors[key] = state.setdefault(index[p], {})[what] = empty
    random_key = next(key for key in (f"random.{rank()}", "random.0", "random") if key in stored)
    tensors[random_key] = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is only one process
        state_dict_loader.load(tensors, storage_reader=reader)
    torch.set_rng_state(tensors[random_key])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _unsharded_parameters(model: Network) -> list[nn.Parameter]:
    """Those that every process holds completely."""
    return [p for name, p in model.named_parameters() if name.endswith("att.time_state")]


def _trained_parameters(model: Network) -> dict[str, nn.Parameter]:
    """By name; of a sharded model the shards, which the last pass may have left gathered."""
    if model.sharded:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
