"""Models of pictures through the same loop as those of text."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_trainer import fails_at, is_interrupted

import heronry
from heronry import InputError
from heronry.data.image_dataset import ImageDataset
from heronry.models.baselines import ViT, ViTConfig
from heronry.train.config import read_config
from heronry.train.image_classification import mix_images
from heronry.train.trainer import Trainer

COLOURS = {"blue": (30, 40, 200), "green": (30, 200, 60), "red": (210, 40, 30)}
SMALL = [
    *("model.generation=vrwkv", "model.n_layer=2", "model.n_embd=24", "vision.size=16", "vision.patch_size=4"),
    *("run.batch=12", "run.steps=8", "run.log_every=1", "run.precision=float32", "optim.lr=3e-3", "optim.eps=1e-8"),
    *("optim.warmup=2", "vision.workers=0"),
]


def noisy(colour, seed: int) -> Image.Image:
    dice = np.random.default_rng(seed)
    size = dice.integers(14, 30, 2)
    noise = dice.normal(0, 25, (*size, 3)) + np.array(colour)
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder a class, 16 pictures in each."""
    at = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        (at / name).mkdir()
        for i in range(16):
            noisy(colour, i).save(at / name / f"{i:02}.png")
    return at


def settings(folder, out, *more: str) -> list[str]:
    return [*SMALL, f"data.train={folder}", f"run.out={out}", *more]


def trained(folder, out, *more: str) -> Trainer:
    trainer = Trainer(read_config(None, settings(folder, out, *more)), quiet=False)
    trainer.train()
    return trainer


def losses(out) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["vrwkv", "vrwkv6"])
def test_it_learns(generation, folder, tmp_path):
    more = [f"model.generation={generation}", f"data.eval={folder}", "run.steps=80", "vision.rand_augment=0"]
    if generation == "vrwkv6":
        more.append("model.n_embd=64")
    trainer = trained(folder, tmp_path / "out", *more, "run.batch=24", "vision.crop=[0.5, 1.0]", "vision.erasing=0.1")
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    model = heronry.load(tmp_path / "out", kind=heronry.VisionModel)
    assert model.config.num_classes == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["labels"] == sorted(COLOURS)
    row = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()][-1]
    assert row["eval_accuracy"] > 0.9


HARD = ("vision.mixup=0.8", "vision.cutmix=1.0", "vision.drop_path=0.3", "run.ema=0.8", "run.accumulate=2")


@pytest.mark.parametrize("more", [(), HARD], ids=["plain", "hard"])
@pytest.mark.quick_for("hard")
def test_stopped_and_gone_on_it_is_the_run_never_stopped(more, folder, tmp_path):
    whole = trained(folder, tmp_path / "whole", *more)
    fails_at(Trainer(read_config(None, settings(folder, tmp_path / "cut", *more, "run.save_every=1"))), 4)
    again = trained(folder, tmp_path / "cut", *more, "run.save_every=1")
    assert again.step == whole.step == 8
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = (heronry.load(tmp_path / name, kind=heronry.VisionModel) for name in ("whole", "cut"))
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_readers_change_nothing(folder, tmp_path):
    trained(folder, tmp_path / "alone", "run.steps=3", *HARD)
    trained(folder, tmp_path / "helped", "run.steps=3", *HARD, "vision.workers=2")
    assert losses(tmp_path / "alone") == losses(tmp_path / "helped")


def test_the_mean_of_the_weights_is_kept(folder, tmp_path):
    found = {}
    for name, more in (("plain", ()), ("mean", ("run.ema=0.5",))):
        run = Trainer(read_config(None, settings(folder, tmp_path / name, "run.steps=3", *more)))
        seen, take_step = [], run.train_step

        def watched(run=run, seen=seen, take_step=take_step):
            result = take_step()
            seen.append(run.model.pos_embed.detach().clone())
            return result

        run.train_step = watched
        run.train()
        found[name] = seen, heronry.load(tmp_path / name, kind=heronry.VisionModel).pos_embed
    (first, second, third), kept = found["mean"]
    assert all(torch.equal(a, b) for a, b in zip(found["plain"][0], found["mean"][0], strict=True))
    assert torch.equal(found["plain"][1], third)
    assert torch.allclose(kept, 0.25 * first + 0.25 * second + 0.5 * third, atol=1e-7)


def test_the_mean_of_a_text_models_weights(texts, tmp_path):
    more = ["run.steps=4", "run.batch=2", "data.ctx_len=16", "model.n_layer=1", "model.n_embd=64", "run.ema=0.5"]
    run = Trainer(read_config(None, [f"data.train={texts}", f"run.out={tmp_path / 'out'}", *more]))
    run.train()
    assert not torch.equal(heronry.load(tmp_path / "out").head.weight, run.model.head.weight)
    with pytest.raises(InputError, match=r"run\.ema does not work with"):
        read_config(None, [f"data.train={texts}", "run.ema=0.5", "run.shard=full"])


def test_fine_tuning_from_another_model(folder, tmp_path):
    from heronry.models.vision import create

    base = create("vrwkv_tiny", n_layer=2, n_embd=24, dim_ffn=96, image_size=32, patch_size=4, num_classes=11)
    heronry.save(base, tmp_path / "base")
    more = (f"model.path={tmp_path / 'base'}", "vision.drop_path=0.2", "vision.decay_lr=10.0")
    trainer = Trainer(read_config(None, settings(folder, tmp_path / "out", *more)))
    assert torch.equal(trainer.model.layers[0].att.key.weight, base.layers[0].att.key.weight)
    assert trainer.model.config.num_classes == 3
    assert trainer.model.layers[1].drop_path == 0.2
    assert {group["base_lr"] / trainer.config.optim.lr for group in trainer.optimizer.param_groups} == {1.0, 10.0}
    trainer.train()
    assert heronry.load(tmp_path / "out", kind=heronry.VisionModel).config.image_size == 32
    with pytest.raises(InputError, match="base: is a vrwkv, not a vrwkv6"):
        Trainer(read_config(None, settings(folder, tmp_path / "b", *more, "model.generation=vrwkv6")))
    with pytest.raises(InputError, match="reads text, not pictures"):
        Trainer(read_config(None, settings(folder, tmp_path / "b", "model.path=heronry/bundled")))


def test_a_vit_through_the_same_loop(folder, tmp_path):
    vit = ViT(ViTConfig(32, 2, 64, 3, 16, 4, 16))
    vit.init_weights()
    Trainer(read_config(None, settings(folder, tmp_path / "out", "run.steps=30")), model=vit).train()
    found = losses(tmp_path / "out")
    assert sum(found[-5:]) < sum(found[:5])


# ---- data --------------------------------------------------------------------------------------------------------


def parquet(path, rows, names=("image", "label")):
    images, labels = [], []
    for picture, label in rows:
        held = io.BytesIO()
        picture.save(held, "png")
        images.append({"bytes": held.getvalue(), "path": None})
        labels.append(label)
    pq.write_table(pa.table({names[0]: images, names[1]: labels}), path)
    return path


def test_folders_and_parquet_hold_the_same(folder, tmp_path):
    rows = [(noisy(colour, i), n) for n, (_, colour) in enumerate(sorted(COLOURS.items())) for i in range(16)]
    table = ImageDataset(str(parquet(tmp_path / "a.parquet", rows, ("img", "labels"))))
    files = ImageDataset(str(folder))
    assert files.class_names == ["blue", "green", "red"]
    assert table.class_names == ["0", "1", "2"]
    assert len(table) == len(files) == 48
    for i in (0, 17, 47):
        a, b = table[i], files[i]
        assert a[1] == b[1] == i // 16
        assert a[0].tobytes() == b[0].tobytes()


def test_every_picture_is_seen_once_an_epoch(folder, tmp_path):
    run = Trainer(read_config(None, settings(folder, tmp_path / "out", "vision.crop=[1.0, 1.0]", "vision.flip=false")))
    seen = [
        [
            x.numpy().tobytes()
            for step in range(4 * epoch, 4 * epoch + 4)
            for ((x8, _),) in run.task.batches(step)
            for x in x8
        ]
        for epoch in range(2)
    ]
    assert len(set(seen[0])) == len(seen[0]) == 48
    assert set(seen[0]) == set(seen[1])
    assert seen[0] != seen[1]


def test_mixing():
    torch.manual_seed(0)
    images, targets = torch.rand(6, 3, 8, 8), torch.eye(6)
    assert mix_images(images, targets, 0, 0)[0] is images
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        ways = set()
        for _ in range(20):
            x, y = mix_images(images, targets, mixup, cutmix)
            share = y[0, 0].item()
            assert torch.allclose(y.sum(1), torch.ones(6))
            assert torch.allclose(y, share * targets + (1 - share) * targets.flip(0))
            if torch.allclose(x, share * images + (1 - share) * images.flip(0), atol=1e-6):
                ways.add("mixup")
            else:
                own = (x == images).all(1).float().mean((1, 2))
                assert torch.allclose(own, torch.full((6,), share), atol=1e-6)
                assert ((x == images) | (x == images.flip(0))).all()
                ways.add("cutmix")
        assert ways == {"mixup"} if not cutmix else "cutmix" in ways


def test_what_is_wrong_with_the_data_is_told(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    bad = parquet(tmp_path / "bad.parquet", [(noisy((0, 0, 0), 0), 0)], ("photo", "kind"))
    for source, message in (
        (tmp_path / "nowhere", "not a folder of images, a .parquet file or an hf:// name"),
        (tmp_path / "nothing.parquet", "no such file"),
        (tmp_path / "empty", "empty: "),
        (bad, "has the columns photo, kind; expected 'image' and 'label'"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            ImageDataset(str(source))
        assert "\n" not in str(caught.value)
    damaged = tmp_path / "damaged"
    for name in ("a", "b"):
        (damaged / name).mkdir(parents=True)
        (damaged / name / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"damaged: image \d: .*not an image that can be read"):
        Trainer(read_config(None, settings(damaged, tmp_path / "out", "run.batch=1"))).train()
    with pytest.raises(InputError, match=r"^\S+damaged: image \d: .*not an image that can be read$"):
        Trainer(read_config(None, settings(damaged, tmp_path / "out2", "run.batch=1", "vision.workers=1"))).train()
    few = tmp_path / "few"
    for name in ("a", "b"):
        (few / name).mkdir(parents=True)
        noisy((1, 2, 3), 0).save(few / name / "x.png")
    with pytest.raises(InputError, match=r"has 3 classes, .*few 2"):
        Trainer(read_config(None, settings(few, tmp_path / "out", f"data.eval={folder}")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("vision.patch_size=5", "vision.size is 16, not a multiple of vision.patch_size = 5"),
        ("vision.shift=up", "vision.shift is 'up'"),
        ("vision.crop=[0.9, 0.5]", "vision.crop must be two ascending fractions"),
        ("vision.mixup=-1.0", "vision.mixup must not be negative"),
        ("vision.decay_lr=0.0", "vision.decay_lr must be positive"),
        ("vision.drop_path=1.0", r"vision.drop_path must be in \[0, 1\)"),
        ("model.tune=lora", "model.tune=lora"),
        ("run.shard=full", "run.sequence_parallel and run.shard do not work with vrwkv"),
        ("run.ema=1.0", r"run.ema must be in \[0, 1\)"),
        ("model.generation=rwkv7", "the section vision is only for vrwkv, vrwkv6, not rwkv7"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(InputError, match=message):
        read_config(None, [*SMALL, "data.train=x", setting])


def test_pictures_that_do_not_fit_in_memory_are_refused(folder, tmp_path):
    for more, problem in (
        (
            ["run.batch=100000000"],
            r"a pass of 100,000,000 x 16 x 16 pixels takes at least 3,072 GB, and cpu has \d+ GB",
        ),
        (["vision.size=1000000000", "vision.patch_size=100"], r"make 2,400,000.0 billion weights"),
    ):
        with pytest.raises(InputError, match=problem):
            Trainer(read_config(None, settings(folder, tmp_path / "out", *more)))


def test_ctrl_c_keeps_what_was_reached(folder, tmp_path):
    is_interrupted(Trainer(read_config(None, settings(folder, tmp_path / "out"))), 3)
    assert trained(folder, tmp_path / "out").step == 8
