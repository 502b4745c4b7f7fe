"""Several adapters over one model: shared weights, chosen by name, each as if it were alone."""

from __future__ import annotations

import threading

import pytest
import torch

import heronry
from heronry import InputError
from heronry.adapters import Adapter, apply_adapter, save_adapter, write_peft
from heronry.adapters.inject import inject_adapter, inject_miss
from heronry.adapters.lora import LoRA
from heronry.checkpoint import assemble, load, save
from heronry.engine.adapters import Adapters
from heronry.models.native_step import source_path
from heronry.quantization import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("lora", "dora", "miss", "bat")
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(random_checkpoint, tmp_path_factory):
    """A model, "model", its int8 copy, "small", and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("adapters")
    base = assemble(random_checkpoint("7", vocab=256, width=64, heads=2, ffn=96))
    save(base, folder / "model")
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(seed)
        model = load(folder / "model")
        if kind in ("miss", "bat"):
            inject_miss(model, 8, "bat" if kind == "bat" else "default")
        else:
            inject_adapter(model, 4, 8, dora=kind == "dora")
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name and "magnitude" not in name:
                torch.nn.init.normal_(p, std=0.1)
        save_adapter(model.eval(), folder / kind, {"opening_tokens": [seed]} if kind == "dora" else {})
    save(quantize(base, "int8"), folder / "small")
    return folder


def served(folder, name: str = "model", kinds=KINDS) -> heronry.LLM:
    llm = heronry.LLM(folder / name, tokenizer="bytes")
    for kind in kinds:
        llm.adapters.add(kind, folder / kind)
    return llm


def logits(model, count: int = 70) -> torch.Tensor:
    tokens = torch.randint(256, (1, count), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(tokens)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_the_merged_model(kind, folder):
    llm = served(folder, kinds=[kind])
    merged = load(folder / "model")
    apply_adapter(merged, folder / kind)
    torch.testing.assert_close(logits(llm.adapters[kind].model), logits(merged), atol=1e-4, rtol=1e-4)
    alone = heronry.LLM(folder / "model", tokenizer="bytes", adapter=folder / kind)
    assert llm.generate("One", adapter=kind, **GREEDY).text == alone.generate("One", **GREEDY).text
    assert llm.adapters[kind].opening == ([1] if kind == "dora" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_beside_packed_weights(kind, folder):
    """As the adapter of the packed model alone, and close to the original model's."""
    llm = served(folder, "small", [kind])
    alone = heronry.LLM(folder / "small", tokenizer="bytes", adapter=folder / kind)
    assert torch.equal(logits(llm.adapters[kind].model), logits(alone.model))
    merged = load(folder / "model")
    apply_adapter(merged, folder / kind)
    found, expected = logits(llm.adapters[kind].model), logits(merged)
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert (found - logits(llm.model)).norm() > 0.2 * expected.norm()
    assert llm.adapters[kind].model.quantization == "int8"


def test_nothing_is_copied_and_the_base_stays(folder):
    """Bit for bit, with its native step; the weights are the same tensors."""
    plain, llm = heronry.LLM(folder / "model", tokenizer="bytes"), served(folder)
    for kind in KINDS:
        llm.generate("One", adapter=kind, **GREEDY)
        model = llm.adapters[kind].model
        own = {id(p) for p in model.parameters()} - {id(p) for p in llm.model.parameters()}
        assert sum(p.numel() for p in model.parameters() if id(p) in own) < 0.2 * llm.num_parameters()
        assert model.blocks[0].att.key.base_layer.weight is llm.model.blocks[0].att.key.weight
    assert torch.equal(logits(llm.model), logits(plain.model))
    assert torch.equal(logits(llm.model, 3), logits(plain.model, 3))
    assert llm.generate("One", **GREEDY) == plain.generate("One", **GREEDY)
    assert llm.model.is_unmodified()
    assert llm.model.fingerprint == plain.model.fingerprint
    if heronry.build.library(source_path("rwkv7")) is not None:
        assert llm.model._step.is_available()


def test_one_batch_of_several(folder):
    """A name a prompt: each text, its ids, seeds and log-probabilities are those of the prompt alone."""
    llm = served(folder)
    prompts = ["One day", "Two", "One day", "The end", "Two"]
    names = [None, "lora", "miss", None, "lora"]
    options = {"max_tokens": 8, "n": 2, "logprobs": True}
    seen: list[tuple[int, int]] = []
    found = llm.generate(
        prompts, adapter=names, seed=list(range(10)), progress=lambda *count: seen.append(count), **options
    )
    for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        alone = llm.generate(prompt, adapter=name, seed=[2 * i, 2 * i + 1], **options)
        assert [x.token_ids for x in found[i]] == [x.token_ids for x in alone]
        for ours, theirs in zip(found[i], alone, strict=True):
            assert [x.logprob for x in ours.logprobs] == pytest.approx([x.logprob for x in theirs.logprobs], abs=1e-4)
    assert seen[-1] == (27, 27)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    pieces = list(llm.generate(prompts, 8, adapter=names, temperature=0, stream=True))
    assert {piece.index for piece in pieces} == set(range(5))
    assert sum(piece.finish_reason is not None for piece in pieces) == 5


def test_states_know_the_adapter(folder):
    llm = served(folder)
    states = {name: llm.adapters.choose(name).state("One day") for name in (None, *KINDS)}
    assert len({state.fingerprint for state in states.values()}) == 5
    for name, state in states.items():
        after = llm.generate(" a", state=state, adapter=name, **GREEDY)
        assert after.token_ids == llm.generate("One day a", adapter=name, **GREEDY).token_ids
        for other in set(states) - {name}:
            with pytest.raises(InputError, match="this state belongs to another model"):
                llm.generate(" a", state=state, adapter=other)
    again = served(folder)
    assert again.generate(" a", state=states["miss"], adapter="miss", **GREEDY).text
    llm.adapters["miss"].model.invalidate_fingerprint()  # computed anew it is still another model's
    assert llm.adapters["miss"].model.fingerprint not in {llm.model.fingerprint, states["bat"].fingerprint}


def test_chat_and_what_it_saves(folder, tmp_path):
    llm = served(folder)
    options = {"max_tokens": 6, "temperature": 0}
    chat = llm.chat(adapter="lora", template="raven")
    answer = chat.say("Hello", **options)
    assert (
        answer.text
        == llm.chat([{"role": "user", "content": "Hello"}], adapter="lora", template="raven", **options).text
    )
    chat.save(tmp_path / "talk")
    llm.chat(adapter="lora", template="raven").load(tmp_path / "talk")
    with pytest.raises(InputError, match="another model"):
        llm.chat(adapter="miss", template="raven").load(tmp_path / "talk")
    with pytest.raises(InputError, match="unknown adapter 'poet'; choose from lora, dora, miss, bat"):
        llm.chat(adapter="poet")


def test_names_and_bad_input(folder, tmp_path):
    llm = heronry.LLM(folder / "model", tokenizer="bytes")
    assert (list(llm.adapters), len(llm.adapters)) == ([], 0)

    def refused(call, *args, **options) -> str:
        with pytest.raises(InputError) as error:
            call(*args, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(llm.generate, "a", adapter="lora") == (
        "unknown adapter 'lora'; there are none yet: see LLM.adapters.add"
    )
    added = llm.adapters.add("lora", folder / "lora")
    assert llm.adapters["lora"] is added
    assert dict(llm.adapters) == {"lora": added}
    assert refused(llm.generate, "a", adapter="lore") == "unknown adapter 'lore'; did you mean 'lora'?"
    assert refused(llm.generate, "a", adapter=3) == "adapter must be a name or a list of 1, got 3"
    assert refused(llm.generate, ["a", "b"], adapter=["lora"]) == "adapter must be a name or a list of 2, got ['lora']"
    assert refused(llm.adapters.add, "", folder / "lora") == "an adapter needs a name, got ''"
    assert refused(llm.adapters.add, "lora", tmp_path).endswith("not an adapter of peft, rwkv_lightning or RWKV-PEFT")
    assert llm.adapters["lora"] is added
    assert llm.adapters.add("lora", folder / "miss") is not added
    llm.adapters.remove("lora")
    assert "unknown adapter 'lora'" in refused(llm.adapters.remove, "lora")
    assert len(llm.adapters) == 0
    beside = heronry.LLM(folder / "small", tokenizer="bytes", adapter=folder / "lora")
    assert refused(beside.adapters.add, "miss", folder / "miss").endswith("the model already has adapters")
    write_peft(
        Adapter({"head": LoRA(torch.zeros(2, 64), torch.zeros(256, 2), 1.0, torch.ones(256))}),
        llm.model,
        tmp_path / "zero",
    )
    llm.model.head.weight.data[3] = 0
    assert refused(llm.adapters.add, "zero", tmp_path / "zero").endswith(
        "head has rows of zeros, which no magnitude of DoRA can scale"
    )


def test_threads_add_remove_and_write(folder):
    """A request goes on with the adapter that it has begun with, whatever happens to the set meanwhile."""
    llm = served(folder, kinds=["lora", "miss"])
    expected = {name: llm.generate("One", adapter=name, **GREEDY).text for name in (None, "lora", "miss")}
    failures: list[object] = []

    def write(name) -> None:
        try:
            stream = llm.generate("One", adapter=name, stream=True, **GREEDY)
            if "".join(piece.text for piece in stream) != expected[name]:
                failures.append(name)
        except Exception as error:  # shown below
            failures.append(error)

    def change() -> None:
        for i in range(10):
            llm.adapters.add(f"x{i}", folder / "bat")
            llm.adapters.remove(f"x{i}")

    threads = [threading.Thread(target=write, args=(name,)) for name in expected for _ in range(3)]
    threads += [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(llm.adapters) == ["lora", "miss"]
    running = llm.generate("One", adapter="lora", stream=True, **GREEDY)
    llm.adapters.remove("lora")
    assert "".join(piece.text for piece in running) == expected["lora"]
    assert isinstance(llm.adapters, Adapters)


def test_prompts_keep_their_numbers(folder):
    """In messages, whichever adapter a prompt is computed with."""
    llm = served(folder, kinds=["lora"])
    names = ["lora", None, "lora", None]
    with pytest.raises(InputError, match=r"^prompt 3 is empty$"):
        llm.generate(["a", "b", "c", ""], adapter=names)
    state = llm.state("a")
    two = type(state).stack([state, state])
    with pytest.raises(InputError, match=r"^a state of 2 sequences was given for 4 prompts$"):
        llm.generate(["a", "b", "c", "d"], adapter=names, state=two)
