"""Grammars that cost too much to compile, and those that came before and after them."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("llguidance")

from heronry.engine.constraints import Grammar
from heronry.serve.errors import ApiError
from heronry.serve.grammar_check import GrammarCheck

HOURS = Grammar.from_schema({"allOf": [{"type": "string", "pattern": f".*{i}.{{30}}"} for i in range(20)]})
QUICK = Grammar.from_regex("a|b")


def test_what_takes_too_long_is_ended():
    async def run() -> None:
        check = GrammarCheck(seconds=1)
        await check.check(QUICK)
        first = check._process
        with pytest.raises(ApiError, match=r"^schema: compiling it takes longer than 1 s$"):
            await check.check(HOURS)
        assert await first.wait() < 0
        waiting = asyncio.create_task(check.check(HOURS))  # and its client goes away
        await asyncio.sleep(0.3)
        busy = check._process
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await busy.wait() < 0
        await asyncio.gather(*(check.check(Grammar.from_regex(f"a{i}")) for i in range(20)), check.check(QUICK))
        deep = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"\n'
        await check.check(Grammar.from_text(deep))
        last = check._process
        check.close()
        assert await last.wait() < 0

    asyncio.run(run())
