"""A real server process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading

import openai
import psutil


class Process:
    """`heronry serve` on a free port, with its address and what it has said."""

    def __init__(self, *options: str, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "heronry", "serve", "--port", "0", "--store", "ram", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}))
        self.lines: list[str] = []
        self.url = ""
        ready = threading.Event()

        def read() -> None:
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(r" at (http://\S+)/v1 ", line):
                    self.url = found[1]
                    ready.set()
            ready.set()

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        assert ready.wait(180)
        assert self.url, self.lines

    def resident(self) -> float:
        """MB of memory that it has now."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.reader.join(5)
        return code

    def openai(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})
