"""Vision-RWKV against the formulas of its specification, written out token by token and channel by channel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import heronry
from heronry import InputError
from heronry.formats import vision_rwkv
from heronry.models import Network, vision
from heronry.models.vision import VARIANTS, VRWKV, VRWKV6, VRWKV6Config, VRWKVConfig, create, q_shift

PUBLISHED = {
    "vrwkv_tiny": 6_155_176,
    "vrwkv_small": 23_820_136,
    "vrwkv_base": 93_645_544,
    "vrwkv_large": 334_881_768,
    "vrwkv6_tiny": 7_641_256,
    "vrwkv6_small": 27_677_032,
    "vrwkv6_base": 104_898_280,
}

SMALL = {"num_classes": 7, "image_size": 32, "patch_size": 8}
KINDS = {
    "T": VRWKVConfig(24, 3, 60, **SMALL),
    "S": VRWKVConfig(24, 3, 60, **SMALL, post_norm=True, init_values=1.0),
    "L": VRWKVConfig(26, 2, 64, **SMALL, post_norm=True, init_values=0.5, key_norm=True, head_hidden=20),
    "6T": VRWKV6Config(24, 3, 60, **SMALL, head_size=12, mix_rank=4, decay_rank=6),
    "6S": VRWKV6Config(24, 2, 60, **SMALL, head_size=8, mix_rank=4, decay_rank=6, post_norm=True, init_values=1.0),
}


def made(config, seed: int = 0, dtype=torch.float64):
    """A model whose every weight matters."""
    torch.manual_seed(seed)
    model = (VRWKV6 if isinstance(config, VRWKV6Config) else VRWKV)(config).double()
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.to(dtype).eval()


def images(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ---- the specification, read literally ---------------------------------------------------------------------------


def neighbours(x: Tensor, rows: int, columns: int, heads: int) -> Tensor:
    """Q-shift pixel by pixel."""
    out = torch.zeros_like(x)
    size = x.shape[2] // heads
    for channel in range(x.shape[2]):
        quarter = (channel % size) // (size // 4)
        dy, dx = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}.get(quarter, (0, 0))
        for y in range(rows):
            for column in range(columns):
                if 0 <= y + dy < rows and 0 <= column + dx < columns:
                    there = (y + dy) * columns + column + dx
                    out[:, y * columns + column, channel] = x[:, there, channel]
    return out


def norm(x: Tensor, weights: dict, name: str) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def spatial_mix(x: Tensor, w: dict, at: str, grid) -> Tensor:
    xx, tokens = neighbours(x, *grid, 1), x.shape[1]
    k, v, r = (
        (x * w[f"{at}spatial_mix_{c}"] + xx * (1 - w[f"{at}spatial_mix_{c}"])) @ w[f"{at}{name}.weight"].T
        for c, name in (("k", "key"), ("v", "value"), ("r", "receptance"))
    )
    decay, first = w[f"{at}spatial_decay"] / tokens, w[f"{at}spatial_first"] / tokens
    wkv = torch.zeros_like(v)
    for t in range(tokens):
        above = below = 0
        for i in range(tokens):
            exponent = first + k[:, t] if i == t else -(abs(t - i) - 1) * decay + k[:, i]
            above, below = above + exponent.exp() * v[:, i], below + exponent.exp()
        wkv[:, t] = above / below
    if f"{at}key_norm.weight" in w:
        wkv = norm(wkv, w, f"{at}key_norm")
    return (r.sigmoid() * wkv) @ w[f"{at}output.weight"].T


def spatial_mix6(x: Tensor, w: dict, at: str, grid, heads: int) -> Tensor:
    xx = neighbours(x, *grid, heads) - x
    m = torch.tanh((x + xx * w[f"{at}time_maa_x"]) @ w[f"{at}time_maa_w1"])
    rank = m.shape[2] // 5
    moved = [m[..., i * rank : (i + 1) * rank] @ w[f"{at}time_maa_w2"][i] for i in range(5)]
    xw, xk, xv, xr, xg = (x + xx * (w[f"{at}time_maa_{c}"] + by) for c, by in zip("wkvrg", moved, strict=True))
    decay = w[f"{at}time_decay"] + torch.tanh(xw @ w[f"{at}time_decay_w1"]) @ w[f"{at}time_decay_w2"]
    d = torch.exp(-torch.exp(decay))
    r, k, v = (y @ w[f"{at}{n}.weight"].T for y, n in ((xr, "receptance"), (xk, "key"), (xv, "value")))
    g = F.silu(xg @ w[f"{at}gate.weight"].T)
    r, k, v, d = (y.unflatten(2, (heads, -1)) for y in (r, k, v, d))
    u = w[f"{at}time_faaaa"]
    y = torch.zeros_like(v)
    for order in (range(x.shape[1]), reversed(range(x.shape[1]))):
        state = torch.zeros(*k[:, 0].shape, v.shape[3], dtype=x.dtype)  # [B, H, key, value]
        for t in order:
            y[:, t] += torch.einsum("bhk,bhkv->bhv", r[:, t], state)
            state = d[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
    y += torch.einsum("bthk,hk,bthk->bth", r, u, k)[..., None] * v
    y = (y - y.mean(3, keepdim=True)) / (y.var(3, keepdim=True, unbiased=False) + 1e-5).sqrt()
    y = y.flatten(2) * w[f"{at}ln_x.weight"] + w[f"{at}ln_x.bias"]
    return (y * g) @ w[f"{at}output.weight"].T


def by_the_book(model, x: Tensor) -> Tensor:
    config, w = model.config, {name: p.detach() for name, p in model.named_parameters()}
    heads = config.n_embd // config.head_size if isinstance(config, VRWKV6Config) else 1
    x = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
    grid = x.shape[2] // 8, x.shape[3] // 8
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ w["patch_embed.projection.weight"].flatten(1).T + w["patch_embed.projection.bias"]
    positions = w["pos_embed"].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    if grid != (4, 4):
        positions = F.interpolate(positions.float(), grid, mode="bicubic").double()
    x = norm(x + positions.flatten(2).transpose(1, 2), w, "layers.0.ln0")
    for i in range(config.n_layer):
        at = f"layers.{i}."

        def att(x: Tensor, at: str = at) -> Tensor:
            return spatial_mix(x, w, f"{at}att.", grid) if heads == 1 else spatial_mix6(x, w, f"{at}att.", grid, heads)

        def ffn(x: Tensor, at: str = at) -> Tensor:
            xx = neighbours(x, *grid, heads)
            mixed = [x * w[f"{at}ffn.spatial_mix_{c}"] + xx * (1 - w[f"{at}ffn.spatial_mix_{c}"]) for c in "kr"]
            k = (mixed[0] @ w[f"{at}ffn.key.weight"].T).relu() ** 2
            if f"{at}ffn.key_norm.weight" in w:
                k = norm(k, w, f"{at}ffn.key_norm")
            return (mixed[1] @ w[f"{at}ffn.receptance.weight"].T).sigmoid() * (k @ w[f"{at}ffn.value.weight"].T)

        for mix, ln, gamma in ((att, "ln1", "gamma1"), (ffn, "ln2", "gamma2")):
            if config.post_norm:
                x = x + w[f"{at}{gamma}"] * norm(mix(x), w, f"{at}{ln}")
            else:
                x = x + mix(norm(x, w, f"{at}{ln}"))
    pooled = norm(x, w, "ln1").mean(1)
    if config.head_hidden:
        pooled = torch.tanh(pooled @ w["head.0.weight"].T + w["head.0.bias"])
        return pooled @ w["head.2.weight"].T + w["head.2.bias"]
    return pooled @ w["head.fc.weight"].T + w["head.fc.bias"]


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    config = VARIANTS[name]
    with torch.device("meta"):
        model = (VRWKV6 if isinstance(config, VRWKV6Config) else VRWKV)(config)
    assert model.num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (19, 50)], ids=str)
def test_equals_the_specification(kind, size):
    model, x = made(KINDS[kind]), images(2, 3, *size)
    if kind == "L":  # 26 channels: what four does not divide stays
        assert model.config.n_embd % 4
    with torch.no_grad():
        expected = by_the_book(model, x)
        assert (model(x) - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)
        low = made(KINDS[kind], dtype=torch.float32)(x.float())
        assert (low - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient(kind):
    model = made(KINDS[kind])
    model(images(2, 3, 24, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind):
    x = images(2, 3, 24, 16)
    found = []
    for kept in (False, True):
        model = made(KINDS[kind])
        model.gradient_checkpointing = kept
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_pictures(kind):
    model, x = made(KINDS[kind]), images(3, 3, 32, 24)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(one) for one in x.split(1)])
    assert (together - alone).abs().max() < 1e-12


def test_bfloat16_is_near():
    model, x = made(KINDS["T"], dtype=torch.float32), images(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        found = made(KINDS["T"], dtype=torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05


def test_q_shift_takes_each_quarter_from_one_side():
    x = torch.arange(1.0, 13).reshape(1, 12, 1).expand(1, 12, 5)  # 3 rows of 4, 5 channels
    left, right, above, below, rest = q_shift(x, (3, 4))[0].reshape(3, 4, 5).unbind(-1)
    assert left.tolist() == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]
    assert right.tolist() == [[2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]]
    assert above.tolist() == [[0] * 4, [1, 2, 3, 4], [5, 6, 7, 8]]
    assert below.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [0] * 4]
    assert torch.equal(rest.flatten(), x[0, :, 4])


def test_a_causal_model_does_not_look_ahead():
    x = images(1, 3, 32, 32)
    changed = x.clone()
    changed[..., 24:, 24:] += 1  # the last patch
    for causal in (True, False):
        model = made(VRWKVConfig(24, 2, 60, **SMALL, shift="previous", causal=causal))
        with torch.no_grad():
            same = model.forward_features(x)[..., 0, 0] == model.forward_features(changed)[..., 0, 0]
        assert same.all() if causal else not same.any()


def test_segments_are_the_kernels_arithmetic():
    x = images(1, 3, 64, 64)
    exact, released = (made(VRWKVConfig(24, 2, 60, **SMALL, segments=n)) for n in (None, 32))
    with torch.no_grad():
        a, b = exact(x), released(x)
    assert 1e-5 < (a - b).norm() / a.norm() < 0.1


def test_drop_path_leaves_whole_pictures_out_and_keeps_the_mean():
    config = VRWKVConfig(24, 2, 60, **SMALL, drop_path=0.5)
    model = made(config).train()
    assert [block.drop_path for block in model.layers] == [0, 0.5]
    block, x = model.layers[1], images(4000, 1, 24)
    with torch.no_grad():
        torch.manual_seed(0)
        branch = block._branch(block.ffn, block.ln2, None, x, (1, 1))
        whole = block.eval()._branch(block.ffn, block.ln2, None, x, (1, 1))
    dropped = (branch == 0).flatten(1).all(1)
    assert 0.45 < dropped.double().mean() < 0.55
    assert torch.allclose(branch[~dropped], 2 * whole[~dropped])


# ---- timm's habits -----------------------------------------------------------------------------------------------


def test_features_and_heads():
    model, x = made(KINDS["T"]), images(2, 3, 24, 40)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 24, 3, 5)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(pooled, features.mean((2, 3)))
        maps = model.forward_intermediates(x)
        assert len(maps) == 3
        assert torch.equal(maps[-1], features)
        first, last = model.forward_intermediates(x, [0, -1])
        assert torch.equal(first, maps[0])
        assert torch.equal(last, features)
        assert torch.equal(model.forward_intermediates(x, 2)[0], maps[1])
        with pytest.raises(InputError, match="block 3 does not exist: this model has 3"):
            model.forward_intermediates(x, [3])
        with pytest.raises(InputError, match="block -4 does not exist: this model has 3"):
            model.forward_intermediates(x, [-4])
        for count in (0, 4):
            with pytest.raises(InputError, match=f"this model has 3 blocks, not {count}"):
                model.forward_intermediates(x, count)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert model.config.num_classes == 0
        model.reset_classifier(5)
        assert model(x).shape == (2, 5)
        assert model.get_classifier().fc.weight.shape == (5, model.num_features)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 32, 32), r"float32 \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), r"float32 \[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 0, 32), r"float32 \[1, 3, 0, 32\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"uint8 \[1, 3, 8, 8\]"),
    ],
)
def test_what_is_no_picture_is_named(x, message):
    with pytest.raises(InputError, match=rf"images must be floating point \[B, 3, height, width\], got {message}"):
        made(KINDS["T"], dtype=torch.float32)(x)
    with pytest.raises(InputError, match=r"images must be a torch.Tensor \[B, 3, height, width\], got array\(\[1.\]\)"):
        made(KINDS["T"], dtype=torch.float32)(np.ones(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not made of patches of 16"),
        ({"shift": "w"}, "unknown shift 'w'; choose from q, previous, none"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"segments": 0}, "segments must be a positive number"),
        ({"depth": 3}, "vrwkv_tiny has no setting 'depth'"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        create("vrwkv_tiny", **changes)
    with pytest.raises(InputError, match="unknown model 'vit_tiny'; did you mean 'vrwkv_tiny'"):
        create("vit_tiny")


# ---- initialisation, optimiser -------------------------------------------------------------------------------------


def test_initialisation():
    torch.manual_seed(0)
    model = create("vrwkv_small", n_layer=4)
    att, c = model.layers[2].att, 384
    h = torch.arange(c)
    rho, tau = 2 / 3, 1 - 2 / 4
    assert torch.allclose(att.spatial_decay, -5 + 8 * (h / (c - 1)) ** (0.7 + 1.3 * rho))
    assert torch.allclose(att.spatial_first, math.log(0.3) + 0.5 * ((h + 1) % 3 - 1.0))
    assert torch.allclose(att.spatial_mix_k.flatten(), (h / c) ** tau)
    assert torch.allclose(att.spatial_mix_v.flatten(), (h / c) ** tau + 0.3 * rho)
    assert torch.allclose(att.spatial_mix_r.flatten(), (h / c) ** (tau / 2))
    assert 0.018 < att.key.weight.std() < 0.021
    assert (model.layers[1].gamma1 == 1).all()
    assert not model.pos_embed.any()
    six = create("vrwkv6_small", n_layer=4)
    att = six.layers[2].att
    assert torch.allclose(att.time_decay.flatten(), -6 + 5 * (h / (c - 1)) ** (0.7 + 1.3 * rho))
    assert torch.allclose(att.time_maa_v.flatten(), 1 - ((h / c) ** tau + 0.3 * rho))
    assert torch.allclose(att.time_faaaa.flatten(), rho * (1 - h / (c - 1)) + 0.1 * ((h + 1) % 3 - 1.0), atol=1e-6)
    assert 0 < att.time_maa_w1.abs().max() <= 1e-4
    assert (six.layers[0].gamma2 == 1e-5).all()


def test_norms_and_biases_do_not_decay():
    model = made(KINDS["6S"])
    fixed, forgetting, others = model.param_groups(1e-3, 0.05)
    assert (fixed["weight_decay"], forgetting["weight_decay"], others["weight_decay"]) == (0, 0.05, 0.05)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in fixed["params"]} == {
        name for name in names.values() if ".ln" in name or name.startswith("ln1") or name.endswith("bias")
    }
    assert {names[p] for p in forgetting["params"]} == {f"layers.{i}.att.time_decay" for i in range(len(model.layers))}
    assert sum(len(group["params"]) for group in (fixed, forgetting, others)) == len(names)


@pytest.mark.parametrize("kind", ["T", "6S"])
def test_decays_may_learn_faster(kind):
    """By so much in a step of AdamW, and they are drawn to 0 no faster for it."""
    model = made(replace(KINDS[kind], decay_lr=20.0))
    names = [name for name, _ in model.named_parameters() if name.endswith("_decay")]
    assert len(names) == len(model.layers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.param_groups(1e-3, 0.0))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = torch.full_like(p, 0.02 if name in names else 0.001)
        assert torch.allclose(before[name] - p, moved, atol=1e-6), name
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(model.param_groups(1e-3, 0.5)).step()
    assert torch.allclose(model.get_parameter(names[0]), (before[names[0]] - 0.02) * 0.9995)


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["vrwkv_tiny", "vrwkv_large", "vrwkv6_small"])
def published(request, tmp_path):
    """A file as the authors publish them, of a model with few layers, and that model."""
    name = request.param
    small = {"n_layer": 2, "n_embd": 64, "dim_ffn": 256, "image_size": 64}
    if name == "vrwkv_large":
        small["head_hidden"] = 48
    torch.manual_seed(0)
    model = create(name, **small).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    tensors = vision_rwkv.from_heronry(model.state_dict())
    assert "backbone.layers.1.att.key.weight" in tensors
    key = "model" if name == "vrwkv_large" else "state_dict"
    torch.save({"meta": {"epoch": 300, "config": "a text"}, key: tensors}, tmp_path / "published.pth")
    return name, small, model, tmp_path / "published.pth"


def test_published_files(published):
    name, small, model, path = published
    x = images(1, 3, 64, 48, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(create(name, pretrained=path, **small).eval()(x), expected)
        loaded = heronry.load(path, kind=heronry.VisionModel)
        assert torch.equal(loaded(x), expected)
        assert loaded.name == model.name
        fine = create(name, pretrained=path, num_classes=3, **small).eval()
        assert torch.equal(fine.forward_features(x), model.forward_features(x))
        assert fine(x).shape == (1, 3)
        bare = create(name, pretrained=path, num_classes=0, **small).eval()
        assert torch.equal(bare(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_other_variants_are_told(published, tmp_path):
    name, small, model, path = published
    other = "vrwkv6_tiny" if name == "vrwkv_tiny" else "vrwkv_tiny"
    with pytest.raises(InputError, match=rf"published.pth: holds a {model.name} of 2 layers and 64 channels, not "):
        create(other, pretrained=path, **{k: v for k, v in small.items() if k != "head_hidden"})
    tensors = torch.load(path)["model" if name == "vrwkv_large" else "state_dict"]
    for change, message in (
        (lambda t: t.pop("backbone.layers.1.ln2.bias"), r"layers.1.ln2.bias is missing"),
        (lambda t: t.update({"backbone.cls_token": torch.zeros(1)}), r"cls_token is not of this model"),
        (
            lambda t: t.update({"backbone.pos_embed": torch.zeros(1, 15, 64)}),
            r"pos_embed has 15 tokens, expected a square number",
        ),
        (lambda t: t.update({"backbone.ln1.weight": torch.zeros(3)}), r"ln1.weight has another shape"),
        (
            lambda t: t.update({"backbone.layers.1.ffn.value.weight": t["backbone.layers.1.ffn.value.weight"].T}),
            r"layers.1.ffn.value.weight has another shape",
        ),
    ):
        damaged = dict(tensors)
        change(damaged)
        torch.save({"state_dict": damaged}, tmp_path / "damaged.pth")
        with pytest.raises(InputError, match=rf"damaged.pth: .*{message}"):
            create(name, pretrained=tmp_path / "damaged.pth", **small)
        with pytest.raises(InputError, match=r"damaged.pth: "):
            heronry.load(tmp_path / "damaged.pth", kind=heronry.VisionModel)
    with pytest.raises(InputError, match="not a Vision-RWKV checkpoint"):
        create(name, pretrained="heronry/bundled")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    model, x = made(KINDS[kind]), images(1, 3, 40, 32)
    heronry.save(model, tmp_path / "a", notes={"labels": list("abcdefg")})
    again = heronry.load(tmp_path / "a", kind=heronry.VisionModel)
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    again = heronry.load(tmp_path / "a", dtype="bfloat16", kind=heronry.VisionModel)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_int8_is_near():
    model = made(VRWKVConfig(64, 2, 128, **SMALL), dtype=torch.float32)
    x = images(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        found = heronry.quantize(model, "int8")(x)
    assert 0 < (found - expected).norm() / expected.norm() < 0.03


def test_text_and_pictures_are_not_mistaken(tmp_path):
    heronry.save(made(KINDS["T"]), tmp_path / "a")
    for read in (heronry.LLM, heronry.load):
        with pytest.raises(InputError, match=r"a: this model \(vrwkv\) reads pictures, not text; .* kind=VisionModel"):
            read(tmp_path / "a")
    assert isinstance(heronry.load(tmp_path / "a", kind=Network), vision.VisionModel)
    with pytest.raises(InputError, match=r"this model \(rwkv7\) reads text, not pictures"):
        heronry.load("heronry/bundled", kind=heronry.VisionModel)
    with pytest.raises(InputError, match=r"this model is of the class RWKV7, not RWKV6"):
        heronry.load("heronry/bundled", kind=heronry.RWKV6)


@pytest.mark.parametrize("kind", ["T", "6T"])
@pytest.mark.quick_for("T")
def test_exported(kind):
    model = made(KINDS[kind], dtype=torch.float32)
    batch = torch.export.Dim("batch")
    x = images(3, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
        assert torch.allclose(program.module()(x), model(x), atol=1e-6)
