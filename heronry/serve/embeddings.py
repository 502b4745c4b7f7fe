"""POST /v1/embeddings: texts as vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ..engine import requests
from ..engine.completion import TokenLogprob
from ..engine.decode_batch import Event
from ..engine.embeddings import Pooler, Pooling, embedding_size
from ..errors import InputError
from ..models import State
from .bodies import Texts, split_texts
from .errors import ApiError
from .models import ServedModel
from .server import Server, owner_of, server_of
from .stream import while_connected

router = APIRouter()
MOST_TEXTS = 2048  # as OpenAI
AT_A_TIME = 16  # of one request


class EmbeddingsBody(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="only so many of the first numbers, of unit length again")
    pooling: Pooling = Field("mean", description="mean of the outputs, or the state of the last layer")
    user: str | None = None


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingsBody, request: Request) -> dict[str, Any]:
    """Embeds texts, or lists of token ids."""
    server = server_of(request)
    model = server.models.find(body.model)
    texts = split_texts(body.input, "input")
    if len(texts) > MOST_TEXTS:
        raise ApiError(400, f"the input has {len(texts):,} texts; at most {MOST_TEXTS:,} are embedded at once", "input")
    size = embedding_size(model.embedding_model, body.pooling)
    if body.dimensions is not None and body.dimensions > size:
        raise ApiError(400, f"dimensions must be a whole number from 1 to {size}, got {body.dimensions}", "dimensions")
    encoded = [model.speaker.encode(text, begins=True) for text in texts]
    vectors = await while_connected(request, embed_all(server, model, encoded, body, owner_of(request)))
    read = sum(map(len, encoded))
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model.name,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }


def _written(vector: NDArray[np.float32], encoding: str) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


async def embed_all(
    server: Server, model: ServedModel, encoded: Sequence[Sequence[int]], body: EmbeddingsBody, owner: str
) -> list[NDArray[np.float32]]:
    room = asyncio.Semaphore(AT_A_TIME)

    async def one(tokens: Sequence[int]) -> NDArray[np.float32]:
        async with room:
            return await _Embedding(model, tokens, body, owner).run(server)

    tasks = [asyncio.ensure_future(one(tokens)) for tokens in encoded]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _Embedding:
    """One text on its way through the scheduler, which reads it as a prompt that nothing is written after."""

    def __init__(self, model: ServedModel, tokens: Sequence[int], body: EmbeddingsBody, owner: str):
        self._loop = asyncio.get_running_loop()
        self._vector: asyncio.Future[NDArray[np.float32]] = self._loop.create_future()
        self._pooler, self._dimensions = Pooler(body.pooling), body.dimensions
        begin = 0, model.speaker.start
        self._request = requests.Request(
            model.embedding_model, tokens, [], self, begin, on_outputs=self._pooler.add, owner=owner
        )

    async def run(self, server: Server) -> NDArray[np.float32]:
        server.scheduler.submit(self._request)
        try:
            return await self._vector
        finally:
            self._request.cancel()

    # On the scheduler's thread

    def on_prompt(self, state: State, _: list[TokenLogprob]) -> None:
        try:
            self._hand_over(self._vector.set_result, self._pooler.finish(state, self._dimensions))
        except InputError as error:  # of this text, not of those that were read with it
            self.on_error(error)

    def on_event(self, choice: int, event: Event) -> bool:
        return False

    def on_error(self, error: Exception) -> None:
        self._hand_over(self._vector.set_exception, error)

    def _hand_over(self, setter: Any, value: Any) -> None:
        def give() -> None:
            if not self._vector.done():
                setter(value)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(give)
