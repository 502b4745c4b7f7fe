"""What `convert --to huggingface` writes, read by transformers in a process that knows nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import heronry
from heronry.convert import convert

pytest.importorskip("transformers")

MESSAGES = [
    {"role": "user", "content": "Hello, 世界!"},
    {"role": "assistant", "content": "Hi. I am <|endoftext|> no token."},
    {"role": "user", "content": "And then?\n\nTell me."},
]
TEXT = "The rook's 12 eggs <|endoftext|> — “No”, été.\n\n  \tx"
PROGRAM = """
import json, sys
from transformers import AutoTokenizer, GenerationConfig, RwkvForCausalLM
folder, messages, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = RwkvForCausalLM.from_pretrained(folder).eval()
inputs = tokenizer(text, return_tensors="pt")
settings = GenerationConfig.from_pretrained(folder)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False, tokenizer=tokenizer)
assert "heronry" not in sys.modules
print(json.dumps({
    "class": type(tokenizer).__name__,
    "ids": inputs["input_ids"][0].tolist(),
    "text": tokenizer.decode(inputs["input_ids"][0]),
    "chat": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "padded": tokenizer([text, "x"], padding=True)["attention_mask"][1][:2],
    "stops": settings.stop_strings,
    "written": output[0, inputs["input_ids"].shape[1]:].tolist(),
}))
"""


@pytest.mark.slow
def test_a_world_model_in_stock_transformers(random_checkpoint, tmp_path):
    """RWKV-4 is the generation that transformers has a class for; the other files are those of every World model."""
    weights = random_checkpoint("4", vocab=65536, width=32, ffn=48)
    torch.save(weights, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "hf"), json.dumps(MESSAGES), TEXT]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    llm = heronry.LLM(tmp_path / "a.pth")
    assert theirs["ids"] == llm.tokenizer.encode(TEXT)
    assert theirs["text"] == TEXT
    assert theirs["chat"] == (
        "User: Hello, 世界!\n\nAssistant: Hi. I am <|endoftext|> no token.\n\nUser: And then?\nTell me.\n\nAssistant:"
    )
    assert theirs["special"] == [0, 0, 0]
    assert theirs["padded"] == [0, 0]
    assert theirs["stops"] == ["\n\nUser:", "\n\nSystem:", "\n\nAssistant:"]
    assert theirs["written"] == llm.generate(TEXT, 8, temperature=0, stop="\n\nUser:").token_ids
