"""What the views compute: beside independent formulas, brute force and the operators themselves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from heronry import InputError
from heronry.adapters.inject import inject_miss
from heronry.checkpoint import assemble
from heronry.models import Model, State
from heronry.models.state import LayerState
from heronry.ops.recording import record_calls
from heronry.view import lens
from heronry.view.cascade import measure_cascade
from heronry.view.decay import read_decays
from heronry.view.flow import influence, trace
from heronry.view.inside import edit_stream, operator_calls, plain_modules, residual_stream
from heronry.view.lens import read_lens
from heronry.view.memory import loss_by_position, recall
from heronry.view.reads import operator_weights, read_weights
from heronry.view.state import effective_rank, knock_out, read_history, read_state, state_difference

TOKENS = [5, 9, 17, 5, 2, 44, 9, 9, 100, 3, 61]


@pytest.fixture
def model(version, random_checkpoint) -> Model:
    """Float64, with a tuned initial state."""
    return assemble(random_checkpoint(version, tuned=True)).double()


@pytest.fixture
def plain(random_checkpoint) -> Model:
    return assemble(random_checkpoint("7")).double()


def test_reads_times_values_is_the_output(model):
    reads = read_weights(model, TOKENS)
    assert reads.error < 1e-12
    n = len(TOKENS)
    assert len(reads.weights) == 2
    for weight in reads.weights:
        assert weight.shape[1:] == (n, n)
        assert not np.triu(weight, 1).any()
    heads = 1 if model.name == "rwkv4" else 3
    assert reads.shares.shape == (2, heads, n, n)
    assert np.allclose(reads.shares.sum(-1)[..., 1:], 1, atol=1e-5 if model.name != "rwkv4" else 1)


def test_reads_of_rwkv4_are_a_mean(random_checkpoint):
    weights = read_weights(assemble(random_checkpoint("4")), TOKENS).weights
    assert np.allclose(np.stack(weights).sum(-1), 1, atol=1e-6)


def test_what_a_token_writes_reaches_only_its_readers(plain):
    """Without the value of token 4, the operator's output changes by exactly its column of the map."""
    (call, *_), weight = operator_calls(plain, torch.tensor([TOKENS])), read_weights(plain, TOKENS).weights[0]
    from heronry.ops.wkv7 import wkv7

    r, log_w, k, v, a, b, state, _ = call.inputs
    without = v.clone()
    without[0, 4] = 0
    change = (call.output[0] - wkv7(r, log_w, k, without, a, b, state)[0])[0]
    expected = torch.tensor(weight[:, :, 4]).T[..., None] * v[0, 4]
    torch.testing.assert_close(change, expected.double(), rtol=1e-5, atol=1e-7)


def test_decays_are_those_of_the_parameters(model):
    decays = read_decays(model, TOKENS)
    att = model.blocks[1].att
    if model.name == "rwkv4":
        expected = -att.time_decay.exp()
    elif model.name == "rwkv5":
        decay = att.time_decay.reshape(3, -1).expand(3, 32).flatten()
        expected = -decay.exp()
    else:
        assert decays.on_text.shape == (2, len(TOKENS), 96)
        expected = torch.tensor(decays.on_text[1].mean(0))
    np.testing.assert_allclose(decays.log_w[1], expected.detach().float().numpy(), rtol=1e-5)
    half = np.exp(decays.log_w * decays.half_lives)  # what is left after a half-life
    np.testing.assert_allclose(half, 0.5, rtol=1e-4)
    assert (decays.rates is not None) == (model.name == "rwkv7")


def test_data_dependent_decays_and_rates(plain):
    """Of the first layer of RWKV-7, written out from its parameters."""
    found = read_decays(plain, TOKENS)
    att, (x, *_) = plain.blocks[0].att, residual_stream(plain, torch.tensor([TOKENS]))[0]
    x = plain.blocks[0].ln1(x)[0]
    before = F.pad(x, (0, 0, 1, 0))[:-1]
    xw, xa = (x + (before - x) * mix.flatten() for mix in (att.x_w, att.x_a))
    log_w = -math.exp(-0.5) * torch.sigmoid(att.w0.flatten() + torch.tanh(xw @ att.w1) @ att.w2)
    np.testing.assert_allclose(found.on_text[0], log_w.detach().numpy(), rtol=1e-5)
    rate = torch.sigmoid(att.a0.flatten() + xa @ att.a1 @ att.a2)
    np.testing.assert_allclose(found.rates[0], rate.detach().numpy(), rtol=1e-4)


def test_mixes_are_shares_of_the_token_before(random_checkpoint):
    old, new = (assemble(random_checkpoint(version)) for version in ("4", "7"))
    mixes = read_decays(old, TOKENS).mixes
    np.testing.assert_allclose(
        mixes["ffn r"][0], 1 - old.blocks[0].ffn.time_mix_r.detach().flatten().numpy(), rtol=1e-6
    )
    mixes = read_decays(new, TOKENS).mixes
    np.testing.assert_allclose(mixes["att w"][1], new.blocks[1].att.x_w.detach().flatten().numpy(), rtol=1e-6)
    assert list(mixes) == ["att r", "att w", "att k", "att v", "att a", "att g", "ffn k"]


def test_lens_ends_with_what_the_model_says(model):
    found = read_lens(model, TOKENS)
    with torch.no_grad():
        probabilities = model(torch.tensor([TOKENS]))[0][0].float().softmax(-1)
        first = model.head(model.ln_out(model.blocks[0].ln0(model.emb(torch.tensor(TOKENS))))).float().softmax(-1)
    np.testing.assert_array_equal(found.best[-1], probabilities.argmax(-1).numpy())
    np.testing.assert_allclose(found.probability[-1], probabilities.amax(-1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.divergence[-1], 0, atol=1e-6)
    kl = (probabilities * (probabilities / first).log()).sum(-1)
    np.testing.assert_allclose(found.divergence[0], kl.numpy(), rtol=1e-3, atol=1e-5)


def test_hooks_go_when_work_is_interrupted(plain):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(plain, TOKENS, [3], 7, draws=1, progress=interrupt)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in plain.blocks)
    assert plain.native_step_enabled


def test_flow_is_brute_force(model):
    """Every place is restored by a run of its own."""
    subject, answer, draws = [2, 3, 6], 7, 3
    flow = trace(model, TOKENS, subject, answer, draws=draws, seed=5)
    row = torch.tensor([TOKENS])
    stream, logits = residual_stream(model, row)
    assert flow.clean == pytest.approx(logits[0, -1].float().softmax(-1)[answer].item())
    noise = torch.randn(draws, 3, 96, generator=torch.Generator().manual_seed(5)).double() * 3 * stream[0].float().std()

    def run(layer, position):
        total = 0.0
        for draw in noise:
            damaged = stream[0].detach().clone()
            damaged[0, subject] += draw
            edits = [lambda x, damaged=damaged: damaged, *[None] * 2]
            if position is not None and layer == 0:
                damaged[0, position] = stream[0][0, position]
            elif position is not None:
                edits[layer] = lambda x: torch.cat(
                    [x[:, :position], stream[layer][:, position : position + 1], x[:, position + 1 :]], 1
                )
            with torch.no_grad(), plain_modules(model), edit_stream(model, edits):
                total += model(row)[0][0, -1].float().softmax(-1)[answer].item() / draws
        return total

    assert flow.corrupted == pytest.approx(run(0, None), rel=1e-5)
    for layer, position in ((0, 2), (0, 9), (1, 3), (1, 7), (2, 6), (2, 10)):
        assert flow.restored[layer, position] == pytest.approx(run(layer, position), rel=1e-5), (layer, position)
    assert np.all(flow.restored[:, :2] == np.float32(flow.corrupted))
    assert flow.restored[-1, -1] == pytest.approx(flow.clean, rel=1e-4)

    def remember(layer, position):
        """With the memory of one layer put back after a token."""
        total = 0.0
        for draw in noise:
            damaged = stream[0].detach().clone()
            damaged[0, subject] += draw
            begin, end = damaged[:, : position + 1], damaged[:, position + 1 :]
            with torch.no_grad(), plain_modules(model):
                clean = model(row[:, : position + 1])[1]
                with edit_stream(model, [lambda _, x=begin: x, None, None]):
                    state = model(row[:, : position + 1])[1]
                layers = [clean.layers[i] if i == layer else state.layers[i] for i in range(2)]
                with edit_stream(model, [lambda _, x=end: x, None, None]):
                    said = model(row[:, position + 1 :], State(layers, state.fingerprint))[0]
                total += said[0, -1].float().softmax(-1)[answer].item() / draws
        return total

    for layer, position in ((0, 2), (1, 3), (0, 7), (1, 9)):
        assert flow.remembered[layer, position] == pytest.approx(remember(layer, position), rel=1e-5), (layer, position)
    assert np.all(flow.remembered[:, [0, 1, -1]] == np.float32(flow.corrupted))


def test_influence_is_the_gradient(plain):
    """Beside differences of the logit along the coordinates of one embedding."""
    found = influence(plain, TOKENS, 7)
    stream, _ = residual_stream(plain, torch.tensor([TOKENS]))
    squares, step = 0.0, 1e-5
    for channel in range(96):
        logits = []
        for sign in (1, -1):
            x = stream[0].detach().clone()
            x[0, 3, channel] += sign * step
            with torch.no_grad(), plain_modules(plain), edit_stream(plain, [lambda _, x=x: x, None, None]):
                logits.append(plain(torch.tensor([TOKENS]))[0][0, -1, 7].item())
        squares += ((logits[0] - logits[1]) / (2 * step)) ** 2
    assert found[0, 3] == pytest.approx(squares**0.5, rel=1e-4)
    assert found.shape == (3, len(TOKENS))
    assert all(p.requires_grad for p in plain.parameters())


def test_lens_in_pieces(plain, monkeypatch):
    whole = read_lens(plain, TOKENS)
    monkeypatch.setattr(lens, "PIECE", 4)
    for part, expected in zip(read_lens(plain, TOKENS), whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-7)


def test_history_is_that_of_the_state(random_checkpoint):
    model = assemble(random_checkpoint("7"))
    history = read_history(model, TOKENS)
    with torch.no_grad():
        _, state = model(torch.tensor([TOKENS]))
    np.testing.assert_array_equal(history.positions, np.arange(1, len(TOKENS) + 1))
    for layer, head in ((0, 1), (1, 2)):
        matrix = state.layers[layer].wkv[0, head].numpy()
        np.testing.assert_allclose(history.final[layer, head], matrix, rtol=1e-4, atol=1e-5)
        assert history.norms[-1, layer, head] == pytest.approx(np.sqrt((matrix**2).sum()), rel=1e-5)
        sizes = np.linalg.svd(matrix, compute_uv=False)
        sizes = sizes[sizes > 0] / sizes.sum()
        assert history.ranks[-1, layer, head] == pytest.approx(np.exp(-(sizes * np.log(sizes)).sum()), rel=1e-3)
    np.testing.assert_allclose(history.ranks[0], 1, rtol=1e-3)  # one token writes one product of two vectors


def test_effective_rank_of_known_matrices():
    ranks = effective_rank(torch.stack([torch.eye(4), torch.zeros(4, 4), torch.diag(torch.tensor([3.0, 3, 0, 0]))]))
    assert ranks.tolist() == pytest.approx([4, 0, 2])


def test_knockout_is_brute_force(model):
    found = knock_out(model, TOKENS)
    with torch.no_grad():
        _, state = model(torch.tensor([TOKENS[:-1]]))
        whole = model(torch.tensor([TOKENS[-1:]]), state)[0][0, 0].float().log_softmax(-1)
        empty = model.initial_state()

        def divergence(layer, heads):
            layers = [LayerState(*(x.clone() for x in part)) for part in state.layers]
            layers[layer].wkv[:, heads] = empty.layers[layer].wkv[:, heads]
            said = model(torch.tensor([TOKENS[-1:]]), State(layers, state.fingerprint))[0][0, 0].float().log_softmax(-1)
            return F.kl_div(said, whole, log_target=True, reduction="sum").item()

        heads = 0 if model.name == "rwkv4" else 3
        assert found.heads.shape == (2, heads)
        for layer in range(2):
            assert found.layers[layer] == pytest.approx(divergence(layer, slice(None)), rel=1e-3, abs=1e-6)
            for head in range(heads):
                assert found.heads[layer, head] == pytest.approx(divergence(layer, [head]), rel=1e-3, abs=1e-6)


def test_a_divergence_is_never_below_zero(random_checkpoint):
    """A state that says nothing: what is left is rounding."""
    model = assemble(random_checkpoint("7", vocab=5000))
    for block in model.blocks:
        torch.nn.init.constant_(block.att.output.weight, 1e-7)
    assert knock_out(model, TOKENS).heads.min() >= 0
    assert read_lens(model, TOKENS).divergence.min() >= 0


def test_difference_of_states(plain):
    with torch.no_grad():
        a, b = (plain(torch.tensor([ids]))[1] for ids in (TOKENS, TOKENS[::-1]))
    assert np.all(state_difference(a, a) == 0)
    found = state_difference(a, b)
    x, y = a.layers[1].wkv[0, 2], b.layers[1].wkv[0, 2]
    assert found[1, 2] == pytest.approx(((x - y).norm() / max(x.norm(), y.norm())).item())


def test_loss_by_position(model):
    random = np.random.default_rng(0)
    texts = random.integers(0, 101, (3, 40)).tolist()
    found = loss_by_position(model, texts, bins=5)
    with torch.no_grad():
        logits = model(torch.tensor(texts))[0][:, :-1].float()
    each = F.cross_entropy(logits.transpose(1, 2), torch.tensor(texts)[:, 1:], reduction="none")
    edges = np.unique(np.geomspace(1, 40, 6).round().astype(int))
    expected = [each[:, a - 1 : b - 1].mean().item() for a, b in pairwise(edges)]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert np.all(np.diff(found.positions) > 0)


def test_recall_is_two_texts(model):
    fillers = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    found = recall(model, [0], [50, 51], fillers, [20, 21], [33, 34], [0, 3, 6])
    with torch.no_grad():

        def said(known, distance):
            rows = [[0, *known, *filler[:distance], 20, 21, 33] for filler in fillers]
            both = model(torch.tensor(rows))[0][:, -2:].float().log_softmax(-1)  # of the two tokens of the answer
            return (both[:, 0, 33] + both[:, 1, 34]).mean().item()

        for i, distance in enumerate((0, 3, 6)):
            assert found.gain[i] == pytest.approx(said([50, 51], distance) - said([], distance), abs=1e-5)
            assert found.probability[i] == pytest.approx(math.exp(said([50, 51], distance)), rel=1e-5)


def test_cascade_is_a_grid_of_times(plain):
    found = measure_cascade(plain, (TOKENS * 4)[:40], 16)
    assert found.begins.shape == (2, 3)
    order = found.begins.T.ravel()  # piece by piece, layer by layer
    assert np.all(np.diff(order) > 0)
    ends = found.ideal_begins + found.seconds
    assert found.ideal_begins[1, 1] == pytest.approx(max(ends[0, 1], ends[1, 0]))
    assert ends.max() <= (found.begins + found.seconds).max()
    assert found.steps.tolist() == [[0, 1, 2], [1, 2, 3]]


def test_the_model_is_as_before(plain):
    plain.train()
    plain.blocks[1].eval()  # frozen
    plain.gradient_checkpointing = True
    influence(plain, TOKENS, 7)
    read_history(plain, TOKENS)
    with torch.no_grad(), record_calls() as calls:
        knock_out(plain, TOKENS)
        read_weights(plain, TOKENS)
    assert plain.training
    assert plain.gradient_checkpointing
    assert plain.blocks[0].att.training
    assert not plain.blocks[1].att.training
    assert plain.native_step_enabled
    assert calls == [] or all(call.operator == "wkv7" for call in calls)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in plain.blocks)


def test_rwkv7b_is_looked_into_too(random_checkpoint):
    model = assemble(random_checkpoint("7", deep=4, dea=5)).double()
    assert read_weights(model, TOKENS).error < 1e-12
    assert knock_out(model, TOKENS).layers.shape == (2,)
    single = assemble(random_checkpoint("7", deep=4, dea=5, layers=1)).double()
    found = trace(single, TOKENS, [3], 7, draws=2)
    assert found.corrupted != pytest.approx(found.clean, rel=1e-3)
    np.testing.assert_allclose(found.remembered[0, 3:-1], found.clean, rtol=1e-5)  # all of its memory is as it was


def test_dropout_of_adapters_is_off(plain):
    """A model whose adapters are being trained is seen as it will be when they are done."""
    inject_miss(plain, rank=4, dropout=0.5, targets=["key", "output", "head"])
    for name, p in plain.named_parameters():
        if "miss" in name:
            torch.nn.init.normal_(p, std=0.1)

    def look() -> list[np.ndarray]:
        found = (
            *read_weights(plain, TOKENS).weights,
            read_decays(plain, TOKENS).log_w,
            *read_lens(plain, TOKENS),
            *knock_out(plain, TOKENS),
            *read_history(plain, TOKENS),
            *trace(plain, TOKENS, [3], 7, draws=2),
            influence(plain, TOKENS, 7),
            *loss_by_position(plain, [TOKENS]),
            *recall(plain, [0], [50], [TOKENS], [20], [33], [0, 3]),
            read_state(plain, TOKENS).layers[1].wkv.numpy(),
        )
        return [np.asarray(x) for x in found]

    expected = look()
    trainable = [name for name, p in plain.named_parameters() if p.requires_grad]
    plain.train()
    for x, y in zip(look(), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert plain.training
    assert [name for name, p in plain.named_parameters() if p.requires_grad] == trainable


def test_the_weights_of_a_call_are_of_one_sequence(plain):
    rows = torch.tensor([TOKENS, TOKENS])
    for options in ({}, {"cu_seqlens": [0, 4, 11]}):
        with torch.no_grad(), plain_modules(plain), record_calls() as calls:
            plain(rows[:1] if options else rows, **options)
        with pytest.raises(InputError, match="the weights are those of one sequence"):
            operator_weights(calls[0])


def test_bad_input(plain, random_checkpoint):
    with pytest.raises(InputError, match="RWKV-4 keeps two sums a channel"):
        read_history(assemble(random_checkpoint("4")), TOKENS)
    with pytest.raises(InputError, match="the subject must be within the 11 tokens"):
        trace(plain, TOKENS, [11], 7)
    with pytest.raises(InputError, match="a text of at least 2 tokens is needed, got 1"):
        knock_out(plain, [3])
    with pytest.raises(InputError, match=r"what every token reads would have 726,000,000 numbers.*take a shorter text"):
        read_weights(plain, TOKENS * 1000)  # 2 layers of 3 heads
    with pytest.raises(InputError, match="what all operators are called with would have"):
        read_decays(plain, TOKENS * 20_000)
    with pytest.raises(InputError, match="fillers of at least 3 tokens"):
        recall(plain, [0], [1], [[1, 2]], [2], [3], [3])
    with pytest.raises(InputError, match="texts of one length"):
        loss_by_position(plain, [[1, 2], [1, 2, 3]])
