"""Answers to lists of messages: thoughts, texts and calls of tools."""

from __future__ import annotations

import pytest

from heronry.engine.completion import join
from heronry.engine.llm import LLM
from heronry.errors import InputError

TOOLS = {"ping": {}}
CALL = '<tool_call>{"name":"ping"}</tool_call>'
ASKED = [{"role": "user", "content": "x"}]


def answer(scripted, reply, *, cue="Assistant:", messages=ASKED, **options):
    """What the model answers when it says the pieces of `reply`; the same whole and as a stream."""
    model, tokenizer = scripted(reply, cue=cue)
    llm = LLM(model, tokenizer=tokenizer)
    options = {"template": "g1", **options}
    whole = llm.chat(messages, **options)
    pieces = [*llm.chat(messages, stream=True, **options)]
    streamed = join(pieces)
    for field in ("text", "reasoning", "tool_calls", "finish_reason", "token_ids", "usage"):
        assert getattr(streamed, field) == getattr(whole, field)
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    return whole


def test_a_thought_is_no_part_of_the_text(scripted):
    said = answer(scripted, [">", "Look", ".", "</think>", "\n", "It ", "rains", "."], cue="<think", think="open")
    assert (said.reasoning, said.text, said.finish_reason) == ("Look.", "It rains.", "stop")
    assert said.state.texts == ("User: x\n\nAssistant: <think>Look.</think>\nIt rains.",)
    cut = answer(scripted, [">", "Look", ".", "</think>"], cue="<think", think="open", max_tokens=3)
    assert (cut.reasoning, cut.text, cut.finish_reason) == ("Look.", "", "length")
    fast = answer(scripted, [">", "\n", "Yes"], cue="</think", think="fake")
    assert (fast.reasoning, fast.text) == ("", "Yes")


def test_calls_of_tools(scripted):
    said = answer(scripted, [" Wait", ".", "\n", CALL, "\n", CALL, " Done"], tools=TOOLS, tool_style="xml")
    assert (said.text, said.finish_reason) == ("Wait.", "tool_calls")
    assert [(call.name, call.arguments) for call in said.tool_calls] == [("ping", "{}")] * 2
    one = answer(scripted, [" Wait", CALL, CALL, "x"], tools=TOOLS, tool_style="xml", parallel_tool_calls=False)
    assert (len(one.tool_calls), one.finish_reason, one.usage.completion_tokens) == (1, "tool_calls", 2)
    fence = ["\n", '{"name":"ping",', '"arguments":{}}', "\n", "```", "x"]
    for parallel, n_tokens in [(True, 6), (False, 5)]:
        said = answer(scripted, fence, cue="```json", tools=TOOLS, parallel_tool_calls=parallel)
        assert ([call.name for call in said.tool_calls], said.text) == (["ping"], "")
        assert said.usage.completion_tokens == n_tokens
    none = answer(scripted, ["\n", '{"answer": 4}', "\n```"], cue="```json", tools=TOOLS)
    assert (none.text, none.tool_calls, none.finish_reason) == ('```json\n{"answer": 4}\n```', [], "stop")


def test_the_reply_of_g1k_that_needs_no_tool(scripted):
    call = '<tool_call>{"name":"no_tool","arguments":{"reason":"It rains."}}</tool_call>'
    said = answer(scripted, [" ", call], tools=TOOLS, tool_style="g1k")
    assert (said.text, said.tool_calls, said.finish_reason) == ("It rains.", [], "stop")


def test_stops_of_the_caller_count_in_the_text_alone(scripted):
    """Those of the template count in a thought too."""
    reply = [">", "a STOP", "</think>", "b", " ST", "OP", "c"]
    said = answer(scripted, reply, cue="<think", think="open", stop="STOP")
    assert (said.reasoning, said.text, said.finish_reason) == ("a STOP", "b", "stop")
    assert said.usage.completion_tokens == 6
    said = answer(scripted, [">", "a", "\n\nUser:", " b"], cue="<think", think="open", stop=["STOP"])
    assert (said.reasoning, said.text, said.finish_reason) == ("a", "", "stop")


def test_a_conversation_with_tools_is_read_as_it_is_rendered(scripted):
    from heronry.text.chat_templates import render

    call = {"id": "a", "type": "function", "function": {"name": "ping", "arguments": "{}"}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "a", "content": "pong"}]
    for style in ("json", "function_calling"):
        said = answer(scripted, [], messages=messages, tools=TOOLS, tool_style=style)
        assert said.state.texts == (render(messages, tools=TOOLS, tool_style=style),)


def test_options_of_an_answer_that_are_refused(scripted):
    for options, message in [
        ({"tool_stile": "json"}, "unknown option 'tool_stile'; did you mean 'tool_style'"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls must be True or False, got 1"),
        ({"stop": [""]}, "a stop string must not be empty"),
        ({"tools": TOOLS, "template": "raven"}, "models with this template have no tools"),
    ]:
        with pytest.raises(InputError, match=message):
            answer(scripted, [], **options)
    model, tokenizer = scripted([])
    with pytest.raises(InputError, match="tools is given to say"):
        LLM(model, tokenizer=tokenizer).chat(tools=TOOLS)


def test_tools_are_shown_as_the_name_of_the_file_says(tmp_path, random_checkpoint):
    import torch

    file = tmp_path / "rwkv7-g1k-0.1b-20260805-ctx4096.pth"
    torch.save(random_checkpoint("7", vocab=256, width=32, heads=2, layers=1, ffn=40, rank=3), file)
    llm = LLM(file)
    assert (llm.chat_template, llm.tool_style) == ("g1", "g1k")
    shown = llm.chat(ASKED, 0, tools=TOOLS).state.texts[0]
    assert shown.startswith('System: <tools>[\n{"name":"ping","arguments":{}},\n{"name":"no_tool"')
    assert "Tools:" in llm.chat(ASKED, 0, tools=TOOLS, template="g1").state.texts[0]
