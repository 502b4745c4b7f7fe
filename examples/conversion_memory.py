"""How much memory the conversion of a large checkpoint takes, and how close it is to the speed of the disk.

    python examples/conversion_memory.py --to huggingface gguf

Makes an RWKV-7 of 1.5B parameters in bfloat16 (3 GB; --layers, --width), converts it in a separate process and samples
the memory of that process every 20 ms. Private memory has no file behind it; pages mapped from the checkpoint come and
go.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from heronry.convert import FOLDERS, SUFFIXES
from heronry.models import RWKV7, RWKV7Config


def make(path: Path, layers: int, width: int) -> int:
    """A checkpoint of random weights; its size in bytes."""
    with torch.device("meta"):
        model = RWKV7(RWKV7Config.sized(65536, layers, width))
    torch.manual_seed(0)
    weights = {}
    for name, x in model.state_dict().items():
        norm = "ln" in name and name.endswith("weight")
        weights[name] = (torch.ones(x.shape) if norm else torch.randn(x.shape) * 0.02).bfloat16()
    torch.save(weights, path)
    return path.stat().st_size


def private(process: psutil.Process) -> int:
    """Bytes of the process that no file stands behind."""
    return sum(region.anonymous for region in process.memory_maps(grouped=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--to", nargs="+", default=["huggingface", "gguf", "safetensors"])
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--folder", type=Path, help="where there is room for the checkpoint and its copies")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = make(folder / "a.pth", args.layers, args.width)
        print(f"checkpoint: {size / 1e9:.2f} GB")
        began = time.perf_counter()
        with open(folder / "a.pth", "rb") as source, open(folder / "copy", "wb") as target:
            while piece := source.read(16 << 20):
                target.write(piece)
        (folder / "copy").unlink()
        print(f"copied by the piece: {time.perf_counter() - began:.1f} s")
        for to in args.to:
            assert to in (*SUFFIXES.values(), *FOLDERS)
            command = [sys.executable, "-m", "heronry", "convert", folder / "a.pth", folder / to, "--to", to]
            began, most = time.perf_counter(), 0
            child = subprocess.Popen([str(x) for x in command], stderr=subprocess.PIPE, text=True)
            watched = psutil.Process(child.pid)
            while child.poll() is None:
                try:
                    most = max(most, private(watched))
                except psutil.Error:  # it has just ended
                    break
                time.sleep(0.02)
            said = child.communicate()[1].strip().splitlines()[-1]
            print(f"{to}: {time.perf_counter() - began:.1f} s, private memory {most / 1e9:.2f} GB; {said}")


if __name__ == "__main__":
    main()
