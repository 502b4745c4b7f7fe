"""State tuning: only the initial state moves, it helps, and its file is what the field reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from binidx import write_binidx
from safetensors.torch import load_file, save_file
from test_trainer import fails_at

import heronry
from heronry.checkpoint import assemble, initial_state, load, read_time_state, save, save_time_state
from heronry.engine.generate import prefill
from heronry.errors import InputError
from heronry.models import MODELS
from heronry.ops.wkv5 import wkv5
from heronry.ops.wkv6 import wkv6
from heronry.ops.wkv7 import wkv7
from heronry.train.config import read_config
from heronry.train.trainer import Trainer

SMALL = ["data.ctx_len=64", "run.batch=4", "run.log_every=1", "run.precision=float32", "run.sample_every=0"]
TUNE = [*SMALL, "model.tune=state", "optim.lr=1", "optim.lr_final=0.01", "optim.weight_decay=0.01", "run.steps=40"]

pytestmark = pytest.mark.usefixtures("one_thread")


def counting(prefix: Path, seed: int, ways: tuple[int, ...]) -> Path:
    """200 documents of 3 to 6 tokens from 1 to 48 that count up (1) or down (-1), around."""
    random = np.random.default_rng(seed)
    documents = []
    for i in range(200):
        steps = np.arange(random.integers(3, 7)) * ways[i % len(ways)]
        documents.append((random.integers(48) + steps) % 48 + 1)
    return write_binidx(prefix, documents)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    kinds = {"both": (1, (1, -1)), "down": (2, (-1,)), "down-eval": (3, (-1,))}
    return {name: counting(folder / name, *of) for name, of in kinds.items()}


@pytest.fixture(scope="module")
def bases(data, tmp_path_factory):
    """Generation -> the folder of a model that has learned to count both ways, made once."""
    folders: dict[str, Path] = {}

    def base(generation: str, seed: int = 0) -> Path:
        out = tmp_path_factory.getbasetemp() / f"{generation}-{seed}"
        if out not in folders.values():
            sizes = [f"model.generation={generation}", "model.n_layer=2", "model.n_embd=64", "model.vocab_size=256"]
            length = ["optim.lr=5e-3", f"run.seed={seed}", f"run.steps={150 if seed == 0 else 1}"]
            config = read_config(None, [*SMALL, *sizes, *length, f"data.train={data['both']}", f"run.out={out}"])
            Trainer(config, quiet=True).train()
            folders[f"{generation}-{seed}"] = out
        return out

    return base


def tuning(base: Path, data: dict[str, Path], out: Path, *more: str) -> Trainer:
    where = [f"model.path={base}", f"data.train={data['down']}", f"data.eval={data['down-eval']}", f"run.out={out}"]
    return Trainer(read_config(None, [*TUNE, *where, *more]))


def losses(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "generation", [pytest.param(x, marks=[] if x in ("rwkv4", "rwkv7") else pytest.mark.slow) for x in MODELS]
)
@pytest.mark.quick_for("rwkv7")
def test_only_the_state_learns_and_it_helps(generation, bases, data, tmp_path, command):
    base, out = bases(generation), tmp_path / "out"
    run = tuning(base, data, out)
    before = run.evaluate()["eval_loss"]
    tuned = run.train()
    after = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["eval_loss"]
    assert after < before - 0.05
    plain = load(base)
    weights = plain.state_dict()
    for name, x in tuned.state_dict().items():
        assert name.endswith(".time_state") or torch.equal(x, weights[name]), name
    kept = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
    last = "checkpoints/step-00000040"
    assert kept == [f"{last}/optimizer.safetensors", f"{last}/time_state.safetensors", "time_state.safetensors"]

    file = out / "time_state.safetensors"
    state = initial_state(file, plain)
    prompt = [0, 20, 19]
    for a, b in zip(state.layers, tuned.initial_state().layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    of_folder = initial_state(out, plain)  # as the run wrote it
    assert all(torch.equal(a.wkv, b.wkv) for a, b in zip(of_folder.layers, state.layers, strict=True))
    expected, _ = prefill(tuned, [prompt])
    logits, _ = prefill(plain, [prompt], state)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits, prefill(plain, [prompt])[0], atol=1e-2)

    text = heronry.LLM(tuned, tokenizer="bytes")
    text.opening = [0]
    words = ["generate", "\x14", "-m", base, "--tokenizer", "bytes", "--state", file, "--temperature", 0]
    code, printed, _ = command(*words, "--max-tokens", 3)
    assert (code, printed) == (0, text.generate("\x14", 3, temperature=0).text + "\n")


@pytest.mark.parametrize("generation", MODELS)
@pytest.mark.quick_for("rwkv7")
def test_untouched_it_is_the_empty_state(generation, bases):
    """In packed rows, whose documents each begin from it, and in the native step."""
    plain, tuned = load(bases(generation)), load(bases(generation)).tune_state()
    tokens = torch.randint(1, 49, (1, 12), generator=torch.Generator().manual_seed(0))
    for cu in (None, (0, 5, 12)):
        with torch.no_grad():
            found, expected = tuned(tokens, cu_seqlens=cu)[0], plain(tokens, cu_seqlens=cu)[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(tuned(tokens, cu_seqlens=cu)[0], expected, atol=1e-5, rtol=1e-5)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == list(tuned.time_states())
    assert tuned.fingerprint == plain.fingerprint


@pytest.mark.parametrize("generation", ["rwkv4", "rwkv7"])
@pytest.mark.parametrize("order", ["documents", "shuffle"])
def test_interrupted_it_is_the_same_to_the_bit(generation, order, bases, data, tmp_path):
    more = ("run.steps=6", "run.save_every=2", f"data.order={order}")
    tuning(bases(generation), data, tmp_path / "whole", *more).train()
    run = tuning(bases(generation), data, tmp_path / "broken", *more)
    fails_at(run, 5)
    again = tuning(bases(generation), data, tmp_path / "broken", *more)
    assert again.step == 4
    again.train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    whole, broken = (load_file(tmp_path / name / "time_state.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(x, broken[name]) for name, x in whole.items())


@pytest.mark.parametrize("generation", ["rwkv4", "rwkv7"])
def test_a_step_in_which_no_text_begins_has_no_gradient(generation, bases, tmp_path):
    long = write_binidx(tmp_path / "long", [np.arange(400) % 48 + 1])
    more = [f"data.train={long}", f"model.path={bases(generation)}", "data.order=carried", "data.ctx_len=16"]
    run = Trainer(read_config(None, [*TUNE, *more, "run.batch=1", f"run.out={tmp_path / 'out'}"]), quiet=True)
    steps = [run.train_step() for _ in range(3)]
    assert all(np.isfinite(step.loss) for step in steps)
    assert steps[0].grad_norm > 0
    assert [step.grad_norm for step in steps[1:]] == [0, 0]


@pytest.mark.parametrize("start", ["empty", "tuned"])
def test_gradient_of_rwkv4_against_differences(start, random_checkpoint):
    """Float64, two documents in one row. At zero the weight |s| has no derivative; differences to both sides agree
    with the one that is taken there."""
    model = assemble(random_checkpoint("4", width=8, layers=2), dtype=torch.float64).tune_state()
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(101, (1, 9), generator=random)
    states = [block.att.time_state for block in model.blocks]
    if start == "tuned":
        for x in states:
            x.data.copy_(torch.randn(x.shape, generator=random, dtype=x.dtype))

    def loss() -> torch.Tensor:
        logits, _ = model(tokens[:, :-1], cu_seqlens=(0, 3, 8))
        return torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])

    loss().backward()
    for x in states:
        found, gradient = torch.zeros_like(x), x.grad
        assert gradient[0].abs().min() > 0  # every channel can leave the empty state
        with torch.no_grad():
            for i in np.ndindex(*x.shape):
                here = x[i].item()
                x[i] = here + 1e-6
                up = loss()
                x[i] = here - 1e-6
                found[i] = (up - loss()) / 2e-6
                x[i] = here
        torch.testing.assert_close(gradient, found, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
@pytest.mark.parametrize("ending", ["pth", "wrapped.pth", "safetensors", "st"])
def test_blinkdl_file_is_read_value_by_key(version, ending, random_checkpoint, tmp_path):
    """[H, N, N] with values down and keys across: what is stored under a key comes back when the key asks."""
    model = assemble(random_checkpoint(version))  # 3 heads of 32
    key, value = torch.eye(32)[5], torch.arange(32.0)
    tensors = {f"blocks.{i}.att.time_state": torch.zeros(3, 32, 32, dtype=torch.bfloat16) for i in range(2)}
    for v in range(32):
        tensors["blocks.1.att.time_state"][2, v, 5] = v
    file = tmp_path / f"state.{ending}"
    if ending == "pth":
        torch.save(tensors, file)
    elif ending == "wrapped.pth":
        torch.save({f"module.model.{name}": x for name, x in tensors.items()}, file)
    elif ending == "st":  # of web-rwkv's converter: float16 and the other way round
        save_file({name: x.half().mT.contiguous() for name, x in tensors.items()}, file, metadata={"format": "pt"})
    else:
        save_file(tensors, file)
    state = initial_state(file, model)
    assert not state.layers[0].wkv.any()
    assert not any(x.any() for layer in state.layers for x in (layer.att_shift, layer.ffn_shift))
    wkv = state.layers[1].wkv
    assert wkv.dtype == torch.float32
    r, zero = key.expand(1, 1, 3, 32), torch.zeros(1, 1, 3, 32)
    if version == "7":
        y, _ = wkv7(r, zero, zero, zero, zero, zero, wkv)
    else:
        log_w = torch.zeros(3, 32) if version == "5.2" else zero
        y, _ = (wkv5 if version == "5.2" else wkv6)(r, log_w, zero, zero, torch.zeros(3, 32), wkv)
    assert torch.equal(y[0, 0, 2], value)
    assert not y[0, 0, :2].any()


def test_what_does_not_fit_is_refused(bases, data, tmp_path, random_checkpoint):
    base, file = bases("rwkv7"), tmp_path / "time_state.safetensors"
    model = load(base)
    save_time_state(load(base).tune_state(), file, {"opening_tokens": [7]})
    assert read_time_state(file, model)[1] == {"opening_tokens": [7]}
    llm = heronry.LLM(model, tokenizer="bytes")
    llm.begin_from(file)
    assert llm.opening == [7]

    def refusal(file: Path, model: heronry.RWKV7) -> str:
        with pytest.raises(InputError) as error:
            initial_state(file, model)
        assert str(error.value).startswith(f"{file}: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "was tuned on another model" in refusal(file, load(bases("rwkv7", seed=1)))
    assert "time_state is [1, 64, 64] instead of [3, 32, 32]" in refusal(file, assemble(random_checkpoint("7")))
    assert "is [1, 64, 64] instead of [2, 96]" in refusal(file, assemble(random_checkpoint("4")))
    assert "instead of blocks.0 to 4.att.time_state" in refusal(file, assemble(random_checkpoint("7", layers=5)))
    assert "no such state file" in refusal(tmp_path / "nothing", model)
    model.initial_state().save(tmp_path / "saved")
    assert "it holds blocks.0.att_shift, blocks.0.ffn_shift, ..." in refusal(tmp_path / "saved", model)
    for value in (torch.nan, torch.inf):
        damaged = {
            name: x.detach().clone() for name, x in load(base).tune_state().state_dict().items() if "time_s" in name
        }
        damaged["blocks.1.att.time_state"][0, 3, 4] = value
        torch.save(damaged, tmp_path / "damaged.pth")
        assert refusal(tmp_path / "damaged.pth", model).endswith("blocks.1.att.time_state contains NaN or infinity")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-5])
    assert "damaged or truncated" in refusal(tmp_path / "cut", model)
    torch.save({"blocks.0.att.time_state": print}, tmp_path / "code.pth")
    assert "would run print; refused" in refusal(tmp_path / "code.pth", model)
    tensors = load_file(file)
    save_file({name: x * torch.nan for name, x in tensors.items()}, tmp_path / "nan.safetensors")
    assert "blocks.0.att.time_state contains NaN or infinity" in refusal(tmp_path / "nan.safetensors", model)
    for notes in ("[1]", "{", '{"opening_tokens": 1}'):
        save_file(tensors, tmp_path / "notes.safetensors", metadata={"notes": notes})
        assert "note" in refusal(tmp_path / "notes.safetensors", model)
    with pytest.raises(InputError, match="no tuned initial state"):
        save_time_state(model, file)

    with pytest.raises(InputError, match=r"model\.tune=state needs model\.path"):
        read_config(None, ["model.tune=state", f"data.train={data['down']}"])
    with pytest.raises(InputError, match=r"model\.tune is 'states'; known: all, state, "):
        read_config(None, ["model.tune=states", f"data.train={data['down']}"])
    other = tmp_path / "other"
    save(load(base), other)
    tuning(other, data, tmp_path / "out2", "run.steps=1").train()
    save(load(bases("rwkv7", seed=1)), other)  # the base changes under a run
    with pytest.raises(InputError, match="was tuned on another model"):
        tuning(other, data, tmp_path / "out2", "run.steps=2")
    save_time_state(load(base).tune_state(), tmp_path / "bare" / "time_state.safetensors")
    with pytest.raises(InputError, match="already contains a model"):
        tuning(base, data, tmp_path / "bare")
