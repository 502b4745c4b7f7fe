"""Every RWKV as an ordinary model of `transformers`.

    rookery.integrations.transformers.register()

puts these classes into AutoConfig, AutoModelForCausalLM and AutoTokenizer, for the layouts that the hub has:
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
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .. import hub
from ..checkpoint import load
from ..errors import InputError
from ..formats import huggingface
from ..formats.stored import Stored
from ..models import MODELS, Model, State
from .tokenizer import RwkvTokenizer, chat_template

__all__ = [
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "Rwkv5Config",
    "Rwkv5ForCausalLM",
    "Rwkv6Config",
    "Rwkv6ForCausalLM",
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvPreTrainedModel",
    "RwkvTokenizer",
    "chat_template",
    "register",
]


class RwkvBaseConfig(PreTrainedConfig):
    """What all generations have in common. None stands for what the training recipe takes."""

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embeddings": "context_length"}

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    context_length: int = 4096
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def ours(self) -> tuple[type[Model], Any]:
        """The class of the model and its configuration."""
        told = huggingface.describe({"model_type": self.model_type, **self.to_dict()})
        cls = MODELS[told.pop("model")]
        head = {"head_size": told["head_size"]} if "head_size" in told else {}
        usual = cls.Config.sized(self.vocab_size, self.num_hidden_layers, self.hidden_size, **head)
        known = {field.name for field in fields(usual)}
        return cls, replace(usual, **{key: value for key, value in told.items() if key in known})

    @classmethod
    def of(cls, model: Model, notes: Mapping[str, Any] | None = None) -> RwkvBaseConfig:
        """The configuration of a model of ours."""
        told = huggingface.config_json(model.name, model.config, notes or {}, model.emb.weight.dtype)
        return CONFIGS[told["model_type"]](**told)


class RwkvConfig(RwkvBaseConfig):
    """RWKV-4, in the words of transformers' own class."""

    model_type: ClassVar[str] = "rwkv"

    vocab_size: int = 50277
    attention_hidden_size: int | None = None
    layer_norm_epsilon: float = 1e-5
    rescale_every: int = 6


class Rwkv5Config(RwkvConfig):
    """RWKV-5."""

    model_type: ClassVar[str] = "rwkv5"

    vocab_size: int = 65536
    head_size: int = 64
    head_size_divisor: int | float = 8
    version: str = "5.2"


class Rwkv6Config(RwkvConfig):
    """RWKV-6."""

    model_type: ClassVar[str] = "rwkv6"

    vocab_size: int = 65536
    head_size: int = 64
    head_size_divisor: int | float = 8
    time_mix_extra_dim: int | None = None
    time_decay_extra_dim: int | None = None


class RWKV7Config(RwkvBaseConfig):
    """RWKV-7, in the words of flash-linear-attention."""

    model_type: ClassVar[str] = "rwkv7"

    head_dim: int = 64
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5


CONFIGS: dict[str, type[RwkvBaseConfig]] = {
    config.model_type: config for config in (RwkvConfig, Rwkv5Config, Rwkv6Config, RWKV7Config)
}


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


class RwkvPreTrainedModel(PreTrainedModel):
    """The one model class; each generation's differs in its configuration alone."""

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
        return MODELS_OF[type(config)](config, model)

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
        self.rwkv._fingerprint = None

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
        model = load(path, None if wanted == "auto" else wanted, device=_device(device_map), quantize=quantize)
        if config is None or not isinstance(config, RwkvBaseConfig):
            config = RwkvBaseConfig.of(model)
        made = MODELS_OF[type(config)](config, model).eval()
        made.name_or_path = config._name_or_path = str(pretrained_model_name_or_path)
        if (path / "generation_config.json").is_file():
            made.generation_config = GenerationConfig.from_pretrained(path)
        info: dict[str, list] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (made, info) if output_loading_info else made

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
        """
        if inputs_embeds is not None or input_ids is None:
            raise InputError("RWKV reads input_ids; it has no way in for inputs_embeds")
        rows, length = input_ids.shape
        there = None if attention_mask is None else attention_mask[:, -length:].bool()
        if there is None or bool(there.all()):
            there = None
        collect = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        last_only = logits_to_keep == 1 and labels is None
        with _Watched(self.rwkv, bool(collect)) as seen:
            if there is None:
                logits, left = self.rwkv(input_ids, state, last_only=last_only)
            else:
                logits, left = self._read_packed(input_ids, there, state, last_only)
        if logits_to_keep > 1 and labels is None:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        cached = use_cache if use_cache is not None else self.config.use_cache and not self.training
        hidden = None
        if collect:
            hidden = tuple(x if there is None else _spread(x, there, rows, length) for x in seen)
        output = RwkvCausalLMOutput(loss=loss, logits=logits, state=left if cached else None, hidden_states=hidden)
        return output if return_dict is not False else output.to_tuple()

    def _read_packed(self, tokens: Tensor, there: Tensor, state: State | None, last_only: bool) -> tuple[Tensor, State]:
        """Rows of different lengths, side by side without their padding."""
        counts = there.sum(1).tolist()
        if 0 in counts:
            raise InputError(f"row {counts.index(0)} of the batch is nothing but padding")
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        logits, left = self.rwkv(tokens[there][None], state, cu_seqlens=ends, last_only=last_only)
        if last_only:
            return logits.transpose(0, 1), left  # [B, 1, V]
        spread = _spread(logits, there, *tokens.shape)
        if not bool(there[:, -1].all()):
            place = torch.arange(tokens.shape[1], device=there.device).expand_as(there)
            before = torch.where(there, place, 0).cummax(1).values
            spread = spread.gather(1, before[..., None].expand_as(spread))
        return spread, left

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Only what the state has not read yet."""
        if state is not None and kwargs.get("is_first_iteration") is not True:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "state": state,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "logits_to_keep": 1,
        }

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if outputs.get("state") is not None:
            model_kwargs["state"] = outputs["state"]
            # all that is new is one token a row: the mask of what was read is of no more use, and would grow
            model_kwargs.pop("attention_mask", None)
        return model_kwargs

    def _reorder_cache(self, state: State, beam_idx: Tensor) -> State:
        return state[beam_idx.tolist()]


class _Watched:
    """While it is entered, collects what goes into the first block and comes out of each."""

    def __init__(self, model: Model, wanted: bool):
        self.model, self.wanted, self.hooks, self.seen = model, wanted, [], []  # type: ignore[var-annotated]

    def __enter__(self) -> list[Tensor]:
        if self.wanted:
            self.native, self.model.uses_native = self.model.uses_native, False  # C++ has no places to look in
            first = self.model.blocks[0]
            self.hooks.append(first.register_forward_pre_hook(lambda module, inputs: self.seen.append(inputs[0])))
            for block in self.model.blocks:
                self.hooks.append(block.register_forward_hook(lambda module, inputs, out: self.seen.append(out[0])))
        return self.seen

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.wanted:
            self.model.uses_native = self.native


def _spread(x: Tensor, there: Tensor, rows: int, length: int) -> Tensor:
    """A packed [1, sum, C] back in its places [B, T, C]; zeros where nothing was."""
    return x.new_zeros(rows, length, x.shape[-1]).masked_scatter(there[..., None], x)


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
    ours = {short: Stored.of(state.pop(long)) for long, short in names.items()}
    for name, x in huggingface.from_blinkdl(ours).items():
        state[prefix + name] = x.read()


def _from_hub(module: RwkvPreTrainedModel, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """load_state_dict(): from the hub's names to ours."""
    theirs = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if not _is_plain(theirs) or any(name.startswith("rwkv.emb.") for name in theirs.values()):
        return
    stored = {short: Stored.of(state.pop(long)) for long, short in theirs.items()}
    shapes = {name: p.shape for name, p in module.rwkv.named_parameters()}
    for name, x in huggingface.to_blinkdl(stored).items():
        value = x.read()
        if name in shapes and value.numel() == shapes[name].numel():
            value = value.reshape(shapes[name])
        state[f"{prefix}rwkv.{name}" if name in shapes else prefix + name] = value


class RwkvForCausalLM(RwkvPreTrainedModel, GenerationMixin):
    """RWKV-4."""

    config_class = RwkvConfig


class Rwkv5ForCausalLM(RwkvPreTrainedModel, GenerationMixin):
    """RWKV-5."""

    config_class = Rwkv5Config


class Rwkv6ForCausalLM(RwkvPreTrainedModel, GenerationMixin):
    """RWKV-6."""

    config_class = Rwkv6Config


class RWKV7ForCausalLM(RwkvPreTrainedModel, GenerationMixin):
    """RWKV-7."""

    config_class = RWKV7Config


MODELS_OF: dict[type[RwkvBaseConfig], type[RwkvPreTrainedModel]] = {
    cls.config_class: cls for cls in (RwkvForCausalLM, Rwkv5ForCausalLM, Rwkv6ForCausalLM, RWKV7ForCausalLM)
}


def register() -> None:
    """Puts the classes of this file into the Auto classes of transformers. Calling it again changes nothing."""
    for kind, config in CONFIGS.items():
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, MODELS_OF[config], exist_ok=True)
        AutoTokenizer.register(config, RwkvTokenizer, exist_ok=True)
