"""Vision-RWKV as a backbone of `transformers`, for UperNet, DETR, RT-DETR, Mask2Former and others.

    heronry.integrations.vision.register()

adds these classes to AutoConfig, AutoBackbone and AutoModel, so that a VisionRwkvConfig can be a `backbone_config`.
Weights come from heronry's own loader:

    vision = heronry.models.vision.create("vrwkv_small", pretrained="vrwkv_s_in1k_224.pth", num_classes=0)
    config = VisionRwkvConfig.from_heronry(vision, pyramid_channels=256, out_indices=[1, 2, 3])
    detector = RTDetrForObjectDetection(RTDetrConfig(backbone_config=config, ...))
    load_backbone(detector, vision)

- without pyramid_channels the feature maps are those of the blocks, all with the stride of the patches: "stage1" is
  that of block 0, and out_indices are the indices of `forward_intermediates`
- with pyramid_channels they are the four of models/vision/dense.py: "stage1" to "stage4" with strides 4, 8, 16, 32
"""

from __future__ import annotations

import copy
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import require

require("transformers", "heronry[transformers]")

from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling

from ..errors import InputError
from ..models import VISION_MODELS, VisionModel
from ..models.vision.dense import Scales

__all__ = [
    "VisionRwkvBackbone",
    "VisionRwkvConfig",
    "VisionRwkvModel",
    "VisionRwkvPreTrainedModel",
    "load_backbone",
    "register",
]

HUB_KEYS = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "dim_ffn": "intermediate_size"}
HEAD = ("num_classes", "head_hidden")  # settings of the head, which a backbone does not have


class VisionRwkvConfig(BackboneConfigMixin, PreTrainedConfig):
    """VRWKV and VRWKV6. Fields without a comment are as in models/vision/model.py."""

    model_type: ClassVar[str] = "vision_rwkv"

    generation: str = "vrwkv"  # or "vrwkv6"
    hidden_size: int = 192
    num_hidden_layers: int = 12
    intermediate_size: int | None = None  # None: 4 times hidden_size
    image_size: int = 224
    patch_size: int = 16
    key_norm: bool = False  # vrwkv only, like causal and segments
    head_size: int = 64  # vrwkv6 only, like the ranks
    mix_rank: int = 32
    decay_rank: int = 64
    post_norm: bool = False
    init_values: float | None = None
    drop_path: float = 0.0
    decay_lr: float = 1.0
    shift: str = "q"
    causal: bool = False
    segments: int | None = None
    pyramid_channels: int = 0  # 0: no pyramid
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        names, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if self.pyramid_channels and names is None and indices is None:
            names = self.stage_names
        self.set_output_features_output_indices(names, indices)
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """The names of all feature maps: of the pyramid, or of the blocks."""
        return [f"stage{i + 1}" for i in range(4 if self.pyramid_channels else self.num_hidden_layers)]

    def to_heronry(self) -> tuple[type[VisionModel], Any]:
        """The class of the heronry model and its configuration."""
        if self.generation not in VISION_MODELS:
            raise InputError(f"unknown generation {self.generation!r}; choose one of {', '.join(VISION_MODELS)}")
        cls = VISION_MODELS[self.generation]
        names = [field.name for field in fields(cls.Config) if field.name not in HEAD]
        return cls, cls.Config(num_classes=0, **{name: getattr(self, HUB_KEYS.get(name, name)) for name in names})

    @classmethod
    def from_heronry(cls, model: VisionModel, **options: Any) -> VisionRwkvConfig:
        """The configuration of a heronry model, without its head; `options`: pyramid_channels, out_indices ..."""
        settings = {HUB_KEYS.get(name, name): value for name, value in asdict(model.config).items() if name not in HEAD}
        return cls(generation=model.name, **settings, **options)


class VisionRwkvPreTrainedModel(PreTrainedModel):
    """The base of the backbone and the bare model: `self.vision` is a VisionModel without a head."""

    config_class = VisionRwkvConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: VisionRwkvConfig):
        super().__init__(config)
        cls, model_config = config.to_heronry()
        self.vision = cls(model_config)

    @classmethod
    def from_heronry(cls, model: VisionModel, **options: Any) -> Any:
        """A new model with a copy of the weights of a heronry model; `options` are those of the configuration."""
        copied: Any = cls(VisionRwkvConfig.from_heronry(model, **options))
        load_backbone(copied.to(model.pos_embed.device, model.pos_embed.dtype), model)
        return copied.train(model.training)

    def _initialize_weights(self, module: nn.Module, *rest: Any) -> None:
        """As in transformers, but for nested modules too, which it leaves out in classes of other packages."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """heronry's models and pyramids initialise themselves; weights loaded from a checkpoint are kept."""
        if isinstance(module, VisionModel | Scales):
            initialised = copy.deepcopy(module)
            initialised.init_weights()
            for parameter, initial in zip(module.parameters(), initialised.parameters(), strict=True):
                init.copy_(parameter, initial)


class VisionRwkvBackbone(BackboneMixin, VisionRwkvPreTrainedModel):
    """Normalised pictures [B, 3, height, width] of any size -> feature maps [B, channels, H, W]."""

    has_attentions = False

    def __init__(self, config: VisionRwkvConfig):
        super().__init__(config)
        channels = config.pyramid_channels
        # only the maps that are returned, because parameters of others would get no gradient
        self.scales = Scales(config.hidden_size, channels, self._out_maps()) if channels else None
        self.num_features = [channels or config.hidden_size for _ in self.stage_names]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """feature_maps: of `out_features`. hidden_states: of every block, with output_hidden_states."""
        out_maps = self._out_maps()
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        last = len(self.vision.layers) - 1
        blocks = range(last + 1) if hidden else [last] if self.scales is not None else out_maps
        features = dict(zip(blocks, self.vision.forward_intermediates(pixel_values, blocks), strict=True))
        maps = [features[i] for i in out_maps] if self.scales is None else self.scales(features[last]).values()
        output = BackboneOutput(feature_maps=tuple(maps), hidden_states=tuple(features.values()) if hidden else None)
        return output.to_tuple() if return_dict is False else output

    def _out_maps(self) -> list[int]:
        """The indices of the maps in `out_features`."""
        return [self.stage_names.index(name) for name in self.out_features]


class VisionRwkvModel(VisionRwkvPreTrainedModel):
    """Normalised pictures [B, 3, height, width] of any size -> the features of every patch and their mean."""

    def __init__(self, config: VisionRwkvConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """last_hidden_state [B, T, C], row by row; pooler_output [B, C]; hidden_states [B, T, C] of every block."""
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = self.vision.forward_intermediates(pixel_values, None if hidden else 1)
        rows = tuple(x.flatten(2).transpose(1, 2) for x in features)
        output = BaseModelOutputWithPooling(
            last_hidden_state=rows[-1],
            pooler_output=self.vision.forward_head(features[-1], pre_logits=True),
            hidden_states=rows if hidden else None,
        )
        return output.to_tuple() if return_dict is False else output


def load_backbone(model: nn.Module, vision: VisionModel) -> None:
    """Copies the weights of `vision`, without a head, into every Vision-RWKV inside `model`.

    Raises:
        InputError: there is none, or one of another size.
    """
    backbones = [module for module in model.modules() if isinstance(module, VisionRwkvPreTrainedModel)]
    if not backbones:
        raise InputError("this model contains no Vision-RWKV")
    weights = {name: x for name, x in vision.state_dict().items() if not name.startswith("head.")}
    shapes = {name: x.shape for name, x in weights.items()}
    for module in backbones:
        if shapes != {name: x.shape for name, x in module.vision.state_dict().items()}:
            raise InputError("the backbone has other sizes; VisionRwkvConfig.from_heronry(vision) has the right ones")
    for module in backbones:
        module.vision.load_state_dict(weights)


def register() -> None:
    """Adds the classes of this file to the Auto classes of transformers. Can be called repeatedly."""
    AutoConfig.register(VisionRwkvConfig.model_type, VisionRwkvConfig, exist_ok=True)
    AutoBackbone.register(VisionRwkvConfig, VisionRwkvBackbone, exist_ok=True)
    AutoModel.register(VisionRwkvConfig, VisionRwkvModel, exist_ok=True)
