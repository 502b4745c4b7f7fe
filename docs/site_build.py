"""What the site computes while it is built: pages made of the program, formulas as MathML, lists of fields."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import griffe
import math_core
import typer
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/heronry/heronry/blob/main/"
OTHER_FILES = {  # names as they were published, besides those of `heronry list`
    "RWKV-4-Pile-1B5-20220903-8040.pth": "rwkv4",
    "RWKV-4-Raven-7B-v12-Eng98%-Other2%-20230521-ctx8192.pth": "rwkv4",
    "RWKV-4-World-7B-v1-20230626-ctx4096.pth": "rwkv4",
    "RWKV-5-World-3B-v2-20231113-ctx4096.pth": "rwkv5",
    "rwkv7-g0a-7.2b-20250829-ctx4096.pth": "rwkv7",
}
WHITE_SPACE = "".join(c for c in map(chr, range(0x110000)) if c.isspace())  # what str.strip takes away


def commands() -> str:
    """`heronry --help` and the help of every command, as a terminal of 80 columns shows them."""
    from heronry.cli.app import app

    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="heronry", terminal_width=80)
    texts = [f"```text\n{group.get_help(context)}\n```"]
    for name, command in group.commands.items():
        inner = typer.Context(command, parent=context, info_name=name, terminal_width=80)
        texts.append(f"## heronry {name}\n\n```text\n{command.get_help(inner)}\n```")
    return "\n\n".join(texts)


def templates() -> dict[str, Any]:
    """The chat templates by name, with the fields that decide what a conversation looks like."""
    from heronry.text.chat_templates import TEMPLATES

    fields = ("turn", "turn_with_input", "system", "separator", "stops", "collapse", "opening", "space", "label")
    return {name: {field: getattr(template, field) for field in fields} for name, template in TEMPLATES.items()}


def embedded_templates() -> str:
    """The data that assets/prompt-formats.js renders with."""
    from heronry.text.thinking import THINKING

    # those in Chinese depend on the question
    thinking = {name: mode._asdict() for name, mode in THINKING.items() if not name.startswith("chinese")}
    parts = {"whiteSpace": WHITE_SPACE, "templates": templates(), "thinking": thinking}
    data = json.dumps(parts).replace("<", "\\u003c")
    return f'<script type="application/json" id="prompt-formats-data">{data}</script>'


def template_choices() -> str:
    """Which template the name of a published file means, as a table."""
    from heronry.catalog import published
    from heronry.text.chat_templates import template_by_name, usual_template

    files = {model.file: model.generation for model in published().values()} | OTHER_FILES
    rows = ["| file | generation | format |", "|---|---|---|"]
    for file, generation in sorted(files.items(), key=lambda item: item[1]):
        name = template_by_name(file) or usual_template(generation, world="world" in file.lower())
        rows.append(f"| {file} | {generation.upper().replace('RWKV', 'RWKV-')} | [`{name}`](#{name}) |")
    return "\n".join(rows)


def template_list() -> str:
    """Every template: its parts as they are, with line breaks as \\n."""
    texts = []
    for name, template in templates().items():
        parts = {"system text": template["system"], "turn": template["turn"]}
        if template["turn_with_input"] is not None:
            parts["turn with an input"] = template["turn_with_input"]
        parts |= {"between an answer and the next turn": template["separator"]}
        rows = [f"| {part} | {quoted(text)} |" for part, text in parts.items()]
        rows.append(f"| an answer ends at | {', '.join(map(quoted, template['stops']))} |")
        lines = "become one" if template["collapse"] else "stay"
        rows.append(f"| empty lines in a message | {lines} |")
        texts.append("\n".join([f"### {name}", "", "| part | text |", "|---|---|", *rows]))
    return "\n\n".join(texts)


def thinking_table() -> str:
    """What an answer begins with in each mode of thinking, and what stands behind the question."""
    from heronry.text.thinking import THINKING

    rows = ["| `think=` | the answer begins with | behind the question |", "|---|---|---|"]
    for name, mode in THINKING.items():
        opening, hint = (quoted(text) if text else "" for text in mode)
        rows.append(f"| `{name}` | {opening} | {hint} |")
    return "\n".join(rows)


def tool_styles() -> str:
    """A conversation with a tool in every style."""
    from heronry.text.chat_templates import render
    from heronry.text.tool_styles import TOOL_STYLES

    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "description": "Weather of a city", "parameters": schema}
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": '{"rain": true}'},
    ]
    texts = []
    for name in TOOL_STYLES:
        text = render(messages, tools=[{"type": "function", "function": function}], tool_style=name)
        texts.append(f"### Tools: {name}\n\n````text\n{text}\n````")
    return "\n\n".join(texts)


def quoted(text: str) -> str:
    """A text with its line breaks as \\n, as code in a table."""
    return "`" + json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|") + "`"


def repository_page(name: str) -> str:
    """A Markdown file of the repository's root, with its links as they are from docs/."""

    def relink(match: re.Match[str]) -> str:
        target = match[1]
        return f"]({target.removeprefix('docs/')})" if target.startswith("docs/") else f"]({REPOSITORY}{target})"

    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", relink, (ROOT / name).read_text(encoding="utf-8"))


class Formulas(Extension):
    """The formulas that pymdownx.arithmatex finds, as MathML: no script renders them, so none is fetched."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(FormulaProcessor(md), "formulas", 1)


class FormulaProcessor(Treeprocessor):
    def run(self, root: ElementTree.Element) -> None:
        """Raises ValueError, which shows the formula and says what is wrong with it."""
        converter = math_core.LatexToMathML(fancy_error=False)
        for element in root.iter():
            if element.get("class") == "arithmatex":
                is_block = element.tag == "div"
                latex = (element.text or "").strip()[2:-2].strip()  # without its brackets
                latex = html.unescape(latex) if is_block else latex  # arithmatex escapes blocks only
                try:
                    formula = converter.convert_with_local_state(latex, displaystyle=is_block)
                except math_core.LatexError as error:
                    raise ValueError(f"the formula {latex}: {error}") from error
                element.text = self.md.htmlStash.store(formula)


class FieldLists(griffe.Extension):
    """Shows the lines "name: what it is" of a docstring as a list, where the name is a parameter or a field."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            names = set(obj.members) | {x.name for x in getattr(obj, "parameters", ())}
            obj.docstring.value = list_fields(obj.docstring.value, names)


def list_fields(text: str, names: set[str]) -> str:
    """The docstring with a bullet before each line that begins with some of the names and a colon."""
    lines: list[str] = []
    for line in text.splitlines():
        match = re.match(r"(\w+(?:, \w+)*): +(.*)", line)
        if match is not None and set(match[1].split(", ")) <= names:
            if lines and lines[-1] and not lines[-1].startswith(("- `", "    ")):
                lines.append("")
            line = f"- `{match[1]}`: {match[2]}"
        lines.append(line)
    return "\n".join(lines)
