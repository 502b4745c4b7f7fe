"""What generating returns, and every option of it, against the plain loop over the model."""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch

from heronry.engine import Completion, Sampling
from heronry.engine.llm import LLM
from heronry.errors import InputError
from heronry.models import State
from heronry.text.chat_templates import Template
from heronry.text.tokenizers import ByteTokenizer

GREEDY = {"temperature": 0}


def plain_loop(llm: LLM, prompt: str, count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy token ids, and the logits that each was drawn from, [count, V]."""
    ids, seen = list(prompt.encode()), []
    for _ in range(count):
        seen.append(llm.model(torch.tensor([ids]))[0][0, -1].detach().float())
        ids.append(int(seen[-1].argmax()))
    return ids[len(prompt.encode()) :], torch.stack(seen)


def fields(completion: Completion) -> tuple:
    return (
        completion.text,
        completion.token_ids,
        completion.finish_reason,
        completion.logprobs,
        completion.usage,
        completion.index,
        completion.choice,
    )


def test_what_a_completion_says(llm):
    ids, _ = plain_loop(llm, "Once", 7)
    completion = llm.generate("Once", 7, **GREEDY)
    assert completion.token_ids == ids
    assert str(completion) == completion.text == bytes(ids).decode(errors="replace")
    assert completion.finish_reason == "length"
    assert completion.logprobs is None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 7)
    assert completion.usage.total_tokens == 11
    assert completion.state.texts == ("Once" + completion.text,)


def test_why_it_ended(scripted):
    model, tokenizer = scripted(["Hello", " wor", "ld.", "\n\nUs", "er: x"], cue=":")
    llm = LLM(model, tokenizer=tokenizer)
    whole, cut, stopped = (llm.generate("a:", **o) for o in ({}, {"max_tokens": 2}, {"stop": "\n\nUser:"}))
    assert [x.finish_reason for x in (whole, cut, stopped)] == ["stop", "length", "stop"]
    assert stopped.text == "Hello world."
    assert tokenizer.decode(stopped.token_ids) == "Hello world.\n\nUser: x"  # all that the state has read
    assert model.read(stopped.state) == "a:Hello world.\n\nUser: x" == stopped.state.texts[0]
    assert stopped.usage.completion_tokens == 5


def test_a_prompt_as_token_ids(llm):
    assert fields(llm.generate(list(b"Once"), 9, seed=1)) == fields(llm.generate("Once", 9, seed=1))
    both = llm.generate([list(b"Once"), "a"], 9, seed=1)
    assert [x.text for x in both] == [llm.generate(p, 9, seed=1).text for p in ("Once", "a")]
    llm = LLM(llm.model)
    llm.opening = [7]
    assert llm.generate("b", 5, **GREEDY).token_ids == llm.generate([7, 98], 5, **GREEDY).token_ids  # nothing is added
    for prompt, message in [
        ([256], "token id 256 is outside this model's vocabulary of 256"),
        ([-1], "token id -1"),
        ([1, "a"], "a prompt must be a text or a list of token ids"),
        ([True], "a prompt must be a text or a list of token ids"),
        ([[]], "the prompt is empty"),
        (3, "a prompt must be a text or a list of token ids, got 3"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.generate(prompt, 1)


def test_a_stream_has_the_fields_of_the_whole(llm):
    options = {"seed": 3, "logprobs": True, "stop": "e", "n": 2}
    pieces = list(llm.generate(["Once", "鳥"], 12, stream=True, **options))
    whole = llm.generate(["Once", "鳥"], 12, **options)
    for i, choices in enumerate(whole):
        for j, completion in enumerate(choices):
            mine = [piece for piece in pieces if (piece.index, piece.choice) == (i, j)]
            assert "".join(piece.text for piece in mine) == completion.text
            assert [x for piece in mine for x in piece.token_ids] == completion.token_ids
            assert [x for piece in mine for x in piece.logprobs] == completion.logprobs
            assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
            assert mine[-1].usage == completion.usage
            counts = [piece.usage.completion_tokens for piece in mine]
            assert counts == sorted(counts)


def test_every_piece_has_its_state(llm):
    prompts, before = ["Once", "In the"], {}
    for piece in llm.generate(prompts, 6, stream=True, seed=1):
        ids = before.setdefault(piece.index, list(prompts[piece.index].encode()))
        ids += piece.token_ids
        expected = llm.state(ids)
        for mine, theirs in zip(piece.state.layers, expected.layers, strict=True):
            torch.testing.assert_close(mine.wkv, theirs.wkv, rtol=1e-8, atol=1e-8)
        assert piece.state.texts == expected.texts


@pytest.mark.parametrize("talk", ["generate", "chat"])
def test_states_of_earlier_steps_are_let_go(llm, monkeypatch, talk):
    """A state is megabytes: a text of 60 tokens must not hold 60 of them until it is complete."""
    alive: weakref.WeakSet[State] = weakref.WeakSet()
    init, most = State.__init__, []

    def counted(self, *args, **options):
        init(self, *args, **options)
        alive.add(self)

    monkeypatch.setattr(State, "__init__", counted)
    options = {"max_tokens": 60, "seed": 1, "mask": lambda ids: most.append(len(alive))}
    if talk == "chat":
        llm.chat(template="story").say("Hello", **options)
    else:
        llm.generate(["Once", "In"], **options)
    assert len(most) >= 60
    assert max(most[30:]) <= max(most[5:15]) + 6


def test_going_on_from_a_completion(llm, tmp_path):
    whole = llm.generate("Once", 12, **GREEDY)
    first = llm.generate("Once", 5, **GREEDY)
    first.state.save(tmp_path / "state.safetensors")
    state = State.load(tmp_path / "state.safetensors")
    # the state has read its last token, so what comes next begins with the token after it
    rest = llm.generate(whole.token_ids[5:6], 6, state=state, **GREEDY)
    assert first.token_ids + whole.token_ids[5:6] + rest.token_ids == whole.token_ids
    assert rest.state.texts == whole.state.texts


def test_n_completions_of_a_prompt_that_is_read_once(llm):
    calls = []
    hook = llm.model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].numel()))
    three = llm.generate("Once upon", 6, n=3, seed=5)
    hook.remove()
    assert calls[0] == 9
    assert sum(calls) == 9 + sum(len(x.token_ids) for x in three)
    assert [x.choice for x in three] == [0, 1, 2]
    assert [x.text for x in three] == [llm.generate("Once upon", 6, seed=5 + j).text for j in range(3)]
    many = llm.generate(["a", "b"], 6, n=2, seed=5)
    assert [[x.text for x in xs] for xs in many] == [
        [llm.generate(prompt, 6, seed=5 + j).text for j in range(2)] for prompt in "ab"
    ]
    assert [len(llm.generate("a", 1, n=1)), len(llm.generate(["a"], 1, n=1)[0])] == [1, 1]
    state = llm.state("Once ")
    both = llm.generate("upon", 4, n=2, seed=[8, 9], state=state)
    assert [x.text for x in both] == [llm.generate("Once upon", 4, seed=seed).text for seed in (8, 9)]
    with pytest.raises(InputError, match="n must be a whole number of at least 1, got 0"):
        llm.generate("a", n=0)


def test_logprobs_are_the_models_own(llm):
    ids, logits = plain_loop(llm, "Once", 5)
    # what draws the token does not change them
    options = {"logprobs": True, "top_logprobs": 3, "logit_bias": {min({*range(256)} - {*ids}): -1.0}}
    completion = llm.generate("Once", 5, temperature=0, **options)
    assert completion.token_ids == ids
    expected = torch.log_softmax(logits, -1)
    for step, entry in enumerate(completion.logprobs):
        assert entry.token_id == ids[step]
        assert entry.logprob == pytest.approx(float(expected[step, ids[step]]), abs=1e-5)
        best = expected[step].topk(3)
        assert list(entry.top_logprobs) == best.indices.tolist()
        assert list(entry.top_logprobs.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    plain = llm.generate("Once", 5, temperature=0, logprobs=True).logprobs
    assert [x.top_logprobs for x in plain] == [{}] * 5
    assert [x.logprob for x in plain] == [x.logprob for x in completion.logprobs]


def test_the_end_of_text_and_what_holds_it_off(model):
    tokenizer = ByteTokenizer()
    llm = LLM(model, tokenizer=tokenizer)
    free = llm.generate("a", 20, **GREEDY).token_ids
    tokenizer.stop_ids = frozenset({free[7]})
    first = free.index(free[7])
    ended = llm.generate("a", 20, **GREEDY)
    assert (ended.token_ids, ended.finish_reason) == (free[:first], "stop")
    assert llm.generate("a", 20, ignore_eos=True, **GREEDY).token_ids == free
    held = llm.generate("a", 20, min_tokens=first + 3, **GREEDY)
    assert held.token_ids[:first] == free[:first]
    assert len(held.token_ids) >= first + 3
    assert free[7] not in held.token_ids[: first + 3]
    stopped = llm.generate("a", 20, stop_token_ids=[free[3]], ignore_eos=True, **GREEDY)
    assert stopped.token_ids == free[: free.index(free[3])]
    with pytest.raises(InputError, match="a token in stop_token_ids must be below 256"):
        llm.generate("a", stop_token_ids=[256])


def test_stop_strings_wait_for_min_tokens(scripted):
    model, tokenizer = scripted(["a", "b", "a", "b", "a", "b"], cue=":")
    llm = LLM(model, tokenizer=tokenizer)
    assert llm.generate("x:", stop="b").text == "a"
    assert llm.generate("x:", stop="b", min_tokens=3).text == "aba"


def test_a_mask_decides_what_may_come(llm):
    allowed = torch.zeros(256, dtype=torch.bool)
    allowed[list(b"abc")] = True
    seen: list[list[int]] = []

    def mask(ids):
        seen.append(ids)  # which are its own to keep
        return allowed if len(ids) < 3 else None

    free = llm.generate("Once", 5, **GREEDY)
    completion = llm.generate("Once", 5, mask=mask, logit_bias={ord("z"): 1000.0}, **GREEDY)
    assert set(completion.text[:3]) <= set("abc")
    assert completion.text[3:] == "zz"
    assert seen == [completion.token_ids[:i] for i in range(5)]
    one = llm.generate(["Once", "Once"], 5, mask=[mask, None], **GREEDY)
    assert one[1].text == free.text
    assert set(one[0].text[:3]) <= set("abc")
    with pytest.raises(InputError, match=r"a mask must be bool \[256\], got float32 \[256\]"):
        llm.generate("a", 1, mask=lambda ids: allowed.float())
    with pytest.raises(InputError, match="no token is left to choose"):
        llm.generate("a", 1, mask=lambda ids: torch.zeros(256, dtype=torch.bool))


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn(llm):
    from transformers import RepetitionPenaltyLogitsProcessor

    penalize, ids = RepetitionPenaltyLogitsProcessor(1.7), list(b"Once upon")
    for _ in range(12):
        logits = llm.model(torch.tensor([ids]))[0][:, -1].detach().float()
        ids.append(int(penalize(torch.tensor([ids]), logits).argmax()))
    assert llm.generate("Once upon", 12, temperature=0, repetition_penalty=1.7).token_ids == ids[9:]
    assert llm.generate("Once upon", 12, temperature=0).token_ids != ids[9:]


def test_one_sampling_a_prompt(llm):
    samplings = [Sampling(temperature=0), Sampling(seed=4, top_p=0.5)]
    both = llm.generate(["Once", "Once"], 8, sampling=samplings)
    assert [x.text for x in both] == [
        llm.generate("Once", 8, temperature=0, top_p=1.0).text,
        llm.generate("Once", 8, seed=4, top_p=0.5).text,
    ]
    assert llm.generate("Once", 8, sampling=Sampling(seed=4), top_p=0.5).text == both[1].text
    seeds = llm.generate(["Once"] * 3, 8, seed=[1, 2, 1])
    assert seeds[0].text == seeds[2].text != seeds[1].text
    for options, message in [
        ({"sampling": samplings}, "sampling has 2 values for 1 prompts"),
        ({"sampling": 0.5}, "sampling must be a Sampling or a list of them, got 0.5"),
        ({"seed": [1, 2]}, "seed has 2 values for 1 completions"),
        ({"min_tokens": -1}, "min_tokens must be a whole number of at least 0, got -1"),
        ({"logprobs": 2}, "logprobs must be True or False, got 2"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"stop_token_ids": "a"}, "stop_token_ids must be a list of token ids, got 'a'"),
        ({"mask": 3}, "mask must be a function"),
        ({"tempreature": 1.0}, "unknown option 'tempreature'; did you mean 'temperature'"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.generate("a", **options)


def test_progress_of_a_long_prompt(llm):
    seen = []
    llm.generate(["x" * 1300, "y" * 40], 1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1340, 1340)
    assert len(seen) > 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    seen.clear()
    llm.state("x" * 600, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(128, 600), (256, 600), (384, 600), (512, 600), (600, 600)]


def test_asyncio_gives_the_same(llm):
    async def both() -> tuple[list[Completion], list[Completion]]:
        whole = asyncio.gather(*(llm.generate_async("Once", 10, seed=seed) for seed in (1, 2)))
        pieces = [piece async for piece in llm.stream_async("Once", 10, seed=1)]
        return await whole, pieces

    whole, pieces = asyncio.run(both())
    assert [fields(x) for x in whole] == [fields(llm.generate("Once", 10, seed=seed)) for seed in (1, 2)]
    assert "".join(map(str, pieces)) == whole[0].text

    async def shapes() -> list[int]:
        several = await llm.generate_async(["a", "b"], 2)
        lists = await llm.generate_async(["a", "b", "c"], 2, n=2)
        return [len(several), len(lists), len(lists[0])]

    assert asyncio.run(shapes()) == [2, 3, 2]
    with pytest.raises(InputError, match="unknown option 'topp'; did you mean 'top_p'"):
        asyncio.run(llm.generate_async("a", topp=1))


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_cancelled_task_leaves_nothing_running(llm, where):
    """Whoever cancels gets control back once the step under way has ended, and no thread goes on computing."""
    calls, began, go_on = [], threading.Event(), threading.Event()

    def slow(module, inputs):
        calls.append(inputs[0].numel())
        if len(calls) == (1 if where == "prefill" else 3):
            began.set()
            assert go_on.wait(10)

    async def cancel() -> bool:
        task = asyncio.create_task(llm.generate_async("x" * 2000, 50))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        waiting = not task.done()  # for the step under way
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return waiting

    hook = llm.model.register_forward_pre_hook(slow)
    try:
        assert asyncio.run(cancel())
        count = len(calls)
    finally:
        hook.remove()
    assert count <= (2 if where == "prefill" else 6)
    assert llm.generate("Once", 5, seed=1).text == llm.generate("Once", 5, seed=1).text
    assert len(calls) == count


def test_an_async_stream_that_is_left_early(llm):
    async def some() -> list[str]:
        stream = llm.stream_async("Once", 100, seed=1)
        texts = []
        async for piece in stream:
            texts.append(piece.text)
            if len(texts) == 3:
                break
        await stream.aclose()
        return texts

    texts = asyncio.run(some())
    whole = [piece.text for piece in llm.generate("Once", 100, seed=1, stream=True)]
    assert texts == whole[:3]


def test_the_answer_to_a_list_of_messages(scripted):
    model, tokenizer = scripted([" Hi", "."], [" It", " is", "."], cue="Assistant:")
    llm = LLM(model, tokenizer=tokenizer)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello\n"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Is it?"},
    ]
    answer = llm.chat(messages, template="g1")
    assert isinstance(answer, Completion)
    assert (answer.text, answer.finish_reason) == ("It is.", "stop")
    chat = llm.chat(template="g1", system="Be kind.")
    chat.say("Hello")
    said = chat.say("Is it?")
    assert said.text == answer.text
    assert model.read(said.state) == model.read(answer.state)
    assert [piece.text for piece in llm.chat(messages, template="g1", stream=True)] == ["It", " is", ".", ""]
    thinking = llm.chat(messages, 0, template="g1-think")
    assert model.read(thinking.state).endswith("Assistant: Hi.\n\nUser: Is it?\n\nAssistant: <think")


def test_messages_that_are_refused(llm):
    for messages, message in [
        ([], "there are no messages"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]: tool_call_id must be that of an earlier call, got None"),
        (
            [{"role": "user", "content": None}],
            r"messages\[0\]: content must be a text or a list of text parts, got None",
        ),
        ([{"role": "user"}], r"messages\[0\]: content must be a text"),
        (["hello"], r"messages\[0\] must be a dict with role and content, got 'hello'"),
        ("g1", "a template is named by template="),
        ([{"role": "user", "content": " "}], "the message is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.chat(messages)


def test_a_chat_that_has_a_history(llm, tmp_path):
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    from heronry.engine.chat import Chat

    chat = Chat(llm, "story", "Be kind.", history)
    assert chat.messages == [{"role": "system", "content": "Be kind."}, *history]
    assert chat.text == "Be kind.\n\nUser: a\n\nAssistant: b\n\n"
    chat.say("c", max_tokens=4, seed=1)
    chat.save(tmp_path / "talk")
    other = llm.chat()
    other.load(tmp_path / "talk")
    assert other.messages == chat.messages
    assert other.text == chat.text
    assert chat.undo() == "c"
    with pytest.raises(InputError, match="nothing was said yet"):
        chat.undo()
    with pytest.raises(InputError, match="the history must end with an answer"):
        Chat(llm, "story", history=history[:1])


def test_extreme_biases_penalties_and_temperatures(llm):
    assert llm.generate("a", 3, logit_bias={5: 1e39}).token_ids == [5, 5, 5]
    first = llm.generate("a", 1, **GREEDY).token_ids
    assert llm.generate("a", 3, presence_penalty=-1e39, **GREEDY).token_ids == first * 3
    hot = llm.generate("a", 40, temperature=1e39, top_p=1.0, logit_bias={5: float("-inf")}, seed=1).token_ids
    assert len(set(hot)) > 20
    assert 5 not in hot


def test_seeds_of_numpy_do_not_wrap(llm):
    both = llm.generate("a", 6, seed=np.uint8(255), n=2)
    assert [x.text for x in both] == [llm.generate("a", 6, seed=seed).text for seed in (255, 256)]


def test_a_completion_is_pickled_with_its_state(llm):
    completion = llm.generate("Once", 4, seed=1, logprobs=True)
    again = pickle.loads(pickle.dumps(completion))
    assert fields(again) == fields(completion)
    assert torch.equal(again.state.layers[0].wkv, completion.state.layers[0].wkv)
    assert again.state.texts == completion.state.texts


def test_what_a_chat_has_read_is_what_it_says(scripted):
    model, tokenizer = scripted([" Hi", "."], [" It", "."], cue="Assistant:")
    chat = LLM(model, tokenizer=tokenizer).chat(template="g1", system="Be kind.")
    first, second = chat.say("a"), chat.say("b")
    assert first.usage.prompt_tokens == model.reads[0] + model.reads[1]  # the system text, then the message
    assert second.usage.prompt_tokens == model.reads[-3]
    assert chat.retry().usage.prompt_tokens == second.usage.prompt_tokens  # the message alone


def test_templates_that_are_refused(llm, tmp_path):
    for options, message in [
        ({"turn": "Hello"}, "a template's turn must contain {user}"),
        ({"turn": "{user}", "stops": ("",)}, "a stop string must not be empty"),
    ]:
        with pytest.raises(InputError, match=message):
            Template(**options)
    chat = llm.chat(template=Template("Q: {user}\nA:", sampling={"logit_bias": {5: -1.0}}))
    chat.say("a", 2)
    chat.save(tmp_path / "talk")
    chat.load(tmp_path / "talk")
    chat.say("a", 2)
    for bad in (None, [1]):
        with pytest.raises(InputError, match="a message must be a text"):
            chat.say(bad)


def test_more_bad_input_is_one_line(llm):
    completion = llm.generate("a", 1)
    for prompt, options, message in [
        (["a", 1], {}, "a prompt must be a text or a list of token ids, got 1"),
        ("a", {"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ("a", {"state": completion}, "state must be a State, got Completion"),
        ("a", {"mask": lambda ids: False}, "a mask must be a torch.Tensor, bool"),
        ("a", {"repetition_penalty": 1e300}, "repetition_penalty must be a number from"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.generate(prompt, 1, **options)
    with pytest.raises(InputError, match="messages must be a list of messages, got 5"):
        llm.chat(5)


def test_an_answer_that_its_chat_has_left_behind(llm):
    """As another thread may do it."""
    chat = llm.chat(template="story")
    with pytest.raises(InputError, match="the conversation moved on"):
        chat.say("a", 5, mask=lambda ids: chat.undo() and None)
    assert chat.messages == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("a", tempreature=0.5), "unknown option 'tempreature'; did you mean 'temperature'"),
        (lambda llm: llm.chat().say("a", state=1), "unknown option 'state'; "),
        (lambda llm: llm.chat().say("a", n=2), "unknown option 'n'; choose from max_tokens, stream, temperature"),
        (lambda llm: llm.stream_async("a", stream=True), "unknown option 'stream'; "),
        (lambda llm: llm.chat(temperature=0.5), "temperature is given to say"),
        (lambda llm: llm.chat(max_tokens=5), "max_tokens is given to say"),
        (lambda llm: llm.chat(template=5), "template must be a Template or the name of one, got 5"),
        (lambda llm: llm.chat([{"role": "system", "content": "a"}], system="b"), "a system text was given twice"),
        (
            lambda llm: llm.chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], system="c"),
            "a system text was given twice",
        ),
        (lambda llm: llm.chat([{"role": "user", "content": " "}]), r"messages\[0\]: the message is empty"),
        (lambda llm: llm.generate(b"abc"), "a prompt must be a text or a list of token ids, got b'abc'"),
        (lambda llm: llm.generate("a", Sampling()), "max_tokens must be a whole number of at least 0, got a Sampling"),
        (lambda llm: llm.generate("a", mask=torch.ones(30, 30)), "mask must be a function, .*, got a Tensor$"),
        (lambda llm: llm.generate("a", progress=True), "progress must be a function of .*, got True"),
        (lambda llm: llm.generate("a", presence_penalty=10**400), "presence_penalty must be a number, got a int"),
        (lambda llm: LLM(5), "give the path of a model, or a Model, got 5"),
        *(
            (lambda llm, name=name: LLM(llm.model, **{name: "int8"}), f"{name}= is for a model that is loaded; with")
            for name in ("dtype", "device", "quantize", "adapter", "ln_x_eps")
        ),
        (lambda llm: LLM(llm.model, tokenizer=5), "tokenizer must be a name, a path or a Tokenizer, got 5"),
        (lambda llm: llm.model([1, 2]), "tokens must be a torch.Tensor of integers"),
        (lambda llm: llm.chat().fork(""), "a branch needs a name, got ''"),
    ],
)
def test_an_argument_at_the_wrong_door_is_named(llm, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(llm)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_numbers_of_numpy_are_whole_numbers(llm):
    one, other = llm.generate("a", np.int64(3), n=np.int64(2), seed=np.int64(7))
    assert (one.token_ids, other.token_ids) == tuple(llm.generate("a", 3, seed=i).token_ids for i in (7, 8))


def test_arguments_are_checked_before_the_prompt_is_read(llm, monkeypatch):
    monkeypatch.setattr("heronry.engine.llm.prefill", lambda *_, **__: pytest.fail("the prompt was read"))
    for options in ({"max_tokens": -1}, {"stop_token_ids": [256]}, {"logit_bias": {256: 1.0}}):
        with pytest.raises(InputError):
            llm.generate("a long prompt", **options)


def test_a_callback_that_raises_stop_iteration_ends_the_task(llm):
    numbers = iter([1])

    async def run():
        await llm.generate_async("a" * 2000, 5, progress=lambda done, total: next(numbers))

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(run(), 30))


def test_a_pickle_holds_each_number_of_a_state_once(llm):
    completion = llm.generate("hello", 3)
    assert len(pickle.dumps(completion)) < 1.5 * completion.state.nbytes + 5000


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_defaults_of_the_process_change_nothing(tmp_path, random_checkpoint, version, quantize):
    torch.save(random_checkpoint(version, vocab=256, ffn=224), tmp_path / "model.pth")

    def run() -> list:
        llm = LLM(tmp_path / "model.pth", tokenizer="bytes", quantize=quantize)
        options = {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "logit_bias": {3: -1.0}}
        rows = llm.generate(["a prompt of many tokens " * 5, "b"], 4, seed=3, **options)
        with torch.inference_mode():  # more rows than the native step takes
            logits, _ = llm.model(torch.full((200, 3), 7, device="cpu"))
        return [row.token_ids for row in rows] + [logits.double().sum().item()]

    expected = run()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert run() == expected
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert run() == expected
