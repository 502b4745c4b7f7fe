"""Fingerprints: a short text that identifies a model by its configuration and samples of its weights.

- a state, a tuned initial state or an adapter carries the fingerprint of the model it belongs to; another model
  refuses it
- of every tensor the shape and SAMPLES evenly spaced elements enter, the first and the last among them, so that the
  cost does not grow with the model
- elements are rounded to bfloat16: a float32 and a bfloat16 copy of one file have the same fingerprint
- a tuned initial state does not enter: a state-tuned model shares its states with the model it came from
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

VERSION = 2  # enters every fingerprint: raise it when the computation changes
SAMPLES = 128  # elements of a tensor
# These enter only where they are not the default, so that older states and adapters still fit.
NEWER_SETTINGS = {"ln0_folded": False, "final_norm": True, "dea_rank": 0, "dea_dim": 0}


def compute_fingerprint(name: str, config: Any, samples: Mapping[str, bytes]) -> str:
    """The fingerprint of a model: 16 hex digits for its class and configuration, 16 for its weights.

    The limit: two models that differ only in elements that are not sampled have the same fingerprint. Training moves
    nearly every element and is always seen; an edit of single elements of a large tensor may not be.

    Args:
        name: of the model's class, "rwkv7".
        config: the configuration, a dataclass; `time_state` does not enter.
        samples: `sample` of each tensor by name, taken in the dtype of the file.
    """
    settings = {
        field: value
        for field, value in asdict(config).items()
        if field != "time_state" and (field, value) not in NEWER_SETTINGS.items()
    }
    architecture = hashlib.sha256(json.dumps([VERSION, name, settings], sort_keys=True).encode())
    weights = hashlib.sha256()
    for key in sorted(samples):
        if not key.endswith(".time_state"):
            weights.update(key.encode() + samples[key])
    return architecture.hexdigest()[:16] + weights.hexdigest()[:16]


def sample(x: Tensor) -> bytes:
    """What enters a fingerprint of a tensor: its shape, and SAMPLES evenly spaced elements (all, if it has no more).

    Reads only these elements: `x` may lie in a mapped file, on a GPU, or transposed in memory.
    """
    shape = repr(tuple(x.shape)).encode()
    x = x.detach() if x.ndim else x.detach()[None]
    count = min(x.numel(), SAMPLES)
    # element i * (numel - 1) / (count - 1) of the flattened tensor: no fixed stride, which could stay in one column
    flat = np.arange(count) * (x.numel() - 1) // max(1, count - 1)
    # not x.flatten(), which copies a transposed tensor; nor torch.unravel_index, which imports sympy
    elements = x[tuple(torch.from_numpy(i).to(x.device) for i in np.unravel_index(flat, tuple(x.shape)))]
    return shape + elements.bfloat16().cpu().view(torch.int16).numpy().tobytes()


def sample_all(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """`sample` of each tensor that has elements, by name; those on the meta device have none."""
    return {name: sample(x) for name, x in tensors.items() if not x.is_meta}
