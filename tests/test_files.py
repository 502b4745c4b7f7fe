"""What is checked and locked before a file is written."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from heronry import InputError
from heronry.files import check_writable, only_process

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@contextmanager
def other_process(path: Path):
    """Another process has locked this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        yield
        process.kill()


def test_only_one_process(tmp_path):
    path = tmp_path / "new" / "lock"
    with only_process(path, "busy"):
        child = os.fork()
        if child == 0:
            try:
                with only_process(path, "busy"):
                    os._exit(0)
            except InputError as error:
                os._exit(3 if str(error) == "busy" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert not path.parent.exists()
    path.parent.mkdir()
    path.touch()  # of a process that was killed
    with only_process(path, "busy"):
        pass
    assert not path.exists()


def test_two_processes_that_write_token_files(tmp_path):
    from heronry.data.tokenize_corpus import tokenize_corpus

    (tmp_path / "a.txt").write_text("hello")
    with other_process(tmp_path / "t.lock.part"):
        with pytest.raises(InputError, match="another process is writing it; wait for its end, or choose another name"):
            tokenize_corpus([str(tmp_path / "a.txt")], tmp_path / "t", "bytes")
        tokenize_corpus([str(tmp_path / "a.txt")], tmp_path / "other", "bytes")
        assert not (tmp_path / "t.bin").exists()
    tokenize_corpus([str(tmp_path / "a.txt")], tmp_path / "t", "bytes")
    assert not (tmp_path / "t.lock.part").exists()


def test_what_can_be_written(tmp_path):
    new, old = tmp_path / "a" / "new", tmp_path / "old"
    check_writable(new)
    assert not new.parent.exists()
    old.write_bytes(b"x")
    before = old.stat()
    check_writable(old)
    assert (old.read_bytes(), old.stat().st_mtime_ns) == (b"x", before.st_mtime_ns)
    for path in (old / "below", Path("/proc/nothing")):
        with pytest.raises(OSError, match=r"Not a directory|No such file") as caught:
            check_writable(path)
        assert caught.value.filename == str(path)
