"""Which states fit a model: a short text made of its configuration and of numbers of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor


def fingerprint(name: str, config: Any, tensors: Mapping[str, Tensor]) -> str:
    """See `Model.fingerprint`; `tensors` in the dtype of the file, so that a model loaded in float32 and in
    bfloat16 from one file shares its states, as does a bfloat16 copy of the file. The first 64 numbers of every
    tensor enter, in whatever shape; a tuned initial state does not, so that a state-tuned model shares its states
    with the model it came from."""
    sizes = {field: value for field, value in asdict(config).items() if field not in ("time_state", "deep_rank")}
    if getattr(config, "deep_rank", 0):  # RWKV-7 keeps the fingerprints that it had before there was a 7a
        sizes["deep_rank"] = config.deep_rank
    kind = hashlib.sha256(json.dumps([name, sizes], sort_keys=True).encode())
    weights = hashlib.sha256()
    for key in sorted(tensors):
        if not key.endswith(".time_state") and not tensors[key].is_meta:
            weights.update(key.encode() + sample(tensors[key]).numpy().tobytes())
    return kind.hexdigest()[:16] + weights.hexdigest()[:16]


def sample(x: Tensor) -> Tensor:
    """What of a tensor enters a fingerprint, float32; a fingerprint of samples is that of the tensors."""
    return x.detach().reshape(-1)[:64].bfloat16().float().cpu()
