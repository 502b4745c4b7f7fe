"""Vision-RWKV under the segmenters and detectors of transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import heronry
from heronry import InputError
from heronry.checkpoint import save
from heronry.models import VRWKV, VRWKV6
from heronry.models.vision import VRWKV6Config, VRWKVConfig
from heronry.models.vision.dense import Pyramid

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoModel,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from heronry.integrations.vision import (  # noqa: E402
    VisionRwkvBackbone,
    VisionRwkvConfig,
    VisionRwkvModel,
    load_backbone,
    register,
)

register()
CONFIGS = {
    "vrwkv": VRWKVConfig.sized(32, 3, num_classes=7, image_size=64, patch_size=8, init_values=0.5, post_norm=True),
    "vrwkv6": VRWKV6Config.sized(32, 3, num_classes=7, image_size=64, patch_size=8, head_size=16, mix_rank=4),
}


def made(kind: str):
    """A model that no initialisation gives, with a head."""
    torch.manual_seed(0)
    model = {"vrwkv": VRWKV, "vrwkv6": VRWKV6}[kind](CONFIGS[kind])
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(params=CONFIGS)
def vision(request):
    return made(request.param)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 45, generator=torch.Generator().manual_seed(1))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if not name.startswith("head.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_the_auto_classes(vision, images):
    register()  # again
    config = VisionRwkvConfig.from_heronry(vision, out_features=["stage1", "stage3"])
    assert isinstance(AutoBackbone.from_config(config), VisionRwkvBackbone)
    assert isinstance(AutoModel.from_config(config), VisionRwkvModel)
    backbone = VisionRwkvBackbone.from_heronry(vision, out_indices=[0, -1])
    assert backbone.out_features == ["stage1", "stage3"]
    assert backbone.channels == [32, 32]
    with torch.inference_mode():
        output = backbone(images, output_hidden_states=True)
        expected = vision.forward_intermediates(images)
        logits = vision.head(VisionRwkvModel.from_heronry(vision)(images).pooler_output)
        torch.testing.assert_close(logits, vision(images), rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(output.feature_maps, (expected[0], expected[2]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected, strict=True))


def test_a_configuration_comes_back(vision, tmp_path):
    config = VisionRwkvConfig.from_heronry(vision, pyramid_channels=24, out_indices=[1, 2])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.out_features, again.pyramid_channels) == (["stage2", "stage3"], 24)
    cls, ours = again.to_heronry()
    assert cls is type(vision)
    assert ours == replace(vision.config, num_classes=0)


def test_new_weights_are_those_of_our_initialisation(vision):
    torch.manual_seed(3)
    backbone = VisionRwkvBackbone(VisionRwkvConfig.from_heronry(vision, pyramid_channels=24))
    fresh = type(vision)(vision.config)
    fresh.init_weights()
    fixed = {"vrwkv": "spatial_decay", "vrwkv6": "time_decay"}[vision.name]
    assert torch.equal(getattr(backbone.vision.layers[1].att, fixed), getattr(fresh.layers[1].att, fixed))
    matrix = backbone.vision.layers[1].ffn.key.weight
    assert 0.018 < matrix.std() < 0.022
    assert backbone.out_features == ["stage1", "stage2", "stage3", "stage4"]


def test_the_pyramid_is_ours(vision, images):
    backbone = VisionRwkvBackbone.from_heronry(vision, pyramid_channels=24, out_indices=[1, 3])
    pyramid = Pyramid(vision, 24)
    pyramid.scales.load_state_dict(backbone.scales.state_dict(), strict=False)
    with torch.inference_mode():
        maps, expected = backbone(images).feature_maps, pyramid(images)
    assert backbone.channels == [24, 24]
    assert torch.equal(maps[0], expected["1"])
    assert torch.equal(maps[1], expected["3"])
    assert list(backbone.scales) == ["1", "3"]  # nobody reads the others


def test_weights_of_our_files(vision, images, tmp_path):
    save(vision, tmp_path / "ours")
    loaded = heronry.load(tmp_path / "ours", kind=heronry.VisionModel)
    backbone = VisionRwkvBackbone.from_heronry(loaded)
    assert not backbone.training
    backbone.save_pretrained(tmp_path / "theirs")
    again = VisionRwkvBackbone.from_pretrained(tmp_path / "theirs")
    assert same(weights(again.vision), weights(vision))
    body = AutoModel.from_pretrained(tmp_path / "theirs")
    assert same(weights(body.vision), weights(vision))
    half = VisionRwkvBackbone.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert half(images.bfloat16()).feature_maps[0].dtype == torch.bfloat16


def test_what_a_file_lacks_is_initialised_and_what_it_has_stays(vision, images, tmp_path):
    VisionRwkvBackbone.from_heronry(vision).save_pretrained(tmp_path)
    config = VisionRwkvConfig.from_heronry(vision, pyramid_channels=24)
    backbone, info = VisionRwkvBackbone.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"scales"}
    assert same(weights(backbone.vision), weights(vision))
    assert all(bool((norm.weight == 1).all()) for norm in (backbone.scales["0"][1], backbone.scales["3"][2]))
    assert 0.05 < backbone.scales["2"][0].weight.std() < 0.2
    assert all(x.isfinite().all() for x in backbone(images).feature_maps)


@pytest.mark.parametrize("channels", [0, 24])
def test_upernet(vision, images, channels, tmp_path):
    options = {"pyramid_channels": channels} if channels else {"out_indices": [0, 1, 2]}
    backbone = VisionRwkvConfig.from_heronry(vision, **options)
    sizes = {"hidden_size": 16, "auxiliary_channels": 16, "num_labels": 3}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes))
    load_backbone(model, vision)
    assert same(weights(model.backbone.vision), weights(vision))
    if not channels:
        with torch.inference_mode():
            maps, expected = model.backbone(images).feature_maps, vision.forward_intermediates(images)
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    output = model.train()(images, labels=torch.arange(3).repeat(2, 64, 15))
    assert output.logits.shape == (2, 3, 64, 45)
    output.loss.backward()
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    with torch.inference_mode():  # a product may round otherwise where the same numbers lie elsewhere
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=1e-6)


def test_checkpointing_changes_no_gradient(vision, images):
    backbone = VisionRwkvBackbone.from_heronry(vision, pyramid_channels=24)
    gradients = []
    for kept in (True, False):
        backbone._set_gradient_checkpointing(enable=not kept)
        assert backbone.vision.gradient_checkpointing is not kept
        backbone.zero_grad()
        sum(x.square().mean() for x in backbone(images).feature_maps).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_cannot_be(vision):
    with pytest.raises(InputError, match="this model contains no Vision-RWKV"):
        load_backbone(torch.nn.Linear(1, 1), vision)
    with pytest.raises(InputError, match="other sizes"):
        load_backbone(VisionRwkvBackbone(VisionRwkvConfig(hidden_size=32, num_hidden_layers=1)), vision)
    with pytest.raises(InputError, match="unknown generation 'vrwkv5'"):
        VisionRwkvBackbone(VisionRwkvConfig(generation="vrwkv5"))
    with pytest.raises(InputError, match="heads of 48"):
        VisionRwkvBackbone(VisionRwkvConfig(generation="vrwkv6", hidden_size=64, head_size=48))


def drawn(number: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Pictures of 64 x 64, a red square and a green one on noise, and their boxes and masks."""
    random = np.random.default_rng(0)
    pictures, labels = random.normal(0, 0.5, (number, 3, 64, 64)), []
    for picture in pictures:
        boxes, masks = [], np.zeros((2, 64, 64))
        for i in range(2):
            r = int(random.integers(5, 12))
            x, y = (int(random.integers(r, 64 - r)) for _ in range(2))
            picture[:, y - r : y + r, x - r : x + r] = np.eye(3)[i][:, None, None] * 3
            masks[i, y - r : y + r, x - r : x + r] = 1
            boxes.append([x / 64, y / 64, r / 32, r / 32])
        annotations = {
            "class_labels": torch.arange(2),
            "boxes": torch.tensor(boxes),
            "masks": torch.from_numpy(masks).float(),
        }
        labels.append(annotations)
    return torch.from_numpy(pictures).float(), labels


PARTS = ("encoder", "decoder")
SMALL = {"d_model": 32, "num_queries": 8, "num_labels": 2, "encoder_layers": 1, "decoder_layers": 2}
SMALL |= {f"{part}_attention_heads": 2 for part in PARTS} | {f"{part}_ffn_dim": 64 for part in PARTS}
MASKS = {"mask_feature_size": 32, "num_labels": 2}
DAB = {"hidden_size": 32, **{name: value for name, value in SMALL.items() if name != "d_model"}}
RT = {
    **SMALL,
    "encoder_hidden_dim": 32,
    "feat_strides": [4, 8, 16],
    **{f"{part}_in_channels": [32] * 3 for part in PARTS},
}
MASK2 = {"feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "dim_feedforward": 64, "common_stride": 2}
MASK2 |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 8, **MASKS}
MASK2["feature_strides"] = [2, 4, 8, 16]
# the maps of the pyramid that each reads (None: the map of the last block) and its settings
DETECTORS = {
    "Detr": (None, SMALL),
    "ConditionalDetr": (None, SMALL),
    "TableTransformer": (None, {**SMALL, "use_timm_backbone": False}),
    "DabDetr": (None, DAB),
    "DeformableDetr": ([1, 2, 3], {**SMALL, "num_feature_levels": 3}),
    "RTDetr": ([1, 2, 3], RT),
    "RTDetrV2": ([1, 2, 3], RT),
    "DFine": ([1, 2, 3], RT),
    "Deimv2": ([1, 2, 3], RT),
    "MaskFormer": ([0, 1, 2, 3], {**MASKS, "fpn_feature_size": 32}),
    "Mask2Former": ([0, 1, 2, 3], MASK2),
}
HEADS = {"MaskFormer": "ForInstanceSegmentation", "Mask2Former": "ForUniversalSegmentation"}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name):
    """Each gives a loss whose gradients reach every weight of the backbone, with the weights of our model."""
    cls = getattr(transformers, f"{name}{HEADS.get(name, 'ForObjectDetection')}", None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    vision = made("vrwkv")
    indices, settings = DETECTORS[name]
    options = {} if indices is None else {"pyramid_channels": 32, "out_indices": indices}
    if name == "MaskFormer":
        settings = {**settings, "decoder_config": transformers.DetrConfig(**SMALL)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        backbone_config=VisionRwkvConfig.from_heronry(vision, **options), **settings
    )
    model = cls(config)
    load_backbone(model, vision)
    pictures, labels = drawn(2)
    if name in HEADS:
        targets = {"mask_labels": [x["masks"] for x in labels], "class_labels": [x["class_labels"] for x in labels]}
    else:
        targets = {"labels": labels}
    loss = model.train()(pixel_values=pictures, **targets).loss
    assert loss.isfinite().all()
    loss.backward()
    (backbone,) = (module for module in model.modules() if isinstance(module, VisionRwkvBackbone))
    assert same(weights(backbone.vision), weights(vision))
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_detector_learns():
    vision = made("vrwkv")
    torch.manual_seed(0)
    backbone = VisionRwkvConfig.from_heronry(vision, pyramid_channels=32, out_indices=[1, 2, 3])
    config = DeformableDetrConfig(backbone_config=backbone, num_feature_levels=3, **SMALL)
    model = DeformableDetrForObjectDetection(config)
    load_backbone(model, vision)
    pictures, labels = drawn(4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        loss = model(pixel_values=pictures, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
