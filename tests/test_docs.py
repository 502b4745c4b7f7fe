"""The Python in README and docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.name)
def test_code_in_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS[page]:
        exec(compile(block, str(page), "exec"), names)


def test_no_figure_is_missing():
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
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
