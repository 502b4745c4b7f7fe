"""A server process: a socket, uvicorn, and one line that says where it is."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from ..errors import InputError


class _Announced(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]):
        super().__init__(config)
        self.announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; InputError where there is none to be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise InputError(f"{host}, port {port}: {reason}; choose another with --port") from error


def serve(app: ASGIApp, listening: socket.socket, drain: float, log_level: str, announce: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM; requests under way have `drain` seconds to end. announce: called once the server
    answers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("heronry.serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(log_level.upper())
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain)),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )
    gc.collect()
    gc.freeze()  # what is loaded stays: to look through it again and again would stop every stream for 0.1 s
    _Announced(config, announce).run(sockets=[listening])
