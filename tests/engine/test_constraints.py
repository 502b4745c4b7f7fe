"""Texts that follow a schema, a regular expression, choices or a grammar."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE, WordLevel

from heronry import LLM, InputError, Sampling
from heronry.checkpoint import assemble
from heronry.engine import Grammar, prefill
from heronry.engine.call_sizes import choose_call_sizes
from heronry.engine.constraints import LARGEST, token_table
from heronry.engine.decode_batch import DecodeBatch, SequenceDecoder
from heronry.text.tokenizers import ByteTokenizer, HFTokenizer, WorldTokenizer, load_tokenizer

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(random_checkpoint):
    """A small random one over bytes, with its C++ step."""
    return assemble(random_checkpoint("7", vocab=256, width=32, heads=2, layers=1, ffn=40, rank=3))


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model)


@pytest.fixture(scope="module")
def world():
    """The tokens that World allows after some bytes of a text, as a set of bytes, and the matcher."""
    tokenizer = WorldTokenizer()

    def allowed(grammar: Grammar, *tokens: int):
        matcher = grammar.matcher(tokenizer, 65536)
        for token in tokens:
            matcher.consume(token)
        mask = matcher.allowed()
        assert mask.shape == (65536,)
        assert mask.dtype == torch.bool
        return {tokenizer.vocabulary[i] for i in mask.nonzero()[:, 0].tolist()}, matcher

    return allowed


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + ["array", "object", "anyOf"] * (2 if depth < 3 else 0) if depth else ["object", "array"])
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 6)}
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)}
    if kind == "enum":
        return {"enum": rng.sample(["a", 'b"\\', "é\n", 1, 2.5, None, True, {"x": [1]}], 3)}
    if kind == "const":
        return {"const": rng.choice(["yes", 12, ["a", {"b": None}]])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": rng.choice(["^[a-c]{2,4}$", r"^\d{3}-\d{2}$", "^(x|yz)+w$"]),
            "maxLength": 9,
        }
    if kind == "array":
        least = rng.randrange(2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
    if kind == "object":
        names = rng.sample(["id", "full name", "größe", 'q"uote', "z"], rng.randrange(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {"type": kind}


def test_random_schemas(model):
    """Whatever a schema and whatever a model, a text that ends is valid."""
    jsonschema = pytest.importorskip("jsonschema")
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(100)]
    tokenizer = ByteTokenizer()
    finished = 0
    for first in range(0, 100, 50):
        chosen = range(first, first + 50)
        decoders = {
            i: SequenceDecoder(Sampling(seed=i), 300, matcher=Grammar.from_schema(schemas[i]).matcher(tokenizer, 256))
            for i in chosen
        }
        batch = DecodeBatch(model, choose_call_sizes(model))
        logits, state = prefill(model, [[65 + i] for i in chosen])
        batch.add(decoders, logits, state)
        while len(batch):
            for event in batch.step():
                if event.finish_reason == "stop":
                    finished += 1
                    text = tokenizer.decode(decoders[event.index].drawn)
                    jsonschema.validate(json.loads(text), schemas[event.index])
                elif event.token is None:
                    assert event.error is None
    assert finished >= 95


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"regex": "(ab|cd)+e?[0-9]{2}"}, "(ab|cd)+e?[0-9]{2}"),
        ({"regex": "[^a-z/]{3}/é"}, "[^a-z/]{3}/é"),
        ({"regex": r"\d{3}"}, r"\d{3}"),
        ({"choices": ["yes", "no", 'per"haps\n', "😀\x00"]}, 'yes|no|per"haps\n|😀\x00'),
        ({"grammar": 'start: "x" part+ "."\npart: /[a-c]{2}/ | "é"'}, r"x([a-c]{2}|é)+\."),
        ({"grammar": 'root ::= "x" part+ "."\npart ::= [a-c]{2} | "é"'}, r"x([a-c]{2}|é)+\."),
        ({"grammar": '# GBNF\nroot  ::= item ("," item){0,3} "."\nitem ::= [0-9]'}, r"\d(,\d){0,3}\."),
    ],
)
def test_texts(llm, options, pattern):
    completions = llm.generate(["a", "b"], 60, n=5, seed=1, temperature=0.7, **options)
    finished = [x for row in completions for x in row if x.finish_reason == "stop"]
    assert len(finished) >= 6
    assert all(re.fullmatch(pattern, x.text) for x in finished)


def test_any_object(llm):
    text = llm.generate("a", 400, schema=True, seed=3, logit_bias={ord("}"): 12, ord('"'): 6}).text
    assert isinstance(json.loads(text), dict)


def test_schemas_in_other_forms(llm):
    class Model:
        @staticmethod
        def model_json_schema():
            return PERSON

    for schema in (json.dumps(PERSON), Model, Model(), Grammar.from_schema(PERSON)):
        name = "grammar" if isinstance(schema, Grammar) else "schema"
        assert llm.generate("a", 90, seed=1, **{name: schema}) == llm.generate("a", 90, seed=1, schema=PERSON)


def test_white_space(world):
    first, matcher = world(Grammar.from_schema(PERSON))
    assert first == {b"\n", b" ", b"{", b" {", b'{"', b' {"'}
    inner, _ = world(Grammar.from_schema(PERSON), 11)
    assert inner == {b"{", b'{"'}
    tokens = WorldTokenizer().encode('{"name":"Bo","age":4')
    assert b" " in world(Grammar.from_schema(PERSON), *tokens)[0]
    assert world(Grammar.from_schema(PERSON, compact=True), *tokens)[0] >= {b"}", b"2"}
    assert not any(x.isspace() for x in world(Grammar.from_schema(PERSON, compact=True), *tokens)[0])
    own = {**PERSON, "x-guidance": {"whitespace_pattern": "[ \t]{0,9}"}}
    assert b"\t" in world(Grammar.from_schema(own), *tokens)[0]
    assert world(Grammar.from_choices(["yes", "no"]))[0] == {b"y", b"ye", b"yes", b"n", b"no"}
    assert matcher.copy().complete is False


def test_tokens_within_a_character(world):
    table = WorldTokenizer().vocabulary
    after, _ = world(Grammar.from_regex("[^a]+"), table.index(b"\xe5"), table.index(b"\xbf"))
    assert after == {bytes([x]) for x in range(0x80, 0xC0)}


def test_tokens_without_text(world):
    """The end of text, padding and the byte FF are never part of a text, even of one that may be anything."""
    _, matcher = world(Grammar.from_regex("(.|\n)*"))
    mask = matcher.allowed()
    assert matcher.complete
    assert not matcher.ended
    assert not mask[[0, 256, *range(65530, 65536)]].any()
    assert mask.sum() > 65000


def test_forced_tokens(world):
    tokenizer = WorldTokenizer()
    _, matcher = world(Grammar.from_schema(PERSON, compact=True), *tokenizer.encode('{"'))
    assert tokenizer.decode(matcher.forced()) == "name"
    for token in tokenizer.encode('name":"Bo'):
        matcher.consume(token)
    assert matcher.forced() == []
    matcher.consume(tokenizer.encode('"')[0])
    assert tokenizer.decode(matcher.forced()).startswith(',"age"')


def test_a_primed_opening(world):
    """A prompt may end in the beginning of the text; across the border, tokens are as free as the grammar is."""
    tools = {
        "anyOf": [
            {"type": "object", "properties": {"name": {"const": name}, "arguments": PERSON}, "required": ["name"]}
            for name in ("ping", "weather")
        ]
    }
    start = f'start: "\\n" call "\\n```"\ncall: %json {json.dumps(tools)}'
    after, _ = world(Grammar("grammar", start, opening='\n{"name":"'))
    assert after == {b"p", b"w", b"pi", b"we", b"pin", b"ping", b"weather"}
    with pytest.raises(InputError, match="the grammar does not allow a text that begins with 'Sure'"):
        Grammar("regex", "[0-9]+", opening="Sure").matcher(WorldTokenizer(), 65536)


def test_text_with_calls_in_it(world):
    """Free text, but a call after its marker has the form; a token may hold the end of the marker and what follows."""
    tokenizer = WorldTokenizer()
    call = {"type": "object", "properties": {"name": {"enum": ["ping", "weather"]}, "arguments": {"type": "object"}}}
    call |= {"required": ["name", "arguments"], "additionalProperties": False}
    grammar = Grammar.from_text(
        f"""start: part* rest
part: text call "</tool_call>"
call: %json {json.dumps(call)}
text[suffix="<tool_call>"]: /(.|\\n)*/
rest: /(.|\\n)*/"""
    )
    _, matcher = world(grammar, *tokenizer.encode("I look it up {here}. "))
    assert matcher.complete
    after, matcher = world(grammar, *tokenizer.encode(" <tool_call"))
    assert b">{" in after
    after, matcher = world(grammar, *tokenizer.encode('It is <tool_call>{"name":"'))
    assert not matcher.complete
    assert {b"ping", b"weather"} <= after <= {x for x in after if b"ping".startswith(x) or b"weather".startswith(x)}
    _, matcher = world(grammar, *tokenizer.encode('It is <tool_call>{"name":"ping","arguments":{}}</tool_call> Well'))
    assert matcher.complete


def test_after_a_thought(world):
    tokenizer = WorldTokenizer()
    grammar = Grammar.from_choices(["yes", "no"]).in_answer(" <think")
    tokens = tokenizer.encode("> Is it? {yes} </thin </think>\nye")
    after, matcher = world(grammar, *tokens[:-2])
    assert not matcher.complete
    after, matcher = world(grammar, *tokens)
    assert after == {b"s"}
    skipped = Grammar.from_choices(["yes", "no"]).in_answer(" <think>\n</think")
    after, _ = world(skipped, *tokenizer.encode(">\n"))
    assert after == {b"y", b"n", b"ye", b"no", b"yes"}


def sentencepiece() -> HFTokenizer:
    """Bytes and some pieces, with a space put in front of every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁eynos", "▁y", "es", "yes", "▁yes"]
    backend = Tokenizer(BPE({x: i for i, x in enumerate(pieces)}, [("e", "s"), ("y", "es")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return HFTokenizer("sentencepiece.json", backend.to_str())


def test_sentencepiece():
    found = sentencepiece()
    matcher = Grammar.from_regex("(a|b)yes no").matcher(found, found.vocab_size)
    matcher.consume(3 + ord("b"))
    forced = matcher.forced()
    assert found.decode(forced) == "yes no"
    for token in forced:
        matcher.consume(token)
    assert matcher.ended
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match=r"^llguidance does not know this kind of tokenizer\.json: .*decoder"):
        Grammar.from_regex("a").matcher(HFTokenizer("words.json", words.to_str()), 2)


@pytest.mark.parametrize("tokenizer", ["bundled", "unknown"])
def test_other_tokenizers(tokenizer, scripted):
    """A tokenizer.json, and any tokenizer that has only the methods of `Tokenizer`."""
    found = load_tokenizer("bundled") if tokenizer == "bundled" else scripted(["yes", "no", "é"])[1]
    matcher = Grammar.from_regex("yes|no|én").matcher(found, found.vocab_size + 3)
    texts = {found.decode([i]) for i in matcher.allowed().nonzero()[:, 0].tolist()}
    assert {"y", "n"} <= texts
    assert not matcher.allowed()[-3:].any()
    for token in found.encode("yes"):
        matcher.consume(token)
    assert matcher.ended
    assert token_table(found) is token_table(found)


def test_the_end(scripted):
    """The text ends as soon as the grammar allows nothing more, or by an end of text where it may end."""
    model, tokenizer = scripted(["4", "2", "0", "0"])
    llm = LLM(model, tokenizer=tokenizer)
    done = llm.generate("Assistant:", 9, regex="[0-9]{3}", temperature=0)
    assert (done.text, done.finish_reason, len(done.token_ids)) == ("420", "stop", 3)
    exactly = llm.generate("Assistant:", 3, regex="[0-9]{3}", temperature=0)
    assert exactly.finish_reason == "stop"
    cut = llm.generate("Assistant:", 2, regex="[0-9]{3}", temperature=0)
    assert (cut.text, cut.finish_reason) == ("42", "length")
    # the model ends after four digits; where it may not, it goes on with what is allowed
    assert llm.generate("Assistant:", 9, regex="[0-9]+", temperature=0).text == "4200"
    more = llm.generate("Assistant:", 9, regex="[0-9]{6,}", temperature=0)
    assert (len(more.token_ids), more.finish_reason) == (6, "stop")
    assert llm.generate("Assistant:", 8, regex="[0-9]+", temperature=0, min_tokens=7).finish_reason == "stop"
    assert len(llm.generate("Assistant:", 8, regex="[0-9]+", temperature=0, min_tokens=7).token_ids) == 7
    assert len(llm.generate("Assistant:", 9, regex="[0-9]{3}", temperature=0, min_tokens=7).token_ids) == 3
    on = llm.generate("Assistant:", 8, regex="[0-9]+", temperature=0, ignore_eos=True)
    assert (len(on.token_ids), on.finish_reason) == (8, "length")
    two = llm.generate("Assistant:", 8, regex="[0-9]+", temperature=0, stop_token_ids=[ord("2")])
    assert (two.text, two.finish_reason) == ("4", "stop")
    assert llm.generate("Assistant:", 8, regex="[0-9]+", temperature=0, stop="20").text == "4"


def test_after_bias_and_with_a_mask(llm):
    """The grammar comes after penalties and bias; with a mask, both must allow a token."""
    assert llm.generate("a", 1, choices=["x", "y"], logit_bias={ord("z"): 100, ord("y"): 50}).text == "y"
    no_x = torch.ones(256, dtype=torch.bool)
    no_x[ord("x")] = False
    assert llm.generate("a", 9, choices=["xa", "ya"], mask=lambda ids: no_x, temperature=0).text == "ya"
    with pytest.raises(InputError, match="no token is left to choose"):
        llm.generate("a", 9, choices=["xa", "xb"], mask=lambda ids: no_x)
    with pytest.raises(InputError, match="no token is left to choose"):
        llm.generate("a", 9, choices=["xa", "xb"], logit_bias={ord("x"): -float("inf")})


def test_penalties_count_forced_tokens(llm):
    """After "aaaa|" the letter that was forced is as improbable as one that was drawn."""
    grammar = r"aaaa\|(a|b)"
    assert llm.generate("x", 9, regex=grammar, presence_penalty=1e6, temperature=0).text == "aaaa|b"
    assert llm.generate("x", 9, regex=grammar, repetition_penalty=1e6, logit_bias={98: 0.0}, temperature=0).token_ids


def test_log_probabilities(llm, model):
    """Each forced token has one, by the model alone."""
    completion = llm.generate("xy", 30, regex="ABCDEFGH[0-9]", seed=1, logprobs=True, top_logprobs=2)
    assert [x.token_id for x in completion.logprobs] == completion.token_ids
    with torch.inference_mode():
        logits, _ = model(torch.tensor([list(b"xy") + completion.token_ids]))
    expected = logits[0].log_softmax(-1)
    for i, found in enumerate(completion.logprobs):
        assert found.logprob == pytest.approx(float(expected[1 + i, found.token_id]), abs=1e-4)
        assert len(found.top_logprobs) == 2
    plain = llm.generate("xy", 30, regex="ABCDEFGH[0-9]", seed=1)
    assert plain.token_ids == completion.token_ids


def test_alone_in_a_batch_and_streamed(llm):
    prompts = ["a", "once", "b" * 70]
    together = llm.generate(prompts, 120, n=2, seed=5, schema=PERSON, logprobs=True)
    for prompt, both in zip(prompts, together, strict=True):
        for j, completion in enumerate(both):
            alone = llm.generate(prompt, 120, seed=5 + j, schema=PERSON, logprobs=True)
            assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)
            pieces = list(llm.generate(prompt, 120, seed=5 + j, schema=PERSON, stream=True))
            assert "".join(x.text for x in pieces) == completion.text
            assert [x for piece in pieces for x in piece.token_ids] == completion.token_ids
            assert pieces[-1].finish_reason == completion.finish_reason


def test_a_stop_within_forced_text(llm):
    """The state is that after the last token handed out, and text goes on from there."""
    completion = llm.generate("xy", 30, regex="[0-9]ABCDEFGH", seed=1, stop="DE")
    assert completion.text[1:] == "ABC"
    assert completion.text + "DE" == bytes(completion.token_ids).decode()
    read = llm.state(completion.token_ids, llm.state("xy"))
    for x, y in zip(completion.state.tensors(), read.tensors(), strict=True):
        assert (x - y).abs().max() < 1e-4


def test_chat(llm):
    """The answer without white space around it; one that was cut off goes on within the grammar."""
    question = [{"role": "user", "content": "Who?"}]
    answer = llm.chat(question, 90, choices=["Bo", "Al"], seed=1)
    assert answer.text in ("Bo", "Al")
    assert answer.finish_reason == "stop"
    begun = [*question, {"role": "assistant", "content": '{"name":"Q'}]
    rest = llm.chat(begun, 90, schema=PERSON, seed=1)
    assert json.loads('{"name":"Q' + rest.text)["name"].startswith("Q")
    chat = llm.chat()
    first = chat.say("Who?", 12, schema=PERSON, seed=1)
    assert first.finish_reason == "length"
    assert chat.go_on(90, schema=PERSON, seed=2).finish_reason == "stop"
    assert set(json.loads(chat.messages[-1]["content"])) == {"name", "age"}
    assert chat.go_on(90, schema=PERSON).text == ""
    chat.say("And?", 90, choices=["Bo", "Al"], seed=3)
    assert chat.messages[-1]["content"] in ("Bo", "Al")


def test_chat_with_a_thought(llm):
    chat = llm.chat(template="g1-think")
    chat.say("Who?", 40, choices=["Bo", "Al"], beginning="<think>Hm.</think>", seed=1)
    assert chat.messages[-1]["content"] in (
        "<think>Hm.</think>Bo",
        "<think>Hm.</think>\nBo",
        "<think>Hm.</think> Bo",
    ) or (chat.messages[-1]["content"].endswith("Al"))
    thinking = llm.chat(template="g1-think").say("Who?", 40, choices=["Bo", "Al"], seed=1)
    assert thinking.finish_reason == "length"  # a random model thinks on and on
    assert not thinking.text.startswith(("Bo", "Al"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"not": {}}}, 'schema: Unimplemented keys: ["not"]'),
        ({"schema": {"type": "objekt"}}, "schema: Invalid type: objekt"),
        ({"schema": {"type": "string", "format": "zzz"}}, "schema: Unknown format: zzz"),
        ({"schema": {"$ref": "#/x"}}, "schema: Pointer '/x' does not exist"),
        (
            {"schema": "{"},
            "schema is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ({"schema": "[1]"}, "schema must be a JSON Schema, as a dict or its JSON, or True, got [1]"),
        ({"schema": False}, "schema must be a JSON Schema, as a dict or its JSON, or True, got False"),
        ({"schema": {"enum": {1}}}, "schema is not JSON: Object of type set is not JSON serializable"),
        ({"schema": {"x": -1, "y": {"z": object}}}, "schema is not JSON: Object of type type is not JSON serializable"),
        ({"regex": "("}, 'regex: invalid regex "(" (in regex): regex parse error: ( error: unclosed group'),
        ({"regex": 3}, "regex must be a text, got 3"),
        ({"regex": "a" * 70000}, "regex has 70,000 characters; at most 65,536 are taken"),
        ({"regex": "\ud800"}, "the text has a lone surrogate at character 0; expected valid Unicode"),
        ({"choices": "yes"}, "choices must be a list of texts, none of them empty, got 'yes'"),
        ({"choices": []}, "choices must be a list of texts, none of them empty, got []"),
        ({"choices": ["a", 1]}, "choices must be a list of texts, got ['a', 1]"),
        ({"grammar": "strt: /a/"}, "grammar: no start rule found"),
        ({"grammar": "start: a\na: a"}, "there is no text that the grammar allows"),
        ({"grammar": 'root ::= ("a"'}, "grammar: Expected ')' at line 1, 'root ::= (\"a\"' ^ ''"),
        ({"grammar": "root ::= foo"}, "grammar: Rule 'foo' not found"),
        ({"grammar": 'Root ::= "a"'}, "grammar: No 'root' rule found"),
        ({"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000}, "grammar is nested too deeply"),
        ({"grammar": 5}, "grammar must be a text, got 5"),
        ({"grammar": "start: /a/", "regex": "a"}, "give one of schema, regex, choices, grammar, not regex and grammar"),
    ],
)
def test_bad_grammars(llm, options, message):
    with pytest.raises(InputError) as caught:
        llm.generate("a", 5, **options)
    assert str(caught.value) == message
    with pytest.raises(InputError):
        llm.chat().say("a", 5, stream=True, **options)  # before the stream is read


def test_what_would_cost_too_much(llm):
    """A text whose grammar turns out to be too much for the library ends with an error, soon."""
    doubling = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"'
    for options in ({"grammar": doubling}, {"regex": "((((a{1000}){1000}){1000}){1000}){1000}"}):
        with pytest.raises(InputError, match=r"^the grammar cannot be followed any further: ") as caught:
            llm.generate("a", 5000, **options)
        assert "\n" not in str(caught.value)


def chain(length: int) -> str:
    """Rules that each name the next one."""
    return f"start: r{0:05}\n" + "".join(f"r{i:05}:r{i + 1:05}\n" for i in range(length)) + f'r{length:05}:"x"'


def test_rules_within_rules(llm):
    """The longest chain that fits: the library follows it by recursion, and on a usual stack it ended the process."""
    text = chain((LARGEST["grammar"] - 40) // 14)
    assert len(text) > LARGEST["grammar"] - 60
    assert llm.generate("a", 5, grammar=text).text == "x"
    length = (LARGEST["schema"] - 200) // 39
    links = {f"r{i:05}": {"$ref": f"#/$defs/r{i + 1:05}"} for i in range(length)}
    definitions = {**links, f"r{length:05}": {"const": 7}}
    assert llm.generate("a", 5, schema={"$ref": "#/$defs/r00000", "$defs": definitions}, seed=1).text.strip() == "7"


def test_without_llguidance(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    token_table.cache_clear()
    with pytest.raises(InputError, match=r"^constrained texts need llguidance: pip install 'heronry\[serve\]'$"):
        llm.generate("a", 5, regex="a")
    assert len(llm.generate("a", 5).token_ids) == 5
