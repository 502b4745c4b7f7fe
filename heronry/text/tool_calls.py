"""From the text of an answer to its parts: the thought, what is said, and calls of tools.

- a thought is what stands between "<think" at the beginning and the first "</think>"; it holds no calls
- a call is marked by <tool_call> or <tool_calls> (but not right after a backtick), or at the beginning of a line by a
  fence of JSON, perhaps under **Tool Call:**; or it is all that is said. Fences of other languages hold no marks
- what follows a mark is a call if it reads as one of the given tools, see `read_calls`; else it is text, as its mark is
- in a tag a call ends where its value does, in a fence at the closing fence; both may be missing at the end of the text
- what is said before the first call is kept, what is said behind it is dropped

The text is read character by character, so the parts do not depend on how it is cut into pieces. What may be a call is
held until that is decided; if it is none, it is read again from behind its mark. That takes linear time, for a mark
ends every value in which it is not part of a string: values that are open at the same place differ in whether they see
a text in single quotation marks there, one in double ones, or none, so there are three of them at most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .call_blocks import Block
from .reasoning import ThoughtParser
from .stop_strings import StopStringBuffer
from .tools import Tool, ToolCall, Tools, read_arguments, read_calls, read_tools

TAGS = ("<tool_call>", "<tool_calls>")
CLOSING_TAGS = ("</tool_call>", "</tool_calls>")
LABEL = "**Tool Call:**"
FENCE = "```"
MARK_BEGIN = re.compile(r"[<*`]")
FENCE_LINE_END = re.compile(r"[`\n]")
LANGUAGES = ("", "json")  # of fences that may hold calls
LONGEST_LANGUAGE = 24  # characters, with the fence in front


class Parsed(NamedTuple):
    """The parts of an answer, or in a stream what is new of them; without white space around them."""

    reasoning: str
    content: str
    calls: list[ToolCall]


def parse(text: str, tools: Tools | None = None, *, opening: str = "") -> Parsed:
    """The parts of what a model wrote.

    Args:
        text: behind the opening.
        tools: that it was given, see `read_tools`. Without any nothing is a call.
        opening: what the prompt had put behind "Assistant:" already, see `heronry.text.chat_templates.Prompt`.
    """
    parser = AnswerParser(tools, opening=opening)
    return _join([parser.feed(text), parser.finish()])


def _join(parts: Sequence[Parsed]) -> Parsed:
    calls = [call for part in parts for call in part.calls]
    return Parsed("".join(part.reasoning for part in parts), "".join(part.content for part in parts), calls)


class AnswerParser(ThoughtParser):
    """The streaming form of `parse`: the parts of all pieces, joined, are those of the whole text.

    Attributes:
        has_called: a call has ended, with its closing tag or fence: where one is enough, generation may end.
        stopped: a stop string came; what follows it is dropped.
    """

    def __init__(
        self, tools: Tools | None = None, *, opening: str = "", beginning: str = "", stops: Sequence[str] = ()
    ):
        """
        Args:
            tools, opening: see `parse`.
            beginning: what the answer begins with behind the opening. It is read, but neither is handed out.
            stops: strings that end what is said. They are not looked for in thoughts and calls.
        """
        super().__init__(len(opening) + len(beginning) if beginning else 0)
        self.has_called = self.stopped = False
        self._tools: dict[str, Tool] = read_tools(tools)
        self._stops = StopStringBuffer(stops)
        self._said: list[str] = []  # since the last piece
        self._calls: list[ToolCall] = []  # since the last piece
        self._is_over = False  # a call came, so nothing is said any more
        self._label: list[str] = []  # **Tool Call:** and white space behind it: said, unless a call follows
        self._block: Block | None = None
        self._before = "\n"  # the last character
        self._fence = ""  # the one we are in: "json", "other" or none
        self._is_fence_line = False  # the line that began it is not over
        self._read(opening + beginning)
        if beginning:
            self._calls = []

    def feed(self, piece: str) -> Parsed:
        """Takes the next piece; returns what is certain now."""
        if not self.stopped:
            self._read(piece)
        return self._take()

    def finish(self) -> Parsed:
        """What was held back, at the end of the text."""
        self._finish_thought()
        while self._held or self._block is not None:
            if self._block is not None:
                self._close() if self._block.calls else self._refuse()
            else:
                self._unhold()
            self._read("")
        self._said += self._label
        self._label, self._is_over = [], True
        return self._take()

    def _take(self) -> Parsed:
        if not self.stopped:
            self._content.put(self._stops.push("".join(self._said)))
            self.stopped = self._stops.stopped
            if self._is_over and not self.stopped:
                self._content.put(self._stops.finish())
        calls = [] if self.stopped else self._calls
        self._said, self._calls = [], []
        return Parsed(self._reasoning.take(), self._content.take(), calls)

    def _read_plain(self, text: str, at: int) -> int:
        if self._state == self._look:
            mark = MARK_BEGIN.search(text, at)
            end = mark.start() if mark else len(text)
        elif self._state == self._say:
            end = len(text)
        else:
            return super()._read_plain(text, at)
        if end > at:
            self._say(text[at:end])
        return end

    # --- what is said

    def _begin_content(self, c: str) -> None:
        """Behind the thought."""
        if c.isspace():
            self._hand_out(c)
        elif not self._tools:
            self._state = self._say
            self._say(c)
        elif c in "{[":
            self._open("", "all")
            self._lead(c)
        else:
            self._state = self._look
            self._look(c)

    def _look(self, c: str) -> None:
        """Looks for marks."""
        is_quiet, is_line = self._fence == "other", self._before == "\n"
        if c == "<" and self._before != "`" and not is_quiet:
            self._held, self._state = c, self._match_tag
        elif c == "*" and is_line and not is_quiet:
            self._held, self._state = c, self._match_label
        elif c == "`" and is_line:
            self._held, self._state = c, self._match_fence
        else:
            self._say(c)

    def _match_tag(self, c: str) -> None:
        self._held += c
        if self._held in TAGS:
            self._open(self._held, "tag")
        elif self._held in CLOSING_TAGS:
            self.has_called |= self._is_over
            self._unhold()
        elif not any(tag.startswith(self._held) for tag in TAGS + CLOSING_TAGS):
            self._unhold(c)

    def _match_label(self, c: str) -> None:
        self._held += c
        if self._held == LABEL:
            self._held, self._state = "", self._look
            self._say("")
            self._label, self._before = [self._visible(LABEL, self._content)], "*"
        elif not LABEL.startswith(self._held):
            self._unhold(c)

    def _match_fence(self, c: str) -> None:
        self._held += c
        n = len(self._held)
        if n <= len(FENCE):
            if c != "`":
                self._unhold(c)
            return
        if (c.isalnum() or c in "_+-#.") and n <= LONGEST_LANGUAGE:
            return
        fence = self._held[:-1]
        language = fence.removeprefix(FENCE).lower()
        begins = not self._fence or (self._fence == "json" and language)
        if begins and language in LANGUAGES:
            self._open(fence, "fence")
            self._input.append((c, 0))
            return
        self._unhold(c)
        if begins:
            self._fence, self._is_fence_line = "other", True
        elif not language:
            self._fence = ""

    def _unhold(self, c: str = "") -> None:
        """What was held is said; `c`, the last of it, is looked at again."""
        text = self._held.removesuffix(c)
        self._held, self._state = "", self._look
        self._say(text)
        self._input.append((c, 0))

    def _say(self, text: str) -> None:
        self._before = text[-1:] or self._before
        if self._is_fence_line and (end := FENCE_LINE_END.search(text)):
            self._is_fence_line = False
            if end[0] == "`":  # code within a line
                self._fence = ""
        visible = self._visible(text, self._content)
        if self._label and text.isspace():
            self._label.append(visible)
        else:
            self._said += () if self._is_over else (*self._label, visible)
            self._label = []

    # --- what may be calls

    def _open(self, mark: str, kind: str) -> None:
        self._block = Block(mark, kind)
        self._held, self._state = "", self._lead

    def _lead(self, c: str) -> None:
        """Between a mark and the value."""
        block = self._of_block(c)
        if c in "{[":
            self._state = self._find_end
            block.value.push(c)
        elif not c.isspace():
            self._refuse()

    def _find_end(self, c: str) -> None:
        """Within the value."""
        block = self._of_block(c)
        is_whole = block.value.push(c)
        if is_whole is None:
            return
        calls = read_calls("".join(block.text), self._tools) if is_whole else None
        if calls is None:
            self._refuse()
            return
        block.calls = calls
        if block.kind == "tag":
            self._close()
        else:
            self._state = self._close_fence if block.kind == "fence" else self._expect_end

    def _close_fence(self, c: str) -> None:
        """Behind the value in a fence. What else stands there makes it no call, unless the fence is never closed."""
        block = self._of_block(c)
        if c == "`" and (block.ticks or not block.has_more or block.text[-2] == "\n"):
            block.ticks += 1
            if block.ticks == len(FENCE):
                self._refuse() if block.has_more else self._close()
        else:
            block.has_more |= block.ticks > 0 or not c.isspace()
            block.ticks = 0

    def _expect_end(self, c: str) -> None:
        """Behind the value that must be all that is said."""
        self._of_block(c)
        if not c.isspace():
            self._refuse()

    def _of_block(self, c: str) -> Block:
        """The block, with the next character of it."""
        assert self._block is not None
        self._block.text.append(c)
        return self._block

    def _refuse(self) -> None:
        """The block holds no calls: its mark is said, the rest is read again."""
        block, self._block = self._block, None
        assert block is not None
        self._state = self._look
        self._say(block.mark)
        if block.kind == "fence":
            self._fence, self._is_fence_line = "json", True
        self._input.append(("".join(block.text), 0))

    def _close(self) -> None:
        """The block holds calls."""
        block, self._block = self._block, None
        assert block is not None
        self._hand_out(block.mark + "".join(block.text))
        self._label, self._before, self._state = [], block.text[-1], self._look
        if block.kind == "fence":
            self._fence = ""
        self.has_called |= block.kind != "tag"
        for call in block.calls:
            if call.name in self._tools:
                self._calls.append(call)
            elif not self._is_over:  # no_tool
                self._said.append(f"\n{read_arguments(call.arguments)['reason']}")
        self._is_over = True
