"""The harness itself, over tasks that lie here: what it asks, and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import heronry  # noqa: E402
from heronry.checkpoint import assemble  # noqa: E402
from heronry.evaluate import log_likelihoods, score_lambada  # noqa: E402
from heronry.integrations.lm_eval import HeronryLM, register  # noqa: E402

PASSAGES = ["Once upon a time there was a little girl", "The dog was very happy", "Tom and Lily went to the park"]


@pytest.fixture
def tasks(tmp_path):
    """LAMBADA over a local file, and a task of choices."""
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "local_lambada.yaml").write_text(
        f"""
task: local_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "lambada.jsonl"}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
    )
    rows = [{"q": "The bird can", "choices": ["fly", "read the morning paper"], "gold": 0}]
    rows += [{"q": "Lily was very", "choices": ["table", "happy"], "gold": 1}]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_choices.yaml").write_text(
        f"""
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "choices.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    )
    return tmp_path


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_the_harness_runs_tasks(tasks):
    register()
    register()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "heronry", tasks=["local_lambada", "local_choices"], task_manager=manager, bootstrap_iters=0
    )
    score = score_lambada(heronry.LLM(), PASSAGES)
    results = found["results"]["local_lambada"]
    assert results["perplexity,none"] == pytest.approx(score.perplexity, rel=1e-3)
    assert results["acc,none"] == pytest.approx(score.accuracy)
    assert found["results"]["local_choices"]["acc,none"] == 1.0


@pytest.mark.slow
def test_as_a_command(tasks):
    command = [sys.executable, "-m", "heronry.integrations.lm_eval", "run", "--model", "heronry"]
    command += ["--tasks", "local_lambada", "--include_path", str(tasks), "--model_args", "dtype=float32"]
    command += ["--output_path", str(tasks / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "|local_lambada|" in done.stdout, done.stderr
    assert list((tasks / "out").rglob("results_*.json"))


def test_the_same_as_the_harness_own_class(tmp_path):
    """The bundled model through lm_eval's HFLM and ours: likelihoods, whole texts and generated texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heronry.convert import convert
    from heronry.integrations import transformers as ours

    ours.register()
    convert(
        os.path.join(os.path.dirname(heronry.__file__), "bundled"), tmp_path / "hf", to="huggingface", dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_special_tokens(
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    )
    theirs = HFLM(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tokenizer=tokenizer, batch_size=2, device="cpu"
    )
    mine = HeronryLM(dtype="float32")
    end = mine.eot_token_id  # which theirs puts in front of a text only where it has no context
    pairs = [
        ("The cat", " sat on the mat."),
        ("The cat", " ran"),
        ("Once upon", " a time"),
        ("", "One day"),
        ("A ", "dog"),
    ]
    for (a, hit), (b, right) in zip(
        mine.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True),
        theirs._loglikelihood_tokens(
            [(pair, *with_end(theirs, pair, end)) for pair in pairs],
            disable_tqdm=True,
        ),
        strict=True,
    ):
        assert a == pytest.approx(b, abs=1e-3)
        assert hit == right
    texts = [("Once upon a time there was a bird.",), ("It was big.",)]
    a = mine.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    b = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-3)
    asked = [
        ("Once upon a time", {"until": ["."], "max_gen_toks": 20}),
        ("The dog", {"until": ["\n"], "max_gen_toks": 8}),
    ]
    a = mine.generate_until(instances("generate_until", asked), disable_tqdm=True)
    asked = [("<|endoftext|>" + prompt, options) for prompt, options in asked]
    b = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert a == b


def with_end(theirs: HFLM, pair: tuple[str, str], end: int) -> tuple[list[int], list[int]]:
    before, after = theirs._encode_pair(*pair) if pair[0] else ([], theirs.tok_encode(pair[1]))
    return [end, *before], after


def test_world_models_read_the_end_of_text_in_front_of_everything(random_checkpoint):
    """As the models were trained, and as the published figures were measured."""
    llm = heronry.LLM(assemble(random_checkpoint("7", width=64, heads=1, ffn=64, rank=3, vocab=65536)))
    assert llm.opening == []
    mine = HeronryLM(llm)
    text = "The cat sat on the mat."
    ids = llm.tokenizer.encode(text)
    expected = log_likelihoods(llm.model, [([0], ids), ([0, *ids[:-2]], ids[-2:])])
    before, after = llm.tokenizer.decode(ids[:-2]), llm.tokenizer.decode(ids[-2:])
    assert mine.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)])) == [expected[0][0]]
    assert mine.loglikelihood(instances("loglikelihood", [("", text), (before, after)])) == expected
    llm.opening = [7, 0]  # two tokens, of which the harness knows the first
    expected = log_likelihoods(llm.model, [([7, 0], ids)])
    assert mine.loglikelihood(instances("loglikelihood", [("", text)])) == expected
    assert mine.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)])) == [expected[0][0]]


def test_a_tuned_state_is_where_every_text_begins(random_checkpoint):
    weights = random_checkpoint("7", width=64, heads=1, ffn=64, rank=3, vocab=65536, tuned=True)
    tuned = heronry.LLM(assemble(dict(weights)))
    llm = heronry.LLM(assemble({name: x for name, x in weights.items() if "time_state" not in name}))
    llm.start = heronry.State(tuned.model.initial_state().layers, llm.model.fingerprint)
    for kind, arguments in (("loglikelihood", ("The cat", " sat")), ("loglikelihood_rolling", ("The cat sat.",))):
        asked = instances(kind, [arguments])
        found, expected = (getattr(HeronryLM(x), kind)(asked, disable_tqdm=True) for x in (llm, tuned))
        assert torch.tensor(found) == pytest.approx(torch.tensor(expected), rel=1e-5)
        plain = getattr(HeronryLM(heronry.LLM(llm.model)), kind)(asked, disable_tqdm=True)
        assert torch.tensor(plain) != pytest.approx(torch.tensor(expected), rel=1e-4)


def test_options_of_generation_count_or_are_refused():
    """Their names and defaults are the harness's."""
    mine = HeronryLM(dtype="float32", max_gen_toks=7)

    def write(**options) -> str:
        return mine.generate_until(instances("generate_until", [("One day", options)]), disable_tqdm=True)[0]

    greedy = mine.llm.generate([0, *mine.tok_encode("One day")], 7, temperature=0).text
    assert write() == write(temperature=0.0, until=None) == write(do_sample=False, temperature=1.0) == greedy
    drawn = mine.llm.generate([0, *mine.tok_encode("One day")], 12, temperature=1.5, top_p=1.0, seed=5).text
    assert write(temperature=1.5, seed=5, max_new_tokens=12) == drawn
    assert write(do_sample=True, temperature=1.5, seed=5, max_tokens=12, top_k=1) == (
        mine.llm.generate([0, *mine.tok_encode("One day")], 12, temperature=0).text
    )
    with pytest.raises(heronry.InputError, match=r"^unknown option 'num_beams'"):
        write(num_beams=4)
    assert mine.loglikelihood_rolling(instances("loglikelihood_rolling", [("",)]), disable_tqdm=True) == [0.0]
    with pytest.raises(heronry.InputError, match=r"^quantize= is for a model that is loaded, not for an LLM$"):
        HeronryLM(mine.llm, quantize="int8")
    with pytest.raises(heronry.InputError, match=r"^unknown option 'quantise'; did you mean 'quantize'"):
        HeronryLM(quantise="int8")


@pytest.mark.slow
def test_the_command_says_in_a_line_what_is_wrong(tasks):
    command = [sys.executable, "-m", "heronry.integrations.lm_eval", "run", "--model", "heronry", "--tasks"]
    command += ["local_lambada", "--include_path", str(tasks), "--model_args", "pretrained=none.pth"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "heronry: none.pth: no such file or folder"
    assert "Traceback" not in done.stderr


def test_a_vocabulary_without_an_end(random_checkpoint, tmp_path):
    torch.save(random_checkpoint("4", width=32, ffn=40, heads=1, vocab=256), tmp_path / "a.pth")
    model = HeronryLM(str(tmp_path / "a.pth"))
    with pytest.raises(heronry.InputError, match="no end-of-text token"):
        model.loglikelihood(instances("loglikelihood", [("", "abc")]), disable_tqdm=True)
    assert len(model.loglikelihood(instances("loglikelihood", [("ab", "c")]), disable_tqdm=True)) == 1
