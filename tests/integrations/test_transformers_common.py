"""transformers' own tests of every model, over our classes. They come with its source package, which `make test-all`
fetches; its tests of generation and of pipelines are not in there."""

from __future__ import annotations

import importlib
import sys
import unittest
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

pytest.importorskip("parameterized")
transformers = pytest.importorskip("transformers")
from transformers.models.auto import modeling_auto  # noqa: E402

from heronry.integrations.transformers import modeling, register  # noqa: E402
from heronry.integrations.transformers.configs import CONFIGS  # noqa: E402

SOURCES = Path(__file__).parents[2] / "build" / "transformers-tests" / "tests"
pytestmark = pytest.mark.slow
if not (SOURCES / "test_modeling_common.py").is_file():
    pytest.skip(f"transformers' source package is not in {SOURCES.parent} (make test-all)", allow_module_level=True)


def common_tests() -> ModuleType:
    """test_modeling_common.py, in a package of its own, with empty classes for what the source package lacks."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCES)]
    sys.modules["transformers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = ModuleType(f"transformers_tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # marks that its own configuration registers
        return importlib.import_module("transformers_tests.test_modeling_common")


common = common_tests()
register()

CHECKPOINTING = "gradient checkpointing is that of heronry's models, without transformers' layer for it"
BY_DESIGN = {
    "test_batching_equivalence": "sets an epsilon of 1 for the norms, which RWKV does not have",
    "test_cannot_load_with_meta_device_context_manager": "what is loaded lies on the device that is asked for",
    "test_generation_tester_mixin_inheritance": "the tests of generation are not in the source package",
    "test_gradient_checkpointing_enable_disable": CHECKPOINTING,
    "test_model_weights_reload_no_missing_tied_weights": "a file without any tensor of an RWKV is refused",
    "test_training_gradient_checkpointing": CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_false": CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_true": CHECKPOINTING,
}


class ModelTester:
    """A small model of a generation, and a batch for it."""

    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, vocab_size = 2, 7, 64, 2, 99

    def __init__(self, model_type: str):
        self.model_type = model_type

    def get_config(self):
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "intermediate_size": 96}
        head = {"rwkv": {}, "rwkv7": {"head_dim": 32}}.get(self.model_type, {"head_size": 32})
        return CONFIGS[self.model_type](num_hidden_layers=self.num_hidden_layers, **sizes, **head, pad_token_id=0)

    def prepare_config_and_inputs_for_common(self):
        tokens = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def common_tests_of(model_type: str) -> type:
    """The common tests for a generation."""
    config = CONFIGS[model_type]

    class Tests(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (modeling.BASE_MODELS[config], modeling.CAUSAL_LMS[config])
        has_attentions = False

        def setUp(self):
            if reason := BY_DESIGN.get(self._testMethodName):
                self.skipTest(reason)
            # which classes have a loss and which have none, the tests look up by name
            causal, base = (cls.__name__ for cls in reversed(self.all_model_classes))
            for mapping, name in (("MODEL_MAPPING_NAMES", base), ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", causal)):
                known = mock.patch.dict(getattr(modeling_auto, mapping), {model_type: name})
                known.start()
                self.addCleanup(known.stop)
            self.model_tester = ModelTester(model_type)

    return Tests


TestRwkv4, TestRwkv5, TestRwkv6, TestRwkv7 = map(common_tests_of, CONFIGS)
