"""`heronry data` as a user meets it: every kind of source, stopped on its way, conversations that a chat can use."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from heronry import LLM, RWKV7, InputError
from heronry.data import encoding, sources
from heronry.data import tokenize_corpus as corpus
from heronry.data.batching import DocumentSampler, collate
from heronry.data.token_file import TokenFile
from heronry.data.tokenize_corpus import tokenize_corpus
from heronry.engine.llm import BUNDLED
from heronry.models import RWKV7Config
from heronry.text.chat_templates import TEMPLATES
from heronry.text.conversations import encode_conversation, render_conversation
from heronry.text.tokenizers import load_tokenizer

ENDINGS = (".bin", ".idx", ".mask", ".json")
TALK = [
    {"role": "user", "content": "Hi,\n\nwho are you?"},
    {"role": "assistant", "content": "A rook.\n\nAnd you?"},
    {"role": "user", "content": "A crow."},
    {"role": "assistant", "content": "Hello, crow!"},
]


def texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    vocabulary = ["rook", "crow", "nest", "grey", "élan", "鳥", "said.", "Then\nit", "\n\n", "flew", "", "away"]
    return ["A " + " ".join(source.choices(vocabulary, k=source.randint(1, 2 * words))) for _ in range(count)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def contents(prefix: Path) -> dict[str, bytes]:
    """The files of a prefix, without the name of their folder."""
    found = {ending: prefix.with_name(prefix.name + ending) for ending in ENDINGS}
    return {ending: path.read_bytes() for ending, path in found.items() if path.is_file()}


def decoded(prefix: Path, tokenizer: str = "bytes") -> list[str]:
    file, known = TokenFile(prefix), load_tokenizer(tokenizer)
    return [known.decode(file.document(d).tolist()) for d in range(len(file))]


def test_lines_folders_and_globs(tmp_path, command):
    written = texts(40)
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    write_lines(folder / "a.jsonl", [{"text": text, "body": "x"} for text in written[:10]])
    write_lines(folder / "b.jsonl.gz", [{"text": text} for text in [*written[10:20], ""]])  # "" is no document
    (folder / "inner" / "c.txt").write_text(written[20], encoding="utf-8")
    (folder / "readme.md").write_text("not a source")
    with open(folder / "a.jsonl", "a") as file:
        file.write("\n  \n")
    out = tmp_path / "made" / "x"
    code, printed, message = command("data", folder, "-o", out, "--tokenizer", "bytes")
    assert (code, printed) == (0, "")
    size = sum(path.stat().st_size for path in folder.rglob("*.*") if path.suffix != ".md")
    tokens = sum(len(text.encode()) for text in written[:21])
    assert f"21 documents, {tokens:,} tokens of {size:,} bytes on disk, " in message
    assert "tokens/s" in message
    assert decoded(out) == written[:21]
    about = json.loads(out.with_name("x.json").read_text())
    assert (about["tokenizer"], about["vocab_size"], about["end_of_text"]) == ("bytes", 256, None)
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.bin", "x.idx", "x.json"]
    command("data", folder / "*.jsonl", folder / "**/*.txt", "-o", tmp_path / "y", "--tokenizer", "bytes")
    assert decoded(tmp_path / "y") == written[:10] + written[20:21]
    command("data", folder / "a.jsonl", "-o", tmp_path / "z", "--tokenizer", "bytes", "--key", "body")
    assert decoded(tmp_path / "z") == ["x"] * 10


def test_parquet_and_data_sets(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    written = texts(700, 10)
    table = pyarrow.table({"number": list(range(700)), "text": written})
    (tmp_path / "hub").mkdir()
    parquet.write_table(table, tmp_path / "hub" / "train.parquet", row_group_size=300)
    datasets.Dataset(table).save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "dict")
    talks = pyarrow.table({"messages": [TALK, TALK[:2]]})
    parquet.write_table(talks, tmp_path / "talks.parquet")
    datasets.Dataset(talks).save_to_disk(tmp_path / "talks")
    names = [
        str(tmp_path / "hub/train.parquet"),
        str(tmp_path / "set"),
        str(tmp_path / "dict"),
        f"hf://{tmp_path}/hub:train",
    ]
    for name in names:
        found = sources.find_sources([name])
        records = list(sources.read_records(found))
        assert [record.content for record in records] == written
        for at in (0, 255, 299, 300, 650, 699):  # and from every place
            rest = list(sources.read_records(found, start=records[at].position))
            assert rest == records[at + 1 :]
    for name in ("talks.parquet", "talks"):
        assert [record.content for record in sources.read_records(sources.find_sources([str(tmp_path / name)]))] == [
            TALK,
            TALK[:2],
        ]
    with pytest.raises(InputError, match=r"train.parquet: has no column 'words'; its columns are number, text"):
        list(sources.read_records(sources.find_sources(names[:1]), sources.Rows("words")))
    with pytest.raises(InputError, match=r"^hf://.*nowhere"):
        list(sources.read_records(sources.find_sources([f"hf://{tmp_path}/nowhere"])))
    for module, name, package in (("pyarrow", names[0], r"'heronry\[train\]'"), ("datasets", names[1], "datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=f"pip install {package}"):
            list(sources.read_records(sources.find_sources([name])))


def test_a_connection_to_the_hub_that_is_lost(monkeypatch):
    """huggingface_hub has tried again in silence; datasets would do all of that 20 times, aloud."""
    datasets = pytest.importorskip("datasets")
    seen = []

    class Table:
        def skip(self, number):
            return self

        def __iter__(self):
            yield {"text": "A rook."}
            config = datasets.config
            seen.append((config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL))
            seen.append(logging.getLogger("datasets").level)
            raise ConnectionError("Server Disconnected")

    before = dict(vars(datasets.config))
    monkeypatch.setattr(sources.hub, "load_dataset", lambda name, streaming: Table())
    records = sources.read_records(sources.find_sources(["hf://a/b"]))
    assert next(records).content == "A rook."
    message = "hf://a/b: the connection to the hub was lost; try the same command again"
    with pytest.raises(sources.TemporaryError, match=message):
        next(records)
    assert seen == [(1, 0), logging.ERROR]
    assert vars(datasets.config) == before


@pytest.mark.parametrize("tokenizer", ["bytes", "world", str(BUNDLED / "tokenizer.json")])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch, tokenizer):
    text = "\n".join(texts(100))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    write_lines(tmp_path / "b.jsonl", [{"text": text}])
    monkeypatch.setattr(sources, "PIECE_SIZE", 999)
    monkeypatch.setattr(encoding, "PIECE_SIZE", 999)
    assert len(list(sources.read_records(sources.find_sources([str(tmp_path / "a.txt")])))) > 20
    for name in ("a.txt", "b.jsonl"):
        tokenize_corpus([str(tmp_path / name)], tmp_path / "x", tokenizer, restart=True)
        known = load_tokenizer(tokenizer)
        file = TokenFile(tmp_path / "x")
        assert len(file) == 1
        assert file.document(0).tolist() == known.encode(text) + sorted(known.stop_ids)[:1]
    (tmp_path / "c.txt").write_text("鳥" * 5000, encoding="utf-8")  # not a line in it
    tokenize_corpus([str(tmp_path / "c.txt")], tmp_path / "x", "bytes", restart=True)
    assert decoded(tmp_path / "x") == ["鳥" * 5000]


def test_stopped_anywhere_it_goes_on_as_if_it_never_had(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_SIZE", 400)
    monkeypatch.setattr(encoding, "PIECE_SIZE", 400)
    monkeypatch.setattr(encoding, "CHUNK", 900)
    (tmp_path / "a.txt").write_text("\n".join(texts(8)), encoding="utf-8")
    (tmp_path / "b.txt").write_text("x" * 1200)  # pieces end exactly where it does
    write_lines(tmp_path / "c.jsonl", [{"text": text} for text in texts(30)])
    write_lines(tmp_path / "d.jsonl.gz", [{"messages": TALK}, *({"text": text} for text in texts(30, seed=1))])
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl", "d.jsonl.gz", "e.txt.xz")]
    (tmp_path / "e.txt.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + "\n".join(texts(9, seed=2)).encode()))
    options = {"template": "world", "holdout": 0.2}
    tokenize_corpus(paths, tmp_path / "once" / "x", "bytes", **options)

    class Stop(BaseException):
        pass

    stops = 0
    for note in (0.0, 100.0):  # a note after every chunk, or only when it stops
        monkeypatch.setattr(corpus, "SAVE_SECONDS", note)
        out = tmp_path / f"often {note}" / "x"
        while True:
            calls = 0

            def stop_at_third(n_bytes, progress):
                nonlocal calls
                calls += 1
                if calls == 3:
                    raise Stop

            try:
                tokenize_corpus(paths, out, "bytes", **options, on_progress=stop_at_third)
                break
            except Stop:
                stops += 1
                with open(out.with_name("x.bin.part"), "ab") as file:
                    file.write(b"what came after the last note")
        for name in ("x", "x-eval"):
            assert contents(out.with_name(name)) == contents(tmp_path / "once" / name)
        assert not list(out.parent.glob("*.part"))
        assert not list(out.parent.glob("*progress*"))
    assert stops > 20
    kept, held = (TokenFile(tmp_path / "once" / name) for name in ("x", "x-eval"))
    assert (len(kept), len(held)) == (52, 12)  # 64 documents, every fifth
    assert held.document(0).tobytes() == np.frombuffer(texts(30)[2].encode(), np.uint8).astype(np.uint16).tobytes()


@pytest.mark.slow
def test_a_process_killed_and_one_interrupted_go_on(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts(6_000)])
    script = "from heronry.data import tokenize_corpus as t; t.SMALL, t.SAVE_SECONDS = 0, 0.2; "
    script += "from heronry.cli.app import main; main()"  # workers and notes as a longer run has them
    options = ["data", str(source), "--tokenizer", str(BUNDLED), "--holdout", "0.1"]
    out = tmp_path / "x"
    notes = tmp_path / "x.progress.json"

    def standing() -> int:
        return json.loads(notes.read_text())["progress"]["documents"] if notes.exists() else 0

    before = 0
    for sent, workers in ((signal.SIGKILL, 2), (signal.SIGINT, 1)):
        command = [sys.executable, "-c", script, *options, "-o", str(out), "--workers", str(workers)]
        # shells let what they start in the background ignore Ctrl-C, and children inherit that
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed) as process:
            while standing() <= before:
                assert process.poll() is None
                time.sleep(0.02)
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) >= workers or workers == 1
            process.send_signal(sent)
            message = process.stderr.read().decode()
        assert not (tmp_path / "x.bin").exists()
        if sent == signal.SIGINT:
            assert process.returncode == 130
            assert message == "heronry: stopped; the same command continues from here\n"
        _, alive = psutil.wait_procs(children, 10)
        assert not alive
        assert standing() > before
        before = standing()
    assert 0 < before < 6_000
    seen = []
    sources = [str(source)]
    tokenize_corpus(
        sources,
        out,
        BUNDLED / "tokenizer.json",
        holdout=0.1,
        on_progress=lambda n_bytes, progress: seen.append(progress),
    )
    assert seen[0].documents == before
    tokenize_corpus(sources, tmp_path / "y", BUNDLED / "tokenizer.json", holdout=0.1)  # in one go, by one process
    for name in ("", "-eval"):
        one, other = contents(tmp_path / f"x{name}"), contents(tmp_path / f"y{name}")
        assert one.pop(".json").replace(b"x.tokenizer", b"y.tokenizer") == other.pop(".json")
        assert one == other
    assert TokenFile(out).tokenizer_file == tmp_path / "x.tokenizer.json"
    assert (tmp_path / "x.tokenizer.json").read_bytes() == (BUNDLED / "tokenizer.json").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.slow
def test_memory_is_not_that_of_the_texts(tmp_path):
    line = (json.dumps({"text": " ".join(texts(20))}) + "\n").encode()
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        for _ in range(60 * 2**20 // len(line)):
            file.write(line)
    (tmp_path / "b.txt").write_bytes(b"a line of it\n" * (40 * 2**20 // 13))
    (tmp_path / "c.txt").write_text("warm\n" * 1000)
    script = """
import re, sys
from pathlib import Path
from heronry.data.tokenize_corpus import tokenize_corpus

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

for source in sys.argv[1:]:
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    tokenize_corpus([source], "x", "bytes", restart=True)
    print((memory("VmHWM") - before) / 1024)
"""
    command = [sys.executable, "-c", script, "c.txt", "a.jsonl.gz", "b.txt"]
    grown = [float(word) for word in subprocess.check_output(command, cwd=tmp_path).split()]
    assert max(grown) < 30, grown  # MiB; the smaller text alone has 40


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "tokenizer"), [("raven", "bytes"), ("world", str(BUNDLED / "tokenizer.json"))])
def test_a_model_that_learned_conversations_holds_them(tmp_path, monkeypatch, name, tokenizer):
    """From messages to `chat`: a model that knows two talks by heart says its lines, stops by itself, and was fed
    the very ids that it learned from."""
    talks = [TALK, [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell."}]]
    source = write_lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    known = load_tokenizer(tokenizer)
    tokenize_corpus([str(source)], tmp_path / "x", tokenizer, template=name)
    file = TokenFile(tmp_path / "x")
    batch = collate([DocumentSampler(file, 1000).row(0)])
    assert batch.cu_seqlens is not None
    assert batch.mask is not None
    ids, mask = zip(*(encode_conversation(talk, TEMPLATES[name], known) for talk in talks), strict=True)
    assert file.tokens.tolist() == [*chain(*ids)]
    assert file.mask.astype(bool).tolist() == [*chain(*mask)]
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config.sized(-(-file.vocab_size // 64) * 64, 2, 64, head_size=32))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        logits, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
        loss = torch.nn.functional.cross_entropy(logits[batch.mask], batch.targets[batch.mask])
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    llm = LLM(model.eval(), tokenizer=tokenizer)
    llm.opening = file.notes["opening_tokens"]
    fed: list[int] = []
    from heronry.engine import chat as engine

    original = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda model, tokens, state: fed.extend(tokens[0]) or original(model, tokens, state)
    )
    for talk in talks:
        chat = llm.chat(template=name)
        fed.clear()
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            wanted = answer["content"].replace("\n\n", "\n") if name == "raven" else answer["content"]
            assert chat.say(question["content"], temperature=0, presence_penalty=0, frequency_penalty=0).text == wanted
            # all that the model read, in the order of its training text, but for the answers that it made itself
        pieces = [
            known.encode(piece) for piece, _ in render_conversation(talk, TEMPLATES[name], bool(known.stop_ids))[::2]
        ]
        assert fed == [0, *(token for piece in pieces for token in piece)]


@pytest.mark.parametrize("name", ["a.json", "a-eval.json", "a.progress.json"])
@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_a_text_is_never_replaced_by_what_is_made_of_it(tmp_path, command, name, restart):
    """`data a.json -o a` would write its notes to a.json."""
    source = tmp_path / name
    source.write_text(json.dumps([{"text": text} for text in texts(20)]))
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    words = ("data", source, "-o", tmp_path / "link" / "a", "--tokenizer", "bytes", "--holdout", 0.1, *restart)
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    said = "is one of the texts, and would be replaced; choose another name with --out"
    assert err == f"heronry: {tmp_path}/link/{name}: {said}\n"
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "link"])


def test_what_is_there_is_kept(tmp_path, command):
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts(20)])
    out = tmp_path / "x"
    words = ("data", source, "-o", out, "--tokenizer", "bytes")
    assert command(*words)[0] == 0
    before = contents(out)
    code, _, message = command(*words)
    assert (code, message) == (2, f"heronry: {out}.bin: already exists; replace it with --restart\n")
    assert contents(out) == before
    assert command(*words, "--restart", "--tokenizer", "world")[0] == 0
    assert TokenFile(out).vocab_size == load_tokenizer("world").vocab_size
    for ending in (".json", ".mask", ".tokenizer.json"):  # somebody's own
        Path(f"{tmp_path}/own{ending}").write_text("mine")
        refused = command("data", source, "-o", tmp_path / "own", "--tokenizer", "bytes")
        assert refused == (2, "", f"heronry: {tmp_path}/own{ending}: already exists; replace it with --restart\n")
        Path(f"{tmp_path}/own{ending}").unlink()
    # an unfinished run goes on with the options that it began with, or not at all
    source = write_lines(tmp_path / "b.jsonl", [{"text": text} for text in texts(20)])

    def stop(n_bytes, progress):
        if n_bytes:
            raise KeyboardInterrupt

    words = ("data", source, "-o", tmp_path / "y", "--tokenizer", "bytes")
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus([str(source)], tmp_path / "y", "bytes", on_progress=stop)
    for other, named in ((("--holdout", "0.5"), "holdout"), (("--key", "words"), "key")):
        code, _, message = command(*words, *other)
        assert code == 2
        assert f"y.progress.json: there is an unfinished run with other {named}; start over with --restart" in message
    write_lines(tmp_path / "b.jsonl", [{"text": "changed"}])
    assert "other sources" in command(*words)[2]
    assert command(*words, "--restart")[0] == 0
    assert decoded(tmp_path / "y") == ["changed"]
    (tmp_path / "z.progress.json").write_text("{")
    assert "z.progress.json: damaged" in command(*words[:3], tmp_path / "z", *words[4:])[2]


def test_what_the_message_advises_is_not_refused(tmp_path, command):
    """After an error in its input a run stands in nobody's way: not in that of the option that its message names, nor
    in that of the corrected file."""
    talk = write_lines(tmp_path / "talk.jsonl", [{"messages": TALK}])
    words = ("data", talk, "-o", tmp_path / "x", "--tokenizer", "bytes")
    assert "choose a chat template with --template" in command(*words)[2]
    assert command(*words, "--template", "g1")[0] == 0
    lines = write_lines(tmp_path / "lines.jsonl", [{"text": text} for text in texts(20)] + [{"words": "x"}])
    words = ("data", lines, "-o", tmp_path / "y", "--tokenizer", "bytes")
    unknown = "does not have a known shape (keys: 'words'); name the field of its text with --key"
    for _ in range(2):
        assert command(*words) == (2, "", f"heronry: {lines}, line 21: {unknown}\n")
    write_lines(tmp_path / "lines.jsonl", [{"text": "corrected"}])
    assert command(*words)[0] == 0
    assert decoded(tmp_path / "y") == ["corrected"]
    # and yet it replaces nothing that was there
    write_lines(tmp_path / "lines.jsonl", [{"words": "x"}])
    assert command(*words, "--restart")[0] == 2
    write_lines(tmp_path / "lines.jsonl", [{"text": "again"}])
    assert command(*words)[2] == f"heronry: {tmp_path}/y.bin: already exists; replace it with --restart\n"
    assert decoded(tmp_path / "y") == ["corrected"]


def test_a_source_that_is_out_of_reach_costs_nothing(tmp_path, command, monkeypatch):
    """Unlike after an error in the texts, what has been encoded is still wanted."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts(20)])
    whole = sources.read_records

    def broken(*args):
        yield from list(whole(*args))[:10]
        raise sources.TemporaryError("a.jsonl: the network is gone")

    monkeypatch.setattr(corpus, "read_records", broken)
    monkeypatch.setattr(encoding, "CHUNK", 1)
    words = ("data", source, "-o", tmp_path / "x", "--tokenizer", "bytes")
    assert command(*words) == (2, "", "heronry: a.jsonl: the network is gone\n")
    monkeypatch.undo()
    assert "unfinished run with other holdout; start over with --restart" in command(*words, "--holdout", "0.5")[2]
    seen = []
    tokenize_corpus(
        [str(source)], tmp_path / "x", "bytes", on_progress=lambda n_bytes, done: seen.append(done.documents)
    )
    assert (seen[0], seen[-1]) == (10, 20)
    assert decoded(tmp_path / "x") == texts(20)


def test_the_name_may_have_its_ending(tmp_path, command):
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts(4)])
    code, _, message = command("data", source, "-o", tmp_path / "t.bin", "--tokenizer", "bytes", "--holdout", "0.5")
    assert code == 0
    assert message.startswith(f"{tmp_path / 't'}: 4 documents, ")
    names = {path.name for path in tmp_path.iterdir()} - {"a.jsonl"}
    assert names == {f"{prefix}{ending}" for prefix in ("t", "t-eval") for ending in (".bin", ".idx", ".json")}
    assert decoded(tmp_path / "t.bin") == texts(4)[::2]
    assert "is a folder; give the name" in command("data", source, "-o", ".", "--tokenizer", "bytes")[2]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, command):
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    (tmp_path / "nothing").mkdir()
    (tmp_path / "model").mkdir()
    file("model/config.json", b"{}")
    good = file("good.jsonl", b'{"text": "a"}\n')
    for words, said in [
        ([tmp_path / "missing"], "missing: no such file or folder"),
        ([tmp_path / "nothing"], "nothing: contains no .txt, .jsonl, .json, .parquet file"),
        ([file("a.pdf", b"x")], "a.pdf: unsupported kind of file; expected .txt"),
        ([file("a.jsonl", b'{"text": "a"}\n{"text": \n')], "a.jsonl, line 2: not JSON"),
        ([file("b.jsonl", b'{"text": "a"}\n\n[1]\n')], "b.jsonl, line 3: not a JSON object"),
        ([file("c.jsonl", b'{"text": 3}\n')], "c.jsonl, line 1: 'text' is neither a string nor a list of messages"),
        ([file("d.jsonl", b'{"text": "\xff"}\n')], "d.jsonl, line 1: is not UTF-8 (byte 0xff at position 10)"),
        ([file("e.jsonl", b'{"text": "\\ud800"}\n')], "e.jsonl, line 1: the text has a lone surrogate at character 0"),
        (
            [file("g.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n')],
            "g.jsonl, line 1: this is a conversation: choose a chat template",
        ),
        (
            [file("f.jsonl", b'{"messages": [{"role": "user"}]}\n')],
            "f.jsonl, line 1: a message has no text (messages[0])",
        ),
        ([file("a.txt", b"abc\xff")], "a.txt, line 1: is not UTF-8 (byte 0xff at position 3)"),
        ([file("a.jsonl.gz", b"abc")], "a.jsonl.gz: cannot be read (Not a gzipped file"),
        (
            [file("b.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 9)[:-20])],
            "b.jsonl.gz: cannot be read (Compressed file ended",
        ),
        ([file("empty.txt", b"")], "out: would be empty, as the sources have 0 documents"),
        ([good, "--holdout", "0.5"], "out-eval: would be empty, as the sources have 1 document\n"),
        ([good, "--holdout", "0.6"], "must be above 0 and at most 0.5, got 0.6"),
        ([good, "--workers", "0"], "workers must be from 1 to 256, got 0"),
        ([good, "--workers", "1000000"], "workers must be from 1 to 256, got 1000000"),
        ([good, "--holdout", "nan"], "must be above 0 and at most 0.5, got nan"),
        ([good, "--template", "klingon"], "chat template 'klingon'"),
        ([good, "--tokenizer", tmp_path / "none.json"], "none.json: tokenizer file not found"),
        ([good, "--tokenizer", tmp_path / "nothing"], "tokenizer.json: tokenizer file not found"),
        ([good, "--tokenizer", tmp_path / "model"], "config.json: not a JSON object with a vocab_size"),
    ]:
        code, out, err = command("data", "--tokenizer", "bytes", *words, "-o", tmp_path / "out", "--restart")
        assert (code, out) == (2, ""), words
        assert said in err, words
        assert err.startswith("heronry: "), words
        assert err.count("\n") == 1, (words, err)
    pytest.importorskip("pyarrow")
    code, _, err = command("data", file("a.parquet", b"x" * 100), "-o", tmp_path / "out", "--restart")
    assert (code, err.count("\n")) == (2, 1)
    assert "a.parquet: damaged, or not a .parquet file" in err
    assert not (tmp_path / "out.bin").exists()
