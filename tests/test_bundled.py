"""The model that comes with the package: small, whole, and a storyteller."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest

from rookery import LLM
from rookery.engine.llm import BUNDLED

ROOT = Path(__file__).parent.parent
STORIES = ROOT.parent / "shared" / "data" / "stories.jsonl.gz"


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32")


def test_it_fits_in_eight_megabytes():
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 8_000_000


def test_the_same_seed_tells_the_same_story(llm):
    story = llm.generate("Once upon a time", max_tokens=60, seed=7)
    assert story == llm.generate("Once upon a time", max_tokens=60, seed=7)
    assert story == "".join(llm.generate("Once upon a time", max_tokens=60, seed=7, stream=True))
    assert story != llm.generate("Once upon a time", max_tokens=60, seed=8)
    assert len(re.findall(r"[a-z]+", story)) > 30


def test_it_answers_with_a_story_about_what_was_asked(llm):
    for thing in ("frog", "boat", "cake"):
        prompt = f"User: Tell me a story about a {thing}\n\nAssistant:"
        story = llm.generate(prompt, max_tokens=300, temperature=0.7, top_p=0.8, seed=1)
        assert thing in story.lower()


def test_chat_uses_its_template(llm):
    chat = llm.chat()
    chat.say("Tell me a story about a frog", max_tokens=30, seed=1)
    assert chat.text.startswith("User: Tell me a story about a frog\n\nAssistant: ")


@pytest.mark.skipif(not STORIES.exists(), reason="the held-out stories are not here: ../shared/data/stories.jsonl.gz")
def test_held_out_stories_cost_less_than_the_promised_bits(llm):
    spec = importlib.util.spec_from_file_location("storyteller", ROOT / "examples" / "storyteller.py")
    storyteller = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(storyteller)
    with gzip.open(STORIES, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 10 == 9 and i < 600]
    bits = storyteller.bits_per_byte(llm.model, llm.tokenizer, texts)
    assert bits < 0.9
