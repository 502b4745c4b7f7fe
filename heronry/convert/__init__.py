"""From any format to any other, proved by the logits of both."""

from .conversion import FOLDERS, GRAPHS, SUFFIXES, Converted, convert

__all__ = ["FOLDERS", "GRAPHS", "SUFFIXES", "Converted", "convert"]
