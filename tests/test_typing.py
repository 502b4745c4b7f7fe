"""The types that users see: mypy --strict takes a program that is right, and names what is wrong in one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parent.parent

RIGHT = """
    from collections.abc import AsyncGenerator, Generator
    from typing_extensions import assert_type

    import torch

    import heronry
    from heronry import LLM, Completion, Model, Sampling, State, VisionModel

    model = heronry.load("model.pth", dtype="bfloat16")
    assert_type(model, Model)
    assert_type(heronry.load("vision.pth", kind=VisionModel), VisionModel)
    assert_type(model.num_parameters(), int)
    assert_type(model.device, torch.device)
    assert_type(model.dtype, torch.dtype)
    logits, state = model(torch.tensor([[1]]))
    assert_type(state, State)
    llm = LLM("model.pth")
    one = llm.generate("a", temperature=0.8, top_p=0.9, seed=1, stop=["b"], logprobs=True)
    assert_type(one, Completion)
    assert_type(one.text, str)
    assert_type(one.token_ids, list[int])
    assert_type(one.state, State)
    assert_type(llm.generate([1, 2], n=2), list[Completion])
    assert_type(llm.generate(["a", "b"]), list[Completion])
    assert_type(llm.generate(["a", "b"], n=2), list[list[Completion]])
    assert_type(llm.generate("a", stream=True), Generator[Completion, None, None])
    assert_type(llm.generate(["a"], sampling=[Sampling(temperature=0.5)]), list[Completion])
    assert_type(llm.stream_async("a"), AsyncGenerator[Completion, None])
    assert_type(llm.chat(), heronry.Chat)
    assert_type(llm.chat([{"role": "user", "content": "a"}]), Completion)
    assert_type(llm.chat().say("a", temperature=0.5), Completion)
    assert_type(llm.chat().say("a", stream=True), Generator[Completion, None, None])

    def allowed(ids: list[int]) -> torch.Tensor | None:
        return None

    def either(stream: bool, prompts: list[str | list[int]]) -> None:
        assert_type(llm.generate(prompts, mask=allowed), list[Completion])
        assert_type(llm.generate(("a", [1, 2])), list[Completion])
        llm.generate("a", stream=stream)
        llm.generate(prompts, stream=True)
        llm.chat().say("a", stream=stream)

    async def answer() -> str:
        return (await llm.generate_async("a", top_k=5)).text
"""

WRONG = {
    'llm.generate("a", tempreature=0.5)': "tempreature",
    'llm.generate("a", temperature="hot")': "generate",
    'llm.generate("a", stream=True, topp=0.5)': "topp",
    'llm.chat([{"role": "user", "content": "a"}], heat=1)': "heat",
    'llm.chat().say("a", heat=1)': "heat",
    'llm.generate("a").txt': "txt",
    'heronry.load("a", dtyp="float32")': "dtyp",
    "heronry.Sampling(temp=1.0)": "temp",
    'LLM("a", quantise="int8")': "quantise",
}


def check(tmp_path, program: str) -> str:
    (tmp_path / "program.py").write_text(program)
    # with the settings and the cache of `make lint`, where PyTorch has been read already: 2 seconds instead of 40
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "program.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment).stdout


def test_a_program_that_is_right_and_one_that_is_not(tmp_path):
    right = textwrap.dedent(RIGHT)
    lines = [f"{line}  # wrong" for line in WRONG]
    out = check(tmp_path, right + "\n" + "\n".join(lines) + "\n")
    first = right.count("\n") + 2
    errors: dict[int, str] = {}
    for line in out.splitlines():
        if ": error:" in line:
            number = int(line.split(":")[1])
            errors[number] = errors.get(number, "") + line
    assert sorted(errors) == list(range(first, first + len(lines))), out
    for number, name in enumerate(WRONG.values(), first):
        assert name in errors[number], errors[number]
