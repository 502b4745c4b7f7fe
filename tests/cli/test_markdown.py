"""Markdown that comes in pieces."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from heronry.cli.markdown import print_markdown, split_blocks

TEXT = """\
# A *title*

The **first** line
and the second.

```python
a = 1

b = 2
```

1. one
2. two
"""


def shown(pieces) -> list[str]:
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    print_markdown(console, pieces)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_it_is_cut_at_empty_lines_outside_of_code():
    assert split_blocks("a\nb\n\n\nc") == ["a\nb\n", "c"]
    assert split_blocks("```\na\n\nb\n```\n\nc\n\n") == ["```\na\n\nb\n```\n", "c\n", ""]
    assert split_blocks("") == [""]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_same_however_it_comes(size):
    lines = shown(TEXT[i : i + size] for i in range(0, len(TEXT), size))
    text = "\n".join(lines)
    assert "A title" in text
    assert "The first line\nand the second." in text
    assert "a = 1\n\n" in text.replace(" a", "a").replace(" b", "b")
    assert "1 one\n 2 two" in text
    for mark in ("**", "```", "# "):
        assert mark not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>I think.</think> <b>You</b>", "<think>I think.</think> <b>You</b>"),
        ("<div>\nall\n</div>", "<div>\nall\n</div>"),
        ("<!-- a --> b", "<!-- a --> b"),
        ("[x]: http://a.b", "[x]: http://a.b"),
        ("[here](http://a.b)", "here (http://a.b)"),
    ],
)
def test_nothing_that_was_written_is_hidden(text, expected):
    assert "\n".join(shown([text])).strip() == expected
