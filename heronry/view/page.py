"""Pictures as files: .png, .svg, or one .html page with everything in it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import atomic_write

if TYPE_CHECKING:
    from .views import Picture

KINDS = (".png", ".svg", ".html", ".gif")
DPI = 100
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 1rem; }
figure { margin: 2rem 0; }
figure div { overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: #444; margin-top: .5rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
@media (max-width: 800px) { img { max-width: none; width: 800px; } }
"""


def write_pictures(
    pictures: Sequence[Picture],
    path: Path,
    title: str,
    about: str,
    table: Sequence[Sequence[str]] = (),
    data: Any = None,
) -> None:
    """Writes pictures to one file, of the kind that its ending names.

    Args:
        pictures: a .png or .svg takes one, a .gif one that is animated, an .html page any number.
        title, about: of the page; `about` is shown as it is.
        table: rows of cells for the page, the first one with the headings.
        data: goes into the page as JSON, in `<script type="application/json" id="data">`.

    Raises:
        InputError: another ending, several pictures for one that takes one, or no animation.
    """
    kind = check_ending(path)
    if kind == ".html":
        content = _page(pictures, title, about, table, data).encode(
            errors="replace"
        )  # names of files may hold any bytes
    elif len(pictures) != 1:
        raise InputError(f"{path}: a {kind} holds one picture, not {len(pictures)}; write an .html page")
    elif kind == ".gif":
        if pictures[0].animation is None:
            raise InputError(f"{path}: nothing moves in this picture; write a .png, an .svg or an .html page")
        content = pictures[0].animation
    else:
        content = _image(pictures[0], kind[1:])
    with atomic_write(path) as part:
        part.write_bytes(content)


def check_ending(path: Path) -> str:
    """The ending, in small letters; InputError if nothing is written of that kind."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{path}: unknown ending; pictures are written as {', '.join(KINDS)}")
    return kind


def _image(picture: Picture, kind: str) -> bytes:
    file = io.BytesIO()
    picture.figure.savefig(file, format=kind, dpi=DPI)
    return file.getvalue()


def _page(
    pictures: Sequence[Picture], title: str, about: str, table: Sequence[Sequence[str]] = (), data: Any = None
) -> str:
    parts = [_table(table)] if table else []
    for picture in pictures:
        images = [_embedded(_image(picture, "png"), "png", picture.caption)]
        if picture.animation is not None:
            images.append(_embedded(picture.animation, "gif", "animated: " + picture.caption))
        images = [f"<div>{image}</div>" for image in images]  # wider than a phone, so that the labels stay readable
        parts.append(f"<figure>{''.join(images)}<figcaption>{html.escape(picture.caption)}</figcaption></figure>")
    if data is not None:  # "</script>" in a text would end it
        content = json.dumps(data).replace("<", "\\u003c")
        parts.append(f'<script type="application/json" id="data">{content}</script>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><pre>{html.escape(about)}</pre>{''.join(parts)}</body></html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    kinds = ["th", *["td"] * (len(rows) - 1)]
    lines = (
        "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in zip(kinds, rows, strict=True)
    )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _embedded(image: bytes, kind: str, alt: str) -> str:
    data = base64.b64encode(image).decode()
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">'
