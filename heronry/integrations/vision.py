"""Vision-RWKV as a backbone of `transformers`: UperNet, DETR, RT-DETR, Mask2Former and others run over it.

    heronry.integrations.vision.register()

puts these classes into AutoConfig, AutoBackbone and AutoModel, so that what takes a `backbone_config` takes a
VisionRwkvConfig. Weights come from our own loader:

    vision = heronry.models.vision.create("vrwkv_small", pretrained="vrwkv_s_in1k_224.pth", num_classes=0)
    config = VisionRwkvConfig.of(vision, pyramid_channels=256, out_indices=[1, 2, 3])
    detector = RTDetrForObjectDetection(RTDetrConfig(backbone_config=config, ...))
    fill(detector, vision)

- without pyramid_channels the maps are those of the blocks, all of one stride: "stage1" is that of block 0, and
  out_indices are the indices of `forward_intermediates`
- with it they are the four of models/dense.py: "stage1" to "stage4" of strides 4, 8, 16 and 32
"""

from __future__ import annotations

import copy
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
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
    "fill",
    "register",
]

THEIRS = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "dim_ffn": "intermediate_size"}
HEAD = ("num_classes", "head_hidden")  # what a backbone has none of


class VisionRwkvConfig(BackboneConfigMixin, PreTrainedConfig):
    """VRWKV and VRWKV6. What has no comment is as in models/vision/model.py."""

    model_type: ClassVar[str] = "vision_rwkv"

    generation: str = "vrwkv"  # or "vrwkv6"
    hidden_size: int = 192
    num_hidden_layers: int = 12
    intermediate_size: int | None = None  # None: 4 times hidden_size
    image_size: int = 224
    patch_size: int = 16
    key_norm: bool = False  # of vrwkv, as are causal and segments
    head_size: int = 64  # of vrwkv6, as are the ranks
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
        """The maps there are: of the pyramid, or of the blocks."""
        return [f"stage{i + 1}" for i in range(4 if self.pyramid_channels else self.num_hidden_layers)]

    def ours(self) -> tuple[type[VisionModel], Any]:
        """The class of the model and its configuration."""
        if self.generation not in VISION_MODELS:
            raise InputError(f"there is no generation {self.generation!r}; known are {', '.join(VISION_MODELS)}")
        cls = VISION_MODELS[self.generation]
        names = [field.name for field in fields(cls.Config) if field.name not in HEAD]
        return cls, cls.Config(num_classes=0, **{name: getattr(self, THEIRS.get(name, name)) for name in names})

    @classmethod
    def of(cls, model: VisionModel, **options: Any) -> VisionRwkvConfig:
        """The configuration of a model of ours, without its head; `options`: pyramid_channels, out_indices ..."""
        told = {THEIRS.get(name, name): value for name, value in asdict(model.config).items() if name not in HEAD}
        return cls(generation=model.name, **told, **options)


class VisionRwkvPreTrainedModel(PreTrainedModel):
    """What the backbone and the bare model have in common: `self.vision`, a VisionModel without a head."""

    config_class = VisionRwkvConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: VisionRwkvConfig):
        super().__init__(config)
        cls, ours = config.ours()
        self.vision = cls(ours)

    @classmethod
    def of(cls, model: VisionModel, **options: Any) -> Any:
        """A new one with a copy of the weights of a model of ours; `options` of the configuration."""
        made: Any = cls(VisionRwkvConfig.of(model, **options))
        fill(made.to(model.pos_embed.device, model.pos_embed.dtype), model)
        return made.train(model.training)

    def _initialize_weights(self, module: nn.Module, *rest: Any) -> None:
        """As in any model of transformers, which in classes that are not its own leaves out modules of modules."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Models and pyramids of ours initialise themselves in whole; what a checkpoint has filled stays."""
        if isinstance(module, VisionModel | Scales):
            new = copy.deepcopy(module)
            new.init_weights()
            for mine, fresh in zip(module.parameters(), new.parameters(), strict=True):
                init.copy_(mine, fresh)


class VisionRwkvBackbone(BackboneMixin, VisionRwkvPreTrainedModel):
    """Pictures [B, 3, height, width], normalised, of any size -> maps [B, channels, H, W]."""

    has_attentions = False

    def __init__(self, config: VisionRwkvConfig):
        super().__init__(config)
        channels = config.pyramid_channels
        # a map that nobody reads would have parameters without gradients
        self.scales = Scales(config.hidden_size, channels, self._wanted()) if channels else None
        self.num_features = [channels or config.hidden_size for _ in self.stage_names]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """feature_maps: of `out_features`. hidden_states: of every block, with output_hidden_states."""
        wanted = self._wanted()
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        last = len(self.vision.layers) - 1
        blocks = range(last + 1) if hidden else [last] if self.scales is not None else wanted
        seen = dict(zip(blocks, self.vision.forward_intermediates(pixel_values, blocks), strict=True))
        maps = [seen[i] for i in wanted] if self.scales is None else self.scales(seen[last]).values()
        output = BackboneOutput(feature_maps=tuple(maps), hidden_states=tuple(seen.values()) if hidden else None)
        return output.to_tuple() if return_dict is False else output

    def _wanted(self) -> list[int]:
        return [self.stage_names.index(name) for name in self.out_features]


class VisionRwkvModel(VisionRwkvPreTrainedModel):
    """Pictures [B, 3, height, width], normalised, of any size -> the features of every patch and their mean."""

    def __init__(self, config: VisionRwkvConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """last_hidden_state [B, T, C], row by row; pooler_output [B, C]; hidden_states [B, T, C] of every block."""
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen = self.vision.forward_intermediates(pixel_values, None if hidden else 1)
        rows = tuple(x.flatten(2).transpose(1, 2) for x in seen)
        output = BaseModelOutputWithPooling(
            last_hidden_state=rows[-1],
            pooler_output=self.vision.forward_head(seen[-1], pre_logits=True),
            hidden_states=rows if hidden else None,
        )
        return output.to_tuple() if return_dict is False else output


def fill(model: nn.Module, vision: VisionModel) -> None:
    """Copies the weights of `vision` into every backbone of this file inside `model`; a head stays behind.

    Raises:
        InputError: there is none, or one of another size.
    """
    found = [module for module in model.modules() if isinstance(module, VisionRwkvPreTrainedModel)]
    if not found:
        raise InputError("there is no Vision-RWKV in this model")
    weights = {name: x for name, x in vision.state_dict().items() if not name.startswith("head.")}
    shapes = {name: x.shape for name, x in weights.items()}
    for module in found:
        if shapes != {name: x.shape for name, x in module.vision.state_dict().items()}:
            raise InputError("the backbone has other sizes: VisionRwkvConfig.of gives those of a model")
    for module in found:
        module.vision.load_state_dict(weights)


def register() -> None:
    """Puts the classes of this file into the Auto classes of transformers. Calling it again changes nothing."""
    AutoConfig.register(VisionRwkvConfig.model_type, VisionRwkvConfig, exist_ok=True)
    AutoBackbone.register(VisionRwkvConfig, VisionRwkvBackbone, exist_ok=True)
    AutoModel.register(VisionRwkvConfig, VisionRwkvModel, exist_ok=True)
