"""The options of the command, of a config file and of a replica are the same."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from heronry.cli.serve import serve
from heronry.serve.options import ServeOptions

OF_THE_PROCESS = {"host", "port", "replicas", "cluster"}


def test_the_command_and_a_config_file_take_the_same_options():
    parameters = inspect.signature(serve).parameters
    assert set(ServeOptions.model_fields) == set(parameters) - OF_THE_PROCESS
    for name, default in ServeOptions().model_dump().items():
        assert (parameters[name].default or None) == (default or None), name


@pytest.mark.parametrize("given", [{"max_row": 1}, {"max_rows": 0}, {"log_level": "loud"}, {"model": "one"}])
def test_a_config_file_that_is_wrong(given):
    with pytest.raises(ValidationError, match=next(iter(given))):
        ServeOptions(**given)
