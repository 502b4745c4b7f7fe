"""Sampling by name."""

from __future__ import annotations

import pytest

from heronry.engine.options import resolve
from heronry.engine.presets import PRESETS, preset_by_name
from heronry.engine.sampling import Sampling
from heronry.errors import InputError
from heronry.text.chat_templates import FOCUSED


def test_a_name_stands_for_its_sampling():
    assert PRESETS["chat"] == Sampling(**FOCUSED)
    assert PRESETS["tools"] == Sampling(temperature=0.3, top_p=0.5, penalty_decay=1)

    def sampling(given, prompts=1, **others):
        return resolve({"sampling": given, **others}, 1, Sampling(), 100, prompts).samplings

    assert sampling("maths", top_p=0.5) == [Sampling(temperature=0.3, top_p=0.5)]
    assert sampling(["fixed", Sampling(top_k=3)], 2) == [Sampling(temperature=0), Sampling(top_k=3)]


def test_an_unknown_name():
    with pytest.raises(InputError, match=r"unknown sampling preset 'tols'; did you mean 'tools'\?") as error:
        preset_by_name("tols")
    assert error.value.param == "preset"
