"""Models of pictures in other formats: the same logits, the authors' names, graphs that onnxruntime runs."""

from __future__ import annotations

import json

import pytest
import torch

import heronry
from heronry import InputError, formats
from heronry.convert import convert
from heronry.formats.reader import DESCRIPTIONS
from heronry.models.vision import VRWKV, VRWKV6, VRWKV6Config, VRWKVConfig

SMALL = {"num_classes": 7, "image_size": 32, "patch_size": 8}
KINDS = {
    "vrwkv": VRWKVConfig(24, 1, 60, **SMALL, post_norm=True, init_values=0.5, key_norm=True, head_hidden=20),
    "vrwkv6": VRWKV6Config(32, 1, 64, **SMALL, head_size=8, mix_rank=4, decay_rank=6),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """A model, and the folder it is in."""
    torch.manual_seed(0)
    vision = (VRWKV6 if request.param == "vrwkv6" else VRWKV)(KINDS[request.param])
    vision.init_weights()
    with torch.no_grad():
        for p in vision.parameters():
            p += 0.2 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("models") / "model"
    heronry.save(vision.eval(), folder, notes={"labels": list("abcdefg")})
    return vision, folder


def test_there_and_back(model, tmp_path):
    vision, folder = model
    x = torch.randn(1, 3, 40, 32)
    with torch.no_grad():
        expected = vision(x)
        for name in ("a.pth", "a.safetensors", "a"):
            result = convert(folder, tmp_path / name)
            assert result.difference == 0 < result.largest
            again = heronry.load(tmp_path / name, kind=heronry.VisionModel)
            assert torch.equal(again(x), expected)
            assert all(torch.equal(p, again.state_dict()[key]) for key, p in vision.state_dict().items())
    held = torch.load(tmp_path / "a.pth")["state_dict"]
    assert "backbone.layers.0.att.key.weight" in held
    assert held.keys() >= {"head.0.weight", "head.2.bias"} or "head.fc.weight" in held
    assert json.loads((tmp_path / "a" / "config.json").read_text())["labels"] == list("abcdefg")
    result = convert(tmp_path / "a.pth", tmp_path / "half.safetensors", dtype="bfloat16")
    assert 0 < result.difference < 0.1 * result.largest
    assert heronry.load(tmp_path / "half.safetensors", kind=heronry.VisionModel).pos_embed.dtype == torch.bfloat16


@pytest.mark.quick_for("vrwkv")
def test_onnx(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    vision, folder = model
    result = convert(folder, tmp_path / "a.onnx")
    assert result.difference < 1e-5 * result.largest
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = vision(x)
    found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    about = session.get_modelmeta().custom_metadata_map
    assert about["model"] == vision.name
    assert json.loads(about["image_size"]) == 32


def test_what_has_no_place_is_told(model, tmp_path):
    _, folder = model
    for target, options, message in (
        ("a.gguf", {}, "the format gguf does not support picture models"),
        ("a", {"to": "huggingface"}, "the format huggingface does not support picture models"),
        ("a.onnx", {"dtype": "bfloat16"}, "ONNX files are float32"),
        ("a.pth", {"dtype": "int8"}, "dtype int8 is not supported"),
    ):
        with pytest.raises(InputError, match=message):
            convert(folder, tmp_path / target, **options)
        assert not (tmp_path / target).exists()
    with pytest.raises(InputError, match="is a language model"):
        convert("heronry/bundled", tmp_path / "a.pth", to="vision_rwkv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="already exists"):
        convert(folder, tmp_path / "full", to="heronry")


def test_what_a_format_cannot_say_is_not_lost_in_silence(tmp_path):
    """A .pth does not tell of the shift: what would be read from it is another model."""
    torch.manual_seed(0)
    vision = VRWKV(VRWKVConfig(24, 1, 60, **SMALL, shift="previous"))
    vision.init_weights()
    heronry.save(vision, tmp_path / "model")
    with pytest.raises(InputError, match=r"a.pth: a blinkdl file cannot store shift = 'previous'"):
        convert(tmp_path / "model", tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()
    assert convert(tmp_path / "model", tmp_path / "copy").difference == 0


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_the_backbone_of_a_dense_prediction(kind, model, tmp_path, caplog):
    vision, _ = model
    others = ["level_embed", "spm.stem.0.weight", "interactions.0.injector.gamma", "up.weight", "norm1.weight"]
    heads = ["decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"]
    if kind == "detection":
        heads = ["neck.lateral_convs.0.conv.weight", "rpn_head.rpn_cls.weight", "roi_head.bbox_head.fc_cls.weight"]
    tensors = {f"backbone.{name}": x for name, x in vision.state_dict().items() if not name.startswith(("head", "ln1"))}
    tensors |= {f"backbone.{name}": torch.ones(3) for name in others} | {name: torch.ones(3) for name in heads}
    torch.save({"meta": {"CLASSES": ["wall"]}, "state_dict": tensors, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    backbone = heronry.load(tmp_path / "a.pth", kind=heronry.VisionModel)
    names = sorted([name.split(".")[0] for name in others + heads])
    assert caplog.messages == [
        f"heronry: the backbone is read, without {len(others + heads)} other tensors ({', '.join(names)})"
    ]
    assert (backbone.config.num_classes, backbone.config.final_norm) == (0, False)
    x = torch.randn(1, 3, 40, 32)
    with torch.no_grad():
        tokens, grid = vision.embed(x)
        for block in vision.layers:
            tokens = block(tokens, grid)
        expected = tokens.transpose(1, 2).unflatten(2, grid)
        assert torch.equal(backbone.forward_features(x), expected)  # without the norm that it does not have
        heronry.save(backbone, tmp_path / "saved")
        again = heronry.load(tmp_path / "saved", kind=heronry.VisionModel)
        assert torch.equal(again.forward_features(x), expected)
        assert convert(tmp_path / "a.pth", tmp_path / "b.pth").difference == 0
    assert formats.read(tmp_path / "a.pth").description == DESCRIPTIONS["vrwkv_adapter"]
    torch.save({"state_dict": {**tensors, "head.fc.weight": torch.ones(7, 24)}}, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"ln1.bias|ln1.weight|head"):  # a classifier has its last norm
        heronry.load(tmp_path / "c.pth", kind=heronry.VisionModel)
