"""Rows in the shapes that people have: the ids and the mask of each, written out by hand, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry import InputError
from heronry.data import encoding
from heronry.data import json_items as json_module
from heronry.data import tokenize_corpus as corpus
from heronry.data.json_items import json_items
from heronry.data.rows import SHAPES, PromptCompletion, read_row
from heronry.data.sources import find_sources, read_records
from heronry.data.text_files import TextFile
from heronry.data.token_file import TokenFile
from heronry.data.tokenize_corpus import tokenize_corpus

# what the template world makes of "Hi" and "Yo", with bytes as tokens: the loss counts the answer and the stop text
ONE_TURN = ("User: Hi\n\nAssistant:", " Yo\n\nUser:")
WITH_SYSTEM = ("Be kind\n\nUser: Hi\n\nAssistant:", " Yo\n\nUser:")
TWO_TURNS = ("User: Hi\n\nAssistant:", " Yo\n\nUser:", " So?\n\nAssistant:", " Good\n\nUser:")
SAID = [("user", "Hi"), ("assistant", "Yo"), ("user", "So?"), ("assistant", "Good")]


def sharegpt(*said: tuple[str, str], names: tuple[str, str] = ("human", "gpt")) -> list[dict]:
    spelling = {"user": names[0], "assistant": names[1]}
    return [{"from": spelling.get(role, role), "value": text} for role, text in said]


def openai(*said: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in said]


ROWS = {
    "messages": ({"messages": openai(*SAID)}, TWO_TURNS),
    "messages, with a system text": ({"messages": openai(("system", "Be kind"), *SAID[:2])}, WITH_SYSTEM),
    "messages of a developer": ({"messages": openai(("developer", "Be kind"), *SAID[:2])}, WITH_SYSTEM),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]}
        | {"tools": []}
        | {"id": 7},
        None,
    ),
    "messages of a table, with nothing in the columns of others": (
        {
            "messages": [
                {"role": "user", "content": "Hi", "tool_calls": None, "weight": None},
                {"role": "assistant", "content": [{"type": "text", "text": "Yo"}], "tool_calls": [], "weight": 1},
            ],
            "text": None,
            "tools": "[]",
        },
        ONE_TURN,
    ),
    "messages, the first answer not learned": (
        {"messages": [*openai(SAID[0]), {"role": "assistant", "content": "Yo", "weight": 0}, *openai(*SAID[2:])]},
        ("User: Hi\n\nAssistant: Yo\n\nUser: So?\n\nAssistant:", " Good\n\nUser:"),
    ),
    "sharegpt": ({"conversations": sharegpt(*SAID), "id": "identity_0"}, TWO_TURNS),
    "sharegpt, other names": ({"conversation": sharegpt(*SAID, names=("user", "chatgpt"))}, TWO_TURNS),
    "sharegpt, a system text": ({"conversations": sharegpt(("system", "Be kind"), *SAID[:2])}, WITH_SYSTEM),
    "sharegpt, a system field": ({"conversations": sharegpt(*SAID[:2]), "system": "Be kind"}, WITH_SYSTEM),
    "sharegpt with the keys of openai": ({"conversations": openai(*SAID[:2]), "system": ""}, ONE_TURN),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Yo"}, ONE_TURN),
    "alpaca with an input": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        ("User: Add\n1 2\n\nAssistant:", " 3\n\nUser:"),
    ),
    "alpaca with a history": (
        {"instruction": "So?", "input": None, "output": "Good", "history": [["Hi", "Yo"]], "system": None},
        TWO_TURNS,
    ),
    "dolly": (
        {"instruction": "Who?", "context": "A heron.", "response": "A heron", "category": "closed_qa"},
        ("User: Who?\nA heron.\n\nAssistant:", " A heron\n\nUser:"),
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Yo"}, ONE_TURN),
    "prompt and completion as messages": (
        {"prompt": openai(*SAID[:3]), "completion": openai(SAID[3])},
        ("User: Hi\n\nAssistant: Yo\n\nUser: So?\n\nAssistant:", " Good\n\nUser:"),
    ),
    "prompt and response": ({"prompt": "Hi", "response": "Yo"}, ONE_TURN),
    "gsm8k": ({"question": "Hi", "answer": "Yo"}, ONE_TURN),
    "metamath": ({"query": "Hi", "response": "Yo", "type": "x"}, ONE_TURN),
    "openorca": ({"system_prompt": "Be kind", "question": "Hi", "response": "Yo"}, WITH_SYSTEM),
}
ROWS["messages in parts"][0]["messages"] += openai(("assistant", "Yo"))
ROWS["messages in parts"] = (ROWS["messages in parts"][0], ONE_TURN)


def expected(parts: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The ids and the mask of texts of which every second one counts."""
    ids = [byte for part in parts for byte in part.encode()]
    return ids, [i % 2 for i, part in enumerate(parts) for _ in part.encode()]


def tokens(source: Path, tmp_path: Path, **options) -> list[tuple[list[int], list[int]]]:
    """The ids and the mask of every document of a source."""
    tokenize_corpus([str(source)], tmp_path / "made", "bytes", restart=True, **options)
    file = TokenFile(tmp_path / "made")
    mask = [1] * len(file.tokens) if file.mask is None else file.mask.tolist()
    return [(file.document(d).tolist(), mask[file.offsets[d] : file.offsets[d + 1]]) for d in range(len(file))]


@pytest.mark.parametrize("name", ROWS)
def test_every_shape_has_the_ids_written_by_hand(name, tmp_path):
    row, parts = ROWS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert tokens(tmp_path / "a.jsonl", tmp_path, template="world") == [expected(parts)]
    (tmp_path / "a.json").write_text(json.dumps([row], indent=2))
    assert tokens(tmp_path / "a.json", tmp_path, template="world") == [expected(parts)]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("alpaca", ("### Instruction: Add\n### Input: 1 2\n### Response:", " 3\n\n### Instruction:")),
        ("instruction", ("Instruction: Add\n\nInput: 1 2\n\nResponse:", " 3\n\nInstruction:")),
        (
            "raven-alpaca",
            (
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "# Instruction:\nAdd\n\n# Input:\n1 2\n\n# Response:\n",
                "3\n\nBelow is an instruction that describes a task",
            ),
        ),
        ("qa", ("Question: Add\n1 2\n\nAnswer:", " 3\n\nQuestion:")),
        ("Q: {user}\nA:", ("Q: Add\n1 2\nA:", " 3\nQ:")),
        ("mine.jinja", ("<Add\n1 2>", "(3)<")),
    ],
)
def test_the_places_of_an_instruction_and_its_input(template, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jinja = (
        "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>"
        "{% else %}({{ m.content }}){% endif %}{% endfor %}"
    )
    Path("mine.jinja").write_text(jinja)
    Path("a.jsonl").write_text('{"instruction": "Add", "input": "1 2", "output": "3"}\n')
    assert tokens(Path("a.jsonl"), tmp_path, template=template) == [expected(parts)]
    kept = jinja if template == "mine.jinja" else template  # models know the template without the file
    assert TokenFile(tmp_path / "made").notes["chat_template"] == kept


def test_a_damaged_template_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for %}")
    (tmp_path / "a.jsonl").write_text("not JSON\n")
    with pytest.raises(InputError, match=r"mine\.jinja: line 1: Expected"):
        tokens(tmp_path / "a.jsonl", tmp_path, template=str(tmp_path / "mine.jinja"), skip_bad=True)


def test_tables_and_data_sets_of_every_shape(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    for i, (row, parts) in enumerate(ROWS.values()):
        if any(isinstance(message.get("content"), list) for message in row.get("messages", [])):
            continue  # strings and lists in one column are no table
        table = pyarrow.Table.from_pylist([row, row])
        parquet.write_table(table, tmp_path / "a.parquet")
        datasets.Dataset(table).save_to_disk(tmp_path / f"set{i}")
        for source in ("a.parquet", f"set{i}"):
            assert tokens(tmp_path / source, tmp_path, template="world") == [expected(parts)] * 2, row


def test_a_prompt_without_a_template_is_the_beginning_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n{"text": "three"}\n')
    assert tokens(tmp_path / "a.jsonl", tmp_path) == [expected(("1 + 1 =", " 2")), expected(("", "three"))]
    tokenize_corpus([str(tmp_path / "a.jsonl")], tmp_path / "w", "world")
    file = TokenFile(tmp_path / "w")
    assert (file.document(0)[-1], file.mask[len(file.document(0)) - 1]) == (0, 1)  # the end of text counts


def test_an_answer_that_does_not_count_ends_in_an_end_that_does_not(tmp_path):
    talk = [*openai(*SAID[:3]), {"role": "assistant", "content": "Good", "weight": 0}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    tokenize_corpus([str(tmp_path / "a.jsonl")], tmp_path / "w", "world", template="world")
    file = TokenFile(tmp_path / "w")
    assert (file.tokens[-1], file.mask[-1]) == (0, 0)


def test_a_thought_comes_before_its_answer():
    row = {"messages": [*openai(SAID[0]), {"role": "assistant", "content": "Yo", "reasoning_content": "Hm."}]}
    assert read_row(row) == openai(SAID[0], ("assistant", "<think>Hm.</think>\nYo"))


PAIR = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
WHOLE = {"prompt": "Hi", "chosen": openai(*SAID[:2]), "rejected": openai(SAID[0], ("assistant", "No"))}
REFUSED = [
    ([1], {}, "not a JSON object"),
    ({}, {}, "does not have a known shape (no keys); name the field of its text with --key"),
    ({"body": "x", "id": 1}, {}, "does not have a known shape (keys: 'body', 'id')"),
    ({"text": None}, {}, "does not have a known shape (no keys)"),
    ({"text": "x"}, {"shape": "alpaca"}, "has the shape text, not alpaca (keys: 'text')"),
    ({"body": "x"}, {"shape": "alpaca"}, "does not have the shape alpaca (keys: 'body')"),
    ({"text": "x"}, {"key": "body"}, "has no 'body' (keys: 'text')"),
    ({"body": 3}, {"key": "body"}, "'body' is neither a string nor a list of messages"),
    (
        {"instruction": "a", "input": "b", "output": "c", "text": "d"},
        {},
        "can be read as text or alpaca (keys: 'instruction', 'input', 'output', 'text'); choose one with --shape",
    ),
    (
        {"prompt": "a", "question": "b", "response": "c"},
        {},
        "can be read as question-answer in two ways (keys: 'prompt', 'question', 'response'); rename or remove a field",
    ),
    (PAIR, {}, "is preference data, for which there is no training yet; --shape chosen reads the chosen answer"),
    (
        {"prompt": "a", "completion": "b", "label": False},
        {},
        "is preference data, for which there is no training yet; --shape prompt-completion reads all answers alike",
    ),
    (
        {"messages": openai(*SAID), "tools": [{"type": "function"}]},
        {},
        "has tools, which no chat template here renders",
    ),
    ({"conversations": sharegpt(*SAID), "tools": '[{"name": "f"}]'}, {}, "has tools, which"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        {},
        "has tool calls or their results, which no chat template here renders (messages[0])",
    ),
    ({"messages": openai(SAID[0], ("tool", "3"))}, {}, "has tool calls or their results"),
    ({"conversations": sharegpt(SAID[0], ("function_call", "{}"))}, {}, "has tool calls or their results"),
    ({"conversations": sharegpt(SAID[0], ("narrator", "x"))}, {}, "unknown role 'narrator' (conversations[1])"),
    ({"messages": [{"content": "x"}]}, {}, "a message has no role (messages[0])"),
    ({"messages": []}, {}, "'messages' has no messages"),
    ({"conversations": [], "system": "Be kind."}, {}, "'conversations' has no messages"),
    ({"messages": [{"role": "user", "content": None}]}, {}, "a message has no text (messages[0])"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {},
        "a message has a part of type 'image_url', where only text can be read (messages[0].content[0])",
    ),
    ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, {}, "the weight of a message must be 0 or 1"),
    ({"messages": "Hi there", "conversations": []}, {}, "can be read as messages or sharegpt"),
    ({"messages": openai(("system", "a"), *SAID), "system": "b"}, {}, "has several system texts"),
    ({"instruction": "a", "output": ["b"]}, {}, "a message has"),
    ({"instruction": 1, "output": "b"}, {}, "'instruction' is not a string"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, {}, "'history' is not a list of pairs of strings"),
]


@pytest.mark.parametrize(("row", "options", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(row, options, message, tmp_path):
    if message == "a message has":  # a list where a string is wanted
        message = "'output' is neither a string nor a list of messages"
    with pytest.raises(InputError) as refusal:
        read_row(row, **options)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("row", "options", "content"),
    [
        ({"instruction": "a", "output": "c", "text": "d"}, {"shape": "text"}, "d"),
        ({"instruction": "a", "output": "c", "text": "d"}, {"key": "instruction"}, "a"),
        (PAIR, {"shape": "chosen"}, PromptCompletion("Hi", "Yo")),
        ({**PAIR, "chosen": "HiYo", "rejected": "HiNo"}, {"shape": "chosen"}, "HiYo"),
        ({**PAIR, "chosen": "Hi there"}, {"shape": "chosen"}, PromptCompletion("Hi", "Hi there")),
        (WHOLE, {"shape": "chosen"}, openai(*SAID[:2])),
        ({"chosen": "a", "rejected": "b"}, {"shape": "chosen"}, "a"),
        ({"question": "Hi", "chosen": "Yo", "rejected": "No"}, {"shape": "chosen"}, openai(*SAID[:2])),
        ({"prompt": "a", "completion": "b", "label": True}, {"shape": "prompt-completion"}, PromptCompletion("a", "b")),
    ],
)
def test_what_is_meant_can_be_said(row, options, content):
    assert read_row(row, **options) == content


def test_options_that_cannot_be(tmp_path, command):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    words = ("data", tmp_path / "a.jsonl", "-o", tmp_path / "x", "--tokenizer", "bytes")
    code, _, message = command(*words, "--shape", "alpacca")
    assert (code, message) == (2, "heronry: unknown shape 'alpacca'; did you mean 'alpaca'?\n")
    code, _, message = command(*words, "--shape", "text", "--key", "text")
    assert (code, "cannot be combined with --shape" in message) == (2, True)
    shown = " ".join(command("data", "--help")[1].replace("│", " ").split())
    assert all(shape in shown for shape in SHAPES)


# ---- bad rows ----------------------------------------------------------------------------------------------------

BAD = [
    b'{"text": "one"}',
    b'{"text": ',
    b'{"text": "\xff"}',
    b'{"story": "x"}',
    b'{"story": "y", "id": 2}',
    b'{"text": "\\ud800"}',
    b'{"messages": [{"role": "user", "content": "Hi"}]}',
    b"[1]",
    b'{"text": "two"}',
]


def test_bad_rows_stop_a_run_or_are_skipped_counted_and_named(tmp_path, command):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(BAD))
    words = ("data", source, "-o", tmp_path / "x", "--tokenizer", "bytes", "--template", "world")
    code, _, message = command(*words)
    assert code == 2
    assert message == f"heronry: {source}, line 2: not JSON (Expecting value at character 11)\n"
    code, printed, message = command(*words, "--skip-bad")
    assert (code, printed) == (0, "")
    reasons = {
        "not JSON": 1,
        "is not UTF-8": 1,
        "does not have a known shape; name the field of its text with --key": 2,
        "the text has a lone surrogate at character N; expected valid Unicode": 1,
        "the messages do not alternate between user and assistant": 1,
        "not a JSON object": 1,
    }
    lines = message.splitlines()
    assert lines[0].startswith(f"{tmp_path}/x: 2 documents, 6 tokens of ")
    assert (
        lines[1]
        == "skipped 7 bad rows: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) + "; the first:"
    )
    assert lines[2] == f"  {source}, line 2: not JSON (Expecting value at character 11)"
    assert len(lines) == 7
    about = json.loads((tmp_path / "x.json").read_text())
    assert about["skipped"]["rows"] == 7
    assert about["skipped"]["reasons"] == reasons
    assert [line.strip() for line in lines[2:]] == about["skipped"]["first"]
    assert TokenFile(tmp_path / "x").tokens.tobytes() == "".join("onetwo").encode("utf-16-le")
    # no row at all is no token file
    source.write_bytes(b"[1]\n")
    code, _, message = command(*words, "--skip-bad", "--restart")
    assert (code, message.count("\n")) == (2, 1)
    assert f"0 documents besides 1 bad row, the first {source}, line 1: not a JSON object" in message


def test_skipped_rows_are_counted_once_by_any_number_of_workers_stopped_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 40)
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(BAD * 20))
    options = {"template": "world", "skip_bad": True, "holdout": 0.25}
    whole = tokenize_corpus([str(source)], tmp_path / "whole", "bytes", **options)
    assert (whole.documents, whole.skipped.rows) == (40, 140)

    def stop(n_bytes, progress):
        if progress.documents % 3 == 2 and progress.documents > stopped_at[-1]:
            stopped_at.append(progress.documents)
            raise KeyboardInterrupt

    stopped_at = [0]
    while True:
        try:
            parts = tokenize_corpus([str(source)], tmp_path / "parts", "bytes", **options, on_progress=stop)
            break
        except KeyboardInterrupt:
            pass
    assert len(stopped_at) > 3
    assert parts == whole
    monkeypatch.setattr(corpus, "SMALL", 0)
    assert tokenize_corpus([str(source)], tmp_path / "many", "bytes", **options, workers=2) == whole
    for suffix in (".bin", ".idx", ".json", "-eval.bin", "-eval.json"):
        made = [(tmp_path / f"{name}{suffix}").read_bytes() for name in ("whole", "parts", "many")]
        assert made[0] == made[1] == made[2], suffix


# ---- JSON arrays -------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(st.lists(VALUES, max_size=12), st.sampled_from([None, 2]), st.booleans(), st.integers(1, 9), st.booleans())
def test_the_values_of_an_array_are_those_that_json_reads(tmp_path_factory, values, indent, escaped, block, array):
    file = tmp_path_factory.getbasetemp() / "values.json"
    texts = [json.dumps(value, indent=indent, ensure_ascii=escaped) for value in values]
    whole = json.dumps(values, indent=indent, ensure_ascii=escaped) if array else "\n".join([*texts, ""])
    if not array and texts and texts[0].startswith("["):
        return  # that is an array
    file.write_bytes(whole.encode("utf-8", "surrogatepass"))
    before, json_module.BLOCK = json_module.BLOCK, block
    try:
        with TextFile(file) as text:
            items = list(json_items(text, False))
        assert [json.loads(item.text.decode("utf-8", "surrogatepass")) for item in items] == values
        for i, item in enumerate(items):
            begins = file.read_bytes()[: item.end - len(item.text)]
            assert item.line == begins.count(b"\n") + 1
            with TextFile(file, item.end) as text:
                assert list(json_items(text, True)) == items[i + 1 :]
    finally:
        json_module.BLOCK = before


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_an_array_is_read_from_any_place(compress, tmp_path):
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[compress]
    file = tmp_path / f"a.json{suffix}"
    rows = [{"text": f'{{[ \\ " {i} 鳥'} for i in range(300)]
    file.write_bytes(compress(b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode()))
    found = find_sources([str(tmp_path)])
    records = list(read_records(found))
    assert [record.content for record in records] == [row["text"] for row in rows]
    assert records[2].location == f"{file}, item 3 (line 8)"
    for i in range(0, 300, 37):
        assert list(read_records(found, start=records[i].position)) == records[i + 1 :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}', "line 1: not JSON (the file ends inside the array)"),
        ('[{"text": "a"},\n{"text": "b"', "line 2: not JSON (the file ends inside a value)"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: not JSON (expected ',' or ']', got '{')"),
        ('[{"text": "a"},]', "line 1: not JSON (expected a value, got ']')"),
        ('[{"text": "a"}] x', "line 1: not JSON ('x' behind the array)"),
        ('[\n{"text": "a"},\n{"text": a}]', "item 2 (line 3): not JSON (Expecting value at character 10)"),
        ('[{"text": "a"}, 7]', "item 2 (line 1): not a JSON object"),
        ('{"data": [{"text": "a"}]}', "item 1 (line 1): does not have a known shape (keys: 'data')"),
        ('[{"text": "a]}', "line 1: not JSON (the file ends inside a value)"),
    ],
)
def test_an_array_that_is_none(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as refusal:
        list(read_records(find_sources([str(tmp_path / "a.json")])))
    assert str(refusal.value).startswith(f"{tmp_path / 'a.json'}, {message}")


def test_a_value_without_an_end_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_module, "MAX_VALUE", 1 << 20)
    (tmp_path / "a.json").write_text('[{"text": "a",' + '{"text": "b"},' * 200_000)
    with pytest.raises(InputError, match=r"a.json, line 1: not JSON \(a value does not end within 1 MiB\)"):
        list(read_records(find_sources([str(tmp_path / "a.json")])))


def test_a_folder_gives_its_arrays_and_not_its_settings(tmp_path):
    (tmp_path / "a.json").write_text(' [{"text": "a"}]')
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert [record.content for record in read_records(find_sources([str(tmp_path)]))] == ["a", "b"]
    (tmp_path / "lines.json").write_text('{"text": "c"}\n{"text": "d"}\n')
    assert [record.content for record in read_records(find_sources([str(tmp_path / "lines.json")]))] == ["c", "d"]
