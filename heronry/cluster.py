"""The way into a Ray cluster."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from typing import Any

from .errors import InputError

PATIENCE = 10.0  # seconds until a cluster answers


def connect(address: str, **local: Any) -> None:
    """Connects this process to a cluster, until `ray.shutdown`.

    Args:
        address: "HOST:PORT" or "ray://HOST:PORT", "auto" for the cluster that runs on this machine, or "local" for a
            new one on it, which ends with the connection.
        local: options of `ray.init` for a new one.

    Raises:
        InputError: there is no cluster.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--cluster {address}: nothing answers there ({error})") from error
    import ray

    options = {"include_dashboard": False} | local if address == "local" else {}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--cluster {address}: {reason}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # where Ray has put a handler of its own
            signal.signal(signal.SIGTERM, on_terminate)
