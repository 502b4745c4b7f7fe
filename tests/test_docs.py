"""The Python in README and docs runs as it stands; its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from heronry.cli.app import app
from heronry.train.config import parse_arguments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for page, text in TEXTS.items()}
CODE = re.compile(r"^```([^\n]*)\n(.*?)^```|((?:^ {4}.*\n)+)", re.M | re.S)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=name_of)
def test_code_in_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS[page]:
        exec(compile(block, str(page), "exec"), names)


def test_quoted_code_is_as_in_its_file():
    for page in PAGES:
        for file, code in re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```', TEXTS[page], re.M | re.S):
            assert code in (ROOT / file).read_text(encoding="utf-8"), f"{name_of(page)}: {file} has no\n{code}"


def commands_in(page: Path) -> list[list[str]]:
    """The words of every `heronry ...` in the code of a page, without the first."""
    blocks = [fenced or indented for kind, fenced, indented in CODE.findall(TEXTS[page]) if kind in ("", "sh", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.strip().startswith("heronry ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_in(page)], ids=name_of)
def test_commands_in_docs_are_accepted(page):
    group = typer.main.get_command(app)
    for name, *words in commands_in(page):
        group.commands[name].make_context(name, [*words])
        if name == "train" and not words[0].endswith(".toml"):
            parse_arguments(words)


def test_no_figure_is_missing():
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", TEXTS[page], flags=re.S)
        words = re.findall(r"\b(DECODE|PEER|LIMIT|STEPS|TOKENS|EPOCHS|MINUTES|BPB|SAMPLE)\b", prose)
        assert not words, f"{page.name} has no figure for {words}"


REPOSITORY = r"https://github\.com/heronry/heronry/(?:blob|tree)/main/"  # how README links, for PyPI


def test_links_in_docs_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for target in re.findall(rf"\]\({REPOSITORY}([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name} links to {target}"


def test_links_in_the_readme_work_on_pypi():
    assert not re.findall(r"\]\((?!https:)", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    answers = text[text.index("### Where does it live?") : text.index("## C++")]
    for name in re.findall(r"`([a-z0-9_/]+(?:\.py|\.cpp|\.md|/))`", answers):
        assert (ROOT / "heronry" / name).exists() or "wkv8" in name, name
