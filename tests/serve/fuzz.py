"""`make soak`: schemathesis sends what the server's own OpenAPI document allows, and what it does not. No answer may be
an error of the server.

python tests/serve/fuzz.py [EXAMPLES]
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from server_process import Process

server = Process("--log-level", "warning")
command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json"]
command += ["--checks", "not_a_server_error", "--max-examples", *(sys.argv[1:] or ["20"]), "--request-timeout", "60"]
code = subprocess.run(command).returncode
with urllib.request.urlopen(f"{server.url}/health") as reply:
    assert reply.status == 200
server.stop()
sys.exit(code)
