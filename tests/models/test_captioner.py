"""A picture read by a language model.

What it must give is told by a model with a longer vocabulary, in which the projected patches are rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heronry import LLM, InputError, State, load
from heronry.checkpoint import assemble, save
from heronry.models import RWKV7, VRWKV, Model, RWKV7Config, VisionModel
from heronry.models.vision import VRWKVConfig
from heronry.models.vision.captioner import Captioner
from heronry.quantization import quantize

SIZES = {"width": 64, "heads": 2, "ffn": 96, "rank": 8, "vocab": 256}
COLOURS = {"red": (1.8, -1.5, -1.4), "green": (-1.6, 1.7, -1.4), "blue": (-1.5, -1.4, 1.9), "grey": (0, 0, 0)}


def small_vision(**other) -> VisionModel:
    torch.manual_seed(0)
    model = VRWKV(VRWKVConfig.sized(32, 2, **{"image_size": 16, "patch_size": 4, "num_classes": 0} | other))
    model.init_weights()
    return model.eval()


def pictures(number: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def weights(version, random_checkpoint) -> dict[str, Tensor]:
    return random_checkpoint(version, **SIZES)


@pytest.fixture
def captioner(weights) -> Captioner:
    return Captioner(small_vision(), assemble(weights)).eval()


@pytest.fixture
def goose(random_checkpoint) -> Model:
    return assemble(random_checkpoint("7", **SIZES))


def close(found: State, expected: State, atol: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found.layers, expected.layers, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


@torch.no_grad()
def test_patches_are_rows_of_the_embedding(captioner, weights):
    """In every generation, from nothing and in the middle of a text; the text that follows has their logits."""
    captioner.double()
    images, text = pictures(1, 8, 12).double(), torch.tensor([list(b"a rook")])
    vectors = captioner.embed(images)[0]  # 2 x 3 patches
    assert vectors.shape == (6, 64)
    with_rows = {name: torch.cat([weights[name], vectors]) for name in ("emb.weight", "head.weight")}
    longer = assemble(weights | with_rows, dtype=torch.float64)
    patches = torch.arange(256, 262)[None]
    close(captioner.look(images), longer(patches)[1], 1e-9)
    logits, _ = captioner(images, text)
    expected, _ = longer(torch.cat([patches, text], 1))
    torch.testing.assert_close(logits, expected[:, 6:, :256], rtol=0, atol=1e-9)

    before = captioner.language(text)[1]
    expected, left = longer(torch.cat([text, patches], 1))
    close(captioner.look(images, before), left, 1e-9)
    assert not captioner.language.emb._forward_hooks


@torch.no_grad()
def test_a_batch_is_its_pictures(captioner):
    images, texts = pictures(3), [b"a rook", b"two", b"many of them"]
    state = captioner.look(images)
    ends = [0, 6, 9, 21]
    logits, left = captioner(images, torch.tensor([list(b"".join(texts))]), cu_seqlens=ends)
    before = captioner.language(torch.tensor([list(b"Look: ")]))[1]
    for i, text in enumerate(texts):
        alone = images[i : i + 1]
        close(state[i], captioner.look(alone), 2e-5)
        expected, own = captioner(alone, torch.tensor([list(text)]))
        torch.testing.assert_close(logits[:, ends[i] : ends[i + 1]], expected, rtol=0, atol=5e-5)
        close(left[i], own, 2e-5)
        close(captioner.look(images, before)[i], captioner.look(alone, before), 2e-5)


def test_the_loss_is_that_of_each_caption(captioner):
    captioner.double()
    images, captions = pictures(2).double(), [list(b"\na rook"), list(b"\nten rooks")]
    for given in (1, 3):
        nats = []
        for image, ids in zip(images, captions, strict=True):
            logits, _ = captioner(image[None], torch.tensor([ids]))
            nats += [-logits[0, i - 1].log_softmax(0)[ids[i]] for i in range(given, len(ids))]
        torch.testing.assert_close(captioner.loss(images, captions, given), torch.stack(nats).mean())


def test_gradients_go_where_they_are_wanted(captioner):
    """Through the state into the projection and the eyes; a frozen language model is left alone."""
    captioner.double()
    captioner.language.requires_grad_(False)
    images, captions = pictures(2).double(), [list(b"\na rook"), list(b"\nno")]
    captioner.loss(images, captions).backward()
    assert all(p.grad is None for p in captioner.language.parameters())
    for name, p in captioner.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
    weight, step = captioner.projection.weight, 1e-5
    with torch.no_grad():
        losses = []
        for way in (1, -1):
            weight[3, 5] += way * step
            losses.append(captioner.loss(images, captions).item())
            weight[3, 5] -= way * step
    assert weight.grad[3, 5].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-9)


def coloured(number: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures of one colour, in shades, and its names."""
    random = torch.Generator().manual_seed(seed)
    names = [list(COLOURS)[i % len(COLOURS)] for i in range(number)]
    shades = torch.tensor([COLOURS[name] for name in names]) + 0.2 * torch.randn(number, 3, generator=random)
    return shades[:, :, None, None].expand(-1, -1, 16, 16), names


@pytest.fixture(scope="module")
def painter() -> Captioner:
    """Has learned to name the colour of a picture, from nothing."""
    language = RWKV7(RWKV7Config.sized(256, 1, 64, 32))
    torch.manual_seed(1)
    language.init_weights()
    captioner = Captioner(small_vision(), language).train()
    optimizer = torch.optim.Adam(captioner.parameters(), 5e-3)
    for step in range(50):
        images, names = coloured(16, step)
        optimizer.zero_grad()
        captioner.loss(images, [list(f"\na {name} wall.".encode()) for name in names]).backward()
        optimizer.step()
    return captioner.eval()


def test_it_names_colours(painter):
    images, names = coloured(12, 1000)
    with torch.no_grad():
        state = painter.look(images)
    llm = LLM(painter.language, tokenizer="bytes")
    said = llm.generate(["\n"] * 12, 20, state=state, temperature=0, stop=".")
    assert [x.text for x in said] == [f"a {name} wall" for name in names]
    for i in range(4):
        assert llm.generate("\n", 20, state=state[i], temperature=0, stop=".").text == said[i].text
    # with a state that has its history too
    assert llm.generate("\n", 20, state=painter.look(images[:1])[0], temperature=0, stop=".").text == said[0].text
    llm.start = state[1]
    chat = llm.chat(template="raven")
    chat.say("What is it?", max_tokens=4)
    assert len(chat.messages) == 2


def test_a_state_of_a_picture_is_kept(painter, tmp_path):
    images, _ = coloured(2, 7)
    with torch.no_grad():
        painter.look(images).save(tmp_path / "seen.safetensors")
    said = LLM(painter.language, tokenizer="bytes").generate(
        ["\n", "\n"], 20, state=State.load(tmp_path / "seen.safetensors"), temperature=0, stop="."
    )
    assert [x.text for x in said] == ["a red wall", "a green wall"]


def write(captioner: Captioner, folder) -> Callable[..., Captioner]:
    save(captioner.vision, folder / "vision")
    save(captioner.language, folder / "language")
    captioner.save(folder / "projection.safetensors")

    def read(dtype: str | None = None) -> Captioner:
        language = load(folder / "language", dtype=dtype)
        return Captioner.load(folder / "projection.safetensors", load(folder / "vision", kind=VisionModel), language)

    return read


@torch.no_grad()
def test_files(captioner, tmp_path):
    read, images = write(captioner, tmp_path), pictures(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "projection.safetensors", "vision"]
    again = read()
    assert not again.training
    close(again.look(images), captioner.look(images), 0)
    # states of the one go on in the other
    text = torch.tensor([list(b"so")] * 2)
    torch.testing.assert_close(again.language(text, captioner.look(images))[0], captioner(images, text)[0])
    half = read("bfloat16").look(images).layers[0].att_shift  # of the same file, with as many digits as it has
    torch.testing.assert_close(half, captioner.look(images).layers[0].att_shift, rtol=0, atol=0.05)


@torch.no_grad()
def test_a_packed_language_model(goose, tmp_path):
    """Looks with the fingerprint that it had before."""
    captioner = Captioner(small_vision(), goose).eval()
    captioner.save(tmp_path / "projection.safetensors")
    expected = captioner.look(pictures(2))
    again = Captioner.load(tmp_path / "projection.safetensors", captioner.vision, quantize(goose, "int8"))
    found = again.look(pictures(2))
    assert found.fingerprint == expected.fingerprint
    close(found, expected, 0.2)


def test_what_was_trained_is_what_is_saved(painter, tmp_path):
    """Whatever mode it was trained in, and whoever asked for a fingerprint before."""
    captioner = write(painter, tmp_path)()
    assert captioner.vision.fingerprint  # is kept
    with torch.no_grad():
        captioner.vision.pos_embed += 1
    read = write(captioner, tmp_path)
    close(read().look(coloured(2, 3)[0]), captioner.look(coloured(2, 3)[0]), 0)


def test_bad_input(goose, random_checkpoint, tmp_path):
    captioner = Captioner(small_vision(), goose)
    write(captioner, tmp_path)
    file, vision = tmp_path / "projection.safetensors", captioner.vision
    with pytest.raises(InputError, match="no such file"):
        Captioner.load(tmp_path / "nothing", vision, goose)
    with pytest.raises(InputError, match="belongs to another language model"):
        Captioner.load(file, vision, assemble(random_checkpoint("7", **SIZES, seed=1)))
    with pytest.raises(InputError, match="belongs to another vision model"):
        Captioner.load(file, small_vision(shift="none"), goose)
    with pytest.raises(InputError, match="not a captioner's projection"):
        Captioner.load(tmp_path / "vision" / "model.safetensors", vision, goose)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged or truncated"):
        Captioner.load(file, vision, goose)
    with pytest.raises(InputError, match=r"images must be floating point \[B, 3, height, width\], got float32 \[3, 8"):
        captioner.look(torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match="given must be at least 1 and every caption longer"):
        captioner.loss(pictures(2), [[1, 2], [1]])
    with pytest.raises(InputError, match="given must be at least 1 and every caption longer"):
        captioner.loss(pictures(1), [[1, 2]], 0)
    with pytest.raises(InputError, match="a state of 2 sequences was given for a batch of 1"):
        captioner.loss(pictures(2), [[1, 2]])
    other = assemble(random_checkpoint("7", **SIZES | {"ffn": 128})).initial_state()
    with pytest.raises(InputError, match="this state belongs to another model"):
        captioner.look(pictures(1), other)
    assert not goose.emb._forward_hooks
    with pytest.raises(InputError, match=r"RWKV-7a \(DeepEmbed\) has a matrix for each token id"):
        Captioner(vision, assemble(random_checkpoint("7", **SIZES, deep=4)))
