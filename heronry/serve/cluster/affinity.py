"""Which requests belong together, so that one replica answers them.

It is only a preference: any replica finds what another has kept in the store, where that costs a state's way through
the network. What one conversation needs next is in the RAM of the replica that wrote it last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

SESSION_HEADER = "x-session-id"
FIELDS = ("session_id", "conversation", "previous_response_id", "prompt_cache_key", "state")  # of bodies
PROMPTS = ("messages", "input", "prompt", "contents", "text")
BEGINNING = 1024  # characters of a prompt by which it is known


def affinity(path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> str:
    """A key that is the same for requests that belong together; "" for one that belongs to none.

    That is what the client says (the header, or a field of the body), else the response, state or conversation in the
    path, else the beginning of the prompt: of a conversation that is all up to its first question.
    """
    name = next(_names(path, headers, body), None) or _beginning(body)
    if not name:
        return ""
    owner = headers.get("authorization") or headers.get("x-api-key", "")
    return hashlib.sha256(json.dumps([owner, name]).encode()).hexdigest()[:32]


def _names(path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> Iterator[str]:
    given = [headers.get(SESSION_HEADER), *(body.get(field) for field in FIELDS)]
    for value in given:
        name = value.get("id") if isinstance(value, dict) else value
        if isinstance(name, str) and name:
            yield name
    if found := re.match(r"/v1/(?:responses|states|conversations)/([^/]+)", path):
        yield found[1]


def _beginning(body: Mapping[str, Any]) -> str:
    prompt = next((body[name] for name in PROMPTS if body.get(name)), None)
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        roles = [item.get("role") if isinstance(item, dict) else None for item in prompt]
        return json.dumps(prompt[: roles.index("user") + 1 if "user" in roles else 1])
    return json.dumps(prompt)[:BEGINNING] if prompt else ""
