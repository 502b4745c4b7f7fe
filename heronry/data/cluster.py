"""Encoding on the machines of a Ray cluster, where one is not enough.

- every source is read and encoded by one worker, many of them at once, so the texts should be in many files
- Ray Data brings the ids back in the order of the sources, and this process writes them: the same bytes as without
- all machines need heronry, and the sources and the tokenizer under the same paths
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ..cluster import connect
from ..errors import InputError
from .encoding import Encoded, Encoder, split_into_chunks
from .sources import Position, Record, Rows, Source, TemporaryError, read_records


def encode_on_cluster(
    sources: list[Source], rows: Rows, start: Position, encoder: Encoder, address: str, workers: int | None
) -> Iterator[tuple[list[Record], Encoded]]:
    """Yields the records from `start` on in chunks, in order and without their contents, each with its ids.

    Args:
        address: of the cluster: "HOST:PORT" or "ray://HOST:PORT", "auto" for the one that runs on this machine, or
            "local" for a new one of `workers` processes.
        workers: how many sources to encode at once; None: one a core.

    Raises:
        InputError: Ray is not installed or there is no cluster, or the sources are refused as in `read_records`.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise InputError("--cluster needs Ray: pip install 'heronry[cluster]'") from None
    connects = not ray.is_initialized()
    if connects:
        connect(address, num_cpus=workers)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        numbers = [{"source": number} for number in range(start.source, len(sources))]
        encode = partial(_encode_sources, sources, rows, start, encoder.arguments)
        compute = None if workers is None else ray.data.TaskPoolStrategy(workers)
        blocks = ray.data.from_items(numbers, override_num_blocks=len(numbers) or None)
        for row in blocks.map_batches(encode, batch_size=1, compute=compute).iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, InputError):
                raise result
            yield result
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise TemporaryError(f"the Ray cluster: {reason[0]}; the same command resumes") from error
    finally:
        if connects:
            ray.shutdown()


def _encode_sources(
    sources: list[Source], rows: Rows, start: Position, arguments: tuple[Any, ...], batch: dict[str, Any]
) -> Iterator[dict[str, list[bytes]]]:
    """What a worker does: yields the chunks of the sources in a batch; last, the error that ends them."""
    try:
        encoder = _encoder(*arguments)
        for number in batch["source"].tolist():
            position = start if number == start.source else Position(number)
            for chunk in split_into_chunks(read_records(sources[: number + 1], rows, position)):
                encoded = encoder(chunk)
                yield {"result": [pickle.dumps(([replace(record, content="") for record in chunk], encoded))]}
    except InputError as error:
        yield {"result": [pickle.dumps(error)]}


@cache
def _encoder(*arguments: Any) -> Encoder:
    """One for all sources that a worker gets."""
    return Encoder(*arguments)
