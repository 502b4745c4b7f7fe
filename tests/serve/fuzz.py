"""`make soak`: schemathesis sends what the server's own OpenAPI document allows, and what it does not. No answer may be
an error of the server.

python tests/serve/fuzz.py [OPTIONS of schemathesis]
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from server_process import Process

SCHEMATHESIS = Path(__file__).parents[2] / "build" / "clients" / "bin" / "schemathesis"
CHECKS = ("--checks", "not_a_server_error", "--request-timeout", "60")

if __name__ == "__main__":
    server = Process("--log-level", "warning")
    code = subprocess.run([SCHEMATHESIS, "run", f"{server.url}/openapi.json", *CHECKS, *sys.argv[1:]]).returncode
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        assert reply.status == 200
    server.stop()
    sys.exit(code)
