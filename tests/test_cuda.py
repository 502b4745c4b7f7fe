"""What stands on the CPU stands on a GPU: the same numbers, gradients, texts and runs. Without one all is skipped."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from ops.cases import OPERATORS, Operator, assert_close, draw, run, to
from torch import Tensor

from heronry import LLM, InputError, State
from heronry import evaluate as measures
from heronry.checkpoint import assemble, load, save
from heronry.convert import convert
from heronry.data.tokenize_corpus import tokenize_corpus
from heronry.engine.llm import BUNDLED
from heronry.models import LayerState, Model
from heronry.models.vision import create
from heronry.ops.biwkv import biwkv
from heronry.ops.biwkv6 import biwkv6
from heronry.quantization import FORMATS, quantize
from heronry.train.config import read_config
from heronry.train.trainer import Interrupted, Trainer

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

# ---- operators ---------------------------------------------------------------------------------------------------

BODIES = [pytest.param(o, impl, id=f"{o.name}-{impl}") for o in OPERATORS for impl in o.bodies if impl != "cpu"]


def moved(operator: Operator) -> Operator:
    """The same, done on the device between tensors on the CPU."""

    def call(cu_seqlens=None, impl="auto", **arguments: Tensor) -> tuple[Tensor, Tensor]:
        there = {name: x.to(DEVICE) for name, x in arguments.items()}
        y, state = operator.call(**there, cu_seqlens=cu_seqlens, impl=impl)
        assert y.device.type == state.device.type == DEVICE
        return y.cpu(), state.cpu()

    return replace(operator, call=call)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
@pytest.mark.parametrize(("batch", "tokens", "heads", "size"), [(2, 1, 3, 5), (2, 63, 2, 64), (1, 300, 2, 16)])
def test_operators(operator, impl, batch, tokens, heads, size):
    exact = draw(operator, batch, tokens, heads, size)
    assert_close(run(moved(operator), exact, impl), run(operator, exact, "reference"), 1e-10)
    rounded = to(exact, torch.float32)
    expected = run(operator, to(rounded, torch.float64), "reference")
    assert_close(run(moved(operator), rounded, impl), expected, 5e-5)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
@pytest.mark.parametrize("lengths", [[7, 1, 90, 33, 1, 32], [1, 1, 1]], ids=str)
def test_packed_operators(operator, impl, lengths):
    cu = [0, *accumulate(lengths)]
    arguments = draw(operator, 1, cu[-1], 2, 8, states=len(lengths))
    expected = run(operator, arguments, "reference", cu)
    assert_close(run(moved(operator), arguments, impl, cu), expected, 1e-10)


@pytest.mark.parametrize(("operator", "impl"), BODIES)
def test_16_bits_and_autocast(operator, impl):
    arguments = to(draw(operator, 2, 70, 2, 8), torch.bfloat16)
    exact_y, exact_state = operator.call(**to(arguments, torch.float64), impl="reference")
    y, state = moved(operator).call(**arguments, impl=impl)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close({"y": y}, {"y": exact_y}, 2**-8)  # one rounding of the output
    assert_close({"state": state}, {"state": exact_state}, 2e-5)  # none of the state
    wide = to(arguments, torch.float32)
    plain = moved(operator).call(**wide, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = moved(operator).call(**wide, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_the_body_of_the_cpu_is_refused(operator):
    with pytest.raises(ValueError, match=f"{operator.name}: the body 'cpu' cannot run on {DEVICE}"):
        moved(operator).call(**draw(operator, 1, 5, 1, 2), impl="cpu")


# ---- models ------------------------------------------------------------------------------------------------------

SIZES = {"width": 64, "heads": 2, "ffn": 96, "rank": 8}


@pytest.fixture(params=["float64", "float32"])
def pair(request, version, random_checkpoint) -> tuple[Model, Model, float]:
    """A model in float64 on the CPU, the same on the device, and how far apart they may be."""
    weights = random_checkpoint(version, **SIZES)
    dtype = getattr(torch, request.param)
    there = assemble({name: x.to(dtype) for name, x in weights.items()}, device=DEVICE)
    return assemble({name: x.double() for name, x in weights.items()}), there, 1e-9 if dtype == torch.float64 else 2e-4


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Within `tolerance` of the largest number."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    error = float((found - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), f"{name} is off by {error:.1e}"


def same(found: State, expected: State, tolerance: float) -> None:
    """RWKV-4's triples (a, b, p) are compared as the sums a e^p, b e^p that they stand for."""
    for a, b in zip(found.layers, expected.layers, strict=True):
        for name, x, y in zip(LayerState._fields, a, b, strict=True):
            if x.ndim == 3:
                x, y = ((z[:, :2] * z[:, 2:].exp()).double() for z in (x, y))
            near(x, y, tolerance, name)


@torch.no_grad()
def test_logits_and_states(pair):
    mine, there, tolerance = pair
    text = tokens(3, 75)
    expected, end = mine(text)
    logits, state = there(text.to(DEVICE))
    assert all(x.device.type == DEVICE for layer in state.layers for x in layer)
    near(logits, expected, tolerance)
    same(state, end, tolerance)
    state, steps = None, []
    for piece in text.to(DEVICE).split([40, 1, 1, 33], 1):
        logits, state = there(piece, state)
        steps.append(logits)
    near(torch.cat(steps, 1), expected, tolerance)
    same(state, end, tolerance)
    assert there.fingerprint == mine.fingerprint


@torch.no_grad()
def test_packed_equals_separate(pair):
    mine, there, tolerance = pair
    lengths = [5, 1, 70, 33]
    texts = [tokens(1, n, seed=n) for n in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    _, carried = there(tokens(4, 3, seed=1).to(DEVICE))
    packed, left = there(torch.cat(texts, 1).to(DEVICE), carried, cu_seqlens=ends.to(DEVICE))
    last, _ = there(torch.cat(texts, 1).to(DEVICE), carried, cu_seqlens=ends.tolist(), last_only=True)
    before = carried.to("cpu")
    for i, text in enumerate(texts):
        logits, end = mine(text, before[i])
        near(packed[:, ends[i] : ends[i + 1]], logits, tolerance)
        near(last[:, i], logits[:, -1], tolerance)
        same(left[i], end, tolerance)


def test_gradients(pair):
    mine, there, tolerance = pair
    weights = torch.randn(101, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def gradients(model: Model, device: str, text: Tensor) -> dict[str, Tensor]:
        model.train()
        logits, state = model(text.to(device))
        more, _ = model(text[:, :2].to(device), state)
        mark = weights.to(device, logits.dtype)
        ((logits.tanh() @ mark).mean() + (more.tanh() @ mark).mean()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected, found = gradients(mine, "cpu", tokens(2, 70)), gradients(there, DEVICE, tokens(2, 70))
    for name, gradient in expected.items():
        top = float(gradient.abs().max())
        near(found[name] / top, gradient / top, 100 * tolerance, name)


@torch.no_grad()
def test_bfloat16(version, random_checkpoint):
    half = assemble(random_checkpoint(version, **SIZES), dtype=torch.bfloat16, device=DEVICE)
    exact = assemble({name: x.double().cpu() for name, x in half.state_dict().items()})
    expected, _ = exact(tokens(2, 100))
    whole, state = half(tokens(2, 100).to(DEVICE))
    assert all(x.dtype == torch.float32 for layer in state.layers for x in layer)
    steps, state = [], None
    for t in range(100):
        logits, state = half(tokens(2, 100)[:, t : t + 1].to(DEVICE), state)
        steps.append(logits)
    for logits in (whole, torch.cat(steps, 1)):
        error = (logits.double().cpu() - expected).square().mean().sqrt() / expected.std()
        assert error < 0.05


@torch.no_grad()
def test_deep_embed_and_tuned_states(random_checkpoint):
    for more in ({"deep": 4}, {"tuned": True}):
        weights = random_checkpoint("7", **SIZES, **more)
        expected, _ = assemble({name: x.double() for name, x in weights.items()})(tokens(2, 40))
        near(assemble(weights, device=DEVICE)(tokens(2, 40).to(DEVICE))[0], expected, 2e-4)


@torch.no_grad()
def test_a_state_left_behind_is_told(version, random_checkpoint):
    there = assemble(random_checkpoint(version, **SIZES), device=DEVICE)
    _, state = there(tokens(1, 5).to(DEVICE))
    with pytest.raises(InputError, match="the state is on cpu, the tokens on cuda:0: move it with"):
        there(tokens(1, 5).to(DEVICE), state.to("cpu"))


@torch.no_grad()
def test_to_and_fro(version, random_checkpoint, tmp_path):
    """A model that has run on the CPU, native step and all, goes to the device and comes back."""
    model = assemble(random_checkpoint(version, **SIZES))
    expected, state = model(tokens(1, 9))
    more, _ = model(tokens(1, 1), state)
    model.to(DEVICE)
    logits, there = model(tokens(1, 9).to(DEVICE))
    near(logits, expected, 2e-4)
    near(model(tokens(1, 1).to(DEVICE), state.to(DEVICE))[0], more, 2e-4)
    save(model, tmp_path / "model")
    there.save(tmp_path / "state.safetensors")
    model.to("cpu")
    near(model(tokens(1, 1), there.to("cpu"))[0], more, 2e-4)
    loaded = load(tmp_path / "model", device=DEVICE)
    again = State.load(tmp_path / "state.safetensors", DEVICE)
    near(loaded(tokens(1, 1).to(DEVICE), again)[0], more, 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights(format, version, random_checkpoint, tmp_path):
    weights = random_checkpoint(version, **{**SIZES, "ffn": 192})
    expected, _ = assemble(weights, quantize=format)(tokens(2, 40))
    there = assemble(weights, device=DEVICE, quantize=format)
    packed_there = quantize(assemble(weights, device=DEVICE), format)
    save(there, tmp_path)
    for model in (there, packed_there, load(tmp_path, device=DEVICE)):
        logits, state = model(tokens(2, 40).to(DEVICE))
        assert logits.device.type == DEVICE
        # activations are rounded to 8 bits, and what lies between two of these goes either way
        assert (logits.cpu().double() - expected.double()).square().mean().sqrt() < 0.02 * expected.std()
        model(tokens(2, 1).to(DEVICE), state)
    near(there.to("cpu")(tokens(2, 40))[0], expected, 1e-5)


# ---- texts -------------------------------------------------------------------------------------------------------

PROMPTS = ["Once upon a time", "The little bird", "Tom and Lily went to the park. They"]


@pytest.fixture(scope="module")
def llms() -> tuple[LLM, LLM]:
    return LLM(), LLM(device=DEVICE)


def test_texts(llms):
    mine, there = llms
    expected = mine.generate(PROMPTS, 60, temperature=0)
    assert there.generate(PROMPTS, 60, temperature=0) == expected
    assert "".join(map(str, there.generate(PROMPTS[0], 60, temperature=0, stream=True))) == expected[0].text
    long = PROMPTS[2] * 100  # several calls of prefill
    assert there.generate(long, 20, temperature=0) == mine.generate(long, 20, temperature=0)
    assert there.generate(PROMPTS, 20, seed=1, presence_penalty=0.5)  # sampling


def test_states_travel(llms, tmp_path):
    mine, there = llms
    there.state(PROMPTS[0]).save(tmp_path / "there")
    mine.state(PROMPTS[0]).save(tmp_path / "mine")
    expected = mine.generate(" there was", 30, state=mine.state(PROMPTS[0]), temperature=0)
    assert there.generate(" there was", 30, state=there.state(PROMPTS[0]), temperature=0) == expected
    here, gone = State.load(tmp_path / "there"), State.load(tmp_path / "mine", DEVICE)
    assert mine.generate(" there was", 30, state=here, temperature=0) == expected
    assert there.generate(" there was", 30, state=gone, temperature=0) == expected


def test_chats_and_measures(llms, tmp_path):
    answers = []
    for llm in llms:
        chat = llm.chat()
        answers.append([chat.say("A frog.", max_tokens=30, temperature=0).text])
        if (tmp_path / "chat").exists():
            chat = llm.chat()
            chat.load(tmp_path / "chat")
        else:
            chat.save(tmp_path / "chat")
        answers[-1].append(chat.say("A boat.", max_tokens=30, temperature=0).text)
    assert answers[0] == answers[1]
    found = [measures.score_texts(llm, [" ".join(PROMPTS), PROMPTS[1]]).bits_per_byte for llm in llms]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    asked = [measures.encode_pair(llms[0], *pair) for pair in ((PROMPTS[0], ", there was"), ("The", " dog ran"))]
    mine, there = ([score for score, _ in measures.log_likelihoods(llm.model, asked)] for llm in llms)
    assert there == pytest.approx(mine, rel=1e-4)


# ---- training ----------------------------------------------------------------------------------------------------

SMALL = ["model.n_layer=2", "model.n_embd=64", "data.ctx_len=64", "run.batch=2", "run.log_every=1", "optim.lr=3e-3"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Bytes that are easy to learn."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text("the rook saw the red boat on the old pond and took the frog home. " * 100)
    tokenize_corpus([str(folder / "text.txt")], folder / "texts", "bytes")
    return folder / "texts"


def settings(texts: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.train={texts}", f"run.out={out}", *more]


def trained(texts: Path, out: Path, *more: str) -> Trainer:
    trainer = Trainer(read_config(None, settings(texts, out, *more)))
    trainer.train()
    return trainer


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("generation", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_it_learns(generation, precision, texts, tmp_path):
    more = (f"model.generation={generation}", f"run.precision={precision}", "run.steps=40", f"data.eval={texts}")
    trainer = trained(texts, tmp_path, *more)
    assert trainer.model.emb.weight.device.type == DEVICE
    found = losses(tmp_path)
    assert sum(found[-3:]) / 3 < found[0] - 2.5
    near(load(tmp_path)(tokens(1, 30))[0], trainer.model(tokens(1, 30).to(DEVICE))[0], 2e-4)


@pytest.mark.parametrize(
    "more",
    [
        ("data.order=carried", "data.tbptt_chunks=2"),
        ("run.checkpointing=true", "run.accumulate=2"),
        ("optim.muon=true",),
        ("model.tune=state", f"model.path={BUNDLED}"),
        ("model.tune=lora", f"model.path={BUNDLED}", "model.quantize=int4"),
        ("model.tune=dora", f"model.path={BUNDLED}"),
    ],
    ids=str,
)
def test_it_learns_in_every_way(more, texts, tmp_path):
    trained(texts, tmp_path, "run.steps=20", "run.precision=bfloat16", *more)
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.1


def test_precision_on_a_gpu_is_bfloat16(texts, tmp_path):
    assert Trainer(read_config(None, settings(texts, tmp_path, "run.steps=1"))).precision == "bfloat16"


DROPPED = ("model.tune=lora", f"model.path={BUNDLED}", "model.dropout=0.5", "optim.lr=2e-2", "optim.warmup=1")


@pytest.mark.parametrize("tuned", [(), DROPPED], ids=["all", "lora"])
def test_stopped_and_gone_on(tuned, texts, tmp_path):
    """Sums that a GPU adds up in any order make the two no more than near each other."""
    more = ("run.steps=12", "run.precision=float32", *tuned)
    trained(texts, tmp_path / "whole", *more)
    trainer = Trainer(read_config(None, settings(texts, tmp_path / "parts", *more)))
    take = trainer.train_step

    def interrupted() -> tuple[float, float]:
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return take()

    trainer.train_step = interrupted
    with pytest.raises(Interrupted, match="stopped at step 6 of 12"):
        trainer.train()
    trained(texts, tmp_path / "parts", *more)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_the_same_run_on_the_cpu_and_in_a_group_of_one(texts, tmp_path):
    """float32, from the same random weights; the group speaks NCCL."""
    more = ("run.steps=10", "run.precision=float32", "run.seed=3")
    alone = {"CUDA_VISIBLE_DEVICES": ""}
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
    processes = []
    for name, environment in (("cpu", alone), ("group", group)):
        command = [sys.executable, "-m", "heronry", "train", *settings(texts, tmp_path / name, *more)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env={**os.environ, **environment}, **pipes))
    trained(texts, tmp_path / "here", *more)
    expected = losses(tmp_path / "here")
    for process, name in zip(processes, ("cpu", "group"), strict=True):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-2000:]
        assert losses(tmp_path / name) == pytest.approx(expected, rel=2e-3), name


# ---- transformers ------------------------------------------------------------------------------------------------


def test_transformers(version, random_checkpoint, tmp_path):
    pytest.importorskip("transformers")
    from heronry.integrations.transformers import RwkvPreTrainedModel

    model = assemble(random_checkpoint(version, **{**SIZES, "vocab": 256}))
    mine = RwkvPreTrainedModel.from_heronry(model)
    there = RwkvPreTrainedModel.from_heronry(copy.deepcopy(model)).to(torch.device(DEVICE, 0))
    rows = torch.tensor([[0, 0, 0, 5, 6], [1, 2, 3, 4, 5], [0, 9, 8, 7, 3]])
    batch = {"input_ids": rows, "attention_mask": (rows > 0).long()}
    moved_batch = {name: x.to(DEVICE) for name, x in batch.items()}
    with torch.no_grad():
        near(there(**moved_batch).logits, mine(**batch).logits, 2e-4)
        right = {name: x.flip(1) for name, x in batch.items()}
        near(there(**{name: x.to(DEVICE) for name, x in right.items()}).logits, mine(**right).logits, 2e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = mine.generate(**batch, **options)
    assert there.generate(**moved_batch, **options).tolist() == expected.tolist()
    beams = {**options, "num_beams": 3, "max_new_tokens": 5}
    assert there.generate(**moved_batch, **beams).tolist() == mine.generate(**batch, **beams).tolist()
    loss = there(**moved_batch, labels=moved_batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in there.parameters())

    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    loaded = type(mine).from_pretrained(tmp_path / "hf", device_map="auto")
    assert loaded.device.type == DEVICE
    assert loaded.generate(**moved_batch, **options).tolist() == expected.tolist()


# ---- pictures ----------------------------------------------------------------------------------------------------


def drawn_picture(operator: str, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    if operator == "biwkv":
        return [-noise(12) / tokens, 3 * noise(2, tokens, 12), noise(2, tokens, 12), noise(12)]
    r, k, v = (noise(2, tokens, 3, 8) for _ in range(3))
    return [r, -noise(2, tokens, 3, 8).exp(), k, v, noise(3, 8)]


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize(
    ("operator", "options"),
    [(biwkv, {"impl": "chunked"}), (biwkv, {"segments": 32}), (biwkv, {"impl": "recurrent"}), (biwkv6, {})],
    ids=["chunked", "segments", "recurrent", "biwkv6"],
)
def test_both_directions(operator, options, tokens):
    found = []
    for device in ("cpu", DEVICE):
        leaves = [x.to(device).requires_grad_() for x in drawn_picture(operator.__name__, tokens)]
        y = operator(*leaves, **options)
        weights = torch.arange(y.numel(), dtype=torch.float64).sin().view_as(y).to(device)
        gradients = torch.autograd.grad((y * weights).sum(), leaves, materialize_grads=True)  # one token has no decay
        found.append([x.detach().cpu() for x in (y, *gradients)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["vrwkv_tiny", "vrwkv6_tiny"])
def test_vision(name):
    torch.manual_seed(0)
    model = create(name, num_classes=10, n_layer=3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        images = torch.randn(2, 3, 100, 64)
        expected = model(images)
        there = copy.deepcopy(model).to(DEVICE)
        near(there(images.to(DEVICE)), expected, 1e-4)
        low = there.bfloat16()(images.to(DEVICE).bfloat16())
    assert (low.float().cpu() - expected).norm() / expected.norm() < 0.05


def test_pictures_are_learnt(tmp_path):
    from PIL import Image

    for i in range(40):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + i, 24), colour).save(tmp_path / "data" / name / f"{i}.png")
    options = ["model.generation=vrwkv", "model.n_layer=2", "model.n_embd=32", "vision.size=16", "vision.patch_size=4"]
    options += [f"data.train={tmp_path / 'data'}", f"data.eval={tmp_path / 'data'}", "run.batch=16", "run.steps=60"]
    trainer = Trainer(read_config(None, [*options, "optim.lr=3e-3", "optim.eps=1e-8", f"run.out={tmp_path / 'out'}"]))
    trainer.train()
    assert trainer.model.pos_embed.device.type == DEVICE
    assert trainer.evaluate()["eval_accuracy"] == 1
