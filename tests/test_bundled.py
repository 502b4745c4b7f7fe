"""The bundled model: it is small, complete, and writes stories."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from heronry import LLM
from heronry.engine.llm import BUNDLED

ROOT = Path(__file__).parent.parent
STORIES = ROOT.parent / "shared" / "data" / "stories.jsonl.gz"


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32")


def test_it_fits_in_eight_megabytes():
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 8_000_000


def test_its_file_alone_is_the_same_model():
    file = LLM(BUNDLED / "model.safetensors")
    assert (file.opening, file.chat_template) == ([0], "story")


def test_the_same_seed_tells_the_same_story(llm):
    story = llm.generate("Once upon a time", max_tokens=60, seed=7).text
    assert story == llm.generate("Once upon a time", max_tokens=60, seed=7).text
    assert story == "".join(map(str, llm.generate("Once upon a time", max_tokens=60, seed=7, stream=True)))
    assert story != llm.generate("Once upon a time", max_tokens=60, seed=8).text
    assert len(re.findall(r"[a-z]+", story)) > 30


def test_it_answers_mostly_with_a_story_about_the_subject(llm):
    things = ["frog", "boat", "cake", "dog", "bird", "tree", "cat", "ball", "car", "fish"]
    prompts = [f"User: Tell me a story about a {thing}\n\nAssistant:" for thing in things]
    stories = [x.text for seed in (1, 2, 3) for x in llm.generate(prompts, 400, temperature=0.8, seed=seed)]
    assert sum(story.startswith((" Once upon a time", " One")) for story in stories) >= 20
    on_subject = sum(thing in story.lower() for thing, story in zip(things * 3, stories, strict=True))
    assert on_subject >= 12  # it was 20; stories about the other nine mention the thing in 3.6 of 30


def test_chat_uses_its_template(llm):
    chat = llm.chat()
    chat.say("Tell me a story about a frog", max_tokens=30, seed=1)
    assert chat.text.startswith("User: Tell me a story about a frog\n\nAssistant: ")


@pytest.mark.skipif(not STORIES.exists(), reason="needs the held-out stories: ../shared/data/stories.jsonl.gz")
def test_bits_per_byte_of_held_out_stories(llm):
    spec = importlib.util.spec_from_file_location("storyteller", ROOT / "examples" / "storyteller.py")
    storyteller = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(storyteller)
    with gzip.open(STORIES, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 10 == 9 and i < 600]
    bits = storyteller.bits_per_byte(llm.model, Tokenizer.from_file(str(BUNDLED / "tokenizer.json")), texts)
    assert bits < 0.7  # all of them: 0.6664
