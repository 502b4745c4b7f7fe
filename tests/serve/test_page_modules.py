"""The chat page's modules that know no server: Markdown and the tree of a conversation, in a real browser."""

from __future__ import annotations

import json
import random
from html import escape

import pytest
from browser import open_browser

from heronry.serve.page import FOLDER, TYPES

LINK = '<a href="{0}" rel="noopener noreferrer nofollow" target="_blank">{1}</a>'


@pytest.fixture(scope="module")
def page():
    def answer(route):
        file = FOLDER / route.request.url.rpartition("/")[2]
        route.fulfill(path=file, content_type=TYPES[file.suffix])

    with open_browser() as browser:
        page = browser.new_page()
        page.route("**/*", answer)
        page.goto("http://heronry.test/page/tree.js")  # any file of the same origin
        yield page


@pytest.fixture(scope="module")
def markdown(page):
    """Text -> the HTML of its nodes."""
    page.evaluate(
        """async () => {
            const { Growing, render } = await import("/page/markdown.js");
            const html = (nodes) => {
                const root = document.createElement("div");
                root.append(...nodes);
                return root.innerHTML;
            };
            window.whole = (text) => html(render(text));
            window.grown = (pieces) => {
                const root = document.createElement("div");
                const growing = new Growing(root);
                for (const piece of pieces) growing.add(piece);
                return root.innerHTML;
            };
        }"""
    )
    return lambda text: page.evaluate("text => whole(text)", text)


def code(text: str, language: str = "") -> str:
    copy = '<button type="button" class="copy" data-copy="code">Copy</button>'
    head = f'<div class="head"><span>{language}</span>{copy}</div>'
    return f'<div class="code">{head}<pre tabindex="0"><code>{escape(text, quote=False)}</code></pre></div>'


CASES = [
    ("", ""),
    ("a", "<p>a</p>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("# One\n###### Six ##\n####### seven\n#none", "<h1>One</h1><h6>Six</h6><p>####### seven<br>#none</p>"),
    ("a\n---\n***\n_ _ _", "<p>a</p><hr><hr><hr>"),
    ("> a\n> b\n>\n> > c", "<blockquote><p>a<br>b</p><blockquote><p>c</p></blockquote></blockquote>"),
    ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    ("- a\n  - b\n    1. c\n- d", "<ul><li>a<ul><li>b<ol><li>c</li></ol></li></ul></li><li>d</li></ul>"),
    ("3. a\n  - b\n4. c", '<ol start="3"><li>a<ul><li>b</li></ul></li><li>c</li></ol>'),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("1. a\n\n   more\n2. b", "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>"),
    ("- a\nlazy\n\nb", "<ul><li>a<br>lazy</li></ul><p>b</p>"),
    ("- a\n1. b\n1) c", "<ul><li>a</li></ul><ol><li>b</li></ol><ol><li>c</li></ol>"),
    ("- a\n  ```\n  x\n\n  y\n  ```\n- b", f"<ul><li>a{code('x' + chr(10) + chr(10) + 'y')}</li><li>b</li></ul>"),
    ("-", "<ul><li></li></ul>"),
    ("born in\n1984. Then", "<p>born in<br>1984. Then</p>"),
    ("```py\n<b> *a*\n```\nb", code("<b> *a*", "py") + "<p>b</p>"),
    ("~~~\n```\n~~~", code("```")),
    ("```\nopen", code("open")),
    ("````\n```\n````", code("```")),
    ("``` \nx\n```", code("x")),
    ("a `<b>` `` ` `` ` c", "<p>a <code>&lt;b&gt;</code> <code>`</code> ` c</p>"),
    ("*a* _b_ **c** __d__ ***e*** ~~f~~", "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> "
     "<em><strong>e</strong></em> <del>f</del></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("snake_case_name 2 * 3 * 4 ~5~", "<p>snake_case_name 2 * 3 * 4 ~5~</p>"),
    ("**open *and", "<p>**open *and</p>"),
    ("*a **b*", "<p>*a *<em>b</em></p>"),
    (r"\*a\* \\ \[x\](y)", r"<p>*a* \ [x](y)</p>"),
    ("a  \nb", "<p>a<br>b</p>"),
    (
        "a | b\n-|:-:\n1 | `x|y`\n2 \\| 3",
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th class="center">b</th></tr></thead><tbody>'
        '<tr><td>1</td><td class="center"><code>x|y</code></td></tr>'
        '<tr><td>2 | 3</td><td class="center"></td></tr></tbody></table></div>',
    ),
    ("a | b\nc", "<p>a | b<br>c</p>"),
    ("[*a*](https://b.c/d_(e))", f"<p>{LINK.format('https://b.c/d_(e)', '<em>a</em>')}</p>"),
    ('[a](http://b.c "title")', f"<p>{LINK.format('http://b.c', 'a')}</p>"),
    ("(see https://a.b/c_d?e=f).", f"<p>(see {LINK.format('https://a.b/c_d?e=f', 'https://a.b/c_d?e=f')}).</p>"),
    ("xhttps://a.b", "<p>xhttps://a.b</p>"),
    ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
    ("[a](JaVaScRiPt:x) [b](data:text/html,x) [c](/x) [d](//x.y)",
     "<p>[a](JaVaScRiPt:x) [b](data:text/html,x) [c](/x) [d](//x.y)</p>"),
    ("![alt](http://a.b/c.png)", f"<p>{LINK.format('http://a.b/c.png', 'alt')}</p>"),
    ("![](http://a.b/c.png)", f"<p>{LINK.format('http://a.b/c.png', 'http://a.b/c.png')}</p>"),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
    ('[a](http://b" onclick="x)', "<p>[a](" + LINK.format("http://b", "http://b") + '" onclick="x)</p>'),
    ("&lt; &amp;", "<p>&amp;lt; &amp;amp;</p>"),
]  # fmt: skip


def test_markdown(markdown):
    for text, html in CASES:
        assert markdown(text) == html, text


def test_markdown_in_pieces_is_the_whole(page, markdown):
    rng = random.Random(1)
    texts = [text for text, _ in CASES] + ["\n\n".join(text for text, _ in CASES), "\r\n".join(["a", "- b", "", "c"])]
    for text in texts:
        for most in (1, 3, 40):
            cuts, at = [], 0
            while at < len(text):
                step = rng.randint(1, most)
                cuts.append(text[at : at + step])
                at += step
            assert page.evaluate("pieces => grown(pieces)", cuts) == markdown(text), cuts


def test_markdown_of_random_signs_in_pieces_is_the_whole(page, markdown):
    rng = random.Random(2)
    parts = ["\n", "\n", "\n\n", " ", "  ", "    ", "- ", "1. ", "2) ", "> ", "# ", "```", "~~~\n", "|", "-|-", "---",
             "*", "**", "_", "`", "[a](http://b)", "\\", "a", "b c", "~~", "![", "\t"]  # fmt: skip
    texts = [[rng.choice(parts) for _ in range(rng.randint(1, 24))] for _ in range(600)]
    found = page.evaluate("texts => texts.map((pieces) => [grown(pieces), whole(pieces.join(''))])", texts)
    for pieces, (grown, whole) in zip(texts, found, strict=True):
        assert grown == whole, pieces


def test_markdown_takes_time_in_proportion(page, markdown):
    """Of what models and attackers repeat: none may stop the page."""
    texts = ["*", "_a", "`", "`` ` ", "[", "[a](", "![", "> ", "- ", "  - ", "|", "a|", "# ", " ", "\\", "http://", "(",
             "~~", "**a ", "a\n", "- a\n", "1. ", "\n", "[a](http://b \"", "#", "-\n", "|-"]  # fmt: skip
    slow = page.evaluate(
        """texts => texts.map((text) => {
            const from = performance.now();
            whole(text.repeat(10000));
            return [text, performance.now() - from];
        }).filter(([, ms]) => ms > 1000)""",
        texts,
    )
    assert slow == []


def test_a_long_code_block_grows_in_place(page, markdown):
    same = page.evaluate(
        """async () => {
            const { Growing } = await import("/page/markdown.js");
            const root = document.createElement("div");
            const growing = new Growing(root);
            growing.add("first\\n\\n```py\\na = 1\\n");
            const [p, code] = root.children;
            for (let i = 0; i < 50; i++) growing.add(`b${i} = 2\\n`);
            return [p === root.children[0], code === root.children[1], code.querySelector("code").textContent.length];
        }"""
    )
    assert same == [True, True, 5 + sum(len(f"\nb{i} = 2") for i in range(50))]


MESSAGES = [
    {"id": "u1", "parent": None},
    {"id": "a1", "parent": "u1"},
    {"id": "a2", "parent": "u1"},
    {"id": "u2", "parent": "a1"},
    {"id": "a3", "parent": "u2"},
    {"id": "v1", "parent": None},
]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("tree.path('a3').map((x) => x.id)", ["u1", "a1", "u2", "a3"]),
        ("tree.path('gone')", []),
        ("tree.path(null)", []),
        ("tree.leaf(null)", "v1"),
        ("tree.leaf('u1')", "a2"),
        ("(tree.path('a3'), tree.leaf('u1'))", "a3"),  # the branch that was shown last
        ("tree.siblings('a2')", ["a1", "a2"]),
        ("tree.siblings('v1')", ["u1", "v1"]),
        ("tree.branch('a1')", ["a1", "u2", "a3"]),
        ("[tree.remove('a1'), tree.siblings('a2'), tree.messages.size]", ["a2", ["a2"], 3]),
        ("[tree.remove('u2'), tree.below('a1')]", ["a1", []]),
        ("[tree.remove('v1')]", ["a2"]),
        ("(tree.remove('v1'), tree.remove('u1'))", None),
        ("(tree.put({id: 'a1', parent: 'u1', content: 'new'}), tree.siblings('a1').length)", 2),
        ("new Tree([{id: 'x', parent: 'y'}, {id: 'y', parent: 'x'}]).path('x').length", 2),  # a circle ends
    ],
)
def test_tree(page, what, expected):
    script = f"import('/page/tree.js').then(({{ Tree }}) => {{ const tree = new Tree({json.dumps(MESSAGES)}); "
    assert page.evaluate(f"{script} return {what}; }})") == expected
