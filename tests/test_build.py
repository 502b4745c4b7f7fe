"""How C++ becomes a library: prebuilt or compiled on first use, kept, replaced when damaged, chosen by processor."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from heronry import build, compiler

try:
    compiler.find_compilers()
except OSError as error:
    pytest.skip(str(error), allow_module_level=True)

LOAD = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="LOG %(message)s", stream=sys.stdout)
from heronry import build
library = build.library(Path(sys.argv[1]))
print("answer", library and library.answer(), "torch" in sys.modules)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source that compiles in no time."""
    return write_source(tmp_path, 42)


def write_source(folder: Path, answer: int) -> Path:
    source = folder / "answer.cpp"
    source.parent.mkdir(exist_ok=True)
    source.write_text(f'#include "platform.h"\nEXPORT int answer() {{ return {answer}; }}\n')
    return source


def start(source: Path, **environment: str) -> subprocess.Popen:
    """A Python that loads `source`; what it compiles is kept beside it."""
    environment = os.environ | {"XDG_CACHE_HOME": str(source.parent / "cache")} | environment
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(source)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def kept(source: Path) -> list[Path]:
    return list((source.parent / "cache" / "heronry").iterdir())


# ---- on first use --------------------------------------------------------------------------------------------------


def test_a_source_is_compiled_once_and_without_torch(source: Path):
    out = finish(start(source))
    assert "compiling answer" in out
    assert "answer 42 False" in out
    [library] = kept(source)
    before = library.stat()
    out = finish(start(source, PATH=""))
    assert "compiling" not in out
    assert "answer 42 False" in out
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_two_processes_may_compile_at_once(source: Path):
    for process in [start(source) for _ in range(2)]:
        assert "answer 42" in finish(process)
    assert [file.suffix for file in kept(source)] == [compiler.SUFFIX]


def test_a_killed_compilation_is_never_loaded(source: Path):
    """The compiler writes half a library and waits; its caller is killed there."""
    tools = source.parent / "tools"
    tools.mkdir()
    fake = tools / "g++"
    fake.write_text(
        """#!/bin/sh
for last; do :; done
printf 'half a library' > "$last"
echo $$ > "$WAITING"
exec sleep 600
"""
    )
    fake.chmod(0o755)
    waiting = source.parent / "waiting"
    process = start(source, PATH=f"{tools}:{os.environ['PATH']}", WAITING=str(waiting))
    deadline = time.monotonic() + 120
    while not (waiting.exists() and waiting.read_text().strip()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(int(waiting.read_text()), signal.SIGKILL)
    halves = list((source.parent / "cache").rglob(f"*{compiler.SUFFIX}"))
    assert [half.read_text() for half in halves] == ["half a library"]
    out = finish(start(source))
    assert "compiling answer" in out
    assert "answer 42" in out


@pytest.mark.parametrize("share", [0, 0.5, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.9, 0.999))])
def test_a_damaged_library_is_compiled_again(source: Path, share: float):
    """Half a library would end the process when it is loaded, or later."""
    finish(start(source))
    [library] = kept(source)
    os.truncate(library, int(share * library.stat().st_size))
    out = finish(start(source))
    assert "compiling answer" in out
    assert "answer 42" in out
    assert "compiling" not in finish(start(source))


def test_a_changed_source_is_compiled_again(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = [build.library(write_source(tmp_path / str(number), number)).answer() for number in (1, 2)]
    assert answers == [1, 2]


def test_a_source_that_does_not_compile_is_a_warning(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return missing; }\n")
    with caplog.at_level(logging.WARNING, "heronry"):
        assert build.library(source) is None
        assert build.library(source) is None
    messages = [record.message for record in caplog.records if "no native broken" in record.message]
    assert len(messages) == 1
    assert "missing" in messages[0]


def test_a_broken_compiler_is_passed_over(source: Path):
    tools = source.parent / "tools"
    tools.mkdir()
    path = f"{tools}:{os.environ['PATH']}"
    broken = "#!/bin/sh\nprintf 'error: cannot execute cc1plus \\351\\n' >&2\nexit 1\n"  # not UTF-8
    for name in ("g++", "clang++", "c++"):
        (tools / name).write_text(broken)
        (tools / name).chmod(0o755)
    assert "instead (error: cannot execute cc1plus \ufffd)" in finish(start(source, PATH=path))
    (tools / "c++").unlink()
    assert "answer 42" in finish(start(source, PATH=path))


def test_without_a_compiler_there_is_a_warning(source: Path):
    out = finish(start(source, PATH=""))
    assert "no native answer, slower Python code runs instead (no C++ compiler found: install g++ or clang++)" in out
    assert "compiling" not in out
    assert "answer None" in out


def test_importing_compiles_nothing(tmp_path: Path):
    code = "import heronry.ops, heronry.models"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, check=True)
    assert not (tmp_path / "heronry").exists()


# ---- where it is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["missing home", "unusable", "full", "noexec"])
def test_without_a_cache_a_temporary_folder_is_taken(cache: str, source: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if cache == "missing home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    elif cache == "unusable":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:  # as on a disk that is full, or that nothing may run from
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        load, compile_library = build._load, compiler.compile_library

        def refuse(file: Path) -> object:
            if tmp_path / "home" in file.parents:
                raise OSError("failed to map segment")
            return load(file)

        def fill(source: Path, level: str, folder: Path) -> Path:
            if tmp_path / "home" in folder.parents:
                raise OSError("No space left on device")
            return compile_library(source, level, folder)

        monkeypatch.setattr(*((build, "_load", refuse) if cache == "noexec" else (compiler, "compile_library", fill)))
    assert build.library(source).answer() == 42
    [folder] = tmp_path.glob("heronry*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 1


def test_a_temporary_folder_that_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = build.cache_folders()[-1]
    assert folder.parent == tmp_path
    folder.mkdir()
    folder.chmod(0o777)
    assert folder not in build.cache_folders()


# ---- prebuilt ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prebuilt(source: Path, tmp_path: Path, monkeypatch) -> Path:
    """The library of `source` as a wheel holds it, on a machine without a compiler."""
    folder = tmp_path / "_kernels"
    folder.mkdir()
    library = compiler.compile_library(source, "portable", folder)
    monkeypatch.setattr(build, "PREBUILT", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return library


def test_a_prebuilt_library_needs_no_compiler(source: Path, prebuilt: Path, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, "heronry"):
        assert build.library(source).answer() == 42
    assert not caplog.records
    assert not (tmp_path / "cache").exists()


def test_a_prebuilt_library_that_is_damaged_is_compiled(source: Path, prebuilt: Path, caplog):
    os.truncate(prebuilt, prebuilt.stat().st_size // 2)
    assert build.library(source).answer() == 42
    assert "compiling answer" in caplog.text


def test_a_prebuilt_library_of_another_system_is_compiled(source: Path, prebuilt: Path, caplog):
    digest = hashlib.sha256(b"not a library").hexdigest()[: compiler.DIGITS]
    prebuilt.with_name(f"{prebuilt.name.split('.')[0]}.{digest}{compiler.SUFFIX}").write_bytes(b"not a library")
    prebuilt.unlink()
    with caplog.at_level(logging.INFO, "heronry"):
        assert build.library(source).answer() == 42
    assert f"{digest}{compiler.SUFFIX}" in caplog.text
    assert "compiling answer" in caplog.text


def test_what_is_prebuilt_is_not_compiled_ahead(source: Path, prebuilt: Path):
    assert build.compiled(source, "portable") == prebuilt


def test_a_prebuilt_library_of_another_source_is_not_taken(source: Path, prebuilt: Path):
    assert build.library(write_source(source.parent, 43)).answer() == 43


# ---- levels --------------------------------------------------------------------------------------------------------

AVX512 = {"sse4_2": True, "avx2": True, "avx512": True}


@pytest.mark.parametrize(
    ("machine", "capabilities", "best"),
    [
        ("x86_64", {}, "portable"),
        ("x86_64", {"sse4_2": True}, "sse4"),
        ("x86_64", {"sse4_2": True, "avx2": True}, "avx2"),
        ("x86_64", {"sse4_2": True, "avx2": True, "avx512_vnni": True}, "avx2"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX512 | {"avx512_vnni": True}, "avx512_vnni"),
        ("x86_64", AVX512 | {"avx512_bf16": True}, "avx512"),
        ("x86_64", AVX512 | {"avx512_vnni": True, "avx512_bf16": True}, "avx512_bf16"),
        ("aarch64", {}, "neon"),
        ("aarch64", {"dotprod": True}, "dotprod"),
        ("aarch64", AVX512, "neon"),
        ("riscv64", {"dotprod": True}, "portable"),
    ],
)
def test_the_level_follows_from_the_processor(machine: str, capabilities: dict[str, bool], best: str):
    levels = compiler.runnable_levels(machine, capabilities)
    assert levels[0] == best
    assert set(levels) <= set(compiler.levels_of(machine)) or levels == ["portable"]
    order = list(compiler.LEVELS)
    assert levels == sorted(levels, key=order.index)


def test_this_processor_runs_its_levels():
    assert set(build.levels()) <= set(compiler.LEVELS)
    assert build.best_level() == build.levels()[0]


def test_what_does_not_depend_on_the_level_is_compiled_once():
    sources = {compiler.name_of(source): source for source in compiler.sources()}
    assert {"wkv4", "wkv6", "wkv7", "biwkv", "packed", "rwkv4", "rwkv5", "rwkv6", "rwkv7"} <= set(sources)
    assert compiler.distinct_level(sources["wkv7"], "avx512_bf16") == "avx512"
    assert compiler.distinct_level(sources["wkv7"], "avx2") == "avx2"
    assert compiler.distinct_level(sources["rwkv7"], "avx512_bf16") == "avx512_bf16"


def test_every_platform_has_its_flags():
    assert "-fPIC" in compiler.flags("avx2", "linux")
    assert "-fPIC" in compiler.flags("neon", "darwin")
    assert not {"-fPIC", "-fvisibility=hidden"} & set(compiler.flags("avx2", "win32"))
    for system in ("linux", "darwin", "win32"):
        for level in compiler.LEVELS:
            assert not [flag for flag in compiler.flags(level, system) if "openmp" in flag or "fast-math" in flag]


def test_an_unknown_name_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "heronry.build", "nofoo"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("heronry: expected names out of ")
