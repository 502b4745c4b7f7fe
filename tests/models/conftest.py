"""A model of every generation, and who computes it."""

from __future__ import annotations

import pytest

from heronry.checkpoint import assemble
from heronry.models import Model, native_step


@pytest.fixture
def model(version, random_checkpoint) -> Model:
    """Float32."""
    return assemble(random_checkpoint(version))


@pytest.fixture
def taken(monkeypatch) -> list[native_step.NativeStep]:
    """One entry for every call that the C++ has done."""
    calls: list[native_step.NativeStep] = []
    done = native_step.NativeStep.__call__

    def call(step, *args):
        calls.append(step)
        return done(step, *args)

    monkeypatch.setattr(native_step.NativeStep, "__call__", call)
    return calls
