"""The chat page at / in a real browser, on a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import torch
from browser import open_browser
from playwright.sync_api import Browser, BrowserContext, Page, expect

from heronry import State
from heronry.serve.page import FILES, POLICY

ASK = "Tell me a story about a dog."
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


class Watch:
    """What a page must never do: complain, break its policy, or call another host.

    refusals: answers of the server that are no success, which the browser tells of, and a test may expect.
    """

    def __init__(self, url: str):
        self.url, self.problems, self.refusals = url, [], []

    def follow(self, page: Page) -> Page:
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._ask)
        return page

    def _hear(self, message) -> None:
        refused = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning"):
            (self.refusals if refused else self.problems).append(message.text)

    def _ask(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(request.url)


@pytest.fixture
def watch(server) -> Watch:
    return Watch(server.url)


@pytest.fixture
def context(browser, server, watch) -> Iterator[BrowserContext]:
    context = browser.new_context(base_url=server.url, viewport={"width": 1180, "height": 800})
    context.set_default_timeout(20_000)
    yield context
    context.close()
    assert watch.problems == []


@pytest.fixture
def page(context, watch) -> Iterator[Page]:
    page = watch.follow(context.new_page())
    page.goto("/")
    expect(page.locator("#box")).to_be_focused()
    yield page
    assert watch.refusals == []


def finish(page: Page) -> None:
    """Waits for the end of an answer."""
    expect(page.locator("article.live")).to_have_count(0)
    expect(page.locator("#stop")).to_be_hidden()


def send(page: Page, text: str = ASK) -> None:
    known = page.locator("article").count()
    page.fill("#box", text)
    page.press("#box", "Enter")
    expect(page.locator("article")).to_have_count(known + 2)
    finish(page)


@contextmanager
def slow_network(page: Page) -> Iterator[None]:
    """16 kB a second."""
    tools = page.context.new_cdp_session(page)
    for speed in (16_384, -1):
        limits = {"offline": False, "latency": 0, "downloadThroughput": speed, "uploadThroughput": -1}
        tools.send("Network.emulateNetworkConditions", limits)
        if speed > 0:
            yield


def shown(page: Page) -> list[str]:
    return page.locator("article .content").evaluate_all(  # innerText leaves out what is not on the screen yet
        """all => all.map((x) => {
            const copy = x.cloneNode(true);
            for (const line of copy.querySelectorAll("br")) line.replaceWith("\\n");
            return [...copy.childNodes].map((block) => block.textContent).join("\\n");
        })"""
    )


def conversation_of(page: Page, http: httpx.Client) -> dict:
    return http.get(f"/v1/conversations/{page.url.partition('#')[2]}").json()


def button(page: Page, name: str, n: int = -1):
    """A button of a message, by default of the last one that has it."""
    return page.locator("article").get_by_role("button", name=name, exact=True).nth(n)


def write(http: httpx.Client, *contents: str) -> str:
    """The id of a conversation that is written by hand: user, assistant, …"""
    [name, parent] = [http.post("/v1/conversations", json={"title": "By hand"}).json()["id"], None]
    for i, content in enumerate(contents):
        body = {"parent": parent, "role": ("user", "assistant")[i % 2], "content": content}
        reply = http.post(f"/v1/conversations/{name}/messages", json=body)
        assert reply.status_code == 201, reply.text
        parent = reply.json()["id"]
    http.post(f"/v1/conversations/{name}", json={"leaf": parent})
    return name


def test_the_files_are_served(http):
    for address, file in FILES.items():
        reply = http.get(address)
        assert reply.content == file.read_bytes()
        assert reply.headers["content-security-policy"] == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        again = http.get(address, headers={"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert http.head("/").headers["content-type"] == "text/html; charset=utf-8"
    assert http.get("/page/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
    for address in ("/page/index.html", "/page/missing.js", "/page/..%2fpage.py"):
        assert http.get(address).status_code == 404
    text = FILES["/"].read_text(encoding="utf-8")
    assert not re.search(
        r"<script(?! type=\"module\" src=)|<style| style=| on\w+=|https?:", text
    )  # all of it is 'self'


def test_sent_streamed_and_there_again(page, http):
    page.evaluate(
        """() => {
            window.lengths = new Set();
            const look = () => lengths.add(document.querySelector(".live .content")?.textContent.length);
            new MutationObserver(look).observe(document.querySelector("#messages"), {childList: true, subtree: true});
        }"""
    )
    with slow_network(page):  # the model may have written it all before the browser looks
        send(page)
    assert len(page.evaluate("[...lengths]")) > 3  # piece by piece
    about = conversation_of(page, http)
    user, answer = about["messages"]
    assert (user["content"], answer["finish_reason"]) == (ASK, "stop")
    texts = shown(page)
    assert texts[0] == ASK
    assert texts[1].split() == answer["content"].split()
    numbers = page.locator(".numbers").inner_text()
    assert f"{answer['tokens_per_second']:.1f} tokens/s · {answer['usage']['completion_tokens']} tokens" in numbers
    assert f"0 of {answer['usage']['prompt_tokens']} prompt tokens cached" in numbers
    assert f"state {answer['state_bytes'] / 1e3:.0f} kB" in numbers
    expect(page.locator("#title")).to_have_text(ASK)
    expect(page.locator("#conversations [aria-current]")).to_have_text(ASK)
    assert page.locator("#said").inner_text().split() == answer["content"].split()  # once, not with every token
    expect(page.locator("#box")).to_be_focused()
    send(page, "And a cat?")
    assert conversation_of(page, http)["messages"][3]["usage"]["cached_tokens"] > 0
    texts = shown(page)
    page.reload()
    expect(page.locator("article")).to_have_count(4)
    assert shown(page) == texts


def test_text_of_a_model_does_nothing(page, watch, http):
    bad = [
        "<img src=x onerror='window.hacked=1'>",
        "<script>window.hacked=1</script>",
        "[a](javascript:window.hacked=1) [b](data:text/html,x) <a href='javascript:window.hacked=1'>c</a>",
        "![](http://example.com/leak.png) ![x](http://example.com/leak.png?q=secret)",
        "[link](https://example.com/a)",
        "`<b>` and\n\n```html\n<iframe src=http://example.com></iframe>\n```",
        "# <svg onload=window.hacked=1>\n\n| <img src=http://example.com> | b |\n|---|---|\n| <b>x</b> | y |",
    ]
    name = write(http, bad[0], "\n\n".join(bad), bad[0], bad[1])
    page.goto(f"/#{name}")
    expect(page.locator("article")).to_have_count(4)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.hacked") is None
    assert page.locator("article").locator("img, script, iframe, svg, b, [onerror], [onload]").count() == 0
    links = page.locator("article a").evaluate_all("all => all.map((a) => [a.href, a.rel, a.target])")
    safe = ["noopener noreferrer nofollow", "_blank"]
    pictures = ["http://example.com/leak.png", "http://example.com/leak.png?q=secret"]
    assert [links[0], links[1]] == [[picture, *safe] for picture in pictures]
    assert ["https://example.com/a", *safe] in links
    assert all(href.startswith(("http://example.com", "https://example.com")) for href, *_ in links)
    assert "<img src=x onerror='window.hacked=1'>" in shown(page)[1]
    page.get_by_role("button", name="New conversation").click()
    page.evaluate("location.hash = '<img src=x onerror=window.hacked=1>'")  # nor does an address
    expect(page.locator("#error")).to_contain_text("there is no conversation")
    assert page.evaluate("window.hacked") is None
    watch.refusals.clear()


def test_a_link_sends_nothing(page, http):
    before = len(http.get("/v1/conversations").json()["data"])
    page.goto("/?q=hello&prompt=hello&send=1")
    page.wait_for_load_state("networkidle")
    assert (page.input_value("#box"), page.locator("article").count()) == ("", 0)
    assert len(http.get("/v1/conversations").json()["data"]) == before


@pytest.mark.slow
def test_stopped_and_continued(page, http):
    endless = {"frequency_penalty": -9, "temperature": 0, "max_tokens": 100_000}  # the same word without end
    name = http.post("/v1/conversations", json={"title": "Long", "settings": endless}).json()["id"]
    page.goto(f"/#{name}")
    expect(page.locator("#title")).to_have_text("Long")
    page.evaluate(
        """() => new MutationObserver(() => {
            if ((document.querySelector(".live .content")?.textContent ?? "").length < 20) return;
            if (document.activeElement.id === "box" && !document.querySelector("#stop").hidden && !window.pressed) {
                window.pressed = true;
                document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
                window.stopped = document.querySelector("article:last-child .content").textContent;
            }
        }).observe(document.querySelector("#messages"), {childList: true, subtree: true})"""
    )
    send(page)
    expect(page.locator(".numbers")).to_contain_text("stopped")
    expect(page.locator(".numbers")).to_contain_text("tokens/s")  # as the server has stored it
    begun = page.evaluate("window.stopped")
    assert len(begun) >= 20
    answer = conversation_of(page, http)["messages"][1]
    assert answer["finish_reason"] == "cancelled"
    assert shown(page)[1].split() == answer["content"].split()  # what was shown stays
    assert "".join(answer["content"].split()).startswith("".join(begun.split()))
    expect(page.locator("#box")).to_be_focused()
    longer = {"frequency_penalty": None, "max_tokens": answer["usage"]["completion_tokens"] + 50}
    http.post(f"/v1/conversations/{name}", json={"settings": longer})
    button(page, "Continue").click()
    expect(page.locator(".numbers")).not_to_contain_text("stopped")
    finish(page)
    user, whole = conversation_of(page, http)["messages"]
    assert whole["id"] == answer["id"]
    assert whole["finish_reason"] in ("stop", "length")
    assert whole["usage"]["completion_tokens"] > answer["usage"]["completion_tokens"]
    assert whole["content"].startswith(answer["content"])
    assert shown(page) == [user["content"], shown(page)[1]]
    assert shown(page)[1].split() == whole["content"].split()


@pytest.mark.slow
def test_branches(page, http):
    send(page)
    first = shown(page)
    button(page, "Retry").click()
    branches = page.locator(".branches")
    expect(branches).to_have_text(["‹2/2›"])
    finish(page)
    page.locator("article.user").hover()
    button(page, "Edit", 0).click()
    page.fill(".edit textarea", "Tell me a story about a cat.")
    page.press(".edit textarea", "Enter")
    expect(page.locator("article.user .content")).to_have_text("Tell me a story about a cat.")
    finish(page)
    expect(branches).to_have_text(["‹2/2›"])
    cat = shown(page)
    button(page, "Previous version").click()
    expect(branches).to_have_text(["‹1/2›", "‹2/2›"])
    assert page.evaluate("document.activeElement.dataset.act") == "after"  # where it can be undone
    button(page, "Previous version").click()
    expect(branches).to_have_text(["‹1/2›", "‹1/2›"])
    assert shown(page) == first
    button(page, "Edit").click()
    page.fill(".edit textarea", "By **hand**")
    button(page, "Save").click()
    expect(branches).to_have_text(["‹1/2›", "‹3/3›"])
    expect(page.locator("article strong")).to_have_text("hand")
    send(page, "And then?")
    page.reload()
    expect(branches).to_have_text(["‹1/2›", "‹3/3›"])
    messages = conversation_of(page, http)["messages"]
    assert [x["role"] for x in messages].count("assistant") == 5
    button(page, "Next version", 0).click()
    expect(branches).to_have_text(["‹2/2›"])
    assert shown(page) == cat
    button(page, "Previous version", 0).click()
    expect(branches).to_have_text(["‹1/2›", "‹3/3›"])  # the branch that was shown last
    page.locator("article").nth(1).hover()
    button(page, "Delete", 1).click()
    expect(page.locator("#ask-title")).to_have_text("Delete this message and the 2 below it?")
    page.locator("#ask .main").click()
    expect(branches).to_have_text(["‹1/2›", "‹2/2›"])
    expect(page.locator("#box")).to_be_focused()
    assert len(conversation_of(page, http)["messages"]) == len(messages) - 3


@pytest.mark.slow
def test_by_keyboard_alone(page, http):
    focused = "[document.activeElement.id, document.activeElement.tagName, document.activeElement.dataset.act]"
    page.keyboard.type("Tell me a story")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("about a dog.")
    page.evaluate(  # Enter that ends the composing of a character sends nothing
        """() => document.querySelector("#box").dispatchEvent(
            new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    )
    assert page.input_value("#box") == "Tell me a story\nabout a dog."
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(2)
    finish(page)
    assert shown(page)[0] == "Tell me a story\nabout a dog."
    page.keyboard.press("ArrowUp")
    expect(page.locator(".edit textarea")).to_be_focused()
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == ["", "BUTTON", "edit"]
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("Tell me a story about a bird.")
    page.keyboard.press("Enter")
    expect(page.locator(".branches")).to_have_text(["‹2/2›"])
    finish(page)
    expect(page.locator("#box")).to_be_focused()
    seen = []
    for _ in range(40 + page.locator("#conversations a").count()):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none" or "box" in seen[-1] or "<body" in seen[-1], seen[-1]
    for what in ("send", "show-picture", "skip", "new", "search", "open-states", "import", "open-settings", "before"):
        assert any(f'"{what}"' in x for x in seen), what
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate(focused)[0] == "open-settings"
    page.focus("#menu summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#ask input")).to_be_focused()
    page.keyboard.type("A bird")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("A bird")
    expect(page.locator("#box")).to_be_focused()
    page.fill("#search", "a BIRD")
    expect(page.locator("#conversations a")).to_have_text(["A bird"])
    page.fill("#search", "no such")
    expect(page.locator("#conversations a")).to_have_count(0)


@pytest.mark.slow
def test_exported_and_imported(page, http, tmp_path):
    send(page)
    button(page, "Retry").click()
    expect(page.locator(".branches")).to_have_text(["‹2/2›"])
    finish(page)
    old = conversation_of(page, http)
    page.click("#menu summary")
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "Tell-me-a-story-about-a-dog-.json"
    download.value.save_as(tmp_path / "tree.json")
    page.set_input_files("#import-file", tmp_path / "tree.json")
    page.wait_for_function("id => location.hash && location.hash !== `#${id}`", arg=old["id"])
    new = conversation_of(page, http)
    expect(page.locator("article").last).to_have_attribute("data-id", new["leaf"])
    expect(page.locator(".branches")).to_have_text(["‹2/2›"])

    def bare(about: dict) -> list:
        places = {message["id"]: i for i, message in enumerate(about["messages"])} | {None: None}
        keys = ("role", "content", "reasoning", "model", "finish_reason", "usage")
        messages = [[places[x["parent"]], *(x[key] for key in keys)] for x in about["messages"]]
        return [about["title"], about["settings"], places[about["leaf"]], messages]

    assert bare(new) == bare(old)
    send(page, "And then?")  # whose states are gone: its text is read again
    assert len(conversation_of(page, http)["messages"]) == 5
    (tmp_path / "bad.json").write_text("{")
    page.set_input_files("#import-file", tmp_path / "bad.json")
    expect(page.locator("#list-error")).to_contain_text("this file is no exported conversation")
    page.click("#menu summary")
    page.click("#delete")
    page.click("#ask .main")
    expect(page.locator("#title")).to_have_text("New conversation")
    expect(page.locator("#box")).to_be_focused()
    assert http.get(f"/v1/conversations/{new['id']}").status_code == 404


@pytest.mark.slow
def test_states(page, http, tmp_path):
    send(page)
    button(page, "Save state").click()
    page.fill("#ask input", "page-dog")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("Saved as page-dog")
    page.click("#open-states")
    row = page.locator("#states li", has_text="page-dog")
    expect(row).to_contain_text("bundled")
    with page.expect_download() as download:
        row.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "page-dog.safetensors"
    download.value.save_as(tmp_path / "page dog.safetensors")
    page.set_input_files("#upload-file", tmp_path / "page dog.safetensors")
    assert page.input_value("#ask input") == "page-dog"
    page.fill("#ask input", "page-dog-2")
    page.keyboard.press("Enter")
    expect(page.locator("#states strong", has_text="page-dog-2")).to_be_visible()
    one, two = (State.from_bytes(http.get(f"/v1/states/page-dog{x}/content").content) for x in ("", "-2"))
    assert one.texts == two.texts
    assert all(torch.equal(x, two.to_tensors()[name]) for name, x in one.to_tensors().items())
    page.get_by_role("button", name="Begin a conversation: page-dog-2").click()
    expect(page.locator("#box")).to_be_focused()
    send(page, "And a cat?")
    assert conversation_of(page, http)["settings"]["state"] == "page-dog-2"
    page.click("#open-states")
    page.get_by_role("button", name="Delete: page-dog-2").click()
    page.click("#ask .main")
    expect(page.locator("#states strong", has_text="page-dog-2")).to_have_count(0)
    assert http.get("/v1/states/page-dog-2").status_code == 404
    http.delete("/v1/states/page-dog")


@pytest.mark.slow
def test_settings(page, http):
    page.click("#open-settings")
    page.select_option("[name=preset]", "creative")
    assert page.get_attribute("[name=temperature]", "placeholder") == "0.6"
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", "7")
    page.fill("[name=system]", "You tell stories.")
    page.fill("[name=stop]", "cat\nbird")
    page.select_option("[name=template]", "world")
    page.select_option("[name=think]", "none")
    page.get_by_role("button", name="Close the settings").click()
    send(page)
    expect(page.locator(".numbers")).to_contain_text("cut at the longest answer")
    settings = conversation_of(page, http)["settings"]
    given = {"preset": "creative", "temperature": 0, "max_tokens": 7, "system": "You tell stories."}
    given |= {"stop": ["cat", "bird"], "template": "world", "think": "none", "top_p": None}
    assert {name: settings[name] for name in given} == given
    page.click("#open-settings")
    assert page.input_value("[name=stop]") == "cat\nbird"
    page.fill("[name=top_p]", "2")
    page.press("[name=top_p]", "Tab")
    expect(page.locator("#settings .error")).to_contain_text("less than or equal to 1")
    page.fill("[name=max_tokens]", "")
    with page.expect_response(lambda reply: reply.request.method == "POST" and reply.ok):
        page.press("[name=max_tokens]", "Tab")
    expect(page.locator("#settings .error")).to_be_hidden()
    assert conversation_of(page, http)["settings"]["max_tokens"] is None


@pytest.mark.slow
def test_the_picture_of_the_state(page):
    send(page)
    canvas = page.locator("#picture canvas")
    expect(canvas).to_be_visible()
    label = canvas.get_attribute("aria-label")
    assert re.fullmatch(
        r"The model's memory: 6 layers of 3 heads after \d+ tokens; fullest: layer \d, head \d, [\d.]+", label
    )
    assert page.locator(".words").inner_text() in label
    canvas.hover(position={"x": 2, "y": 2})
    expect(page.locator(".words")).to_contain_text("layer 1, head 1: ")
    page.uncheck("#show-picture")
    expect(canvas).to_be_hidden()
    with page.expect_request("**/answers") as request:
        send(page, "And a cat?")
    assert request.value.post_data_json["picture"] is False
    expect(canvas).to_be_hidden()
    button(page, "See state").click()
    expect(canvas).to_be_visible()


@pytest.mark.slow
def test_errors_are_told_where_they_happen(page, watch, http):
    wrong = {"error": {"message": "too many requests wait; try again in 2 s"}}
    page.route("**/answers", lambda route: route.fulfill(status=429, json=wrong), times=1)
    page.fill("#box", ASK)
    page.press("#box", "Enter")
    error = page.locator("#error")
    expect(error).to_contain_text("too many requests wait; try again in 2 s")
    assert page.input_value("#box") == ASK  # nothing is lost
    page.route("**/answers", lambda route: route.abort(), times=1)
    error.get_by_role("button", name="Try again").click()
    expect(error).to_contain_text("the server cannot be reached")
    error.get_by_role("button", name="Try again").click()
    expect(page.locator("article")).to_have_count(2)
    finish(page)
    expect(error).to_be_hidden()
    assert page.input_value("#box") == ""
    cut = 'data: {"type":"content","text":"x"}\n\n'
    parent = conversation_of(page, http)["messages"][0]["id"]
    message = {"id": "msg_1", "parent": parent, "role": "assistant", "content": "", "reasoning": ""}
    begin = f"data: {json.dumps({'type': 'begin', 'message': message})}\n\n"
    page.route("**/answers", lambda route: route.fulfill(body=begin + cut, content_type="text/event-stream"), times=1)
    button(page, "Retry").click()
    expect(error).to_contain_text("the connection to the server was lost")
    error.get_by_role("button", name="Try again").click()
    finish(page)
    expect(page.locator(".branches")).to_have_text(["‹3/3›"])
    page.route("**/conversations", lambda route: route.abort(), times=1)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#list-error")).to_contain_text("the server cannot be reached")
    page.locator("#list-error button").click()
    expect(page.locator("#list-error")).to_be_hidden()
    watch.refusals.clear()


@pytest.mark.slow
def test_two_tabs_keep_what_each_writes(page, context, watch, http):
    send(page)
    other = watch.follow(context.new_page())
    other.goto(page.url)
    expect(other.locator("article")).to_have_count(2)
    for tab, text in ((page, "From the one."), (other, "From the other.")):
        tab.fill("#box", text)
    for tab in (page, other):
        tab.press("#box", "Enter")
    for tab in (page, other):
        expect(tab.locator("article")).to_have_count(4)
        finish(tab)
        expect(tab.locator(".branches")).to_have_count(1)
    assert len(conversation_of(page, http)["messages"]) == 6
    assert shown(page)[2] == "From the one."
    assert shown(other)[2] == "From the other."
    other.click("#menu summary")
    other.click("#rename")
    other.fill("#ask input", "Renamed")
    other.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Renamed")


@pytest.mark.slow
def test_an_answer_goes_on_while_another_conversation_is_shown(page, http):
    page.fill("#box", ASK)
    page.press("#box", "Enter")
    expect(page.locator("article")).to_have_count(2)
    name = page.url.partition("#")[2]
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    page.go_back()
    expect(page.locator("article")).to_have_count(2)
    finish(page)
    answer = http.get(f"/v1/conversations/{name}").json()["messages"][1]
    assert answer["finish_reason"] == "stop"
    assert shown(page)[1].split() == answer["content"].split()


@pytest.fixture
def long_conversation(http) -> str:
    """500 messages, the last with a thought."""
    messages = [
        {"id": f"m{i}", "parent": f"m{i - 1}" if i else None, "role": ("user", "assistant")[i % 2],
         "content": f"Message **{i}**\n\n- a\n- b\n\n```py\nx = {i}\n```"}
        for i in range(500)
    ]  # fmt: skip
    messages[-1]["reasoning"] = "First I think."
    body = {"object": "conversation.export", "version": 1, "conversation": {"title": "Long", "leaf": "m499"}}
    reply = http.post("/v1/conversations/import", json=body | {"messages": messages})
    assert reply.status_code == 201, reply.text
    return reply.json()["id"]


@pytest.mark.slow
def test_a_long_conversation_is_quick_and_follows_only_a_reader_at_its_end(page, long_conversation):
    page.goto(f"/#{long_conversation}")
    expect(page.locator("article")).to_have_count(500)
    at_end = """() => {
        const x = document.querySelector("#scroll");
        return x.scrollHeight - x.scrollTop - x.clientHeight < 48;
    }"""
    page.wait_for_function(at_end)
    draw = """async () => {
        const { Messages } = await import("/page/messages.js");
        const { Conversation } = await import("/page/conversation.js");
        const conversation = await Conversation.open(location.hash.slice(1));
        const root = document.querySelector("#messages");
        const messages = new Messages(root, root.parentNode, document.createElement("p"), () => {});
        const from = performance.now();
        messages.draw(conversation);
        root.getBoundingClientRect();
        const first = performance.now();
        messages.draw(conversation);
        root.getBoundingClientRect();
        return [first - from, performance.now() - first];
    }"""
    first, again = page.evaluate(draw)
    assert first < 2000
    assert again < 50
    page.reload()
    expect(page.locator("article")).to_have_count(500)
    thought = page.locator("article:last-child .thought")
    assert thought.get_attribute("open") is None  # folded
    thought.locator("summary").click()
    expect(thought).to_contain_text("First I think.")
    page.locator("#scroll").evaluate("x => { x.scrollTop = 1000; }")
    expect(page.locator("#to-end")).to_be_visible()
    place = page.locator("#scroll").evaluate("x => x.scrollTop")
    page.evaluate("""async () => {
        const root = document.querySelector("#messages");
        root.lastElementChild.append("more ".repeat(500));
        await new Promise((done) => setTimeout(done, 100));
    }""")
    assert abs(page.locator("#scroll").evaluate("x => x.scrollTop") - place) < 5
    page.click("#to-end")
    page.wait_for_function(at_end)
    expect(page.locator("#to-end")).to_be_hidden()


CONTRAST = """selectors => selectors.map((selector) => {
    const numbers = (colour) => {
        const context = new OffscreenCanvas(1, 1).getContext("2d");
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => numbers(colour).slice(0, 3).map((x) => x / 255)
        .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    const found = document.querySelector(selector);
    let behind = found;
    const paint = (x) => getComputedStyle(x).backgroundColor;
    while (behind.parentElement && numbers(paint(behind))[3] < 255) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(found).color, paint(behind)].map(light);
    return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
})"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_colours(page, http, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto("/#" + write(http, "a", "`x` [a](http://b.c)\n\n> q\n\n```\nc"))
    expect(page.locator("article")).to_have_count(2)
    names = ["#title", "#send", "#help", ".content p", ".content a", ".content code", "blockquote", ".code .head",
             "pre code", ".user .content", "footer button", "#conversations a", "#new", ".under label"]  # fmt: skip
    for name, ratio in page.evaluate(CONTRAST, names):
        assert ratio >= 4.5, name
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    level = sum(int(x) for x in re.findall(r"\d+", background)[:3]) / 3
    assert level > 200 if scheme == "light" else level < 60


@pytest.mark.slow
def test_a_narrow_screen_has_a_drawer(page, http):
    name = write(http, "a" * 300, "| a | b |\n|---|---|\n| " + "c" * 300 + " | d |\n\n```\n" + "e" * 300 + "\n```")
    page.set_viewport_size({"width": 390, "height": 780})
    page.goto(f"/#{name}")
    expect(page.locator("article")).to_have_count(2)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#scroll').scrollWidth <= 390")
    expect(page.locator("#drawer")).to_be_hidden()
    page.click("#open-drawer")
    expect(page.locator("#close-drawer")).to_be_focused()
    assert page.get_attribute("#open-drawer", "aria-expanded") == "true"
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_be_hidden()
    expect(page.locator("#box")).to_be_focused()
    page.click("#open-drawer")
    page.locator("#conversations a").first.click()
    expect(page.locator("#drawer")).to_be_hidden()
    send(page, "And then?")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390


@pytest.mark.slow
def test_everything_has_a_name(page, http):
    page.goto(f"/#{write(http, 'a', 'b')}")
    expect(page.locator("article")).to_have_count(2)
    nameless = page.evaluate(
        """() => {
            const named = (x) => x.getAttribute("aria-label") || x.labels?.length || x.textContent.trim()
                || document.getElementById(x.getAttribute("aria-labelledby"));
            const all = document.querySelectorAll("button, input, select, textarea, summary, dialog, nav, canvas");
            return [...all].filter((x) => !named(x)).map((x) => x.outerHTML);
        }"""
    )
    assert [x for x in nameless if 'class="main"' not in x] == []  # that of a question is filled with it
    assert page.locator("main").count() == page.locator("nav").count() == page.locator("header").count() == 1
    assert page.locator("#said").get_attribute("aria-live") == "polite"


@pytest.mark.slow
def test_the_key_is_asked_for(browser, start: Callable):
    server = start("--api-key", "ann=sesame", "--log-level", "warning")
    watch = Watch(server.url)
    with browser.new_context(base_url=server.url) as context:
        page = watch.follow(context.new_page())
        page.goto("/")
        expect(page.locator("#ask-title")).to_have_text("This server asks for a key")
        assert page.get_attribute("#ask input", "type") == "password"
        page.fill("#ask input", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#ask-title")).to_have_text("the API key is wrong")
        page.fill("#ask input", "sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#ask")).to_be_hidden()
        send(page)
        page.reload()
        expect(page.locator("article")).to_have_count(2)  # the tab remembers it
        assert page.evaluate("[localStorage.length, sessionStorage.getItem('key')]") == [0, "sesame"]
        assert "sesame" not in page.content()
        other = watch.follow(context.new_page())
        other.goto("/")
        expect(other.locator("#ask-title")).to_have_text("This server asks for a key")
    assert watch.problems == []
