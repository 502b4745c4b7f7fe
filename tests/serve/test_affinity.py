"""Which requests go to the same replica."""

from __future__ import annotations

import pytest

from heronry.serve.cluster.affinity import affinity

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]


def key(body: dict | None = None, path: str = "/v1/chat/completions", **headers: str) -> str:
    return affinity(path, {name.replace("_", "-"): value for name, value in headers.items()}, body or {})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (key({"messages": ASKED}), key({"messages": ANSWERED, "temperature": 0})),  # the next turn
        (key({"input": "Hello"}, x_session_id="a"), key({"messages": ANSWERED}, x_session_id="a")),
        (key({"prompt": "x" * 2000 + "y"}), key({"prompt": "x" * 2000 + "z"})),
        (key({"conversation": "c"}), key({"conversation": {"id": "c"}})),
        (key({"previous_response_id": "r", "input": "a"}), key({"previous_response_id": "r", "input": "b"})),
        (key({"state": "s", "prompt": "a"}), key(path="/v1/states/s/content")),
        (key({"conversation": "c"}), key(path="/v1/conversations/c/answers")),
    ],
)
def test_what_belongs_together(one, other):
    assert one == other != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (key({"messages": ASKED}), key({"messages": [*ASKED[:1], {"role": "user", "content": "Bye"}]})),
        (key(x_session_id="a"), key(x_session_id="b")),
        (key(x_session_id="a", authorization="Bearer ann"), key(x_session_id="a", authorization="Bearer bob")),
        (key({"prompt": [1, 2, 3]}), key({"prompt": [1, 2, 4]})),
        (key({"input": [{"role": "user", "content": "a"}]}), key({"input": [{"role": "user", "content": "b"}]})),
    ],
)
def test_what_does_not(one, other):
    assert one != other


@pytest.mark.parametrize(
    "body", [{}, {"prompt": ""}, {"messages": []}, {"state": {"data": "xx"}}, {"session_id": 7}, {"prompt": None}]
)
def test_no_matter_where(body):
    assert key(body) == ""


@pytest.mark.parametrize("body", [{"messages": [{"role": 1}]}, {"messages": [[1]]}, {"prompt": [{}, 1]}, {"input": 3}])
def test_bodies_that_the_replica_refuses(body):
    assert key(body)
