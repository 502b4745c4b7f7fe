"""Text in, text out: the same alone, side by side and streamed; stop strings never show."""

from __future__ import annotations

import json

import pytest
import torch
from bpe import train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry.checkpoint import assemble, save
from heronry.engine import Completion, Sampling, generate
from heronry.engine import llm as llm_file
from heronry.engine.llm import LLM
from heronry.errors import InputError
from heronry.text.stop_strings import StopStringBuffer
from heronry.text.tokenizers import ByteTokenizer, HFTokenizer

PROMPTS = ["Once upon a time", "鳥", "x" * 30]


def written(llm: LLM, *given, **options):
    """The text, or the list of texts, that `LLM.generate` writes."""
    completions = llm.generate(*given, **options)
    return completions.text if isinstance(completions, Completion) else [completion.text for completion in completions]


def streamed(llm: LLM, *given, **options) -> list[str]:
    """The pieces that are not empty."""
    return [piece.text for piece in llm.generate(*given, stream=True, **options) if piece.text]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"seed": 1, "top_k": 5, "presence_penalty": 0.5}])
def test_a_list_is_each_alone(llm, options):
    together = written(llm, PROMPTS, 15, **options)
    assert together == [written(llm, prompt, 15, **options) for prompt in PROMPTS]
    assert len(set(together)) == 3


def test_the_default_is_top_p_and_a_new_text_each_time(llm):
    assert written(llm, "a", 20, seed=1) == written(llm, "a", 20, seed=1, temperature=1.0, top_p=0.85)
    assert written(llm, "a", 20) != written(llm, "a", 20)


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), stop=st.lists(st.text("aet \n", min_size=1, max_size=2), max_size=2))
def test_streaming_gives_the_same_text(llm, seed, stop):
    options = {"seed": seed, "stop": stop}
    text = written(llm, "a", 12, **options)
    assert "".join(streamed(llm, "a", 12, **options)) == text
    many = list(llm.generate(["a", "b"], 12, stream=True, **options))
    assert "".join(piece.text for piece in many if piece.index == 0) == text
    assert "".join(piece.text for piece in many if piece.index == 1) == written(llm, "b", 12, **options)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: reading character by character, where the first stop string is complete, and what is before."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=400)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=10),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_by_definition_however_the_text_is_cut(pieces, stops):
    hold = StopStringBuffer(stops)
    text, shown = "", ""
    expected, stopped = cut("".join(pieces), stops)
    for piece in pieces:
        text += piece
        shown += hold.push(piece)
        assert expected.startswith(shown)  # nothing leaks
        if not hold.stopped:
            assert shown + hold.held == text  # and nothing is lost
    assert hold.stopped == stopped
    assert shown + hold.finish() == expected


def test_only_what_may_become_a_stop_string_is_held_back():
    hold = StopStringBuffer(["\n\nUser:"])
    assert [hold.push(piece) for piece in ["Hi.", "\n", "x", "\n\nUs", "e", "d", "\n\nUser", ": no", "more"]] == [
        *["Hi.", "", "\nx", "", "", "\n\nUsed", "", "", ""]
    ]


def test_stop_strings_end_the_text(scripted):
    model, tokenizer = scripted(["Hello", " wor", "ld.", "\n\nUs", "er: x", " y"], cue=":")
    llm = LLM(model, tokenizer=tokenizer)
    assert written(llm, "a:") == "Hello world.\n\nUser: x y"
    assert written(llm, "a:", stop="\n\nUser:") == "Hello world."
    assert streamed(llm, "a:", stop=["zz", "wo"]) == ["Hello", " "]
    # the end comes before the stop string is complete: what was held back comes out
    assert streamed(llm, "a:", 4, stop="\n\nUser:") == ["Hello", " wor", "ld.", "\n\nUs"]
    assert written(llm, ["a:", "b:"], stop=["wor", "\n"]) == ["Hello ", "Hello "]


def test_a_stopped_sequence_is_not_computed_further(scripted):
    model, tokenizer = scripted(["aa"] * 50, cue=":")
    llm = LLM(model, tokenizer=tokenizer)
    written(llm, ["x:", "y:"], stop="aaa")
    assert model.reads == [2, 2, 1, 1, 1, 1]


def test_half_a_character_at_the_end(scripted):
    model, tokenizer = scripted(["x"], cue=":")
    bird = [tokenizer.table.index(bytes([byte])) for byte in "鳥".encode()]
    model.replies = [bird + bird[:2]]
    llm = LLM(model, tokenizer=tokenizer)
    assert streamed(llm, "a:") == ["鳥", "\ufffd"]
    assert written(llm, "a:") == tokenizer.decode(bird + bird[:2])


def test_end_of_text_is_not_text(model):
    tokenizer = ByteTokenizer()
    [free] = generate(model, [[97]], Sampling(temperature=0), 20).run()
    end = free.tokens[7]
    tokenizer.stop_ids = frozenset({end})
    text = written(LLM(model, tokenizer=tokenizer), "a", 20, temperature=0)
    assert text == tokenizer.decode(free.tokens[: free.tokens.index(end)])


def test_going_on_from_a_state(llm):
    state = llm.state("Once upon ")
    assert state.texts == ("Once upon ",)
    for options in ({"temperature": 0}, {"seed": 4}):
        assert written(llm, "a time", 10, state=state, **options) == written(llm, "Once upon a time", 10, **options)
        assert written(llm, ["a", "the"], 10, state=state, **options) == [
            written(llm, "Once upon " + end, 10, **options) for end in ("a", "the")
        ]
    assert llm.state("a time", state).texts == ("Once upon a time",)
    both = type(state).stack([state, llm.state("In ")])
    assert written(llm, ["a", "a"], 5, state=both, seed=1) == written(llm, ["Once upon a", "In a"], 5, seed=1)
    with pytest.raises(InputError, match="2 sequences was given for 3 prompts"):
        written(llm, ["a"] * 3, state=both)


def test_a_broken_off_stream_leaves_all_as_it_was(llm):
    expected = written(llm, "abc", 12, seed=1)
    pieces = llm.generate("abc", 12, stream=True, seed=1)
    next(pieces)
    pieces.close()
    for _ in llm.generate(["abc", "d"], 12, stream=True, seed=1):
        break
    assert written(llm, "abc", 12, seed=1) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "there is no prompt"),
        (["a", ""], {}, "prompt 1 is empty"),
        ("a\ud800", {}, "lone surrogate at character 1"),
        ("a", {"stop": ""}, "a stop string must not be empty"),
        ("a", {"stop": ["b", ""]}, "a stop string must not be empty"),
        ("a", {"top_p": 2}, "top_p must be a number from 0 to 1, got 2"),
        ("a", {"topp": 1}, "unknown option 'topp'"),
        ("a", {"max_tokens": -1}, "max_tokens must be a whole number of at least 0"),
    ],
)
def test_bad_input_is_named_at_once(llm, stream, prompt, options, message):
    with pytest.raises(InputError, match=message):
        llm.generate(prompt, stream=stream, **options)


def test_tokens_of_several_bytes(random_checkpoint, tmp_path):
    train_bpe(tmp_path / "tokenizer.json", "Once upon a time, 鳥 and Où.\n\nUser: Hello\n\nAssistant:")
    weights = random_checkpoint("7", vocab=300, width=32, heads=2, layers=2, ffn=40, rank=3)
    llm = LLM(assemble({name: x.double() for name, x in weights.items()}), tokenizer=tmp_path)
    for seed in range(20):
        tokens = generate(llm.model, [llm.encode("Once", begins=True)], Sampling(seed=seed), 20, {0}).run()[0].tokens
        text = written(llm, "Once", 20, seed=seed, top_p=1.0)
        assert text == "".join(streamed(llm, "Once", 20, seed=seed, top_p=1.0))
        assert text == llm.tokenizer.decode(tokens)
        chat = llm.chat(template="story")
        assert chat.say("Hello", max_tokens=20, seed=seed).text == chat.messages[1]["content"]
        chat.say("Où", max_tokens=20, seed=seed)
        turn = chat._tree.heads["main"]
        assert turn.state.texts[0] + turn.owed == chat.text


def test_from_a_folder(tmp_path, random_checkpoint, llm):
    weights = random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3)
    save(assemble(weights), tmp_path / "model")
    loaded = LLM(tmp_path / "model")
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert written(LLM(str(tmp_path / "model"), dtype="float64"), "a", 10, seed=1) == written(loaded, "a", 10, seed=1)
    assert loaded.opening == []
    assert loaded.chat_template is None


def test_what_a_folder_says_about_its_texts(tmp_path, random_checkpoint):
    weights = random_checkpoint("7", vocab=256, width=32, heads=2, layers=2, ffn=40, rank=3)
    save(assemble(weights), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    notes = {"chat_template": "story", "opening_tokens": [0]}
    (tmp_path / "config.json").write_text(json.dumps(config | notes))
    llm = LLM(tmp_path)
    assert llm.chat_template == "story"
    plain = LLM(llm.model)
    assert written(llm, "a", 10, seed=1) == written(plain, "\0a", 10, seed=1)
    assert written(llm, "", 10, seed=1) == written(plain, "\0", 10, seed=1)  # from nothing but the opening
    assert written(llm, "b", 10, state=llm.state("a"), seed=1) == written(plain, "\0ab", 10, seed=1)


def test_tokenizers_of_ones_own_and_wrong_ones(model, random_checkpoint, tmp_path):
    assert written(LLM(model, tokenizer="bytes"), "a", 5, seed=1) == written(LLM(model), "a", 5, seed=1)
    with pytest.raises(InputError, match="65530 ids, but the model has 256"):
        LLM(model, tokenizer="world")
    weights = random_checkpoint("7", vocab=300, width=32, heads=2, layers=1, ffn=40, rank=3)
    with pytest.raises(InputError, match="no known tokenizer has 300 ids"):
        LLM(assemble(dict(weights)))
    with pytest.raises(InputError, match=r"none\.json: tokenizer file not found"):
        LLM(model, tokenizer=tmp_path / "none.json")


def test_the_bundled_model(monkeypatch, tmp_path):
    if llm_file.BUNDLED.is_dir():
        llm = LLM()
        assert isinstance(llm.tokenizer, HFTokenizer)
        assert written(llm, "Once upon a time", 10, temperature=0)
    monkeypatch.setattr(llm_file, "BUNDLED", tmp_path / "none")
    with pytest.raises(InputError, match="no bundled model"):
        LLM()
