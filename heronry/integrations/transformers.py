"""Every RWKV as an ordinary model of `transformers`.

    heronry.integrations.transformers.register()

puts these classes into AutoConfig, AutoModelForCausalLM, AutoModel and AutoTokenizer, for the layouts that the hub has:
RWKV/rwkv-4-* ("rwkv"), RWKV/rwkv-5-* ("rwkv5"), RWKV/rwkv-6-* ("rwkv6") and RWKV/RWKV7-Goose-* ("rwkv7"). What
transformers' own class for RWKV-4 does is done here too, by our model.

- the cache of generate() is our State: a step costs the same after ten tokens and after a hundred thousand
- padding is left out of what is read, on whatever side it is, so that a row of a batch is what it would be alone
- the names of the weights in state_dict() are those of the hub, so that save_pretrained, Trainer and others write what
  the hub's other readers expect; adapters of peft keep the names of our modules ("key", "value", "receptance")
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .. import formats, hub
from ..checkpoint import DTYPES, assemble, load
from ..errors import InputError
from ..formats import huggingface
from ..formats.lazy_tensor import LazyTensor
from ..models import Model, State
from .configs import CONFIGS, Rwkv5Config, Rwkv6Config, RWKV7Config, RwkvBaseConfig, RwkvConfig
from .reading import read
from .tokenizer import RwkvTokenizer, chat_template

__all__ = [
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "Rwkv5Config",
    "Rwkv5ForCausalLM",
    "Rwkv5Model",
    "Rwkv6Config",
    "Rwkv6ForCausalLM",
    "Rwkv6Model",
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvModel",
    "RwkvPreTrainedModel",
    "RwkvTokenizer",
    "chat_template",
    "register",
]


@dataclass
class RwkvOutput(ModelOutput):
    """
    last_hidden_state: [B, T, C], what the head would read: after the last norm. A padded place has that of the last
        token before it.
    state, hidden_states: as of RwkvCausalLMOutput.
    """

    last_hidden_state: Tensor | None = None
    state: State | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RwkvCausalLMOutput(ModelOutput):
    """
    loss: [], the mean over the labels that count, in nats.
    logits: [B, T, V], or of the last tokens with logits_to_keep. A padded place has those of the last token before it.
    state: of B rows, what the next call goes on from.
    hidden_states: with output_hidden_states [B, T, C] of the embedding and of each block; places of padding hold 0.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class _Begun:
    """What peft is shown in place of a cache: its prompt tuning puts the trained vectors in front of whatever is read,
    at every step, unless it is given `past_key_values` that hold something already."""

    def get_seq_length(self) -> int:
        return 1


BEGUN = _Begun()


class RwkvPreTrainedModel(PreTrainedModel):
    """What models with and without a head have in common; each generation's differ in their configuration alone."""

    base_model_prefix = "rwkv"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: RwkvBaseConfig, rwkv: Model | None = None):
        super().__init__(config)
        if rwkv is None:
            cls, ours = config.ours()
            rwkv = cls(ours)
            if not rwkv.emb.weight.is_meta:
                rwkv.init_weights()
        self.rwkv = rwkv
        self.register_state_dict_post_hook(_to_hub)
        self.register_load_state_dict_pre_hook(_from_hub)
        self.post_init()

    @classmethod
    def of(cls, model: Model) -> RwkvPreTrainedModel:
        """A model of ours, as it is, in the class of its generation. They share their weights."""
        config = RwkvBaseConfig.of(model)
        return cls._class(config)(config, model)

    @classmethod
    def _class(cls, config: RwkvBaseConfig) -> type[RwkvPreTrainedModel]:
        """That of the generation, with a head or without."""
        return MODELS_OF[type(config)]

    @classmethod
    def _load(
        cls, path: Path, dtype: str | torch.dtype | None, device: torch.device | str, quantize: str | None
    ) -> Model:
        return load(path, dtype, device, quantize=quantize)

    def init_weights(self) -> None:
        """Done by the generation's file when the model is made."""

    def get_input_embeddings(self) -> nn.Module:
        return self.rwkv.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.rwkv.emb = value  # type: ignore[assignment]
        self._resized()

    def get_output_embeddings(self) -> nn.Module:
        return self.rwkv.head  # type: ignore[return-value]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.rwkv.head = new_embeddings
        self._resized()

    def _resized(self) -> None:
        self.rwkv.config = replace(self.rwkv.config, vocab_size=self.rwkv.emb.weight.shape[0])
        self.rwkv.invalidate_fingerprint()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        config: RwkvBaseConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        quantize: str | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """The model in a folder or in a repository of the hub, in eval mode.

        Args:
            dtype: "float32", torch.bfloat16 ...; None and "auto" keep the file's. torch_dtype is its old name.
            device_map: None, "auto", a device, or {"": device}. A model is not split over several.
            quantize: "int8" or "int4" packs the large matrices in our own way as they are read.
            options: of the hub: revision, cache_dir, token, local_files_only, force_download.
        """
        for name in ("quantization_config", "load_in_8bit", "load_in_4bit"):
            if options.get(name):
                raise InputError(f"{name} is for other models; quantize='int8' or 'int4' packs these")
        path = Path(pretrained_model_name_or_path)
        if not path.exists():
            known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
            path = hub.fetch(str(path), **{key: options[key] for key in known if options.get(key) is not None})
        wanted = torch_dtype if dtype is None else dtype
        model = cls._load(path, None if wanted == "auto" else wanted, _device(device_map), quantize)
        if config is None or not isinstance(config, RwkvBaseConfig):
            config = RwkvBaseConfig.of(model)
        made = cls._class(config)(config, model).eval()
        made.name_or_path = config._name_or_path = str(pretrained_model_name_or_path)
        if (path / "generation_config.json").is_file():
            made.generation_config = GenerationConfig.from_pretrained(path)
        info: dict[str, list] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (made, info) if output_loading_info else made

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        state: State | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        rest: Mapping[str, Any],
        last_only: bool = False,
    ) -> tuple[Tensor, State | None, tuple[Tensor, ...] | None]:
        """What `self.rwkv` makes of the arguments of forward, and with a cache the state."""
        for name in ("past_key_values", "cache"):
            if rest.get(name) is not None and rest[name] is not BEGUN:
                raise InputError(
                    f"RWKV has no {name} (peft's prefix tuning is not for it); what it has read is `state`"
                )
        collect = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        out, left, hidden = read(
            self.rwkv, input_ids, inputs_embeds, attention_mask, state, last_only=last_only, collect=bool(collect)
        )
        cached = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return out, left if cached else None, hidden


class _CausalLM(RwkvPreTrainedModel, GenerationMixin):
    """With a head."""

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
    ) -> RwkvCausalLMOutput | tuple:
        """
        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T] or longer, of which the last T columns count; 0 = not there, wherever it stands.
            state: what an earlier call returned.
            labels: [B, T], shifted here; -100 does not count.
            logits_to_keep: only for so many of the last places; 0 = all.
            inputs_embeds: [B, T, C], vectors of the embedding in place of input_ids.
        """
        last_only = logits_to_keep == 1 and labels is None
        logits, left, hidden = self._read(
            input_ids, inputs_embeds, attention_mask, state, use_cache, output_hidden_states, kwargs, last_only
        )
        if logits_to_keep > 1 and labels is None:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = RwkvCausalLMOutput(loss=loss, logits=logits, state=left, hidden_states=hidden)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only what the state has not read yet."""
        begun = state is not None and kwargs.get("is_first_iteration") is not True
        told = {
            "state": state,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "logits_to_keep": 1,
        }
        if begun:
            return told | {"input_ids": input_ids[:, -1:], "past_key_values": BEGUN}
        return told | ({"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds})

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
            # all that is new is one token a row: the mask of what was read is of no more use, and would grow
            model_kwargs.pop("attention_mask", None)
        return model_kwargs

    def _reorder_cache(self, state: State, beam_idx: Tensor) -> State:
        return state[beam_idx.tolist()]


class _Body(RwkvPreTrainedModel):
    """Without a head."""

    def __init__(self, config: RwkvBaseConfig, rwkv: Model | None = None):
        super().__init__(config, rwkv)
        self.rwkv = _without_head(self.rwkv)

    @classmethod
    def _class(cls, config: RwkvBaseConfig) -> type[RwkvPreTrainedModel]:
        return BODIES_OF[type(config)]

    @classmethod
    def _load(
        cls, path: Path, dtype: str | torch.dtype | None, device: torch.device | str, quantize: str | None
    ) -> Model:
        if dtype is not None and dtype not in (*DTYPES, *DTYPES.values()):
            raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
        wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
        try:
            checkpoint = formats.read(path)
            tensors = checkpoint.tensors
            if "emb.weight" in tensors:  # stands in for the head that the file need not have, and goes with it
                tensors.setdefault("head.weight", tensors["emb.weight"])
            return assemble(tensors, checkpoint.config, wanted, device, quantize=quantize)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def get_output_embeddings(self) -> None:  # type: ignore[override]
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
    ) -> RwkvOutput | tuple:
        """The arguments are those of the class with a head."""
        out, left, hidden = self._read(
            input_ids, inputs_embeds, attention_mask, state, use_cache, output_hidden_states, kwargs
        )
        output = RwkvOutput(last_hidden_state=out, state=left, hidden_states=hidden)
        return output if return_dict is not False else output.to_tuple()


def _without_head(model: Model) -> Model:
    """A model of the same parts that gives what its head would read; `model` stays as it is."""
    with torch.device("meta"):
        body = type(model)(model.config)
    body.emb, body.blocks, body.ln_out, body.head = model.emb, model.blocks, model.ln_out, nn.Identity()
    body.quantization = model.quantization
    body.native_step_enabled = False  # the C++ step gives logits
    return body.train(model.training)


def _device(map: Any) -> torch.device | str:
    if isinstance(map, dict):
        if set(map) != {""}:
            raise InputError("a model is not split over devices; device_map={'': device} puts all of it on one")
        map = map[""]
    if map is None:
        return "cpu"
    if map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{map}" if isinstance(map, int) else map


def _ours(names: Iterable[str], prefix: str) -> dict[str, str]:
    """The names that are parameters of our model as it is, without adapters: {with its prefix: without}."""
    inside = f"{prefix}rwkv."
    return {name: name.removeprefix(inside) for name in names if name.startswith(inside)}


def _is_plain(names: Iterable[str]) -> bool:
    return not any("lora_" in name or ".base_layer." in name or "modules_to_save" in name for name in names)


def _to_hub(module: RwkvPreTrainedModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """state_dict(): from our names to the hub's."""
    names = _ours(state, prefix)
    if not names or not _is_plain(names.values()):
        return
    ours = {short: LazyTensor.from_tensor(state.pop(long)) for long, short in names.items()}
    for name, x in huggingface.from_blinkdl(ours).items():
        state[prefix + name] = x.read()


def _from_hub(module: RwkvPreTrainedModel, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """load_state_dict(): from the hub's names to ours."""
    theirs = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if not _is_plain(theirs) or any(name.startswith("rwkv.emb.") for name in theirs.values()):
        return
    stored = {short: LazyTensor.from_tensor(state.pop(long)) for long, short in theirs.items()}
    shapes = {name: p.shape for name, p in module.rwkv.named_parameters()}
    for name, x in huggingface.to_blinkdl(stored).items():
        value = x.read()
        if name in shapes and value.numel() == shapes[name].numel():
            value = value.reshape(shapes[name])
        state[f"{prefix}rwkv.{name}" if name in shapes else prefix + name] = value


class RwkvForCausalLM(_CausalLM):
    """RWKV-4."""

    config_class = RwkvConfig


class RwkvModel(_Body):
    """RWKV-4 without its head."""

    config_class = RwkvConfig


class Rwkv5ForCausalLM(_CausalLM):
    """RWKV-5."""

    config_class = Rwkv5Config


class Rwkv5Model(_Body):
    """RWKV-5 without its head."""

    config_class = Rwkv5Config


class Rwkv6ForCausalLM(_CausalLM):
    """RWKV-6."""

    config_class = Rwkv6Config


class Rwkv6Model(_Body):
    """RWKV-6 without its head."""

    config_class = Rwkv6Config


class RWKV7ForCausalLM(_CausalLM):
    """RWKV-7."""

    config_class = RWKV7Config


class RWKV7Model(_Body):
    """RWKV-7 without its head."""

    config_class = RWKV7Config


MODELS_OF: dict[type[RwkvBaseConfig], type[RwkvPreTrainedModel]] = {
    cls.config_class: cls for cls in (RwkvForCausalLM, Rwkv5ForCausalLM, Rwkv6ForCausalLM, RWKV7ForCausalLM)
}
BODIES_OF: dict[type[RwkvBaseConfig], type[RwkvPreTrainedModel]] = {
    cls.config_class: cls for cls in (RwkvModel, Rwkv5Model, Rwkv6Model, RWKV7Model)
}


def register() -> None:
    """Puts the classes of this file into the Auto classes of transformers. Calling it again changes nothing."""
    for kind, config in CONFIGS.items():
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, MODELS_OF[config], exist_ok=True)
        AutoModel.register(config, BODIES_OF[config], exist_ok=True)
        AutoTokenizer.register(config, RwkvTokenizer, exist_ok=True)
