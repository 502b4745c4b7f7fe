"""What holds for every generation: one forward for all uses, gradients everywhere, states that are never changed."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from heronry import RWKV4, InputError, State
from heronry.checkpoint import assemble
from heronry.models import LayerState, Model
from heronry.models.fingerprint import sample
from heronry.ops.wkv4 import wkv4
from heronry.ops.wkv5 import wkv5
from heronry.ops.wkv6 import wkv6
from heronry.ops.wkv7 import wkv7

OPERATORS = {"wkv4": wkv4, "wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}


@pytest.fixture
def model(version, random_checkpoint) -> Model:
    """Small, random, float64."""
    weights = random_checkpoint(version, width=32, heads=2, layers=2, ffn=40, rank=3)
    return assemble({name: x.double() for name, x in weights.items()})


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: State, b: State, tolerance: float = 1e-9) -> None:
    """Equal memories. RWKV-4's triples (a, b, p) are compared as the sums a e^p, b e^p that they stand for."""
    for x, y in zip(a.layers, b.layers, strict=True):
        for left, right in zip(_sums(x), _sums(y), strict=True):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def _sums(layer: LayerState) -> LayerState:
    if layer.wkv.ndim == 4:
        return layer
    a, b, p = layer.wkv.unbind(1)
    return layer._replace(wkv=torch.stack([a, b]) * p.exp())


@torch.no_grad()
def test_whole_pass_equals_steps_and_halves(model):
    text = tokens(3, 75)
    whole, end = model(text)
    steps, state = [], None
    for t in range(75):
        logits, state = model(text[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
    assert_same(state, end)
    for cut in (1, 40):
        first, middle = model(text[:, :cut])
        second, state = model(text[:, cut:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)
        assert_same(state, end)


@torch.no_grad()
def test_packed_equals_separate(model):
    lengths = [5, 1, 70, 33]
    texts = [tokens(1, n, seed=n) for n in lengths]
    _, carried = model(tokens(4, 3, seed=1))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for state in (None, carried):
        packed, packed_end = model(torch.cat(texts, 1), state, cu_seqlens=ends)
        last, _ = model(torch.cat(texts, 1), state, cu_seqlens=ends.tolist(), last_only=True)
        assert last.shape == (1, 4, 101)
        for i, text in enumerate(texts):
            logits, end = model(text, state and state[i])
            torch.testing.assert_close(packed[:, ends[i] : ends[i + 1]], logits, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(last[:, i], logits[:, -1], rtol=1e-9, atol=1e-9)
            assert_same(packed_end[i], end)


@torch.no_grad()
def test_last_only(model):
    text = tokens(2, 9)
    whole, _ = model(text)
    last, _ = model(text, last_only=True)
    assert last.shape == (2, 1, 101)
    torch.testing.assert_close(last, whole[:, -1:])


def losses(model: Model, start: State, text: torch.Tensor) -> torch.Tensor:
    """A number that depends on logits and on the final state, the latter through a continuation."""
    weights = torch.randn(101, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logits, state = model(text, start)
    more, _ = model(text[:, :2], state)
    return (logits.tanh() @ weights).sum() / 10 + (more.tanh() @ weights).sum()


def carried(model: Model) -> tuple[State, list[torch.Tensor]]:
    """A state that asks for gradients, and its tensors."""
    with torch.no_grad():
        _, state = model(tokens(2, 6, seed=2))
    layers = [LayerState(*(x.clone().requires_grad_() for x in layer)) for layer in state.layers]
    return State(layers, state.fingerprint), [x for layer in layers for x in layer]


def test_gradients_agree_between_bodies(model, monkeypatch):
    operator = model.name.replace("r", "", 1)  # rwkv7 -> wkv7
    found = {}
    for impl in ("reference", "chunked"):
        generation = sys.modules[type(model).__module__]
        monkeypatch.setattr(generation, operator, partial(OPERATORS[operator], impl=impl))
        start, state = carried(model)
        found[impl] = torch.autograd.grad(losses(model, start, tokens(2, 40)), [*model.parameters(), *state])
    names = [name for name, _ in model.named_parameters()] + [f"state {i}" for i in range(len(state))]
    for name, a, b in zip(names, found["reference"], found["chunked"], strict=True):
        assert a.abs().max() > 0, f"no gradient reaches {name}"
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(a.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_the_slopes(model):
    """The step along a random direction that gradients predict is the one that happens, in full float64."""
    start, state = carried(model)
    if isinstance(model, RWKV4):  # p is a choice of unit: move the sums, not it
        state = [x for i, x in enumerate(state) if i % 3 != 1]
    moved = [*model.parameters(), *state]
    text = tokens(2, 20)
    random = torch.Generator().manual_seed(3)
    direction = [torch.randn(x.shape, dtype=torch.float64, generator=random) for x in moved]
    slopes = torch.autograd.grad(losses(model, start, text), moved)
    predicted = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True))
    step, results = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for x, d in zip(moved, direction, strict=True):
                x.add_(d, alpha=sign * step)
            results.append(losses(model, start, text))
    happened = (results[0] - results[1]) / (2 * step)
    torch.testing.assert_close(predicted, happened, rtol=1e-5, atol=1e-5)


def test_forward_leaves_the_state_alone(model):
    with torch.no_grad():
        _, state = model(tokens(2, 5))
        before = state.clone()
        for length in (1, 50):
            model(tokens(2, length), state)
        model(tokens(1, 10), state, cu_seqlens=[0, 4, 10])
    for a, b in zip(before.layers, state.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def test_tuned_state_is_where_a_model_begins(version, random_checkpoint):
    sizes = {"width": 32, "heads": 2, "rank": 3}
    weights = random_checkpoint(version, **sizes, tuned=True)
    states = [weights[f"blocks.{i}.att.time_state"] for i in range(2)]
    plain = assemble({name: x for name, x in weights.items() if "time_state" not in name})
    tuned = assemble(weights)
    assert tuned.config.time_state
    assert tuned.fingerprint == plain.fingerprint  # so each takes the other's states
    zero = plain.initial_state(2)
    if version == "4":  # the sums a and b of one token of weight |s|, in the unit 0
        assert all(not layer.wkv[:, :2].any() for layer in zero.layers)
        states = [torch.stack([s * (1 + d), s.abs(), 0 * s]) for s, d in states]
    else:
        assert all(not x.any() for layer in zero.layers for x in layer)
    wkvs = [x.expand(2, *x.shape) for x in states]
    begin = State([layer._replace(wkv=x) for layer, x in zip(zero.layers, wkvs, strict=True)], "")
    begin.fingerprint = plain.fingerprint
    expected, _ = plain(tokens(2, 8), begin)
    logits, _ = tuned(tokens(2, 8))
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, plain(tokens(2, 8))[0], atol=1e-2)
    with torch.enable_grad():
        tuned(tokens(2, 8))[0].sum().backward()
    assert all(block.att.time_state.grad.abs().max() > 0 for block in tuned.blocks)


@torch.no_grad()
def test_bfloat16_does_not_drift(model, version):
    """512 steps of bfloat16 activations stay beside the float64 model of the same weights."""
    half = model.to(torch.bfloat16)
    exact = assemble({name: x.double() for name, x in half.state_dict().items()})
    text = tokens(1, 512)
    expected, end = exact(text)
    steps, state = [], None
    for t in range(512):
        logits, state = half(text[:, t : t + 1], state)
        assert logits.dtype == torch.float32
        steps.append(logits.double())
    assert all(x.dtype == torch.float32 for layer in state.layers for x in layer)
    assert all(x.dtype == torch.float64 for layer in end.layers for x in layer)
    chunked, state = half(text)
    assert all(x.dtype == torch.float32 for layer in state.layers for x in layer)
    for logits in (torch.cat(steps, 1), chunked.double()):
        error = (logits - expected).square().mean(-1).sqrt()[0] / expected.std()  # [T]
        print(f"{version}: first 64 {error[:64].mean():.4f}, last 64 {error[-64:].mean():.4f}, most {error.max():.4f}")
        assert error.mean() < 0.03
        assert error.max() < 0.2
        assert error[-64:].mean() < 2 * error[:64].mean()


@torch.no_grad()
def test_float16(model):
    expected, _ = model.to(torch.float16)(tokens(2, 40))
    logits, state = assemble({name: x.float() for name, x in model.state_dict().items()})(tokens(2, 40))
    assert expected.dtype == torch.float32  # as the step gives them
    assert (logits - expected).abs().max() < 0.05
    assert all(x.dtype == torch.float32 for layer in state.layers for x in layer)


def test_tokens_are_checked(model):
    for wrong, message in (
        (torch.tensor([[3, 101]]), "token id 101 is outside this model's vocabulary of 101"),
        (torch.tensor([[-1, 3]]), "token id -1 is outside"),
        (torch.tensor([1, 2]), "tokens must be integers"),
        (torch.zeros(1, 0, dtype=torch.long), "tokens must be integers"),
        (torch.tensor([[0.5]]), "tokens must be integers"),
    ):
        with pytest.raises(InputError, match=message):
            model(wrong)


@torch.no_grad()
def test_foreign_states_are_refused(model, version, random_checkpoint):
    other = assemble(random_checkpoint(version, width=32, heads=2, layers=2, ffn=40, rank=3, seed=1))
    wider = assemble(random_checkpoint(version, width=64, heads=2, layers=2, ffn=40, rank=3))
    with pytest.raises(InputError, match="belongs to another model"):
        model(tokens(1, 3), other.initial_state())
    with pytest.raises(InputError, match="a state of 2 sequences was given for a batch of 3"):
        model(tokens(3, 3), model.initial_state(2))
    model.train()  # where weights move between two steps, only the sizes must agree
    model(tokens(1, 3), other.initial_state())
    with pytest.raises(InputError, match="belongs to another model"):
        model(tokens(1, 3), wider.initial_state())


@pytest.mark.parametrize("gradients", [False, True])
def test_every_tensor_must_be_where_the_model_is(model, gradients):
    """On meta a result is made up, or in C++ the process ends."""
    text = torch.randint(101, (2, 3), generator=torch.Generator().manual_seed(0))
    state = model(text)[1].detach()
    with torch.set_grad_enabled(gradients):
        with pytest.raises(
            InputError, match=r"^tokens on meta, but the model is on cpu: move one of them with \.to\(\)$"
        ):
            model(text.to("meta"))
        for i, name in ((0, "wkv"), (1, "att_shift"), (1, "ffn_shift")):
            layers = list(state.layers)
            layers[i] = layers[i]._replace(**{name: getattr(layers[i], name).to("meta")})
            with pytest.raises(InputError, match=r"^state on meta, but the model is on cpu"):
                model(text, State(layers, state.fingerprint))


def test_every_tensor_of_a_state_must_fit(model):
    text = torch.randint(101, (2, 3), generator=torch.Generator().manual_seed(0))
    state = model(text)[1].detach()
    for i, name in ((0, "ffn_shift"), (1, "att_shift"), (1, "wkv")):
        for damage in (lambda x: x[:1], lambda x: x[..., :-1], Tensor.long):
            layers = list(state.layers)
            layers[i] = layers[i]._replace(**{name: damage(getattr(layers[i], name))})
            with pytest.raises(InputError, match=r"^this state (is damaged|of 1 sequences)"), torch.no_grad():
                model(text, State(layers, state.fingerprint))


def test_counts_its_parameters_and_knows_device_and_dtype(model):
    assert model.num_parameters() == sum(x.numel() for x in model.state_dict().values())
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == model.head.weight.numel()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float64)
    assert (model.to("meta").bfloat16().device.type, model.dtype) == ("meta", torch.bfloat16)


def test_fingerprint_follows_training(model):
    before = model.fingerprint
    model.train()
    assert model.fingerprint == before
    with torch.no_grad():
        model.head.weight.add_(0.1)
    assert model.eval().fingerprint not in (before, None)
    assert model.fingerprint[:16] == before[:16]


def test_fingerprint_follows_new_weights(model):
    before = model.fingerprint
    changed = {name: x + 1 for name, x in model.state_dict().items()}
    model.load_state_dict(changed)
    assert model.fingerprint not in (before, None)


@pytest.mark.parametrize("where", [(0, 0), (-1, -1), (-1, slice(None)), (slice(50, 52), slice(None))], ids=str)
def test_fingerprint_sees_the_whole_tensor(model, where):
    """The first and the last element, and each region that the samples fall into."""
    before = model.fingerprint
    with torch.no_grad():
        model.emb.weight[where] += 1
    model.invalidate_fingerprint()
    assert (model.fingerprint[:16], model.fingerprint == before) == (before[:16], False)


def test_fingerprint_reads_only_samples():
    """Of a tensor of 4 TB, which is one number in memory, or of one that is transposed in memory."""
    huge = torch.ones(1).expand(2**20, 2**20)
    assert len(sample(huge)) < 1000
    x = torch.randn(300, 70)
    assert sample(x.t().contiguous().t()) == sample(x) != sample(x.view(70, 300))
    assert sample(x.bfloat16()) == sample(x.bfloat16().float())


def test_a_state_keeps_itself_alive_and_no_more(model):
    state = model(tokens(2, 50))[1]
    assert all(x.untyped_storage().nbytes() == x.nbytes for layer in state.layers for x in layer)


def test_a_model_without_memory_runs(model):
    logits, state = model.to("meta")(tokens(2, 5).to("meta"))
    assert (logits.shape, len(state)) == ((2, 5, 101), 2)


def test_groups_hold_each_parameter_once(model):
    groups = model.param_groups(1e-3, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    "version",
    [pytest.param(x, marks=[] if x == "7" else pytest.mark.slow) for x in ("4", "5.0", "5.1", "5.2", "6", "7")],
)
def test_compiles_whole(model):
    """torch.compile without a break, and with the gradients of the plain model."""
    text = tokens(2, 40)

    def gradients(forward):
        model.zero_grad()
        logits, state = forward(text)
        (
            logits.square().sum() + sum(x.sum() for layer in state.layers for x in (layer.att_shift, layer.wkv))
        ).backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = model.to(torch.float32).train()
    torch.compiler.reset()
    expected, wanted = gradients(model)
    logits, found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(logits, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
