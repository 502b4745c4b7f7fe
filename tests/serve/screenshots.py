"""Makes the pictures of docs/chat-page.md: python tests/serve/screenshots.py"""

from __future__ import annotations

from pathlib import Path

import httpx
from browser import open_browser
from server_process import Process

FOLDER = Path(__file__).parents[2] / "docs" / "assets"
ANSWER = """An RWKV reads a text once and keeps **one matrix for each head**. For every token

1. the matrix decays, each channel at its own rate;
2. a key and a value are written into it;
3. the next token is read out of it.

```python
state = state * w + (state @ a) @ b + v @ k
```

| model | layers | its whole memory |
|---|---:|---:|
| 0.1B | 12 | 2.4 MB |
| 7.2B | 32 | 34.6 MB |
"""


def write(http: httpx.Client) -> str:
    """A conversation with branches and a thought; its id."""
    about = {"created_at": 0, "model": "g1-1.5b", "finish_reason": "stop", "tokens_per_second": 54.3}
    usage = {"prompt_tokens": 214, "cached_tokens": 192, "completion_tokens": 131}
    messages = [
        {"id": "u1", "parent": None, "role": "user", "content": "How does an RWKV remember?"},
        {"id": "a1", "parent": "u1", "role": "assistant", "content": "With a state."},
        {"id": "a2", "parent": "u1", "role": "assistant", "content": ANSWER, "reasoning": "…", "usage": usage, **about},
    ]
    conversation = {"title": "How does an RWKV remember?", "leaf": "a2"}
    body = {"object": "conversation.export", "version": 1, "conversation": conversation, "messages": messages}
    return http.post("/v1/conversations/import", json=body).raise_for_status().json()["id"]


def main() -> None:
    server = Process("--log-level", "warning")
    with open_browser() as browser, httpx.Client(base_url=server.url) as http:
        for title in ("A story about a bird", "Letters to a friend", "Names of herons"):
            http.post("/v1/conversations", json={"title": title})
        page = browser.new_page(base_url=server.url, viewport={"width": 1120, "height": 860})
        page.goto(f"/#{write(http)}")
        page.wait_for_selector("article.assistant")
        page.screenshot(path=FOLDER / "chat-page.png")
        page.emulate_media(color_scheme="dark")
        page.click("#new")
        page.fill("#box", "Tell me a story about a dog.")
        page.press("#box", "Enter")
        page.wait_for_selector(".numbers")
        page.get_by_role("button", name="Retry").click()
        page.wait_for_selector(".branches")
        page.wait_for_selector(".numbers")
        page.screenshot(path=FOLDER / "chat-page-state.png")
        page.set_viewport_size({"width": 390, "height": 760})
        page.goto(f"/#{write(http)}")
        page.wait_for_selector("article.assistant")
        page.emulate_media(color_scheme="light")
        page.locator("#scroll").evaluate("x => { x.scrollTop = 0; }")
        page.wait_for_timeout(500)  # until nothing moves any more
        page.screenshot(path=FOLDER / "chat-page-narrow.png")
    server.stop()


if __name__ == "__main__":
    main()
