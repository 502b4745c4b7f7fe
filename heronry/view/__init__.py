"""Drawings of what models compute: figures.py draws arrays, vision.py computes them from a model."""

from .figures import draw_class_maps, draw_decays, draw_q_shift, draw_receptive_fields

__all__ = ["draw_class_maps", "draw_decays", "draw_q_shift", "draw_receptive_fields"]
