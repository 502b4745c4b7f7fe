"""What the tests of conversions share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import heronry
from heronry import InputError
from heronry.convert import convert

TEXT = torch.tensor([[3, 1, 4, 1, 5, 92, 65, 35, 8]])


@torch.inference_mode()
def read(path: Path) -> torch.Tensor:
    return heronry.load(path, dtype="float32")(TEXT)[0]


def refusal(*args, **options) -> str:
    with pytest.raises(InputError) as caught:
        convert(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
