"""What loading a file is refused with."""

from __future__ import annotations

import pytest

import heronry
from heronry import InputError


def refusal(path):
    with pytest.raises(InputError) as caught:
        heronry.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")
