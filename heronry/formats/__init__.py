"""Every file that holds an RWKV: its format, and its tensors under BlinkDL's names (Vision-RWKV's under its own).

One file per format, each with its table of names, both ways. Nothing here depends on a model: heronry.load builds one
from what is read, heronry.convert writes.
"""

from .reader import Checkpoint, read

__all__ = ["Checkpoint", "read"]
