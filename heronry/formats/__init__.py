"""Every file that holds an RWKV: what it is, and its tensors under BlinkDL's names (Vision-RWKV's under its own).

One file a format, each with its table of names, both ways. Nothing here knows a model: heronry.load makes one of what
is read, `heronry convert` writes.
"""

from .reader import Checkpoint, read

__all__ = ["Checkpoint", "read"]
