"""Models from files and into files."""

from .identification import QUANTIZATION_KEYS, identify
from .loading import DTYPE_ALIASES, DTYPES, assemble, load, load_checkpoint, locate, parse_device, parse_dtype
from .notes import read_notes, select_notes
from .saving import check_folder_name, save
from .time_state import initial_state, read_time_state, save_time_state

__all__ = [
    "DTYPES",
    "DTYPE_ALIASES",
    "QUANTIZATION_KEYS",
    "assemble",
    "check_folder_name",
    "identify",
    "initial_state",
    "load",
    "load_checkpoint",
    "locate",
    "parse_device",
    "parse_dtype",
    "read_notes",
    "read_time_state",
    "save",
    "save_time_state",
    "select_notes",
]
