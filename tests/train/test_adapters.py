"""Adapters: only they learn, peft reads what is written, and merged they are the same model."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_trainer import fails_at
from torch.nn import functional as F

import heronry
from heronry.adapters import apply_adapter, merge_adapter, read_adapter, save_adapter
from heronry.adapters.inject import inject_adapter, inject_miss
from heronry.checkpoint import assemble, load, save
from heronry.errors import InputError
from heronry.models import MODELS, Model
from heronry.models.layers import Linear, PackedLinear
from heronry.ops.packed import dequantize, untile
from heronry.quantization import FORMATS, quantize
from heronry.train.config import OptimSection, read_config
from heronry.train.optim import build_optimizer
from heronry.train.trainer import Trainer

VERSION = {"rwkv4": "4", "rwkv5": "5.2", "rwkv6": "6", "rwkv7": "7"}
TUNE = ["data.ctx_len=32", "run.batch=4", "run.log_every=1", "run.precision=float32", "run.sample_every=0"]
TUNE += ["model.rank=4", "model.alpha=8", "optim.lr=1e-2", "optim.lr_final=1e-3", "optim.warmup=2", "run.steps=15"]
FILES = ["adapter_config.json", "adapter_model.safetensors"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(random_checkpoint, tmp_path_factory):
    """Generation -> the folder of a model, made once."""

    def base(generation: str, seed: int = 0, layers: int = 2) -> Path:
        out = tmp_path_factory.getbasetemp() / f"{generation}-{seed}-{layers}"
        if not out.exists():
            sizes = {"vocab": 256, "width": 64, "heads": 2, "ffn": 96, "layers": layers, "seed": seed}
            notes = {"opening_tokens": [1], "chat_template": "story"}
            save(assemble(random_checkpoint(VERSION[generation], **sizes)), out, notes=notes)
        return out

    return base


def tuning(base: Path, texts: Path, out: Path, *more: str, tune: str = "lora") -> Trainer:
    where = [f"model.path={base}", f"model.tune={tune}", f"data.train={texts}", f"run.out={out}"]
    return Trainer(read_config(None, [*TUNE, *where, *more]), quiet=False)


def adapted(base: Path, dora: bool = False, seed: int = 0, **options) -> Model:
    """A model whose adapters change something."""
    torch.manual_seed(seed)
    model = inject_adapter(load(base), 4, 8, dora=dora, **options)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
        elif "magnitude" in name:
            p.data *= torch.rand_like(p) + 0.5
    return model.eval()


def logits(model: torch.nn.Module, length: int = 20) -> torch.Tensor:
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens[:, :length])[0]


def losses(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row]


def refusal(call, *args, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("generation", MODELS)
@pytest.mark.parametrize("tune", ["lora", "dora"])
def test_only_adapters_learn_and_peft_reads_them(generation, tune, bases, texts, tmp_path):
    base, out = bases(generation), tmp_path / "out"
    tuned = tuning(base, texts, out, tune=tune).train()
    found = [row[1] for row in losses(out)]
    assert sum(found[-5:]) / 5 < found[0] - 1
    plain = load(base)
    weights, found = plain.state_dict(), tuned.state_dict()
    assert all(
        torch.equal(x, found.get(name, found.get(f"{name[:-6]}base_layer.weight"))) for name, x in weights.items()
    )
    trained = {name.rsplit(".lora", 1)[0] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {name for name, m in plain.named_modules() if type(m) is Linear and name != "head"}
    kept = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".json", ".safetensors"))
    last = "checkpoints/step-00000015"
    assert kept == [*FILES, *(f"{last}/{name}" for name in [*FILES, "optimizer.safetensors", "run.json"])]

    expected = logits(tuned)
    merged = load(base)
    apply_adapter(merged, out)
    assert merged.is_unmodified()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(plain), expected, atol=0.1)
    theirs = PeftModel.from_pretrained(load(base), str(out))
    torch.testing.assert_close(logits(theirs), expected, atol=1e-6, rtol=1e-6)
    for name, x in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("generation", MODELS)
def test_merged_it_runs_native_and_beside_plain(generation, bases, tmp_path):
    model = adapted(bases(generation))
    save_adapter(model, tmp_path)
    merged = load(bases(generation))
    apply_adapter(merged, tmp_path)
    expected, step = logits(model), logits(merged, 3)
    assert model._step is not None
    assert not model._step.is_available()
    torch.testing.assert_close(step, expected[:, :3], atol=1e-4, rtol=1e-4)
    if heronry.build.library(heronry.models.native_step.source_path(generation)) is not None:
        assert merged._step.is_available()


@pytest.mark.parametrize("generation", MODELS)
def test_what_peft_writes_is_read(generation, bases, tmp_path):
    """Without a fingerprint; other matrices than ours, and a scale of alpha / sqrt(rank)."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["att.key", "head"], init_lora_weights=False)
    theirs = get_peft_model(load(bases(generation)), config).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ours = load(bases(generation))
    assert apply_adapter(ours, tmp_path).notes == {}
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(load(bases(generation))), logits(ours), atol=0.1)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("", {}),
        ("base_model.model.", {}),
        ("base_model.model.model.", {}),
        ("base_model.model.rwkv.", {}),
        ("module.base_model.model.rwkv7.", {}),
        ("_orig_mod.module.", {}),
        ("base_model.model.rwkv.", {"att.": "attention.", "ffn.": "feed_forward."}),
        (
            "base_model.model.model.",
            {"blocks.": "layers.", "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.": "attn."},
        ),
    ],
)
def test_names_of_other_classes(prefix, words, bases, tmp_path):
    """The same adapter as wrappers, transformers' classes and flash-linear-attention name its tensors."""
    base = bases("rwkv7")
    model = adapted(base, targets=["att.receptance", "att.key", "ffn.key"])
    save_adapter(model, tmp_path)
    tensors = {}
    for name, x in load_file(tmp_path / FILES[1]).items():
        name = name.removeprefix("base_model.model.")
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        tensors[prefix + name] = x
    save_file(tensors, tmp_path / FILES[1])
    tokens = torch.arange(1, 9)[None]
    merged = load(base)
    apply_adapter(merged, tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(merged(tokens)[0], model.eval()(tokens)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_beside_a_packed_matrix(format, dtype, bases, tmp_path):
    """Those of y = W x + s B A x with the weights that the packed ones stand for, written down here."""
    model = inject_adapter(quantize(load(bases("rwkv7")), format), 4, 8)
    layer = model.blocks[1].ffn.value  # [64, 96]
    assert isinstance(layer.base_layer, PackedLinear)
    random = torch.Generator().manual_seed(0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.normal_(generator=random)
    x = torch.randn(5, 96, generator=random).to(dtype).requires_grad_()
    dy = torch.randn(5, 64, generator=random).to(dtype)
    layer(x).backward(dy)
    w = dequantize(*untile(layer.base_layer.weight, layer.base_layer.scales, 64)).double()
    x64, dy64, a64, b64 = (t.detach().double() for t in (x, dy, a, b))
    near = {"atol": 0.06, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(x.grad.double(), dy64 @ (w + 2 * b64 @ a64), **near)
    torch.testing.assert_close(a.grad.double(), 2 * b64.T @ dy64.T @ x64, **near)
    torch.testing.assert_close(b.grad.double(), 2 * dy64.T @ x64 @ a64.T, **near)


class Rounding(Linear):
    """Unpacked weights, and inputs in 8 bits with a scale for each 32, whose rounding has the gradient of none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, 32))
        scales = groups.abs().amax(-1, keepdim=True) / 127
        rounded = ((groups / scales).round() * scales).flatten(-2)
        return F.linear(x + (rounded - x).detach(), self.weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("generation", MODELS)
def test_gradients_through_a_packed_model(format, generation, bases):
    packed = quantize(load(bases(generation)), format)
    wide = load(bases(generation))
    for name, m in packed.named_modules():
        if isinstance(m, PackedLinear):
            wide.get_submodule(name).__class__ = Rounding
            wide.get_submodule(name).weight.data = dequantize(*untile(m.weight, m.scales, m.out_features))
    gradients = []
    for model in (packed, wide):
        torch.manual_seed(0)
        inject_adapter(model, 4, 8)
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.05)
        tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
        F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        gradients.append({name: p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, x in gradients[0].items():
        assert F.cosine_similarity(x, gradients[1][name], dim=0) > 0.999, name


@pytest.mark.parametrize("format", FORMATS)
def test_packed_base(format, bases, texts, tmp_path):
    """Packed while loading or before is the same run; its adapter goes on the packed model and into the original."""
    base, small = bases("rwkv6"), tmp_path / "small"
    save(quantize(load(base), format), small)
    tuned = tuning(base, texts, tmp_path / "a", f"model.quantize={format}").train()
    tuning(small, texts, tmp_path / "b").train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[-1][1] < losses(tmp_path / "a")[0][1] - 1
    beside = heronry.LLM(small, tokenizer="bytes", adapter=tmp_path / "a").model
    assert beside.quantization == format
    # the 8 bits of activations can magnify a difference in the last bit of float32
    assert (logits(beside) - logits(tuned)).norm() < 0.01 * logits(tuned).norm()
    assert not any(p.requires_grad for p in beside.parameters())
    merged = heronry.LLM(base, tokenizer="bytes", adapter=tmp_path / "b").model
    far = (logits(load(base)) - logits(tuned)).norm()
    assert (logits(merged) - logits(tuned)).norm() < 0.5 * far
    assert beside.fingerprint not in (load(small).fingerprint, merged.fingerprint)
    with pytest.raises(InputError, match="cannot be merged into packed weights"):
        tuned.blocks[0].att.key.merge()


CUT = [
    ("rwkv7", "lora", "model.dropout=0.2"),
    ("rwkv4", "dora", "data.order=shuffle"),
    ("rwkv6", "lora", "model.quantize=int8"),
    ("rwkv7", "miss", "model.dropout=0.2"),
    ("rwkv5", "miss", "model.quantize=int4"),
    ("rwkv7", "miss", "model.miss_variant=bat"),
]


@pytest.mark.parametrize(("generation", "tune", "more"), CUT)
def test_interrupted_it_is_the_same_to_the_bit(generation, tune, more, bases, texts, tmp_path):
    more = (more, "run.steps=6", "run.save_every=2", *["model.alpha=32"] * (tune == "miss"))
    tuning(bases(generation), texts, tmp_path / "whole", *more, tune=tune).train()
    run = tuning(bases(generation), texts, tmp_path / "broken", *more, tune=tune)
    fails_at(run, 5)
    again = tuning(bases(generation), texts, tmp_path / "broken", *more, tune=tune)
    assert again.step == 4
    again.train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    whole, broken = (load_file(tmp_path / name / FILES[1]) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(x, broken[name]) for name, x in whole.items())


@pytest.mark.parametrize("generation", MODELS)
@pytest.mark.parametrize("more", [(), ("model.miss_variant=mini", "model.mini_r=4"), ("model.miss_variant=bat",)])
@pytest.mark.quick_for("rwkv7")
def test_miss_learns(generation, more, bases, texts, tmp_path):
    """Only its blocks do; merged, read by peft and beside, it is the model that was trained."""
    base, out = bases(generation), tmp_path / "out"
    tuned = tuning(base, texts, out, "model.alpha=32", *more, tune="miss").train()
    found = [row[1] for row in losses(out)]
    assert sum(found[-5:]) / 5 < found[0] - 0.3
    plain = load(base)
    weights, found = plain.state_dict(), tuned.state_dict()
    assert all(
        torch.equal(x, found.get(name, found.get(f"{name[:-6]}base_layer.weight"))) for name, x in weights.items()
    )
    trained = {name.removesuffix(".miss_block") for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {name for name, m in plain.named_modules() if type(m) is Linear and name != "head"}
    expected = logits(tuned)
    merged = load(base)
    apply_adapter(merged, out)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    theirs = PeftModel.from_pretrained(load(base), str(out))
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)


def test_every_block_of_miss_decays(bases):
    model = inject_miss(load(bases("rwkv7")), 8, "bat")
    lengths, blocks = ([len(group["params"]) for group in build_optimizer(model, OptimSection()).param_groups], 12)
    assert lengths == [blocks]


@pytest.mark.parametrize("dora", [False, True])
def test_checkpointing_and_autocast(dora, bases):
    """Recomputed activations give the same gradients; bfloat16 ones nearly, in float32 adapters."""

    def gradients(model: Model, precise: bool = True) -> dict[str, torch.Tensor]:
        tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            found = model(tokens, cu_seqlens=(0, 9, 24))[0]
        F.cross_entropy(found[0].float(), tokens[0].roll(-1)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    model = adapted(bases("rwkv7"), dora).train()
    again, rounded = copy.deepcopy(model), copy.deepcopy(model)
    expected = gradients(model)
    again.gradient_checkpointing = True
    for name, x in gradients(again).items():
        assert torch.equal(x, expected[name])
    for name, x in gradients(rounded, precise=False).items():
        assert x.dtype == torch.float32
        assert F.cosine_similarity(x.flatten(), expected[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("generation", MODELS)
def test_who_decays(generation, bases):
    optimizer = build_optimizer(adapted(bases(generation), dora=True), OptimSection(lr=1e-3, weight_decay=0.2))
    lengths, matrices = optimizer.param_groups
    assert (lengths["weight_decay"], matrices["weight_decay"]) == (0.0, 0.2)
    assert lengths["lr"] == matrices["lr"] == 1e-3
    assert {p.ndim for p in lengths["params"]} == {1}
    assert len(matrices["params"]) == 2 * len(lengths["params"])


def test_states_know_the_adapter(bases, tmp_path):
    """Neither the base's states nor those of another adapter fit; those of the merged folder do."""
    base = bases("rwkv7")
    for seed in (0, 1):
        save_adapter(adapted(base, seed=seed), tmp_path / f"a{seed}")
    plain = heronry.LLM(base, tokenizer="bytes")
    first, second = (heronry.LLM(base, tokenizer="bytes", adapter=tmp_path / f"a{seed}") for seed in (0, 1))
    unmerged = adapted(base)
    assert len({llm.model.fingerprint for llm in (plain, first, second)} | {unmerged.fingerprint}) == 4
    assert unmerged.adapted_from == plain.model.fingerprint
    for llm in (plain, second):
        with pytest.raises(InputError, match="belongs to another model"):
            first.generate("a", 1, state=llm.state("b"))
    save(first.model, tmp_path / "merged")
    again = heronry.LLM(tmp_path / "merged", tokenizer="bytes")
    assert again.generate("a", 3, state=first.state("b"), seed=0) == first.generate(
        "a", 3, state=first.state("b"), seed=0
    )


def test_generate_and_merge(command, bases, texts, tmp_path):
    base, out, merged = bases("rwkv5"), tmp_path / "out", tmp_path / "merged"
    code, output, _ = command(
        "train", *TUNE, f"model.path={base}", "model.tune=lora", f"data.train={texts}", f"run.out={out}"
    )
    assert (code, output) == (0, f"{out}\n")
    greedy = ("--tokenizer", "bytes", "--temperature", 0, "--max-tokens", 8)
    adapted = command("generate", "\x05", "-m", base, "--adapter", out, *greedy)
    assert adapted[0] == 0
    assert adapted[1] != command("generate", "\x05", "-m", base, *greedy)[1]
    assert command("merge", base, out, merged) == (0, f"{merged}\n", "")
    assert command("generate", "\x05", "-m", merged, *greedy) == adapted
    about = json.loads((merged / "config.json").read_text())
    assert about["opening_tokens"] == [0]  # the adapter's
    assert about["chat_template"] == "story"  # the base's
    assert command("merge", base, out, base)[2].endswith("is the original itself; choose another folder\n")
    assert command("quantize", merged, tmp_path / "small")[0] == 0
    assert command("generate", "\x05", "-m", out)[2].endswith(
        "the folder holds an adapter; give its model, and this folder with --adapter\n"
    )


def test_what_does_not_fit_is_refused(bases, random_checkpoint, texts, tmp_path, command):
    base, folder = bases("rwkv7"), tmp_path / "adapter"
    save_adapter(adapted(base), folder, {"opening_tokens": [7]})
    assert read_adapter(folder, load(base)).notes == {"opening_tokens": [7]}

    def told(change=None, tensors=None, model=base, **settings) -> str:
        """What is said of a copy of the adapter, changed; without a fingerprint, if its tensors are."""
        copied = tmp_path / "changed"
        copied.mkdir(exist_ok=True)
        about = json.loads((folder / FILES[0]).read_text()) | settings
        (copied / FILES[0]).write_text(json.dumps(about))
        (copied / FILES[1]).write_bytes((folder / FILES[1]).read_bytes())
        if tensors is not None:
            save_file(tensors, copied / FILES[1])
        if change is not None:
            change(copied)
        line = refusal(apply_adapter, load(model), copied)
        assert line.startswith(f"{copied}: ")
        return line.removeprefix(f"{copied}: ")

    good = load_file(folder / FILES[1])
    a = "base_model.model.blocks.0.att.key.lora_A.weight"
    assert told(model=bases("rwkv7", seed=1)) == "this adapter was trained on another model"
    assert (
        told(model=bases("rwkv6"), base_model_name_or_path="goose")
        == "this adapter was trained on another model, goose"
    )
    assert "blocks.1.att.key, which this rwkv7 does not have" in told(tensors=good, model=bases("rwkv7", layers=1))
    assert "lora_A.weight has shape [4, 64], but the rank in adapter_config.json is 3" in told(tensors=good, r=3)
    assert "has no blocks.0.att.key.lora_A.weight" in told(tensors={k: x for k, x in good.items() if k != a})
    assert "lora_magnitude_vector" in told(tensors=good, use_dora=True)
    assert "contains NaN or infinity" in told(tensors=good | {a: good[a] * torch.inf})
    assert "blocks.0.att.key.lora_A.weight occurs twice" in told(
        tensors=good | {a.replace("blocks", "rwkv.blocks"): good[a].clone()}
    )
    assert "unexpected tensor head.bias, which is not part" in told(tensors=good | {"head.bias": torch.ones(3)})
    assert "adapter_model.safetensors is empty" in told(tensors={})
    for wrong in (0, -1, 2.0, True, None):
        assert f"r must be a positive whole number, got {wrong!r}" in told(r=wrong)
    for wrong in ("8", True, None):
        assert f"lora_alpha must be a number, got {wrong!r}" in told(lora_alpha=wrong)
    assert "unsupported peft_type 'IA3'; only LORA, MISS and BONE are supported" in told(peft_type="IA3")
    assert "unsupported init_lora_weights 'pissa'" in told(init_lora_weights="pissa")
    assert "use_dora must be true or false, got 'no'" in told(use_dora="no")
    assert "use_rslora must be true or false, got 1" in told(use_rslora=1)
    assert "peft_type ['LORA']; only" in told(peft_type=["LORA"])
    assert "rank_pattern = {'key': 2} is not supported" in told(rank_pattern={"key": 2})
    for text, complaint in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be a JSON object, got [1]"),
        ('{"opening_tokens": "a"}', "the note opening_tokens is 'a'; expected a list of token ids"),
        ('{"chat_template": ["a"]}', "the note chat_template is ['a']; expected the name of a template"),
    ):
        assert complaint in told(lambda at: save_file(good, at / FILES[1], metadata={"notes": text}))  # noqa: B023
    assert "bias = 'all' is not supported" in told(bias="all")
    assert "has no adapter_model.safetensors" in told(lambda at: (at / FILES[1]).unlink())
    assert "has no adapter_config.json" in told(lambda at: (at / FILES[0]).unlink())
    assert "adapter_config.json cannot be read" in told(lambda at: (at / FILES[0]).write_text("{"))
    assert "adapter_config.json is not a JSON object" in told(lambda at: (at / FILES[0]).write_text("[]"))
    cut = (folder / FILES[1]).read_bytes()[:-5]
    assert "damaged or truncated safetensors file" in told(lambda at: (at / FILES[1]).write_bytes(cut))
    assert refusal(apply_adapter, load(base), tmp_path / "none").endswith("none: no such file or folder")
    unchanged = load(base, dtype="float16")
    before = {name: p.clone() for name, p in unchanged.named_parameters()}
    large = read_adapter(folder, unchanged)
    last, change = list(large.changes.items())[-1]
    change.b.fill_(1e8)
    assert refusal(merge_adapter, unchanged, large) == f"{last}.weight contains NaN or infinity after merging"
    assert all(torch.equal(p, before[name]) for name, p in unchanged.named_parameters())
    assert unchanged.fingerprint == load(base, dtype="float16").fingerprint

    small = tmp_path / "small"
    save(quantize(load(base), "int8"), small)
    code, _, line = command("merge", small, folder, tmp_path / "x")
    assert code == 2
    assert "cannot merge into int8 weights; merge into the original model" in line
    assert "DoRA does not work beside packed weights" in refusal(inject_adapter, load(small), dora=True)
    model = adapted(base)
    assert "already has adapters" in refusal(apply_adapter, model, folder)
    assert "already has adapters" in refusal(inject_adapter, model)
    assert "has adapters beside its matrices" in refusal(save, model, tmp_path / "y")
    assert "has adapters beside its matrices" in refusal(quantize, model, "int8")
    assert "has no adapters" in refusal(save_adapter, load(base), tmp_path / "y")
    assert "adapter= is for a model that is loaded" in refusal(
        heronry.LLM, load(base), tokenizer="bytes", adapter=folder
    )
    zero = load(base)
    zero.blocks[0].att.key.weight.data[3] = 0
    assert "blocks.0.att.key.weight has rows of zeros" in refusal(inject_adapter, zero, dora=True)

    def config(*settings: str) -> str:
        return refusal(tuning, base, texts, tmp_path / "z", *settings)

    assert config("model.tune=locon") == "model.tune is 'locon'; known: all, state, lora, dora, miss"
    assert config("model.rank=0") == "model.rank must be positive, got 0"
    assert config("model.alpha=-1") == "model.alpha must be positive, got -1"
    assert config("model.dropout=1") == "model.dropout must be in [0, 1), got 1.0"
    assert config("model.path=") == "model.tune=lora needs model.path, the model to tune"
    assert config("model.quantize=int3") == "model.quantize is 'int3'; known: int8, int4"
    assert config("model.tune=dora", "model.quantize=int8") == "model.quantize needs model.tune=lora or miss, got dora"
    assert config("model.tune=miss") == "model.alpha is for lora and dora: MiSS has no scale"
    assert config("model.miss_variant=bat") == "model.miss_variant needs model.tune=miss, got lora"
    miss = ("model.tune=miss", "model.alpha=32")
    assert config(*miss, "model.mini_r=4") == "model.mini_r needs model.miss_variant=mini, got default"
    assert config(*miss, "model.miss_variant=bone").endswith("known: default, mini, bat")
    assert config(*miss, "model.miss_variant=bat", "model.dropout=0.1") == (
        "model.dropout does not work with model.miss_variant=bat, which changes the matrix itself"
    )
    assert config("model.targets=key") == "model.targets must be a list of strings, got 'key'"
    assert config("model.targets=[1]") == "model.targets must be a string, got 1"
    assert "is called 'q_proj'; known: att.key, " in config('model.targets=["att.key", "q_proj"]')
    for tune in ("all", "state", "dora"):
        assert "quantized weights cannot be trained" in refusal(tuning, small, texts, tmp_path / "z", tune=tune)


def test_other_matrices_by_name(bases, texts, tmp_path):
    run = tuning(bases("rwkv7"), texts, tmp_path / "out", 'model.targets=["ffn.key", "head"]', "run.steps=2")
    run.train()
    trained = {name.rsplit(".lora", 1)[0] for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.0.ffn.key", "blocks.1.ffn.key", "head"}
    merged = load(bases("rwkv7"))
    apply_adapter(merged, tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(run.model), atol=1e-5, rtol=1e-5)


def test_the_base_must_stay_what_it_was(bases, texts, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save(load(bases("rwkv7")), base)
    tuning(base, texts, out, "run.steps=1").train()
    with pytest.raises(InputError, match=r"trained with model\.rank = 4, not 8"):
        tuning(base, texts, out, "model.rank=8")
    save(load(bases("rwkv7", seed=1)), base)
    with pytest.raises(InputError, match=f"trained on another model, {base}"):
        tuning(base, texts, out, "run.steps=2")
    save_adapter(adapted(base), tmp_path / "bare")
    with pytest.raises(InputError, match="already contains a model"):
        tuning(base, texts, tmp_path / "bare")


def test_without_peft(bases, tmp_path, monkeypatch):
    """Merging needs none, nor what stays beside packed weights; training says what is missing."""
    base = bases("rwkv7")
    save_adapter(adapted(base), tmp_path / "adapter")
    save(quantize(load(base), "int8"), tmp_path / "small")
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "heronry.adapters.inject")
    apply_adapter(load(base), tmp_path / "adapter")
    apply_adapter(load(tmp_path / "small"), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"training adapters needs peft: pip install 'heronry\[train\]'$"):
        importlib.import_module("heronry.adapters.inject")
