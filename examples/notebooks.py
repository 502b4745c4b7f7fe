"""The pages of "How it works" as Jupyter notebooks, to change the cells and run them again.

    pip install 'heronry[docs,plots]' jupyter
    python examples/notebooks.py notebooks           # writes notebooks/*.ipynb, without results
    jupyter lab notebooks

The pages themselves, docs/how/*.md, are the source: jupytext takes their Python for cells and the rest for text.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import jupytext

PAGES = Path(__file__).parent.parent / "docs" / "how"
SITE = "https://heronry.github.io/heronry/"
PICTURES = "https://github.com/heronry/heronry/raw/main/docs/"


def as_notebook(page: Path) -> str:
    """A page as the text of a notebook. Code that is quoted from a file stays text, and links lead to the site."""
    text = re.sub(r'^```python title="(.*?)"$', r"`\1`:\n\n```py", page.read_text(encoding="utf-8"), flags=re.M)
    text = re.sub(r"\]\(\.\./([\w-]+\.png)\)", rf"]({PICTURES}\1)", text)
    text = re.sub(r"\]\(\.\./([\w-]+)\.md(#[\w-]+)?\)", rf"]({SITE}\1/\2)", text)
    text = re.sub(r"\]\((\w+)\.md(#[\w-]+)?\)", r"](\1.ipynb\2)", text)
    notebook = jupytext.reads(text, "md")
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    written: str = jupytext.writes(notebook, "ipynb")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder, which is made if it is not there")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for page in sorted(PAGES.glob("*.md")):
        target = out / f"{page.stem}.ipynb"
        target.write_text(as_notebook(page), encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main()
