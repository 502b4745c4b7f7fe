"""What wrappers put in front of the names of tensors: training frameworks, torch.compile, peft, and classes that hold
the model under a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ..errors import InputError

T = TypeVar("T")

OUTSIDE = re.compile(
    r"^(?:(?:base_model\.model|module|model|rwkv7?|_forward_module|_orig_mod|_fsdp_wrapped_module)\.)+"
)
INSIDE = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # around single blocks


def strip_prefixes(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors, in the same order, under the names that they have in the model itself.

    Raises:
        InputError: two tensors would have the same name.
    """
    plain: dict[str, T] = {}
    for name, x in tensors.items():
        short = INSIDE.sub("", OUTSIDE.sub("", name))
        if short in plain:
            raise InputError(f"{short} occurs twice, also as {name}")
        plain[short] = x
    return plain
