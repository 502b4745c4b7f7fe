"""What `from_pretrained` is given: its options, the folder or file that it names, and the weights in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import formats, hub
from ...checkpoint import assemble, identify, locate, parse_device, parse_dtype, select_notes
from ...errors import InputError
from ...files import read_json
from ...formats import huggingface
from ...models import Model
from .configs import CONFIGS, RwkvBaseConfig

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# layouts whose config.json has a model_type of another class, with other keys: their tensors say what they are
OWN_CONFIGS = ("rwkv_rs", "fla_rwkv6")
# of from_pretrained: what only concerns how transformers itself reads files, or chooses among its kernels
WITHOUT_EFFECT = (
    *("_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "attn_implementation", "code_revision"),
    *(
        "low_cpu_mem_usage",
        "max_memory",
        "offload_folder",
        "proxies",
        "trust_remote_code",
        "tqdm_class",
        "use_safetensors",
    ),
    "weights_only",
)


@dataclass
class Weights:
    """The weights of a file or folder, and the heronry model that they are."""

    path: Path
    checkpoint: formats.Checkpoint
    model_class: type[Model]
    config: Any

    @classmethod
    def read(cls, path: Path, read: Callable[[Path], formats.Checkpoint]) -> Weights:
        try:
            checkpoint = read(path)
            model_class, config = identify(checkpoint.tensors, checkpoint.config)
            if not issubclass(model_class, Model):
                raise InputError(f"this model ({model_class.name}) reads pictures, not text")
            return cls(path, checkpoint, model_class, config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def describe(self) -> RwkvBaseConfig:
        """The configuration that says of them what config.json would."""
        dtype = self.checkpoint.tensors["emb.weight"].dtype
        notes = select_notes(self.checkpoint.config)
        config = huggingface.config_json(self.model_class.name, self.config, notes, dtype)
        return CONFIGS[config["model_type"]](**config)

    def assemble(self, dtype: str | torch.dtype | None, device: torch.device | str, quantize: str | None) -> Model:
        try:
            target = None if dtype is None else parse_dtype(dtype)
            return assemble(self.checkpoint.tensors, self.checkpoint.config, target, device, quantize=quantize)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error


def find(name: str | os.PathLike[str] | None, subfolder: str, hub_options: Mapping[str, Any]) -> Path | None:
    """The local path of a model by its path or its name on the hub."""
    if name is None:
        return None
    path = Path(name)
    if not path.exists() and hub.is_name(path):
        path = hub.fetch(path, **{key: value for key, value in hub_options.items() if value is not None})
    if not (path / subfolder).exists():
        raise InputError(f"{path / subfolder}: no such file or folder")
    return locate(path / subfolder)


def read_config(path: Path | None, options: dict[str, Any]) -> tuple[RwkvBaseConfig | None, dict[str, Any]]:
    """The configuration in a folder of Hugging Face's layout, changed by the options that it knows, and the others."""
    if path is None or not (path / "config.json").is_file():
        return None, options
    model_type = read_json(path / "config.json").get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        return None, options
    config: RwkvBaseConfig
    config, options = CONFIGS[model_type].from_pretrained(path, return_unused_kwargs=True, **options)
    return config, options


def parse_device_map(device_map: Any) -> torch.device | str:
    """The device for the whole model."""
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise InputError("a model cannot be split over devices; use device_map={'': device}")
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    if device_map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return parse_device(f"cuda:{device_map}" if isinstance(device_map, int) else device_map)
