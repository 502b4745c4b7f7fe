"""A real redis-server of the test's own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


class RedisServer:
    """Listens at a port of its own and keeps what it has in a folder, through restarts."""

    def __init__(self, folder: Path):
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
        self._program, self._folder = program, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self, *options: str) -> None:
        command = [self._program, "--port", self.port, "--bind", "127.0.0.1", "--dir", self._folder]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "no", *options]
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
        for _ in range(1000):
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(100).startswith(b"+PONG"):  # not while it reads its file
                        return
            except OSError:
                pass
            time.sleep(0.01)
        raise RuntimeError("redis-server does not answer")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
