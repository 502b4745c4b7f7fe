"""The models as classes of `transformers`, with and without a head.

- the cache of generate() is a State: a step costs the same after ten tokens and after a hundred thousand
- padding is not read, on either side, so that a row of a batch gives what it would give alone (masked_forward.py)
- the names of the weights in state_dict() are those of the hub (state_dict_names.py)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.utils.generic import ModelOutput

from ... import formats
from ...checkpoint import parse_dtype
from ...errors import InputError
from ...formats import huggingface
from ...formats.lazy_tensor import Tensors, as_lazy
from ...models import Model, State
from ...quantization import quantize as heronry_quantize
from .configs import Rwkv5Config, Rwkv6Config, RWKV7Config, RwkvBaseConfig, RwkvConfig
from .masked_forward import masked_forward
from .state_dict_names import rename_from_hub, rename_to_hub
from .weights import HUB_OPTIONS, OWN_CONFIGS, WITHOUT_EFFECT, Weights, find, parse_device_map, read_config

logger = logging.getLogger(__name__)


@dataclass
class RwkvOutput(ModelOutput):
    """
    last_hidden_state: [B, T, C], the input of the head: after the last norm. A padded position has that of the last
        token before it.
    state, hidden_states: as in RwkvCausalLMOutput.
    """

    last_hidden_state: Tensor | None = None
    state: State | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RwkvCausalLMOutput(ModelOutput):
    """
    loss: [], the mean over all labels but -100, in nats.
    logits: [B, T, V], or with logits_to_keep those of the last tokens. A padded position has those of the last token
        before it.
    state: of B rows, for the next call.
    hidden_states: with output_hidden_states, [B, T, C] of the embedding and of each block, zero at padded positions.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class _CachedOutput(ModelOutput):
    """logits and the state, as `_call_with_cache` returns them."""

    logits: Tensor | None = None
    cache: State | None = None
    past_key_values: State | None = None


class _NonEmptyCache:
    """A stand-in for a cache, for peft: its prompt tuning prepends the trained vectors at every step, unless
    `past_key_values` already contain something."""

    def get_seq_length(self) -> int:
        return 1


NON_EMPTY_CACHE = _NonEmptyCache()


class RwkvPreTrainedModel(PreTrainedModel):
    """The base of the models with and without a head; those of different generations differ only in their config."""

    base_model_prefix = "rwkv"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: RwkvBaseConfig, rwkv: Model | None = None):
        super().__init__(config)
        if rwkv is None:
            cls, model_config = config.to_heronry()
            rwkv = cls(model_config)
            if not rwkv.emb.weight.is_meta:
                rwkv.init_weights()
        self.rwkv = rwkv
        self.register_state_dict_post_hook(rename_to_hub)
        self.register_load_state_dict_pre_hook(rename_from_hub)
        self.post_init()

    @classmethod
    def from_heronry(cls, model: Model) -> RwkvPreTrainedModel:
        """A heronry model in the class of its generation. They share their weights."""
        config = RwkvBaseConfig.from_heronry(model)
        return cls._class_for(config)(config, model)

    @classmethod
    def _class_for(cls, config: RwkvBaseConfig) -> type[RwkvPreTrainedModel]:
        """The class for the generation, with or without a head as this one."""
        return CAUSAL_LMS[type(config)]

    @classmethod
    def _read(cls, path: Path) -> formats.Checkpoint:
        """The contents of a file or folder."""
        return formats.read(path)

    def init_weights(self) -> None:
        """Does nothing: `Model.init_weights` was called in the constructor."""

    def get_input_embeddings(self) -> nn.Module:
        return self.rwkv.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        variant = getattr(self.rwkv.config, "variant", "")
        if variant and len(value.weight) != self.rwkv.config.vocab_size:
            raise InputError(f"the vocabulary of {variant} cannot be resized: it has tables in every layer")
        self.rwkv.emb = value  # type: ignore[assignment]
        self._adopt_vocab_size()

    def get_output_embeddings(self) -> nn.Module:
        return self.rwkv.head  # type: ignore[return-value]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.rwkv.head = new_embeddings
        self._adopt_vocab_size()

    def _adopt_vocab_size(self) -> None:
        """Takes the size of a replaced embedding."""
        self.rwkv.config = replace(self.rwkv.config, vocab_size=self.rwkv.emb.weight.shape[0])
        self.rwkv.invalidate_fingerprint()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: RwkvBaseConfig | str | os.PathLike[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        subfolder: str = "",
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        quantize: str | None = None,
        ignore_mismatched_sizes: bool = False,
        generation_config: GenerationConfig | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Loads the model in a folder or in a repository on the hub, in eval mode.

        Args:
            pretrained_model_name_or_path: may be None where config and state_dict are given.
            config: of another size than the weights: what fits is taken, what is missing is initialised.
            state_dict: in place of the weights in the folder, under the names of state_dict().
            subfolder: of the folder or repository.
            dtype: "float32", torch.bfloat16 ...; None and "auto" keep that of the file. torch_dtype is its old name.
            device_map: None, "auto", a device, or {"": device}. A model cannot be split over several devices.
            quantize: "int8" or "int4", as for heronry.load.
            ignore_mismatched_sizes: initialise weights of other shapes than the config says; else they are an error.
            options: for the hub: revision, cache_dir, token, local_files_only, force_download; without config, keys of
                the configuration to change, such as num_hidden_layers.

        Raises:
            InputError: an unknown option, or weights that do not fit.
        """
        for name in ("quantization_config", "load_in_8bit", "load_in_4bit"):
            if options.pop(name, None):
                raise InputError(f"{name} is not supported; use quantize='int8' or 'int4'")
        if options.pop("gguf_file", None):
            raise InputError("gguf_file is not supported; give the path of the file itself")
        hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        for name in WITHOUT_EFFECT:
            options.pop(name, None)
        device, dtype = parse_device_map(device_map), torch_dtype if dtype is None else dtype
        path = find(pretrained_model_name_or_path, subfolder, hub_options)
        if not isinstance(config, RwkvBaseConfig | None):
            config = read_config(find(config, "", hub_options), {})[0]
        elif config is None and path is not None:
            config, options = read_config(path, options)
        if options:
            raise InputError(f"from_pretrained has no option {next(iter(options))!r}")
        weights = None if path is None or state_dict is not None else Weights.read(path, cls._read)
        if weights is not None and (weights.checkpoint.layout or weights.checkpoint.format) in OWN_CONFIGS:
            config = None  # also one that an Auto class has read
        if config is None:
            if weights is None:
                raise InputError("give a folder, or config= and state_dict=")
            config = weights.describe()
            fits = True
        else:
            fits = weights is not None and config.to_heronry() == (weights.model_class, weights.config)
        loading_info: dict[str, Any] = {
            key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        }
        tied = bool(config.tie_word_embeddings)  # also where only an option says so
        if weights is not None and tied:
            weights.checkpoint.tensors = huggingface.to_blinkdl(weights.checkpoint.tensors, tied)
        if weights is not None and fits:
            rwkv = weights.assemble(None if dtype == "auto" else dtype, device, quantize)
            model: Any = cls._class_for(config)(config, rwkv)
        else:
            tensors = weights.checkpoint.tensors if weights is not None else as_lazy(state_dict or {})
            model = cls._class_for(config)(config)
            loading_info |= model._load_what_fits(huggingface.to_blinkdl(tensors, tied), ignore_mismatched_sizes)
            if dtype in (None, "auto") and tensors:
                dtype = next(iter(tensors.values())).dtype
            model.to(device, None if dtype in (None, "auto") else parse_dtype(dtype))
            if quantize is not None:
                heronry_quantize(model.rwkv, quantize)
        if tied and "head.weight" in model.rwkv.state_dict():
            model.config.tie_word_embeddings = False  # as it will be saved
            if model.rwkv.has_copied_head():
                logger.warning("the head is tied to the embedding; here it is a copy, trained and saved apart")
        model.eval()
        model.name_or_path = config._name_or_path = str(pretrained_model_name_or_path or "")
        if generation_config is not None:
            model.generation_config = generation_config
        elif path is not None and (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return (model, loading_info) if output_loading_info else model

    def _load_what_fits(self, tensors: Tensors, ignore_mismatched_sizes: bool) -> dict[str, set[Any]]:
        """Copies tensors under BlinkDL's names into this new model; says what it did not find or could not take."""
        parameters = self.rwkv.state_dict()
        head = {"head.weight"} - parameters.keys()  # a model without a head has no use for it
        unexpected = tensors.keys() - parameters.keys() - head - set(self.rwkv.ignored_keys)
        missing, mismatched = set(), set()
        for name, parameter in parameters.items():
            if name not in tensors:
                missing.add(name)
            elif tensors[name].numel() == parameter.numel():
                parameter.copy_(tensors[name].read().reshape(parameter.shape))
            else:
                mismatched.add((name, tensors[name].shape, parameter.shape))
        if mismatched and not ignore_mismatched_sizes:
            name, found, expected = min(mismatched)
            raise InputError(f"{name} is {list(found)} instead of {list(expected)}; see ignore_mismatched_sizes=True")
        for what, names in (("not in the weights, newly initialized", missing), ("not used", unexpected)):
            if names:
                logger.warning("%d tensors are %s: %s", len(names), what, ", ".join(sorted(names)[:3]))
        self.rwkv.invalidate_fingerprint()
        return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}

    def _run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        state: State | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        other_arguments: Mapping[str, Any],
        last_only: bool = False,
    ) -> tuple[Tensor, State | None, tuple[Tensor, ...] | None]:
        """The output of `self.rwkv` for the arguments of forward, the state if it is to be cached, hidden states."""
        for name in ("past_key_values", "cache"):
            if other_arguments.get(name) is not None and other_arguments[name] is not NON_EMPTY_CACHE:
                raise InputError(f"RWKV has no {name} (peft's prefix tuning is not supported); its cache is `state`")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        output, new_state, hidden = masked_forward(
            self.rwkv,
            input_ids,
            inputs_embeds,
            attention_mask,
            state,
            last_only=last_only,
            output_hidden_states=output_hidden_states,
        )
        cached = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return output, new_state if cached else None, hidden


class _CausalLM(RwkvPreTrainedModel, GenerationMixin):
    """A model with a head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> RwkvCausalLMOutput | tuple[Any, ...]:
        """
        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T] or longer, of which the last T columns count; 0 = padding, at any position.
            state: as returned by an earlier call.
            labels: [B, T], the input_ids: they are shifted here; -100 is ignored.
            logits_to_keep: the number of last positions that logits are returned for; 0 = all.
            inputs_embeds: [B, T, C], instead of input_ids.
        """
        last_only = logits_to_keep == 1 and labels is None
        logits, new_state, hidden = self._run(
            input_ids, inputs_embeds, attention_mask, state, use_cache, output_hidden_states, kwargs, last_only
        )
        if logits_to_keep > 1 and labels is None:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = RwkvCausalLMOutput(loss=loss, logits=logits, state=new_state, hidden_states=hidden)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of the next step: only tokens that the state does not contain yet."""
        is_first = state is None or kwargs.get("is_first_iteration") is True
        inputs = {
            "state": state,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "logits_to_keep": 1,
        }
        if not is_first:
            return inputs | {"input_ids": input_ids[:, -1:], "past_key_values": NON_EMPTY_CACHE}
        return inputs | ({"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds})

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if outputs.get("state") is not None:
            model_kwargs["state"] = outputs["state"]
            # from now on one token per row is new: the mask of the prompt is not needed, and would grow
            model_kwargs.pop("attention_mask", None)
        return model_kwargs

    def _get_logits_processor(self, *arguments: Any, **options: Any) -> LogitsProcessorList:
        """As in any model; the second pass of classifier-free guidance gets its cache as we have it."""
        processors: LogitsProcessorList = super()._get_logits_processor(*arguments, **options)  # type: ignore[misc]
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = self._call_with_cache
        return processors

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, *arguments: Any, tokenizer: Any = None, **options: Any
    ) -> Any:
        """As in any model; the tokenizer that stop strings need is by default the one in the model's folder."""
        if generation_config.stop_strings is not None and tokenizer is None and self.name_or_path:
            tokenizer = AutoTokenizer.from_pretrained(self.name_or_path)
        return super()._get_stopping_criteria(  # type: ignore[misc]
            generation_config, *arguments, tokenizer=tokenizer, **options
        )

    def _call_with_cache(
        self, input_ids: Tensor, cache: State | None = None, past_key_values: State | None = None, **options: Any
    ) -> _CachedOutput:
        """A call whose state goes by the names that versions of transformers have for a cache."""
        output = self(input_ids, state=past_key_values if cache is None else cache, **options)
        return _CachedOutput(output.logits, output.state, output.state)

    def _reorder_cache(self, state: State, beam_idx: Tensor) -> State:
        return state[beam_idx.tolist()]


class _BaseModel(RwkvPreTrainedModel):
    """A model without a head."""

    def __init__(self, config: RwkvBaseConfig, rwkv: Model | None = None):
        super().__init__(config, rwkv)
        self.rwkv = self.rwkv.without_head()

    @classmethod
    def _class_for(cls, config: RwkvBaseConfig) -> type[RwkvPreTrainedModel]:
        return BASE_MODELS[type(config)]

    @classmethod
    def _read(cls, path: Path) -> formats.Checkpoint:
        checkpoint = formats.read(path)
        if "emb.weight" in checkpoint.tensors:  # in place of a missing head, which is dropped anyway
            checkpoint.tensors.setdefault("head.weight", checkpoint.tensors["emb.weight"])
        return checkpoint

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> RwkvOutput | tuple[Any, ...]:
        """As for the class with a head."""
        last_hidden_state, new_state, hidden = self._run(
            input_ids, inputs_embeds, attention_mask, state, use_cache, output_hidden_states, kwargs
        )
        output = RwkvOutput(last_hidden_state=last_hidden_state, state=new_state, hidden_states=hidden)
        return output if return_dict is not False else output.to_tuple()


class RwkvForCausalLM(_CausalLM):
    """RWKV-4."""

    config_class = RwkvConfig


class RwkvModel(_BaseModel):
    """RWKV-4 without its head."""

    config_class = RwkvConfig


class Rwkv5ForCausalLM(_CausalLM):
    """RWKV-5."""

    config_class = Rwkv5Config


class Rwkv5Model(_BaseModel):
    """RWKV-5 without its head."""

    config_class = Rwkv5Config


class Rwkv6ForCausalLM(_CausalLM):
    """RWKV-6."""

    config_class = Rwkv6Config


class Rwkv6Model(_BaseModel):
    """RWKV-6 without its head."""

    config_class = Rwkv6Config


class RWKV7ForCausalLM(_CausalLM):
    """RWKV-7."""

    config_class = RWKV7Config


class RWKV7Model(_BaseModel):
    """RWKV-7 without its head."""

    config_class = RWKV7Config


CAUSAL_LMS: dict[type[RwkvBaseConfig], type[RwkvPreTrainedModel]] = {
    cls.config_class: cls for cls in (RwkvForCausalLM, Rwkv5ForCausalLM, Rwkv6ForCausalLM, RWKV7ForCausalLM)
}
BASE_MODELS: dict[type[RwkvBaseConfig], type[RwkvPreTrainedModel]] = {
    cls.config_class: cls for cls in (RwkvModel, Rwkv5Model, Rwkv6Model, RWKV7Model)
}
