"""The documentation site: built strictly, whole, and readable without a network."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown import Markdown
from py_mini_racer import MiniRacer

from heronry.cli.app import COMMAND_NAMES
from heronry.errors import InputError
from heronry.text.chat_templates import ROLES, TEMPLATES, render
from heronry.text.thinking import THINKING

tomllib = pytest.importorskip("tomllib", reason="zensical needs Python 3.11")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(DOCS)])}
PUBLIC = ("", ".models", ".engine", ".formats", ".checkpoint", ".convert", ".adapters")  # rooms that list their names


def build(project: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site of a folder with a zensical.toml, as `make site` does."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=project, env=ENVIRONMENT, capture_output=True, text=True)


class Page(HTMLParser):
    """The tags of a page, and the text of its article."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def links(self, *names: str) -> Iterator[tuple[str, str]]:
        for tag, attributes in self.tags:
            yield from ((tag, attributes[name]) for name in names if name in attributes)


@pytest.fixture(scope="module")
def site() -> Path:
    result = build(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return ROOT / "build" / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """The Markdown files under docs/."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("[a page](missing.md)", "page does not exist"),
        ("[a place](index.md#missing)", "anchor does not exist"),
        ("::: heronry.missing", "heronry.missing"),
        (r"A formula $\foo_t$", r'the formula \foo_t: 0: Unknown command "\foo"'),
    ],
)
def test_a_mistake_fails_the_build(page, complaint, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A title\n\n{page}\n")
    (tmp_path / "zensical.toml").write_text(
        '[project]\nsite_name = "x"\n[project.plugins.mkdocstrings]\n[project.markdown_extensions]\n'
        'pymdownx.arithmatex.generic = true\n"site_build:Formulas" = {}\n'
    )
    result = build(tmp_path)
    assert result.returncode != 0
    assert complaint in re.sub(r"\x1b\[[0-9;]*m", "", result.stdout + result.stderr)


def test_navigation_and_llms_txt_have_every_page(site, sources):
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from files(part)

    assert sorted(files(CONFIG["nav"])) == sources
    urls = re.findall(r"\]\(<?([^)>]+)>?\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert sorted(url.removeprefix(CONFIG["site_url"]) for url in urls) == sources
    assert all((site / source).is_file() for source in sources)  # what llms.txt leads to


def test_links_and_anchors_exist(site, pages):
    for path, page in pages.items():
        for tag, link in page.links("href", "src", "srcset"):
            local = link.removeprefix(CONFIG["site_url"])
            parts = urlsplit(local)
            if parts.scheme or parts.netloc or path.name == "404.html":  # which is shown for any address
                continue
            folder = path.parent if local == link else site
            target = (folder / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(site)}: <{tag}> leads to {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids, f"{path.relative_to(site)} leads to {link}"


def test_an_id_is_one_place(pages, site):
    for path, page in pages.items():
        assert not [name for name, times in Counter(page.ids).items() if times > 1], path.relative_to(site)


def test_nothing_comes_from_another_host(site, pages):
    for path, page in pages.items():
        links = [*page.links("src", "srcset", "poster", "data")]
        for tag, attributes in page.tags:
            if tag == "link" and attributes["rel"] not in ("canonical", "prev", "next", "alternate", "describedby"):
                links.append((tag, attributes["href"]))
            # what the theme's script fetches more for: diagrams, galleries, runnable code, the stars of a repository
            assert not re.search(r"\b(mermaid|glightbox|pyodide)\b", attributes.get("class", "")), path
            assert attributes.get("data-md-component") != "source", path
        assert not [link for link in links if urlsplit(link[1]).netloc], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_search_works_without_a_server(site, pages, sources):
    text = (site / "search.json").read_text(encoding="utf-8")
    assert text in (site / "search.js").read_text(encoding="utf-8")  # what pages opened from files read
    places = [item["location"] for item in json.loads(text)["items"]]
    assert {source.removesuffix(".md") + ".html" for source in sources} <= {place.partition("#")[0] for place in places}
    for place in places:
        file, _, anchor = place.partition("#")
        assert not anchor or unquote(anchor) in pages[site / file].ids, place

    (worker,) = site.glob("assets/javascripts/workers/search*.js")
    with MiniRacer() as engine:
        engine.eval("let answer; const self = { postMessage: (message) => { answer = message } };")
        engine.eval(worker.read_text(encoding="utf-8"))
        engine.eval(f"self.onmessage({{ data: {{ type: 0, data: {text} }} }}); 0")

        def search(words: str) -> list[str]:
            engine.eval(f"self.onmessage({{ data: {{ type: 2, data: {{ input: {json.dumps(words)} }} }} }}); 0")
            return [
                places[i] for i in json.loads(engine.eval("JSON.stringify(answer.data.items.map((item) => item.id))"))
            ]

        assert "view.html#decay" in search("half-life")
        assert "zh/index.html" in search("状态")


def test_pages_say_their_language(pages, site):
    for path, page in pages.items():
        expected = "zh" if path.is_relative_to(site / "zh") else "en"
        assert [x["lang"] for tag, x in page.tags if tag == "html"] == [expected], path


def test_the_language_is_changed_on_the_same_page(pages, site):
    translations = CONFIG["extra"]["translations"]
    assert {site / page for page in translations.values()} == {
        page for page in pages if page.is_relative_to(site / "zh")
    }
    pairs = [*translations.items(), ("view.html", "zh/index.html")]  # one without a translation
    for english, chinese in pairs:
        for path in (english, chinese) if english in translations else (english,):
            links = [x for _, x in pages[site / path].tags if "hreflang" in x]
            assert len(links) == 4  # in the head and in the menu
            for link in links:
                target = chinese if link["hreflang"] == "zh" else english if english in translations else "index.html"
                assert ((site / path).parent / link["href"]).resolve() == site / target


def test_pages_fit_a_phone(pages):
    for path, page in pages.items():
        viewports = [x["content"] for tag, x in page.tags if tag == "meta" and x.get("name") == "viewport"]
        assert viewports == ["width=device-width,initial-scale=1"], path
        for tag, x in page.tags:
            assert tag == "mspace" or "width" not in x, path  # a space in a formula
            assert not re.search(r"width:\s*\d+px", x.get("style", "")), path


@pytest.mark.parametrize("room", PUBLIC)
def test_reference_has_every_public_name(room, pages, site):
    module = importlib.import_module(f"heronry{room}")
    ids = pages[site / "reference" / f"{room.removeprefix('.') or 'heronry'}.html"].ids
    for name in module.__all__:
        home = getattr(getattr(module, name), "__module__", None) or ""
        if home.startswith("heronry"):  # a class or function, no constant
            assert {f"heronry{room}.{name}", f"{home}.{name}"} & {*ids}, name


def test_reference_has_every_command(pages, site):
    assert {f"heronry-{name}" for name in COMMAND_NAMES} <= {*pages[site / "reference" / "commands.html"].ids}


# --- prompt-formats.md


@pytest.fixture(scope="module")
def script(site) -> Iterator[MiniRacer]:
    """The page's script with the page's data, without a document."""
    page = (site / "prompt-formats.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="prompt-formats-data">(.*?)</script>', page, re.DOTALL)[1]
    with MiniRacer() as engine:
        engine.eval((site / "assets" / "prompt-formats.js").read_text(encoding="utf-8"))
        engine.eval(f"const renderer = promptFormats({data})")
        yield engine


def rendered_there(script: MiniRacer, name: str, messages: list[dict[str, str]], think: str | None) -> str | None:
    call = f"renderer.render({json.dumps(name)}, {json.dumps(messages)}, {json.dumps(think)})"
    return json.loads(
        script.eval(f"(() => {{ try {{ return JSON.stringify({call}) }} catch (e) {{ return 'null' }} }})()")
    )


def rendered_here(name: str, messages: list[dict[str, str]], think: str | None) -> str | None:
    """The prompt; None where a message is refused."""
    try:
        return render(messages, name, think=think)
    except InputError:
        return None


PARTS = ["a", "\n", "\n\n", "\r\n", "b\r\n\nc", " ", "\t", "\x1c", "\x85", "\ufeff", "\u3000", "鹭", "🪶", "\\"]
PARTS += ["$&", "{user}", "{input}", "{system}", "\n\nUser:", "<think", ">\n</think", "</script>", "✿"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)
CONTENTS = st.fixed_dictionaries({"content": TEXTS}, optional={"input": TEXTS})
ORDERS = st.sampled_from([["user"], ["system", "user"], ["user", "assistant"], ["system", "user", "assistant", "user"]])
CONVERSATIONS = (ORDERS | st.lists(st.sampled_from(ROLES), max_size=4)).flatmap(
    lambda roles: st.tuples(*(CONTENTS.map(lambda content, role=role: {"role": role, **content}) for role in roles))
)


THOUGHTS = st.sampled_from([None, *(name for name in THINKING if not name.startswith("chinese"))])


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(TEMPLATES)), messages=CONVERSATIONS, think=THOUGHTS)
def test_page_renders_conversations_as_heronry_does(script, name, messages, think):
    assert rendered_there(script, name, [*messages], think) == rendered_here(name, [*messages], think)


@pytest.mark.parametrize("name", TEMPLATES)
def test_page_renders_a_whole_conversation(script, name):
    for stop in TEMPLATES[name].stops:
        messages = [
            {"role": "system", "content": "You are\n\n\nkind. "},
            {"role": "user", "content": " Sum up:\r\n", "input": "a heron\n\nstands"},
            {"role": "assistant", "content": f"It stands.\n\nTall.{stop} no"},
            {"role": "user", "content": "And 鹭?"},
        ]
        for n in range(1, 5):
            assert (
                rendered_there(script, name, messages[:n], None) == rendered_here(name, messages[:n], None) is not None
            )


def test_guide_names_every_template():
    table = re.findall(r"^\| (`.*?`) \| .* \| .* \|$", (DOCS / "guide.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = re.findall(r"`([a-z0-9-]+)`", " ".join(table))
    assert set(TEMPLATES) <= set(names)


# --- docs/site_build.py


@pytest.fixture
def site_build(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("site_build")


def test_formulas_become_mathml(site_build):
    extensions = ["pymdownx.arithmatex", site_build.Formulas()]
    convert = Markdown(extensions=extensions, extension_configs={"pymdownx.arithmatex": {"generic": True}}).convert
    html = convert("$x_t$ for 5$ and $HOME\n\n$$\n\\begin{aligned} a &< b \\\\ c &= d \\end{aligned}\n$$\n")
    assert "<math><msub><mi>x</mi><mi>t</mi></msub></math></span> for 5$ and $HOME" in html
    assert '<math display="block"><mtable' in html
    assert "<mo>&lt;</mo><mi>b</mi>" in html


def test_fields_in_docstrings_become_a_list(site_build):
    text = "What it is.\nrow, column: where,\n    in the table\nsize: how large\nNote: no field\n"
    listed = "What it is.\n\n- `row, column`: where,\n    in the table\n- `size`: how large\nNote: no field"
    assert site_build.list_fields(text, {"row", "column", "size"}) == listed


def test_links_of_the_changelog_lead_to_pages(site_build, monkeypatch, tmp_path):
    (tmp_path / "A.md").write_text("[a](docs/view.md#decay) [b](LICENSE) [c](https://x.org) [d](#e)", encoding="utf-8")
    monkeypatch.setattr(site_build, "ROOT", tmp_path)
    linked = f"[a](view.md#decay) [b]({site_build.REPOSITORY}LICENSE) [c](https://x.org) [d](#e)"
    assert site_build.repository_page("A.md") == linked
