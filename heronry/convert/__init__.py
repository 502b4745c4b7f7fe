"""Conversion from any format to any other, verified by comparing the logits of both files."""

from .conversion import convert
from .result import Converted
from .target_formats import FOLDERS, GRAPHS, SUFFIXES

__all__ = ["FOLDERS", "GRAPHS", "SUFFIXES", "Converted", "convert"]
