"""Puts compiled libraries into the wheel when HERONRY_PREBUILT=1 is set; without it the wheel is the same everywhere.

One wheel serves every Python, as ctypes loads the libraries: py3-none-PLATFORM. HERONRY_PREBUILT may also name levels
(`avx2,sse4`), for a quick trial.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles every source at every level of this machine, outside of the source tree."""
        wanted = os.environ.get("HERONRY_PREBUILT", "")
        if wanted in ("", "0") or version == "editable":
            return
        sys.path.insert(0, self.root)
        from heronry import compiler  # needs nothing but the standard library

        machine = compiler.machine()
        known = compiler.levels_of(machine)
        levels = known if wanted == "1" else [level.strip() for level in wanted.split(",")]
        if not set(levels) <= set(known):
            raise ValueError(f"HERONRY_PREBUILT must be 1 or some of {','.join(known)}, got {wanted!r}")
        libraries = {(s, compiler.distinct_level(s, level)) for s in compiler.sources() for level in levels}
        self.folder = tempfile.TemporaryDirectory(prefix="heronry-kernels-")
        strip = ["-s"] if sys.platform == "linux" else []

        def build(source: Path, level: str) -> None:
            library = compiler.compile_library(source, level, Path(self.folder.name), strip)
            build_data["force_include"][str(library)] = f"heronry/_kernels/{library.name}"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: build(*library), sorted(libraries)))
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        if sys.platform == "darwin":  # what compiler.flags builds for, whatever Python was built for
            platform = f"macosx_11_0_{'arm64' if machine == 'aarch64' else machine}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Deletes what `initialize` compiled."""
        if hasattr(self, "folder"):
            self.folder.cleanup()
